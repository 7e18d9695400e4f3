"""The transport: one socket to the gateway, that never waits and never grows.

The rest of the client knows only `send`, `receive`, `wait` and `close`; another transport would
implement these four.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import zmq
from zmq.utils import z85

from .rendezvous import address_trouble
from .wire.keys import Key, key_of

SEND_HWM = 64
SPARE_DESCRIPTORS = 16  #: twice what a process's first socket, its threads and pipes take
HANDSHAKE_TRIES = 3  #: one may fail because the gateway is just being restarted
LET_IN = zmq.EVENT_HANDSHAKE_SUCCEEDED
HUNG_UP = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL  #: another key than ours, or no gateway at all
REFUSED = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
_EVENTS, _READABLE = int(zmq.EVENTS), int(zmq.POLLIN)

# One for each process, never terminated: `term` waits for ever on a socket somebody else holds
# open, and a context that leaves scope would call it. By process, as a forked child inherits its
# parent's without the thread that does its work; without a lock, as it would inherit that too.
_contexts: dict[int, zmq.Context[Any]] = {}


def _context() -> zmq.Context[Any]:
    pid = os.getpid()
    found = _contexts.get(pid)
    if found is None:
        _spare_descriptors()
        made: zmq.Context[Any] = zmq.Context()
        made.linger = 0
        made.socket(zmq.PAIR).close()  # its threads begin now, while there is room for them
        found = _contexts.setdefault(pid, made)
        if found is not made:  # another thread was faster
            made.term()
    return found


def _spare_descriptors() -> None:
    """Raises OSError where the process has too few left: libzmq's threads would abort it."""
    opened: list[int] = []
    try:
        while len(opened) < SPARE_DESCRIPTORS:
            opened.append(os.eventfd(0, os.EFD_CLOEXEC))
    finally:
        for fd in opened:
            os.close(fd)


def connect(address: str, environ: Mapping[str, str]) -> Link:
    """A link; over a network with the environment's key, and with `refused` to be asked.

    Raises BadKey for a key that cannot be used (never connects without it), zmq.ZMQError, OSError
    where the process has too few descriptors left.
    """
    if not address.startswith("tcp://"):
        return Link(address)
    return Link(address, key_of(environ), watched=True)


class Link:
    """A DEALER owned by the thread that made it."""

    def __init__(self, address: str, key: Key | None = None, *, watched: bool = False) -> None:
        """Encrypted with a key, plain without one. `watched`: `refused` tells of handshakes that
        fail, and whoever wants this must go on asking: events that nobody takes would one day
        block the transport's own thread. Raises zmq.ZMQError for an address that is none, OSError
        where the process has too few descriptors left."""
        self.near = address.startswith("ipc://")  #: the gateway sees this node's files
        if trouble := address_trouble(address):
            raise zmq.ZMQError(zmq.EINVAL, trouble)
        try:
            socket = _context().socket(zmq.DEALER)
        except zmq.ZMQError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0)) from None
        socket.setsockopt(zmq.IMMEDIATE, 1)  # without a peer, sends must fail, not vanish
        socket.setsockopt(zmq.SNDHWM, SEND_HWM)
        socket.setsockopt(zmq.RCVHWM, 1000)
        socket.setsockopt(zmq.RECONNECT_IVL, 100)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        socket.setsockopt(zmq.HEARTBEAT_IVL, 5000)  # shorter ones reorder messages after a stall
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 30000)
        socket.setsockopt(zmq.MAXMSGSIZE, 1 << 20)
        self._socket = socket
        self._monitor: zmq.Socket[bytes] | None = None
        self._hung_up = 0
        try:
            if key is not None:
                _encrypt(socket, key)
            if "[" in address:
                socket.setsockopt(zmq.IPV6, 1)
            if watched:  # before we connect: a refusal that came first would never be told
                self._monitor = socket.get_monitor_socket(LET_IN | HUNG_UP | REFUSED)
            socket.connect(address)
        except zmq.ZMQError:
            self.close()
            raise

    def refused(self) -> bool:
        """True when the other side will not have us: close this link and make another later.

        After some refusals libzmq never connects again by itself, and then a key that is put
        right would not help.
        """
        if self._monitor is None:
            return False
        while self._monitor.poll(0):
            event = int.from_bytes(self._monitor.recv_multipart(zmq.NOBLOCK)[0][:2], "little")
            if event == LET_IN:
                self._hung_up = 0
            else:
                self._hung_up += 1 if event == HUNG_UP else HANDSHAKE_TRIES
        return self._hung_up >= HANDSHAKE_TRIES

    def send(self, frame: bytes) -> bool:
        """False when nobody is there or the peer is slow: the caller keeps the frame."""
        try:
            self._socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def receive(self) -> list[bytes]:
        out: list[bytes] = []
        while len(out) < 1000 and self._socket.get(_EVENTS) & _READABLE:  # an exception costs more
            out.append(self._socket.recv(zmq.NOBLOCK))
        return out

    def wait(self, seconds: float) -> bool:
        """Until a message is there or the time is over."""
        return bool(self._socket.poll(int(seconds * 1000)))

    def close(self) -> None:
        if self._monitor is not None:
            self._socket.disable_monitor()
            self._monitor.close(0)
            self._monitor = None
        self._socket.close(0)


def _encrypt(socket: zmq.Socket[bytes], key: Key) -> None:
    secret = z85.encode(key.client_secret())
    socket.curve_secretkey = secret
    socket.curve_publickey = zmq.curve_public(secret)
    server = key.server.encode() or zmq.curve_public(z85.encode(key.server_secret()))
    socket.curve_serverkey = server
