"""Raw TCP connections to a real gateway: noise, half greetings, old protocols, silence, garbage.

Beside them one good rank sends a row at a time and measures how long its acknowledgement takes.
"""

from __future__ import annotations

import multiprocessing
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from gateway.rules.follow import rebuild
from rank_client.link import Link
from rank_client.wire.keys import SECRET_BYTES, Key, write_keyfile
from rank_client.wire.session import ClientSession
from tests.flow.job import Job, wait_until

from .fuzz_frames import Source, resident_kib

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + b"\x00" + bytes(31)
READY = b"\x04\x26\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x00"
OPEN_AT_ONCE = 200  #: raw connections of one attacker that are held at a time
PAUSE_SECONDS = 0.005  #: between two rows of the good rank
ANSWER_SECONDS = 60.0
WARM = 0.2  #: of the connections, before memory is measured first
STREAM = b"good" * 4


def payload(random: Random) -> bytes:
    """What one raw connection says."""
    dice = random.randrange(9)
    if dice == 0:
        return b""
    if dice == 1:
        return random.randbytes(random.randrange(1, 300))
    if dice == 2:
        return GREETING[: random.randrange(1, len(GREETING))]
    if dice == 3:  # ZMTP/1.0: a short identity, then messages
        return b"\x01\x00" + _short(random.randbytes(20)) * 3
    if dice == 4:
        return GREETING + random.randbytes(random.randrange(100))
    if dice == 5:
        return GREETING + READY + b"\x02" + b"\xff" * 8
    if dice == 6:
        return (
            GREETING
            + READY
            + b"".join(_part(random.randbytes(random.randrange(100)), more=i < 5) for i in range(6))
        )
    if dice == 7:
        return GREETING + READY + _part(b"RG\x01\x01" + random.randbytes(60), more=False)
    return b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


def _short(data: bytes) -> bytes:
    return bytes([len(data) + 1, 0]) + data


def _part(data: bytes, more: bool) -> bytes:
    return bytes([int(more), len(data)]) + data


def attack(seed: int, port: int, n: int, done: Any) -> None:
    """Open so many raw connections; `done` counts them."""
    random = Random(f"connections {seed}")
    held: list[socket.socket] = []
    for i in range(n):
        raw = socket.socket()
        raw.settimeout(5)
        # Closed with a reset: two hundred thousand sockets in TIME_WAIT would use up all ports.
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        try:
            raw.connect(("127.0.0.1", port))
            raw.sendall(payload(random))
        except OSError:
            pass  # refused, reset: its affair
        held.append(raw)
        if len(held) > OPEN_AT_ONCE:
            held.pop(random.randrange(len(held))).close()
        if i % 100 == 99:
            with done.get_lock():
                done.value += 100
    with done.get_lock():
        done.value += n % 100


class GoodRank:
    """A rank without spool; `round_trip` sends a row and waits until it is on disk."""

    def __init__(self, address: str, key: Key | None) -> None:
        self.source = Source()
        self._link = Link(address, key)
        hello = {"run": "r1", "kind": "live", "rank": 0, "world_size": 1, "launch": "l"}
        self.session = ClientSession(STREAM, lambda: hello, self.source, Random(0).random)
        self.source.row()
        self._until(lambda: self.session.idle)

    def _until(self, condition: Any) -> float:
        began = time.monotonic()
        while True:
            now = time.monotonic()
            for frame in self.session.tick(now):
                self._link.send(frame)
            if condition():
                return now - began
            assert now - began < ANSWER_SECONDS, "no answer"
            if self._link.wait(0.02):
                for frame in self._link.receive():
                    self.session.receive(time.monotonic(), frame)

    def round_trip(self) -> float:
        self.source.row()
        return self._until(lambda: self.session.idle)

    def finish(self) -> None:
        self.session.end({"status": "completed"})
        self._until(lambda: self.session.state == "closed")
        self._link.close()


def fuzz(seed: int, n: int, folder: Path, keyed: bool) -> dict[str, Any]:
    """Figures; `broken` says what did not hold. With `keyed` the gateway is for those with a key,
    which the raw connections do not have."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(mode=0o700)
    address = f"tcp://127.0.0.1:{port}"
    key, options = None, ["--insecure"]
    if keyed:
        path = folder / "gateway.key"
        key, options = Key(Random(seed).randbytes(SECRET_BYTES)), ["--keyfile", str(path)]
        write_keyfile(path, key)
    with Job(folder) as job:
        serving = job.serve("--bind", address, *options)
        ingest = wait_until(lambda: job.child("ingest"), what="ingest")
        rank = GoodRank(address, key)
        calm = sorted(rank.round_trip() for _ in range(200))
        done = multiprocessing.Value("q", 0)
        attacker = multiprocessing.Process(target=attack, args=(seed, port, n, done))
        attacker.start()
        took: list[float] = []
        warm_kib = 0
        while attacker.is_alive():
            took.append(rank.round_trip())
            time.sleep(PAUSE_SECONDS)
            if not warm_kib and done.value >= WARM * n:
                warm_kib = resident_kib(ingest)
        attacker.join()
        broken = []
        end_kib = resident_kib(ingest)
        total = rank.source.last
        rank.finish()
        if job.child("ingest") != ingest or serving.poll() is not None:
            broken.append("the gateway died")
        job.stop_gateway(15)
        broken += _books(job, total)
    took.sort()
    figures = {
        "connections": done.value,
        "rows": total,
        "ack_p50_ms": _ms(took, 0.5),
        "ack_p99_ms": _ms(took, 0.99),
        "ack_calm_p99_ms": _ms(calm, 0.99),
        "ingest_warm_kib": warm_kib,
        "ingest_end_kib": end_kib,
    }
    return {**figures, "broken": broken}


def _ms(took: list[float], part: float) -> float:
    return round(took[min(len(took) - 1, int(len(took) * part))] * 1000, 2) if took else 0.0


def _books(job: Job, total: int) -> Iterator[str]:
    """What is in the run is what the good rank logged, and no run is there beside it."""
    if (runs := sorted(p.name for p in (job.data / "runs").iterdir())) != ["r1"]:
        yield f"runs that nobody began: {runs}"
    rebuild(job.data / "runs" / "r1")
    with job.reader() as reader:
        points = reader.points("a")
        if points.step.tolist() != list(range(1, total + 1)):
            yield f"{len(points.step)} of {total} rows of the good rank"
        if len(reader.streams()) != 1 or reader.quarantine():
            yield f"junk: {len(reader.streams())} streams, {reader.quarantine()[:3]}"
    job.assert_accounted()
