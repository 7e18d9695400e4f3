"""A peer on the cluster's network connects, with bytes of its own or with a wrong key."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

from gateway import app
from gateway.config import GatewayConfig
from gateway.errors import BadConfig
from gateway.ingest import admission, sockets
from gateway.ingest.admission import AllowList, Guarded, Unguarded, server_public
from rank_client.link import Link
from rank_client.wire import frames
from rank_client.wire.frames import Type
from rank_client.wire.keys import ANY_RUN, Key

from .row import Row, nothing, refused, without

KEY = Key(b"k" * 32)
HELLO = frames.control(Type.HELLO, 0, b"h" * 16, {"v": [1, 1], "run": "r", "kind": "live"})
DEADLINE_SECONDS = 30.0

#: ZMTP 1.0: an empty identity, then one frame
ZMTP_1 = b"\1\0" + bytes([len(HELLO) + 1, 0]) + HELLO
#: ZMTP 3.1 without encryption: greeting and READY as a DEALER; when both were answered, one frame
_READY = b"\5READY\x0bSocket-Type\0\0\0\6DEALER"
ZMTP_3 = (
    b"\xff\0\0\0\0\0\0\0\1\x7f\3\1" + b"NULL".ljust(20, b"\0") + bytes(32)
    + b"\4" + bytes([len(_READY)]) + _READY
)  # fmt: skip
FRAME = b"\0" + bytes([len(HELLO)]) + HELLO
GREETING_BYTES = 64


class Raw:
    """A tcp connection that says its bytes, `more` after a whole greeting and something else, and
    then waits to be thrown out."""

    def __init__(self, address: str, said: bytes, more: bytes = b"") -> None:
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        self._socket = socket.create_connection((host, int(port)), 5)
        self._socket.sendall(said)
        self._socket.setblocking(False)
        self._more, self._heard_bytes = more, 0

    def refused(self) -> bool:
        try:
            while heard := self._socket.recv(4096):
                self._heard_bytes += len(heard)
                if self._heard_bytes > GREETING_BYTES and self._more:
                    self._socket.sendall(self._more)
                    self._more = b""
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def close(self) -> None:
        self._socket.close()


class Client(Link):
    """A ZeroMQ client that sends a HELLO as soon as it is let in."""

    def __init__(self, address: str, key: Key | None) -> None:
        super().__init__(address, key, watched=True)

    def refused(self) -> bool:
        self.send(HELLO)
        return super().refused()


def arrived(root: Path, guest: Callable[[str], Any]) -> list[bytes]:
    """The first message that a guest gets through to the gateway; none once it is refused."""
    guarded = Guarded(sockets.bind([]), KEY, root)
    guarded.router.bind("tcp://127.0.0.1:*")
    knocking = guest(guarded.router.get_string(zmq.LAST_ENDPOINT))
    deadline = time.monotonic() + DEADLINE_SECONDS
    try:
        while time.monotonic() < deadline:
            guarded.gatekeeper.answer()
            out = knocking.refused()
            if guarded.router.poll(5):
                return guarded.router.recv_multipart()
            if out:
                return []
        raise TimeoutError("neither let in nor refused")
    finally:
        knocking.close()
        guarded.router.context.destroy(0)


def silent(guest: Callable[[str], Any]) -> Callable[[Path], None]:
    def check(root: Path) -> None:
        assert arrived(root, guest) == []

    return check


class Open:
    """Guarded, without its lock: no CURVE, no question asked."""

    def __init__(self, router: Any, key: Key, directory: Path) -> None:
        self.router, self.key = router, key
        self.gatekeeper = admission.Gatekeeper(router.context, lambda _: ANY_RUN)


def plain(patch: Any) -> None:
    patch.setattr(Guarded, "__init__", Open.__init__)


def self_test_finds_it(root: Path) -> None:
    """A door whose encryption is gone is not served."""
    router = sockets.bind([])
    router.bind("tcp://127.0.0.1:*")
    door: Any = Open(router, KEY, root)
    try:
        address = router.get_string(zmq.LAST_ENDPOINT)
        assert refused(lambda: admission.self_test(door, address), Unguarded)
    finally:
        router.context.destroy(0)


def no_wide_bind(root: Path) -> None:
    """Nobody listens on every network, and on none unless asked to."""
    assert GatewayConfig().bind == "ipc"
    assert [a[:6] for a in app.addresses(root, "ipc", False, "10.0.0.1")] == ["ipc://"]
    for wide in ("tcp://*:5717", "tcp://0.0.0.0:5717", "tcp://[::]:5717"):
        assert refused(lambda wide=wide: app.addresses(root, wide, False, ""), BadConfig), wide


STRANGER = Key(b"x" * 32)
FORGED = Key(b"x" * 32, server=server_public(KEY))
ANYBODY = without(AllowList, "run_of", lambda *_: ANY_RUN)
THREAT = "a peer on the network"

ROWS = [
    Row(THREAT, "old ZMTP is refused", silent(lambda a: Raw(a, ZMTP_1)), plain),
    Row(THREAT, "plain ZMTP bytes are refused", silent(lambda a: Raw(a, ZMTP_3, FRAME)), plain),
    Row(THREAT, "a client without a key is refused", silent(lambda a: Client(a, None)), plain),
    Row(THREAT, "another secret is refused", silent(lambda a: Client(a, FORGED)), ANYBODY),
    Row(
        THREAT,
        "no encryption, no service",
        self_test_finds_it,
        without(admission, "self_test", nothing),
    ),
    Row(THREAT, "no wide bind", no_wide_bind, without(app, "_WILDCARDS", ())),
]
