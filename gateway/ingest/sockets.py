"""The sockets that a gateway listens on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import zmq

from rank_client.wire import frames
from rank_client.wire.keys import Key

from .admission import KEYS_DIR, Guarded, self_test

RECEIVE_FRAMES = 32  #: of each peer, unread: what one that ignores its credit can make us hold
SEND_FRAMES = 64  #: to each peer; one that does not read gets the same state told later


def bind(addresses: list[str]) -> zmq.Socket[bytes]:
    """A ROUTER on every address. Raises zmq.ZMQError when one is taken."""
    context: zmq.Context[Any] = zmq.Context()
    context.linger = 0
    context.set(zmq.MAX_SOCKETS, 65535)
    router: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)
    router.setsockopt(zmq.ROUTER_HANDOVER, 1)
    router.setsockopt(zmq.MAXMSGSIZE, frames.MAX_FRAME_BYTES)
    router.setsockopt(zmq.RCVHWM, RECEIVE_FRAMES)
    router.setsockopt(zmq.SNDHWM, SEND_FRAMES)
    router.setsockopt(zmq.HANDSHAKE_IVL, 5000)
    router.setsockopt(zmq.HEARTBEAT_IVL, 5000)
    router.setsockopt(zmq.HEARTBEAT_TIMEOUT, 30_000)
    router.setsockopt(zmq.BACKLOG, 4096)
    for address in addresses:
        listen(router, address)
    return router


def listen(router: zmq.Socket[bytes], address: str) -> None:
    """Raises zmq.ZMQError."""
    if address.startswith("ipc://"):
        # The lock on the data directory says that nobody else serves this path.
        path = Path(address[6:])
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
    if "[" in address:
        router.setsockopt(zmq.IPV6, 1)
    before = os.umask(0o177)
    try:
        router.bind(address)
    finally:
        os.umask(before)


def guard(root: Path, addresses: list[str], key: Key) -> Guarded | None:
    """A ROUTER on the tcp addresses for those with a key, tried out; None without such an
    address. Raises zmq.ZMQError, BadKey, Unguarded."""
    network = [a for a in addresses if a.startswith("tcp://")]
    if not network:
        return None
    router = bind([])
    try:
        guarded = Guarded(router, key, root / KEYS_DIR)
        for address in network:
            listen(router, address)
            self_test(guarded, address)
    except BaseException:
        router.context.destroy(0)
        raise
    return guarded
