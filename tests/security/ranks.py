"""A rank with a good key that floods, sends nonsense, or says that it is another."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

from gateway.ingest import admission, peers, room, sockets, streams
from gateway.ingest import strikes as strikes_of
from gateway.ingest.admission import Guarded, server_public
from gateway.ingest.journals import RunStore
from gateway.ingest.peers import QUEUED_TOP_BYTES, Peers
from gateway.ingest.strikes import STRIKES
from gateway.rules import keys
from gateway.rules import project as projection
from rank_client.link import Link
from rank_client.wire import frames
from rank_client.wire.frames import Code, Type
from rank_client.wire.keys import Key, write_keyfile
from rank_client.wire.records import MAX_EVENT_BYTES
from tests.gateway.ingest.test_peers import (
    PEER,
    SESSION,
    A,
    B,
    Gateway,
    Later,
    announce,
    chunk,
)
from tests.gateway.rules.made import Run, reading

from .row import Row, nothing, without

MIB = 1 << 20

# --- floods --------------------------------------------------------------------------------------


def credit_is_shared(root: Path) -> None:
    """However many streams there are, what all may have on the way stays within the budget."""
    gateway = Gateway(root, budget_bytes=MIB)
    told = [gateway.hello(bytes([n]) * 16).body["credit"] for n in range(64)]
    assert all(credit > 0 for credit in told)
    assert 64 * told[-1] <= MIB


def files_are_bounded(root: Path) -> None:
    """Of a peer that ignores its credit, so many chunks are held, and no more."""
    gateway = Gateway(root)
    later = Later(gateway)
    announce(gateway)
    later.run()
    gateway.peers._queued_bytes = QUEUED_TOP_BYTES - 1000
    gateway.say(chunk(1))
    assert later.jobs == []


def frames_are_bounded(root: Path) -> None:
    gateway = Gateway(root)
    gateway.hello()
    gateway.say(frames.data(SESSION, A, 1, 1, bytes(MIB)))
    assert gateway.peers.streams[A].high_water == 0
    assert gateway.peers.counts == {"bad frame: too long": 1}


def hello_is_bounded(root: Path) -> None:
    """It is kept for as long as the run."""
    answer = Gateway(root).hello(tags=["x" * 20_000])
    assert (answer.type, answer.body.get("code")) == (Type.REJECT, Code.SIZE)


def progress_is_bounded(root: Path) -> None:
    """What live.json shows of a rank's own words is short."""
    gateway = Gateway(root)
    gateway.hello(node="n" * 10_000)
    gateway.ping(step="s" * 100_000)
    stream = gateway.peers.streams[A]
    assert len(str(stream.about)) + len(str(stream.progress)) < 2000


def events_are_bounded(root: Path) -> None:
    run = Run()
    run.life(0).text("x" * MAX_EVENT_BYTES).text("short").end()
    with reading(root, run) as reader:
        assert [row[5] for row in reader.texts()] == ["short"]
        assert [n for _, _, _, n, _ in reader.quarantine()] == [1]


def keys_are_bounded(root: Path) -> None:
    run = Run()
    life = run.life(0)
    for n in range(21):
        life.kv({f"{n}/{i}": 1.0 for i in range(1000)}, n).flush()
    life.end()
    with reading(root, run) as reader:
        assert len(reader.keys()) == 20_000


def strikes(root: Path) -> None:
    """Who sends much that is no frame has to pause, and the others do not."""
    gateway = Gateway(root)
    gateway.hello()
    gateway.hello(B, b"another peer")
    said = [answer for _ in range(STRIKES) for answer in gateway.say(b"junk")]
    assert [(to, c.type, c.body["code"]) for to, c in said] == [(PEER, Type.REJECT, Code.STRIKES)]
    assert gateway.ping() == []
    assert len(gateway.ping(B, b"another peer")) == 1


# --- who it says it is ---------------------------------------------------------------------------


def stream_keeps_its_run(root: Path) -> None:
    """A HELLO that names the stream of another run, or makes a file of it, changes nothing."""
    gateway = Gateway(root)
    gateway.hello()
    for forged in ({"run": "other"}, {"kind": "blob", "sha256": "a" * 64, "size": 1}):
        answer = gateway.hello(**forged)
        assert (answer.type, answer.body.get("code")) == (Type.REJECT, Code.STREAM)
    assert set(gateway.journals) == {"r"}


def key_keeps_its_run(root: Path) -> None:
    """The holder of one run's key says HELLO for another: no message for the peers, over the
    real encrypted socket."""
    key = Key(b"k" * 32)
    mine = Key(b"m" * 32, "mine", server_public(key))
    write_keyfile(root / "keys" / "mine.key", mine)
    guarded = Guarded(sockets.bind([]), key, root / "keys")
    guarded.router.bind("tcp://127.0.0.1:*")
    link = Link(guarded.router.get_string(zmq.LAST_ENDPOINT), mine)
    known = Peers(SESSION, RunStore(root / "data"), MIB, lambda _: False)
    try:
        body = {"v": [1, 1], "run": "yours", "kind": "live", "first": 1}
        assert through(guarded, link, known, frames.control(Type.HELLO, 0, A, body)) == []
        assert known.counts == {"refused: the key is for another run": 1}
    finally:
        link.close()
        guarded.router.context.destroy(0)


def through(guarded: Guarded, link: Link, known: Peers, frame: bytes) -> list[bytes]:
    """What the peers would get of a frame that was sent."""
    deadline, sent = time.monotonic() + 10, False
    while time.monotonic() < deadline:
        guarded.gatekeeper.answer()
        sent = sent or link.send(frame)
        if guarded.router.poll(5):
            return guarded.receive(known)
    raise TimeoutError("nothing came")


def alone(name: str, value: Any) -> Callable[[Any], None]:
    return without(peers, name, value)


FLOOD, LIE = "a hostile rank with a key", "a rank lies about who it is"
ALL_CREDIT = property(lambda _: room.CREDIT_TOP_BYTES)

ROWS = [
    Row(FLOOD, "credit", credit_is_shared, without(room.Room, "credit_bytes", ALL_CREDIT)),
    Row(FLOOD, "chunks held", files_are_bounded, alone("QUEUED_TOP_BYTES", 1 << 40)),
    Row(FLOOD, "a frame's size", frames_are_bounded, without(frames, "MAX_FRAME_BYTES", 1 << 30)),
    Row(FLOOD, "a HELLO's size", hello_is_bounded, without(frames, "MAX_HELLO_BYTES", 1 << 30)),
    Row(
        FLOOD, "words of a rank", progress_is_bounded, without(streams, "TOLD_CHARACTERS", 1 << 30)
    ),
    Row(
        FLOOD,
        "an event's size",
        events_are_bounded,
        without(projection, "MAX_EVENT_BYTES", 1 << 30),
    ),
    Row(FLOOD, "keys of a run", keys_are_bounded, without(keys, "MAX_RUN_KEYS", 1 << 30)),
    Row(FLOOD, "strikes", strikes, without(strikes_of, "STRIKES", 1 << 30)),
    Row(LIE, "a stream has one run", stream_keeps_its_run, alone("check_same", nothing)),
    Row(
        LIE,
        "a key has one run",
        key_keeps_its_run,
        without(admission, "wrong_run", lambda *_: ""),
    ),
]
