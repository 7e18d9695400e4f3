"""The transport: one socket to the gateway, that never waits and never grows.

The rest of the client knows only `send`, `receive`, `wait` and `close`; another transport would
implement these four.
"""

from __future__ import annotations

import threading
from typing import Any

import zmq

SEND_HWM = 64

# One for the process, never terminated: `term` waits for ever on a socket somebody else holds
# open, and a context that leaves scope would call it.
_contexts: list[zmq.Context[Any]] = []
_contexts_lock = threading.Lock()


def _context() -> zmq.Context[Any]:
    with _contexts_lock:
        if not _contexts:
            context: zmq.Context[Any] = zmq.Context()
            context.linger = 0
            _contexts.append(context)
        return _contexts[0]


class Link:
    """A DEALER owned by the thread that made it."""

    def __init__(self, address: str) -> None:
        """Raises zmq.ZMQError for an address that is none."""
        socket = _context().socket(zmq.DEALER)
        socket.setsockopt(zmq.IMMEDIATE, 1)  # without a peer, sends must fail, not vanish
        socket.setsockopt(zmq.SNDHWM, SEND_HWM)
        socket.setsockopt(zmq.RCVHWM, 1000)
        socket.setsockopt(zmq.RECONNECT_IVL, 100)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        socket.setsockopt(zmq.HEARTBEAT_IVL, 5000)  # shorter ones reorder messages after a stall
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 30000)
        socket.setsockopt(zmq.MAXMSGSIZE, 1 << 20)
        self._socket = socket
        try:
            socket.connect(address)
        except zmq.ZMQError:
            socket.close(0)
            raise

    def send(self, frame: bytes) -> bool:
        """False when nobody is there or the peer is slow: the caller keeps the frame."""
        try:
            self._socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def receive(self) -> list[bytes]:
        out: list[bytes] = []
        while len(out) < 1000:
            try:
                out.append(self._socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                break
        return out

    def wait(self, seconds: float) -> bool:
        """Until a message is there or the time is over."""
        return bool(self._socket.poll(int(seconds * 1000)))

    def close(self) -> None:
        self._socket.close(0)
