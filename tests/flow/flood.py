"""Peers that send as fast as they can and read no answer, whatever credit they are given.

Usage: python flood.py ADDRESS PEERS FRAMES; ends when its stdin does, and prints how many it sent.
FRAMES: in_order (all is stored) | out_of_order (never stored, refused each time) | no_frame
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

sys.path.insert(0, str(Path(__file__).parents[2]))

from rank_client.wire import frames
from rank_client.wire.frames import Type
from rank_client.wire.records import Kind, pack

BODY = bytes(8 << 10)
FAR = 10**6
BIG = pack(Kind.TEXT, FAR, bytes(60 << 10))


def in_order(session: int, stream: bytes, n: int) -> bytes:
    return frames.data(session, stream, n, 1, pack(Kind.TEXT, n, BODY))


def out_of_order(session: int, stream: bytes, n: int) -> bytes:
    return frames.data(session, stream, FAR, 1, BIG)


def no_frame(session: int, stream: bytes, n: int) -> bytes:
    return b"GET / HTTP/1.1\r\n" * 8


FRAMES: dict[str, Callable[[int, bytes, int], bytes]] = {
    f.__name__: f for f in (in_order, out_of_order, no_frame)
}


class Flooder(threading.Thread):
    def __init__(self, context: zmq.Context[Any], address: str, name: str) -> None:
        super().__init__(daemon=True)
        self.sent = 0
        self._frame_of = FRAMES[name]
        self._stream = os.urandom(16)
        self._socket = context.socket(zmq.DEALER)
        self._socket.connect(address)
        hello = {"v": [1, 1], "run": "flood", "kind": "live", "first": 1, "nonce": b"x"}
        self._socket.send(frames.control(Type.HELLO, 0, self._stream, hello))
        self._session = frames.read_control(self._socket.recv()).session

    def run(self) -> None:
        while True:
            self._socket.send(self._frame_of(self._session, self._stream, self.sent + 1))
            self.sent += 1


def main() -> None:
    address, peers, name = sys.argv[1:]
    context: zmq.Context[Any] = zmq.Context()
    flooders = [Flooder(context, address, name) for _ in range(int(peers))]
    for flooder in flooders:
        flooder.start()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.read()
    sys.stdout.write(f"{sum(f.sent for f in flooders)}\n")
    sys.stdout.flush()
    os._exit(0)  # the threads are in the middle of it


if __name__ == "__main__":
    main()
