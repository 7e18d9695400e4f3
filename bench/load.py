"""Many ranks in one process: `python -m bench.load JSON`, as fast as the gateway can be fed.

Each stream is a real `ClientSession` over its own DEALER socket; only the rows are made beforehand
and shared. Every stream sends one frame, then every stream the next, as ranks in step do.
"""

from __future__ import annotations

import json
import random
import sys
import time
from typing import Any

import zmq

from rank_client.link import SEND_HWM
from rank_client.sender import Carrier, new_stream_id
from rank_client.wire.records import Schema
from rank_client.wire.session import ClientSession

from . import records

RECEIVE_EACH = 8  #: an empty receive costs this process more than a frame costs the gateway


class Rows:
    """A `Source` of rows made beforehand; `last` is moved on by `frame` rows at a time."""

    first_kept = 1

    def __init__(self, schema: Schema, rows: bytes, frame: int) -> None:
        self.last = 0
        self._head, self._rows = schema.pack(1), rows
        self._size, self._frame = schema.row_bytes, frame

    def read(self, first: int, max_bytes: int) -> tuple[int, bytes]:
        n = min(self._frame, self.last - first + 1)
        data = self._rows[(first - 1) * self._size : (first - 1 + n) * self._size]
        return n, self._head + data if first == 1 else data


class Socket:
    """A `Link` that shares its context: a thousand contexts would be two thousand threads."""

    def __init__(self, context: zmq.Context[Any], address: str) -> None:
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._socket.setsockopt(zmq.SNDHWM, SEND_HWM)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(address)
        self._turn = 0

    def send(self, frame: bytes) -> bool:
        try:
            self._socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def receive(self) -> list[bytes]:
        self._turn += 1
        out: list[bytes] = []
        while self._turn % RECEIVE_EACH == 0:
            try:
                out.append(self._socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                break
        return out


class Stream:
    def __init__(self, context: zmq.Context[Any], config: dict[str, Any], rank: int, rows: bytes):
        schema = records.schema(config["keys"])
        self.source = Rows(schema, rows, config["frame"])
        hello = {"kind": "live", "run": "bench", "rank": rank, "world_size": config["streams"]}
        self.session = ClientSession(new_stream_id(), lambda: hello, self.source, random.random)
        self.carrier = Carrier(self.session, Socket(context, config["address"]))  # type: ignore[arg-type]

    def step(self) -> None:
        self.carrier.step(time.monotonic())


def step_until(streams: list[Stream], done: Any) -> None:
    """Step those that are not done, until none is left."""
    while streams := [s for s in streams if not done(s)]:
        for stream in streams:
            stream.step()
        time.sleep(0.0005)


def push(streams: list[Stream], rows: int, frame: int) -> None:
    """All rows of all streams, frame by frame; returns when the last is acknowledged."""
    for last in range(frame, rows + frame, frame):
        for stream in streams:
            stream.source.last = min(last, rows)
            stream.step()
    step_until(streams, lambda s: s.session.durable >= rows)


def main() -> None:
    config = json.loads(sys.argv[1])
    context: zmq.Context[Any] = zmq.Context()
    context.set(zmq.MAX_SOCKETS, 65535)
    rows = records.rows(config["rows"], config["keys"])
    streams = [Stream(context, config, rank, rows) for rank in range(config["streams"])]
    step_until(streams, lambda s: s.session.state == "open")
    print(json.dumps("ready"), flush=True)
    sys.stdin.readline()
    started, cpu = time.monotonic(), time.process_time()
    push(streams, config["rows"], config["frame"])
    result = {"started": started, "acked": time.monotonic(), "cpu_s": time.process_time() - cpu}
    result["resent"] = sum(s.session.resent_total for s in streams)
    print(json.dumps(result), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
