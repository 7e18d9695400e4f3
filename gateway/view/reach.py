"""Does a gateway answer where ranks will look for it, and will it know their key?

Asks as a rank would, over the same link, but opens no stream: a PING of a stream that nobody has is
answered with UNKNOWN, and leaves nothing behind.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import zmq

from rank_client.link import Link, connect
from rank_client.wire import frames
from rank_client.wire.frames import BadFrame, Type
from rank_client.wire.keys import ANY_RUN, BadKey, Key, key_of, read_keyfile

from .check import Check

ANSWER_SECONDS = 3.0
POLL_SECONDS = 0.02
OWN_KEYFILE = "gateway.key"

_KEEPS = "ranks train on and keep their logs"


def key_checks(data_dir: Path, environ: Mapping[str, str]) -> Iterator[Check]:
    """The key that ranks started here would use, and the gateway's own."""
    try:
        key = key_of(environ)
    except BadKey as error:
        yield Check("key", "bad", str(error), "ranks do not connect without it")
        return
    if key is not None:
        name = "RANKGATE_KEYFILE" if environ.get("RANKGATE_KEYFILE") else "RANKGATE_SECRET"
        yield Check("key", "ok", f"{name}{_bound(key, environ)}")
        if key.run not in (ANY_RUN, environ.get("RANKGATE_RUN", key.run)):
            text = f"it is for run {key.run}, and RANKGATE_RUN is {environ['RANKGATE_RUN']}"
            yield Check("key", "bad", text, "set RANKGATE_RUN to the key's run, or use another key")
    elif environ.get("RANKGATE_ADDR", "").startswith("tcp://"):
        advice = "set RANKGATE_KEYFILE to a copy of the gateway's keyfile, unless it is --insecure"
        yield Check("key", "warn", "none, and RANKGATE_ADDR is on a network", advice)
    own = data_dir / OWN_KEYFILE
    if own.exists():
        try:
            read_keyfile(own)
            yield Check("gateway: key", "ok", str(own))
        except BadKey as error:
            advice = "a gateway that listens on tcp does not start with it"
            yield Check("gateway: key", "bad", str(error), advice)


def _bound(key: Key, environ: Mapping[str, str]) -> str:
    where = f" {environ['RANKGATE_KEYFILE']}" if environ.get("RANKGATE_KEYFILE") else ""
    return where if key.run == ANY_RUN else f"{where}, for run {key.run} alone"


def address_check(name: str, address: str, environ: Mapping[str, str], advice: str) -> Check:
    """Ask the gateway at an address; `advice` is for where there is none."""
    trouble = _network_trouble(address)
    if trouble:
        return Check(name, "bad", f"{address}: {trouble}", f"{advice}; until then {_KEEPS}")
    try:
        link = connect(address, environ)
    except BadKey:
        return Check(name, "bad", f"{address}: not asked without a good key", "mend the key first")
    except zmq.ZMQError as error:
        advice = "an address is tcp://HOST:PORT or ipc://PATH"
        return Check(name, "bad", f"{address} is none that can be connected to: {error}", advice)
    try:
        return _asked(name, address, link, advice)
    finally:
        link.close()


def _asked(name: str, address: str, link: Link, advice: str) -> Check:
    stream = os.urandom(16)
    question = frames.control(Type.PING, 0, stream, {})
    began = time.monotonic()
    sent = False
    while time.monotonic() < began + ANSWER_SECONDS:
        sent = sent or link.send(question)
        if any(_is_answer(frame, stream) for frame in link.receive()):
            return Check(name, "ok", f"{address} answers after {_ms(began)}")
        if link.refused():
            text = f"{address}: the encrypted handshake fails: no key here, or not the gateway's"
            return Check(name, "bad", text, f"RANKGATE_KEYFILE must be a copy of its key; {_KEEPS}")
        link.wait(POLL_SECONDS)
    what = "is connected to, and does not answer" if sent else "lets nobody in"
    text = f"{address}: {what} for {ANSWER_SECONDS:g} s; it may be stopped, or no gateway"
    return Check(name, "bad", text, f"{advice}; until then {_KEEPS}")


def _is_answer(frame: bytes, stream: bytes) -> bool:
    try:
        return frames.type_of(frame) == Type.UNKNOWN and frames.read_control(frame).stream == stream
    except BadFrame:
        return False


def _ms(began: float) -> str:
    return f"{(time.monotonic() - began) * 1000:.0f} ms"


def _network_trouble(address: str) -> str:
    """Why no connection can be made at all, or empty; says more than ZeroMQ, which only retries."""
    if not address.startswith("tcp://"):
        return ""
    try:
        found = urlsplit(address)
        host, port = found.hostname, found.port
    except ValueError:
        return "not an address; it is tcp://HOST:PORT"
    if not host or not port:
        return "not an address; it is tcp://HOST:PORT"
    try:
        socket.create_connection((host, port), ANSWER_SECONDS).close()
    except socket.gaierror:
        return f"the host {host} is not known here"
    except TimeoutError:
        return f"no answer within {ANSWER_SECONDS:g} s, so likely a firewall"
    except OSError as error:
        refused = isinstance(error, ConnectionRefusedError)
        return "nobody listens there" if refused else error.strerror or str(error)
    return ""
