"""A TCP proxy between one rank and the gateway that behaves as badly as networks do.

A `Door` listens; `play` runs a seeded schedule of faults, `heal` makes all as it should be.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from dataclasses import dataclass
from typing import NamedTuple

CHUNK_BYTES = 1 << 16
FAULTS = (
    "cut", "reset", "stall", "hole", "half-open client", "half-open gateway", "dribble", "delay",
    "reset mid-frame", "refuse", "reset greeting",
)  # fmt: skip
NO_WAITING = struct.pack("ii", 1, 0)  #: SO_LINGER: close with a reset


class Step(NamedTuple):
    """One fault: after `wait_seconds`, for `seconds`, or at byte `at_byte`."""

    wait_seconds: float
    fault: str
    seconds: float
    at_byte: int


def schedule(rng: random.Random) -> list[Step]:
    """One to five faults. Their order and measure follow from the seed alone."""
    return [
        Step(
            wait_seconds=rng.expovariate(1 / 0.25),
            fault=rng.choice(FAULTS),
            seconds=min(3.0, rng.expovariate(1 / 0.5)),
            at_byte=int(rng.choice((10, 64, 300, 5000)) * rng.random()),
        )
        for _ in range(rng.randint(1, 5))
    ]


@dataclass(eq=False)
class Passage:
    """One connection: what comes from the rank goes to the gateway, and back."""

    rank: asyncio.StreamWriter
    gateway: asyncio.StreamWriter | None = None
    swallowing: bool = False  #: takes what comes, and passes nothing on
    is_reset: bool = False

    def close(self) -> None:
        for writer in (self.rank, self.gateway):
            if writer is not None:
                writer.close()

    def reset(self) -> None:
        self.is_reset = True
        reset(self.rank)
        if self.gateway is not None:
            reset(self.gateway)


def reset(writer: asyncio.StreamWriter) -> None:
    made = writer.get_extra_info("socket")
    if made is not None and made.fileno() >= 0:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_WAITING)
    writer.transport.abort()


class Door:
    """Listens on `port` of 127.0.0.1 for one rank; the gateway is at `target`."""

    def __init__(self, target: int) -> None:
        self.port = 0
        self._target = target
        self._server: asyncio.Server | None = None
        self._passages: set[Passage] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._hole = False
        self._delay_seconds = 0.0
        self._dribble_bytes = 0
        self._reset_after: int | None = None  #: bytes until every passage is reset
        self._greeting_bytes: int | None = None  #: a new connection is reset after so many

    async def open(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._enter, "127.0.0.1", self.port)
            self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Listen no more, and reset what is open."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for passage in list(self._passages):
            passage.reset()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- faults --------------------------------------------------------------

    async def play(self, steps: list[Step]) -> None:
        for step in steps:
            await asyncio.sleep(step.wait_seconds)
            await self._do(step)

    async def _do(self, step: Step) -> None:
        """Faults of what is open now here, of the road as a whole in `_change`."""
        passages = list(self._passages)
        if step.fault == "cut":
            for passage in passages:
                passage.close()
        elif step.fault == "reset":
            for passage in passages:
                passage.reset()
        elif step.fault.startswith("half-open"):
            for passage in passages:
                self._half_open(passage, step.fault)
        elif step.fault == "refuse":
            await self.close()
            await asyncio.sleep(step.seconds)
            await self.open()
        else:
            await self._change(step, passages)

    async def _change(self, step: Step, passages: list[Passage]) -> None:
        if step.fault == "stall":
            self._flowing.clear()
            await asyncio.sleep(step.seconds)
            self._flowing.set()
        elif step.fault == "hole":
            self._hole = True
            for passage in passages:
                passage.swallowing = True
            await asyncio.sleep(step.seconds)
        elif step.fault == "dribble":
            self._dribble_bytes = 20 * step.at_byte
        elif step.fault == "delay":
            self._delay_seconds = step.seconds / 5
        elif step.fault == "reset mid-frame":
            self._reset_after = step.at_byte
        elif step.fault == "reset greeting":
            self._greeting_bytes = step.at_byte
            for passage in passages:
                passage.close()
            await asyncio.sleep(step.seconds)
            self._greeting_bytes = None

    @staticmethod
    def _half_open(passage: Passage, which: str) -> None:
        """One side is gone and the other is never told."""
        passage.swallowing = True
        if which == "half-open client":
            reset(passage.rank)
        elif passage.gateway is not None:
            reset(passage.gateway)

    async def heal(self, notice: bool) -> None:
        """From now on all flows. A connection that was swallowed is reset, or (`notice` False)
        stays as it is and nobody is told."""
        self._hole = False
        self._delay_seconds, self._dribble_bytes = 0.0, 0
        self._reset_after = self._greeting_bytes = None
        self._flowing.set()
        if notice:
            for passage in list(self._passages):
                if passage.swallowing:
                    passage.reset()
        await self.open()

    # --- connections ---------------------------------------------------------

    def _enter(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None:
            reset(writer)  # it was accepted just before the door was closed
            return
        passage = Passage(writer)
        self._passages.add(passage)  # here, as `close` waits for the task, which has not begun
        task = asyncio.ensure_future(self._pass(reader, passage))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pass(self, reader: asyncio.StreamReader, passage: Passage) -> None:
        try:
            if self._hole:
                passage.swallowing = True
                while await reader.read(CHUNK_BYTES):
                    pass
                return
            back, passage.gateway = await asyncio.open_connection("127.0.0.1", self._target)
            if passage.is_reset:
                passage.reset()  # while the other half was not there yet
            there = self._carry(reader, passage.gateway, passage)
            await asyncio.gather(there, self._carry(back, passage.rank, passage))
        except OSError:
            passage.reset()
        finally:
            passage.close()
            self._passages.discard(passage)

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, passage: Passage
    ) -> None:
        greeting = self._greeting_bytes
        while data := await self._read(reader):
            await self._flowing.wait()
            if self._delay_seconds:
                await asyncio.sleep(self._delay_seconds)
            if passage.swallowing:
                continue
            cut = greeting if greeting is not None else self._reset_after
            if cut is not None and len(data) >= cut:
                writer.write(data[:cut])
                await writer.drain()
                self._reset_after = None
                passage.reset()
                return
            if greeting is not None:
                greeting -= len(data)
            await self._write(writer, data)
        if not passage.swallowing:
            writer.close()

    @staticmethod
    async def _read(reader: asyncio.StreamReader) -> bytes:
        try:
            return await reader.read(CHUNK_BYTES)
        except OSError:
            return b""

    async def _write(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        single = data[: self._dribble_bytes]
        self._dribble_bytes -= len(single)
        for at in range(len(single)):
            writer.write(single[at : at + 1])
            await writer.drain()
            await asyncio.sleep(0)  # each on its way alone
        if len(single) < len(data):
            writer.write(data[len(single) :])
            await writer.drain()
