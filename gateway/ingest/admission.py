"""Who may speak over the network: CURVE with an allow-list, on a ROUTER of its own.

A peer whose key is not known never gets a message to us. A known key may be bound to one run, and
then opens no other. All on ingest's thread: libzmq asks us (ZAP) about each new connection.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import zmq
from zmq.utils import z85

from rank_client.wire import frames
from rank_client.wire.frames import BadFrame, Code, Type
from rank_client.wire.keys import ANY_RUN, BadKey, Key, read_keyfile

from .peers import Peers

ZAP_ADDRESS = "inproc://zeromq.zap.01"
ZAP_DOMAIN = b"rankgate"
PEER_PREFIX = b"t"  #: of our peers' names; libzmq's own begin with a zero byte
KEYS_DIR = "keys"  #: in the data directory: the keys of single runs
REREAD_SECONDS = 1.0  #: at most so often an unknown key makes us look for new keyfiles
SAY_SECONDS = 60.0
SELF_TEST_SECONDS = 10.0  #: takes 10 ms; the rest is for a machine that is very busy
_STREAM = slice(16, 32)  #: where a frame's head names its stream

log = logging.getLogger("rankgate.ingest")


class Unguarded(Exception):
    """The self-test found that a connection is not handled as it must be."""


def server_public(key: Key) -> str:
    """The gateway's public key, in Z85."""
    return zmq.curve_public(z85.encode(key.server_secret())).decode()


class AllowList:
    """Public key → the run it is bound to: of the gateway's key, and of the files in a directory
    which `rankgate keys new --run` writes. A new file counts at once, a removed one for new
    connections."""

    def __init__(self, key: Key, directory: Path, clock: Callable[[], float]) -> None:
        self._key = key
        self._directory = directory
        self._clock = clock
        self._runs: dict[bytes, str] = {}
        self._read_at = 0.0
        self._read()

    def run_of(self, public: bytes) -> str | None:
        """None for a key that is not ours."""
        if self._clock() - self._read_at > REREAD_SECONDS:
            self._read()
        return self._runs.get(public)

    def _read(self) -> None:
        self._read_at = self._clock()
        keys = [self._key]
        for path in sorted(self._directory.glob("*.key")):
            try:
                keys.append(read_keyfile(path))
            except BadKey as error:
                log.error("%s", error)
        self._runs = {_client_public(key): key.run for key in keys}


def _client_public(key: Key) -> bytes:
    public: bytes = z85.decode(zmq.curve_public(z85.encode(key.client_secret())))
    return public


class Gatekeeper:
    """Answers libzmq's question about each new connection: 200 and the key's run, or 400."""

    def __init__(self, context: zmq.Context[Any], run_of: Callable[[bytes], str | None]) -> None:
        self.socket: zmq.Socket[bytes] = context.socket(zmq.REP)
        self.socket.bind(ZAP_ADDRESS)
        self.refused = 0
        self._run_of = run_of
        self._said_at = -SAY_SECONDS

    def answer(self) -> None:
        """All questions that wait."""
        while True:
            try:
                parts = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            run = self._admit(parts)
            code, text = (b"400", b"unknown key") if run is None else (b"200", b"OK")
            number = parts[1] if len(parts) > 1 else b""
            self.socket.send_multipart((b"1.0", number, code, text, (run or "").encode(), b""))

    def _admit(self, parts: list[bytes]) -> str | None:
        try:
            version, _, domain, address, _, mechanism, public = parts
            known = (version, domain, mechanism) == (b"1.0", ZAP_DOMAIN, b"CURVE")
            run = self._run_of(public) if known else None
        except Exception:  # whatever it was, it is no reason to let somebody in
            log.exception("cannot judge a connection; it is refused")
            return None
        if run is None:
            self._refuse(address)
        return run

    def _refuse(self, address: bytes) -> None:
        self.refused += 1
        if time.monotonic() - self._said_at >= SAY_SECONDS:
            self._said_at = time.monotonic()
            log.warning(
                "refused a connection from %s: its key is not known here (%d so far)",
                address.decode("ascii", "replace"),
                self.refused,
            )


class Guarded:
    """The encrypted ROUTER and its gatekeeper."""

    def __init__(self, router: zmq.Socket[bytes], key: Key, directory: Path) -> None:
        """Makes the ROUTER a CURVE server, so before it is bound. Raises BadKey."""
        if key.server:
            raise BadKey(
                "this keyfile is for the ranks of one run; a gateway needs its own: rankgate keys "
                "new, or leave --keyfile and RANKGATE_KEYFILE out"
            )
        self.router = router
        self.key = key
        self.gatekeeper = Gatekeeper(
            router.context, AllowList(key, directory, time.monotonic).run_of
        )
        secret = z85.encode(key.server_secret())
        router.curve_secretkey = secret
        router.curve_publickey = zmq.curve_public(secret)
        router.curve_server = True
        router.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
        router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without a gatekeeper nobody comes in
        router.setsockopt(zmq.ROUTER_HANDOVER, 0)  # nobody takes over another peer's name

    def receive(self, peers: Peers) -> list[bytes]:
        """[peer, frame] of the next message; nothing when its key is for another run than it
        speaks of, which its sender is told. Raises zmq.Again."""
        parts = self.router.recv_multipart(zmq.NOBLOCK, copy=False)
        peer, frame = PEER_PREFIX + parts[0].bytes, parts[-1].bytes
        if len(parts) != 2:
            return [peer]
        bound = str(parts[1].get("User-Id"))
        if bound != ANY_RUN and (text := wrong_run(peers, frame, bound)):
            peers.count("refused: the key is for another run")
            self._reject(peer, frame, text)
            return []
        return [peer, frame]

    def _reject(self, peer: bytes, frame: bytes, text: str) -> None:
        body = {"code": Code.KEY, "text": text, "fatal": True}
        try:
            self.send(peer, frames.control(Type.REJECT, 0, frame[_STREAM], body))
        except zmq.ZMQError:
            pass  # gone; should it come again, it is told again

    def send(self, peer: bytes, frame: bytes) -> None:
        """Raises zmq.ZMQError when the peer is gone or slow."""
        self.router.send_multipart((peer[1:], frame), zmq.NOBLOCK)

    def close(self) -> None:
        self.router.close(200)
        self.gatekeeper.socket.close(0)


def wrong_run(peers: Peers, frame: bytes, bound: str) -> str:
    """Why a frame of a key that is bound to a run must not be taken, or nothing."""
    stream = peers.streams.get(frame[_STREAM])
    if stream is not None and stream.run != bound:
        return f"this key is for run {bound} only"
    if len(frame) > 3 and frame[3] == Type.HELLO:
        try:
            frames.type_of(frame)
            run = frames.read_control(frame).body.get("run")
        except BadFrame:
            return ""  # counted as what it is
        if run != bound:
            return f"this key is for run {bound} only; set RANKGATE_RUN={bound}"
    return ""


# --- before serving ------------------------------------------------------------------------------


def self_test(guarded: Guarded, address: str) -> None:
    """Knock with our key, another key and none, and see the first alone let in. Raises Unguarded.

    Takes the place of ingest's loop while it lasts, at most SELF_TEST_SECONDS.
    """
    stranger = Key(os.urandom(32), server=server_public(guarded.key))
    guests = {"the right key": guarded.key, "an unknown key": stranger, "no key": None}
    found = _knock(guarded.gatekeeper, address, guests)
    want = {"the right key": "let in", "an unknown key": "refused", "no key": "refused"}
    for name in guests:
        if found[name] != want[name]:
            raise Unguarded(
                f"not serving on {address}: in a test of its own lock, a connection with {name} "
                f"was {found[name]} and should have been {want[name]}"
            )


def _knock(gatekeeper: Gatekeeper, address: str, guests: dict[str, Key | None]) -> dict[str, str]:
    """What became of a connection of each guest: `let in`, `refused`, or `not answered`."""
    found = dict.fromkeys(guests, "not answered")
    deadline = time.monotonic() + SELF_TEST_SECONDS
    with _monitors(address, guests) as monitors:
        poller = zmq.Poller()
        for socket in (gatekeeper.socket, *monitors.values()):
            poller.register(socket, zmq.POLLIN)
        while "not answered" in found.values() and time.monotonic() < deadline:
            poller.poll(50)
            gatekeeper.answer()
            for name, monitor in monitors.items():
                while monitor.poll(0):
                    event = int.from_bytes(monitor.recv_multipart()[0][:2], "little")
                    let_in = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
                    found[name] = "let in" if let_in else "refused"
    return found


@contextmanager
def _monitors(address: str, guests: dict[str, Key | None]) -> Iterator[dict[str, Any]]:
    """A connection for each guest, and the socket that tells how its handshake went."""
    context: zmq.Context[Any] = zmq.Context()
    context.linger = 0
    events = (
        zmq.EVENT_HANDSHAKE_SUCCEEDED
        | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    )
    sockets = []  # what nobody refers to is closed
    try:
        monitors = {}
        for name, key in guests.items():
            guest = context.socket(zmq.DEALER)
            sockets.append(guest)
            guest.setsockopt(zmq.IPV6, 1)
            guest.setsockopt(zmq.RECONNECT_IVL, -1)
            if key is not None:
                secret = z85.encode(key.client_secret())
                guest.curve_secretkey = secret
                guest.curve_publickey = zmq.curve_public(secret)
                guest.curve_serverkey = (key.server or server_public(key)).encode()
            monitors[name] = guest.get_monitor_socket(events)
            guest.connect(address)
        yield monitors
    finally:
        context.destroy(0)
