"""The gateway's side: accept what follows, refuse the rest, acknowledge only what is on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.ingest import opening, peers, strikes
from gateway.ingest.hello import MAX_NUMBER
from gateway.ingest.media import CHUNK_BYTES, Job, blob_path
from gateway.ingest.peers import GONE_NS, SILENT_NS, Peers
from gateway.ingest.presence import superseded
from gateway.ingest.room import CREDIT_FLOOR_BYTES, CREDIT_TOP_BYTES
from gateway.ingest.strikes import STRIKE_NS, STRIKE_PAUSE_SECONDS, STRIKES
from gateway.journal.reader import Entry
from gateway.journal.writer import Journal, Mark
from rank_client.wire import frames
from rank_client.wire.disk import OsDisk
from rank_client.wire.frames import Control, Type
from rank_client.wire.records import Kind, unpack_map
from rank_client.wire.session import ClientSession
from tests.gateway.journal.made import A, B, frame, high_waters, make, read_all
from tests.rank_client.wire.disks import MemoryDisk
from tests.rank_client.wire.test_session import ToySource

SESSION = 77
PEER, OTHER_PEER = b"p1", b"p2"
SECOND = 10**9


class Gateway:
    """Peers over journals in memory; files go to `root`."""

    disk = OsDisk()

    def __init__(self, root: Path, budget_bytes: int = 1 << 30) -> None:
        self.root = root
        self.disks: dict[str, MemoryDisk] = {}
        self.journals: dict[str, Journal] = {}
        self.stopped: set[str] = set()
        self.budget_bytes = budget_bytes
        self.now = SECOND
        self.work: Callable[[Job], None] | None = None
        self.start(SESSION)

    def start(self, session: int) -> None:
        """A new life of the gateway, from what is on disk."""
        self.journals = {}
        stop = lambda run: run in self.stopped  # noqa: E731
        self.peers = Peers(session, self, self.budget_bytes, stop, self.work)

    def journal(self, run: str) -> Journal:
        if run not in self.journals:
            self.journals[run] = make(self.disks.setdefault(run, MemoryDisk()))
        return self.journals[run]

    def directory(self, run: str) -> Path:
        return self.root / run

    def say(self, data: bytes, peer: bytes = PEER) -> list[tuple[bytes, Control]]:
        out: list[tuple[bytes, bytes]] = []
        self.peers.receive(self.now, peer, data, out)
        return [(to, frames.read_control(reply)) for to, reply in out]

    def hello(self, stream: bytes = A, peer: bytes = PEER, **more: Any) -> Control:
        body = {"v": [1, 1], "run": "r", "kind": "live", "first": 1, "last": 0, **more}
        [(_, answer)] = self.say(frames.control(Type.HELLO, 0, stream, body), peer)
        return answer

    def data(self, first: int, n: int = 1, stream: bytes = A, peer: bytes = PEER) -> Any:
        made = frame(stream, first, n)
        return self.say(self.in_session(made), peer)

    @staticmethod
    def in_session(made: bytes) -> bytes:
        head = frames.read_data(made)
        return frames.data(SESSION, head.stream, head.first, head.n, made[frames.DATA_HEAD_BYTES :])

    def ping(self, stream: bytes = A, peer: bytes = PEER, **body: Any) -> Any:
        return self.say(frames.control(Type.PING, SESSION, stream, body), peer)

    def bye(self, final: int, stream: bytes = A, peer: bytes = PEER) -> Any:
        body = {"final": final, "status": "completed"}
        return self.say(frames.control(Type.BYE, SESSION, stream, body), peer)

    def committed(self, failed: set[str]) -> list[tuple[bytes, Control]]:
        return [(to, frames.read_control(f)) for to, f in self.peers.committed(frozenset(failed))]

    def commit(self) -> list[tuple[bytes, Control]]:
        for journal in self.journals.values():
            journal.commit()
            journal.mark()
        return [(to, frames.read_control(reply)) for to, reply in self.peers.committed()]

    def entries(self, run: str = "r") -> list[Entry]:
        return read_all(self.disks[run], polls=30)

    def kinds(self, run: str = "r") -> list[int]:
        return [e.kind for e in self.entries(run)]


@pytest.fixture
def gateway(tmp_path: Path) -> Gateway:
    return Gateway(tmp_path)


# --- data ----------------------------------------------------------------------------------------


def test_what_follows_is_accepted_and_acknowledged_after_the_commit(gateway: Gateway) -> None:
    """Frames that follow each other get no answer at once, and one acknowledgement of all of them
    once they are on disk."""
    gateway.hello()
    assert gateway.data(1, 3) == []
    assert gateway.data(4, 2) == []
    assert gateway.peers.streams[A].durable == 0
    [(peer, ack)] = gateway.commit()
    assert (peer, ack.type, ack.body["durable"]) == (PEER, Type.ACK, 5)
    assert high_waters(gateway.entries()) == {A: 5}
    assert gateway.commit() == []


@pytest.mark.parametrize("first", [3, 4, 99])
def test_what_skips_numbers_is_refused(gateway: Gateway, first: int) -> None:
    """A frame beyond the next number is not stored, and the answer says where to go on."""
    gateway.hello()
    gateway.data(1)
    [(_, answer)] = gateway.data(first)
    assert (answer.type, answer.body["back"], answer.body["durable"]) == (Type.ACK, 2, 0)
    gateway.commit()
    assert high_waters(gateway.entries()) == {A: 1}
    assert gateway.peers.duplicates == {}


@pytest.mark.parametrize(("first", "n", "doubled"), [(1, 3, 3), (2, 1, 1), (2, 5, 2), (3, 1, 1)])
def test_duplicates_are_dropped_and_counted(
    gateway: Gateway, first: int, n: int, doubled: int
) -> None:
    """A frame that starts with what is stored is dropped whole, its known records counted."""
    gateway.hello()
    gateway.data(1, 3)
    gateway.commit()
    [(_, answer)] = gateway.data(first, n)
    assert (answer.body["back"], answer.body["durable"]) == (4, 3)
    assert gateway.peers.duplicates == {"r": doubled}
    gateway.commit()
    assert high_waters(gateway.entries()) == {A: 3}


def test_streams_do_not_mix(gateway: Gateway) -> None:
    """Two streams of a run have numbers of their own, interleaved in one journal."""
    gateway.hello(A)
    gateway.hello(B)
    for first in (1, 2, 3):
        gateway.data(first, stream=A)
        gateway.data(first, stream=B)
    gateway.commit()
    assert high_waters(gateway.entries()) == {A: 3, B: 3}


def test_nothing_is_acknowledged_that_was_not_committed(gateway: Gateway) -> None:
    """Answers to pings, hellos and refusals between two commits tell of the last commit only."""
    gateway.hello()
    gateway.data(1, 3)
    gateway.commit()
    gateway.data(4, 3)
    [(_, pong)] = gateway.say(frames.control(Type.PING, SESSION, A, {"t": 1.5}))
    assert (pong.type, pong.body["durable"], pong.body["t"]) == (Type.PONG, 3, 1.5)
    assert gateway.data(99)[0][1].body["durable"] == 3
    assert gateway.hello().body["durable"] == 3
    assert gateway.commit()[0][1].body["durable"] == 6


def test_after_a_restart_the_stream_goes_on_where_it_is_stored(gateway: Gateway) -> None:
    """A new life of the gateway knows what was committed, and only that."""
    gateway.hello()
    gateway.data(1, 3)
    gateway.commit()
    gateway.data(4)  # never committed
    gateway.start(SESSION)
    [(_, answer)] = gateway.data(4)
    assert answer.type == Type.UNKNOWN
    assert gateway.hello().body["durable"] == 3
    gateway.data(4)
    gateway.commit()
    assert gateway.kinds().count(Kind.OPEN) == 1
    assert high_waters(gateway.entries()) == {A: 4}


def test_answers_go_to_where_a_stream_spoke_last(gateway: Gateway) -> None:
    """After a reconnect acknowledgements go to the new peer."""
    gateway.hello()
    gateway.data(1, peer=OTHER_PEER)
    assert gateway.commit()[0][0] == OTHER_PEER


@pytest.mark.parametrize("make_frame", ["data", "ping", "bye"])
def test_who_is_not_known_is_told_to_say_hello(gateway: Gateway, make_frame: str) -> None:
    """Frames of an unknown stream or of another session of the gateway are answered UNKNOWN."""
    for stream, session in ((A, SESSION), (B, SESSION - 1)):
        if stream == B:
            gateway.hello(B)
        data = {
            "data": frames.data(session, stream, 1, 1, bytes(24)),
            "ping": frames.control(Type.PING, session, stream, {}),
            "bye": frames.control(Type.BYE, session, stream, {"final": 0}),
        }[make_frame]
        [(_, answer)] = gateway.say(data)
        assert (answer.type, answer.session, answer.stream) == (Type.UNKNOWN, SESSION, stream)
    gateway.commit()
    assert high_waters(gateway.entries()) == {}


def test_what_is_no_frame_is_counted_and_dropped(gateway: Gateway) -> None:
    """Junk, broken frames and frames only a gateway sends get no answer and are counted."""
    gateway.hello()
    broken = bytearray(Gateway.in_session(frame(A, 1)))
    broken[-1] ^= 1
    welcome = frames.control(Type.WELCOME, SESSION, A, {})
    for junk in (b"", b"GET / HTTP/1.1", bytes(broken), welcome):
        assert gateway.say(junk) == []
    assert sum(gateway.peers.counts.values()) == 4
    gateway.commit()
    assert high_waters(gateway.entries()) == {}


# --- credit --------------------------------------------------------------------------------------


def test_credit_is_the_budget_shared_by_streams(tmp_path: Path) -> None:
    """Each stream gets its share of the budget, within a floor and a top."""
    gateway = Gateway(tmp_path, budget_bytes=1 << 20)
    assert gateway.hello(bytes([0]) * 16).body["credit"] == 1 << 19  # twice that may be on the way
    for n in range(1, 4):
        credit = gateway.hello(bytes([n]) * 16).body["credit"]
    assert credit == (1 << 19) // 4
    for n in range(4, 70):
        credit = gateway.hello(bytes([n]) * 16).body["credit"]
    assert credit == CREDIT_FLOOR_BYTES
    assert Gateway(tmp_path).hello().body["credit"] == CREDIT_TOP_BYTES


def test_a_full_disk_takes_nothing_and_says_so(gateway: Gateway) -> None:
    """While there is no room, data is dropped without an answer and every credit is 0; afterwards
    it is taken again."""
    gateway.hello()
    gateway.peers.room.full = True
    assert gateway.data(1) == []
    assert gateway.say(frames.control(Type.PING, SESSION, A, {}))[0][1].body["credit"] == 0
    gateway.commit()
    assert high_waters(gateway.entries()) == {}
    gateway.peers.room.full = False
    gateway.data(1)
    assert gateway.commit()[0][1].body["durable"] == 1


def test_after_a_failed_commit_everyone_begins_again(gateway: Gateway) -> None:
    """When a commit fails nothing is acknowledged, and the run's streams are told to say HELLO,
    which tells them what is really stored."""
    gateway.hello()
    gateway.data(1, 2)
    gateway.commit()
    gateway.data(3, 2)
    gateway.disks["r"].room = 10
    with pytest.raises(OSError, match="space"):
        gateway.journal("r").commit()
    gateway.peers.forget("r")
    gateway.journals.pop("r").close()
    assert gateway.peers.committed() == []
    gateway.disks["r"].room = 1 << 20
    assert gateway.data(5)[0][1].type == Type.UNKNOWN
    assert gateway.hello().body["durable"] == 2
    gateway.data(3, 2)
    gateway.commit()
    assert high_waters(gateway.entries()) == {A: 4}


# --- hello and bye -------------------------------------------------------------------------------


def test_hello_is_written_down_once(gateway: Gateway) -> None:
    """The first HELLO of a stream is an entry with its whole map; a repeated one is not."""
    gateway.hello(rank=3, node="n1")
    gateway.hello(rank=3, node="n1")
    gateway.commit()
    [entry] = gateway.entries()
    body = unpack_map(bytes(entry.body))
    assert (entry.kind, body["stream"]) == (Kind.OPEN, A)
    assert (body["hello"]["rank"], body["hello"]["node"]) == (3, "n1")


def test_welcome_tells_what_a_client_must_know(gateway: Gateway) -> None:
    """WELCOME carries the session, the journal's name, what is durable, and the credit."""
    welcome = gateway.hello()
    assert (welcome.type, welcome.session) == (Type.WELCOME, SESSION)
    assert welcome.body["journal"] == gateway.journal("r").uuid
    assert welcome.body["durable"] == 0
    assert welcome.body["credit"] > 0


DEEP: dict[str, Any] = {}
for _ in range(6):
    DEEP = {"k": DEEP}


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"v": None}, "versions"),
        ({"v": [1]}, "versions"),
        ({"v": ["a", "b"]}, "versions"),
        ({"v": [None, 1]}, "versions"),
        ({"run": None}, "run id"),
        ({"run": "../up"}, "run id"),
        ({"run": ".."}, "run id"),
        ({"run": "x" * 65}, "run id"),
        ({"kind": "spy"}, "kind"),
        ({"kind": None}, "kind"),
        ({"first": 2**63}, "number"),
        ({"first": -1}, "number"),
        ({"first": "1"}, "number"),
        ({"more": DEEP}, "nested"),
        ({"kind": "blob"}, "sha256"),
        ({"kind": "blob", "sha256": "a" * 64}, "size"),
    ],
)
def test_a_hello_that_makes_no_sense_is_rejected(
    gateway: Gateway, more: dict[str, Any], reason: str
) -> None:
    """A HELLO of another protocol, run or kind is rejected for good with its reason, and leaves
    no entry."""
    answer = gateway.hello(**more)
    assert answer.type == Type.REJECT
    assert (answer.body["fatal"], answer.body["code"]) == (True, "hello")
    assert reason in answer.body["text"]
    assert gateway.peers.streams == {}
    assert gateway.peers.counts == {"rejected: hello": 1}
    gateway.commit()
    assert gateway.disks.get("r") is None or gateway.entries() == []


def test_another_version_is_told_which_are_spoken(gateway: Gateway) -> None:
    """A HELLO of versions that this gateway does not speak, in a frame of any version, is rejected
    with those that it does."""
    by_range = gateway.hello(v=[2, 3])
    frame_of_2 = bytearray(frames.control(Type.HELLO, 0, A, {"v": [2, 2]}))
    frame_of_2[2] = 2
    [(_, by_frame)] = gateway.say(bytes(frame_of_2))
    for answer in (by_range, by_frame):
        assert (answer.type, answer.stream) == (Type.REJECT, A)
        assert (answer.body["code"], answer.body["v"]) == ("version", [1, 1])
        assert answer.body["fatal"]


@pytest.mark.parametrize("kind", ["live", "blob"])
def test_the_answer_to_hello_echoes_its_nonce(gateway: Gateway, kind: str) -> None:
    """WELCOME and REJECT name the HELLO they answer, and the journal does not keep it."""
    more = {"sha256": SHA, "size": 5} if kind == "blob" else {}
    assert gateway.hello(kind=kind, nonce=b"n1", **more).body["nonce"] == b"n1"
    assert gateway.hello(kind="spy", nonce=b"n2").body["nonce"] == b"n2"
    gateway.commit()
    assert all(b"n1" not in bytes(e.body) for e in gateway.entries())


def test_a_hello_that_is_too_large_is_rejected(gateway: Gateway) -> None:
    """A HELLO above its limit is rejected unread; one below is kept as it is."""
    answer = gateway.hello(tags=["x" * frames.MAX_HELLO_BYTES])
    assert (answer.type, answer.body["code"]) == (Type.REJECT, "size")
    assert gateway.peers.streams == {}
    assert gateway.hello(tags=["x" * (frames.MAX_HELLO_BYTES - 200)]).type == Type.WELCOME


def test_a_run_has_only_so_many_streams(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """One stream more than the journal's table can hold is rejected; those that are there go on."""
    monkeypatch.setattr(opening, "MAX_STREAMS", 2)
    gateway.hello(A)
    gateway.hello(B)
    answer = gateway.hello(b"c" * 16)
    assert (answer.type, answer.body["code"]) == (Type.REJECT, "streams")
    assert gateway.hello(b"c" * 16, run="other").type == Type.WELCOME
    assert gateway.hello(A).type == Type.WELCOME


def test_the_largest_table_can_be_read() -> None:
    """A journal with as many streams as a run may have goes on in a new segment, and recovers."""
    disk = MemoryDisk()
    journal = make(disk, 1)
    for n in range(opening.MAX_STREAMS):
        journal.streams[n.to_bytes(16, "little")] = Mark(MAX_NUMBER)
    journal.append_map(Kind.TICK, 1, {"quiet": []})
    journal.commit()  # begins a segment, with the table
    again = make(disk.copy(), 1)
    assert len(again.streams) == opening.MAX_STREAMS
    assert not again.damage


def test_without_descriptors_only_those_here_go_on(gateway: Gateway) -> None:
    """A crowded gateway rejects, for now, what needs a descriptor: another run, and files."""
    gateway.hello(A)
    gateway.peers.room.crowded = True
    for more in ({"run": "other"}, {"kind": "blob", "sha256": SHA, "size": 5}):
        answer = gateway.hello(b"c" * 16, **more)
        assert (answer.body["code"], answer.body["fatal"]) == ("crowded", False)
    assert gateway.hello(B).type == Type.WELCOME


def test_every_answer_has_only_the_fields_of_its_message(gateway: Gateway) -> None:
    """What the gateway says is what frames.FIELDS, and so docs/protocol.md, lists."""
    said = [
        gateway.hello(nonce=b"n"),
        gateway.hello(kind="spy", nonce=b"n"),
        gateway.hello(v=[9, 9]),
    ]
    gateway.data(1)
    said += [a for _, a in gateway.commit()]
    gateway.stopped = {"r"}
    gateway.peers.room.full = True
    said += [a for _, a in (*gateway.commit(), *gateway.ping(), *gateway.data(9))]
    said += [a for _, a in (*gateway.bye(1), *gateway.commit())]
    assert {m.type for m in said} >= {Type.WELCOME, Type.REJECT, Type.ACK, Type.PONG, Type.BYE_ACK}
    for message in said:
        assert set(message.body) <= set(frames.FIELDS[Type(message.type)]), message


def test_a_hello_as_deep_as_allowed_survives_a_restart(gateway: Gateway) -> None:
    """Whatever HELLO is accepted can be read back from the journal."""
    answer = gateway.hello(more=DEEP["k"])
    assert answer.type == Type.WELCOME
    gateway.commit()
    gateway.start(SESSION)
    assert gateway.hello().type == Type.WELCOME
    assert not gateway.journal("r").damage
    assert unpack_map(bytes(gateway.entries()[0].body))["stream"] == A


def test_a_stream_of_another_run_is_refused(gateway: Gateway) -> None:
    """Nobody continues a stream under another run, or a file as a rank."""
    gateway.hello(run="r")
    answer = gateway.hello(run="other", peer=OTHER_PEER)
    assert answer.type == Type.REJECT
    assert "another run" in answer.body["text"]
    assert "another kind" in gateway.hello(kind="blob", sha256="a" * 64, size=1).body["text"]
    gateway.data(1)
    gateway.commit()
    assert high_waters(gateway.entries("r")) == {A: 1}
    assert "other" not in gateway.disks


def test_a_run_that_cannot_be_written_is_asked_for_later(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the run's journal cannot be opened for want of room, the rank is told to come again."""

    def no_room(run: str) -> Journal:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gateway, "journal", no_room)
    answer = gateway.hello()
    assert answer.type == Type.REJECT
    assert not answer.body["fatal"]
    assert "No space" in answer.body["text"]


def test_a_gap_is_written_down(gateway: Gateway) -> None:
    """A living rank that no longer has numbers opens a gap, once, and goes on after it; it is
    welcomed when that is on disk."""
    gateway.hello()
    gateway.data(1, 2)
    gateway.commit()
    say_hello = frames.control(Type.HELLO, 0, A, {**GOOD, "first": 10})
    assert gateway.say(say_hello) == gateway.say(say_hello) == []
    [(_, welcome)] = gateway.commit()
    assert (welcome.type, welcome.body["durable"]) == (Type.WELCOME, 9)
    assert gateway.hello(first=10).body["durable"] == 9
    assert gateway.data(10) == []
    gateway.commit()
    gaps = [unpack_map(bytes(e.body)) for e in gateway.entries() if e.kind == Kind.GAP]
    assert [(g["from"], g["to"]) for g in gaps] == [(3, 9)]
    gateway.start(SESSION)
    assert gateway.hello(first=10).body["durable"] == 10


@pytest.mark.parametrize("restarted", [False, True])
def test_only_its_own_process_may_open_a_gap(gateway: Gateway, restarted: bool) -> None:
    """Who replays another's spool and lacks its first numbers changes nothing, also after a
    restart at which the stream was expected."""
    kind = "live" if restarted else "replay"
    gateway.hello(kind=kind)
    gateway.data(1)
    gateway.commit()
    if restarted:
        gateway.start(SESSION)
        assert gateway.peers.expect(gateway.now, "r")
    assert gateway.hello(kind="replay", first=10).body["durable"] == 1
    gateway.commit()
    assert Kind.GAP not in gateway.kinds()


def test_bye_is_answered_only_when_all_is_stored(gateway: Gateway) -> None:
    """BYE before the last record is met with silence, afterwards with BYE_ACK after the commit,
    again for each repetition; the journal notes it once."""
    gateway.hello()
    gateway.data(1, 2)
    assert gateway.bye(3) == []
    assert [c.type for _, c in gateway.commit()] == [Type.ACK]
    gateway.data(3)
    assert gateway.bye(3) == []
    assert [(c.type, c.body["durable"]) for _, c in gateway.commit()] == [(Type.BYE_ACK, 3)]
    gateway.bye(3, peer=OTHER_PEER)
    [(peer, again)] = gateway.commit()
    assert (peer, again.type) == (OTHER_PEER, Type.BYE_ACK)
    assert gateway.kinds().count(Kind.BYE) == 1


def test_who_said_bye_may_say_hello_again(gateway: Gateway) -> None:
    """A stream that ended, and whose BYE_ACK was lost with the gateway, gets it after HELLO."""
    gateway.hello()
    gateway.data(1)
    gateway.bye(1)
    gateway.commit()
    gateway.peers.tick(gateway.now)
    assert gateway.bye(1)[0][1].type == Type.UNKNOWN
    assert gateway.hello().body["durable"] == 1
    gateway.bye(1)
    assert [c.type for _, c in gateway.commit()] == [Type.BYE_ACK]
    assert gateway.kinds().count(Kind.BYE) == 1


def test_a_wish_to_stop_goes_with_every_answer(gateway: Gateway) -> None:
    """Acknowledgements and pongs of a run that should stop say so, those of others do not."""
    gateway.hello(A, run="r")
    gateway.hello(B, run="other")
    gateway.stopped = {"r"}
    ping = [gateway.say(frames.control(Type.PING, SESSION, s, {}))[0][1] for s in (A, B)]
    assert ["stop" in p.body for p in ping] == [True, False]


# --- who misbehaves ------------------------------------------------------------------------------


def junk(gateway: Gateway, n: int, peer: bytes = PEER) -> list[tuple[bytes, Control]]:
    return [answer for _ in range(n) for answer in gateway.say(b"x" * 40, peer)]


def test_a_peer_of_many_bad_frames_has_to_pause(gateway: Gateway) -> None:
    """After so many bad frames within a minute its streams are rejected for a while and nothing
    it sends is looked at; another peer notices nothing; after the pause it is welcome."""
    gateway.hello(A, PEER)
    gateway.hello(B, OTHER_PEER)
    assert junk(gateway, STRIKES - 1) == []
    [(peer, answer)] = junk(gateway, 1)
    assert (peer, answer.type, answer.stream) == (PEER, Type.REJECT, A)
    assert (answer.body["code"], answer.body["fatal"]) == ("strikes", False)
    assert answer.body["retry_seconds"] == STRIKE_PAUSE_SECONDS
    assert gateway.data(1, peer=PEER) == junk(gateway, 5) == []
    gateway.data(1, stream=B, peer=OTHER_PEER)
    gateway.commit()
    assert high_waters(gateway.entries()) == {B: 1}
    assert gateway.peers.counts["dropped: too many bad frames"] == 6
    gateway.now += STRIKE_PAUSE_SECONDS * SECOND
    assert gateway.hello(A, PEER).type == Type.WELCOME


def test_a_bad_frame_now_and_then_is_forgiven(gateway: Gateway) -> None:
    """Bad frames that lie further apart lead to nothing, and are not remembered."""
    gateway.hello()
    for _ in range(3):
        assert junk(gateway, STRIKES - 1) == []
        gateway.now += STRIKE_NS
        gateway.say(frames.control(Type.PING, SESSION, A, {}))
        gateway.peers.tick(gateway.now)
    assert gateway.peers.strikes.struck == {}


def test_a_clock_that_is_set_back_frees_who_pauses(gateway: Gateway) -> None:
    """When the gateway's clock goes back, a pause does not last for ever."""
    gateway.now = 10**6 * SECOND
    junk(gateway, STRIKES)
    gateway.now = SECOND
    assert gateway.hello().type == Type.WELCOME


def test_many_bad_peers_do_not_grow_memory(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only so many peers' bad frames are remembered, the newest ones."""
    monkeypatch.setattr(strikes, "STRUCK_PEERS", 3)
    for n in range(10):
        junk(gateway, 1, bytes([n]))
    assert list(gateway.peers.strikes.struck) == [b"\x07", b"\x08", b"\x09"]


def test_what_peers_tell_is_kept_short(gateway: Gateway) -> None:
    """Of a PING or HELLO of any size, only short known fields stay in memory."""
    gateway.hello(rank=3, node="n" * 5000, more=["x" * 5000])
    gateway.ping(step=7, volatile="v" * 100_000, junk="x" * 100_000, last={"a": 1})
    stream = gateway.peers.streams[A]
    assert (stream.about["rank"], len(stream.about["node"])) == (3, 256)
    assert (stream.progress["step"], stream.progress["last"]) == (7, None)
    assert len(repr((stream.about, stream.progress))) < 1000


# --- two processes for one rank ------------------------------------------------------------------


def test_the_older_of_two_live_processes_of_a_rank_is_superseded(gateway: Gateway) -> None:
    """Both are stored; the one that the journal opened first is named as superseded, whatever
    their clocks say and after a restart too, until one of them is gone."""
    later, c = gateway.now + 5 * SECOND, b"c" * 16
    gateway.hello(B, rank=0)
    gateway.hello(c, rank=1)
    gateway.now = later
    gateway.hello(A, rank=0)
    gateway.data(1, stream=A)
    gateway.data(1, stream=B)
    gateway.commit()
    assert high_waters(gateway.entries()) == {A: 1, B: 1}
    assert {
        old: new.id for old, new in superseded(gateway.peers.streams.values(), "r").items()
    } == {B: A}
    gateway.start(SESSION)
    for stream in (A, B):
        gateway.hello(stream, rank=0)
    assert {
        old: new.id for old, new in superseded(gateway.peers.streams.values(), "r").items()
    } == {B: A}
    gateway.bye(1, A)
    gateway.commit()
    assert superseded(gateway.peers.streams.values(), "r") == {}


def test_ended_replayed_and_unranked_streams_supersede_nobody(gateway: Gateway) -> None:
    """Only living ranks do: a dead life's spool is no second process."""
    gateway.hello(A, rank=0)
    gateway.hello(B, rank=0, kind="replay")
    gateway.hello(b"c" * 16, rank=None)
    gateway.hello(b"d" * 16, rank=None)
    assert superseded(gateway.peers.streams.values(), "r") == {}


# --- room ----------------------------------------------------------------------------------------


def test_everybody_hears_when_room_runs_out_and_comes_back(gateway: Gateway) -> None:
    """Streams are told of credit 0 and why, and of credit again, without having asked."""
    gateway.hello(A)
    gateway.hello(B, peer=OTHER_PEER)
    gateway.commit()
    gateway.peers.room.full = True
    told = gateway.commit()
    assert {peer for peer, _ in told} == {PEER, OTHER_PEER}
    assert all((a.body["credit"], a.body["full"]) == (0, "disk") for _, a in told)
    gateway.data(1)
    assert gateway.commit() == []
    gateway.peers.room.full = False
    told = gateway.commit()
    assert all(a.body["credit"] > 0 and "full" not in a.body for _, a in told)
    assert {a.stream: a.body.get("back") for _, a in told} == {A: 1, B: None}


def test_a_run_over_its_quota_is_the_only_one_to_wait(gateway: Gateway) -> None:
    """Its streams get credit 0 and are told why; other runs go on; with more quota it does too."""
    gateway.hello(A)
    gateway.hello(B, run="other")
    gateway.commit()
    gateway.peers.room.over_quota = frozenset({"r"})
    [(_, told)] = gateway.commit()
    assert (told.stream, told.body["credit"], told.body["full"]) == (A, 0, "quota")
    gateway.data(1, stream=A)
    gateway.data(1, stream=B)
    gateway.commit()
    assert high_waters(gateway.entries("other")) == {B: 1}
    assert high_waters(gateway.entries("r")) == {}
    gateway.peers.room.over_quota = frozenset()
    [(_, told)] = gateway.commit()
    assert (told.stream, told.body["back"]) == (A, 1)
    assert told.body["credit"] > 0


def test_a_commit_that_finds_no_room_is_acknowledged_later(gateway: Gateway) -> None:
    """What is buffered when the disk is full is not acknowledged, stays, and is stored once when
    there is room; the stream hears of it meanwhile."""
    gateway.hello(A)
    gateway.hello(B, run="other")
    gateway.commit()
    disk = gateway.disks["r"]
    disk.room = 0
    gateway.data(1, 3)
    gateway.data(1, stream=B)
    with pytest.raises(OSError, match="No space"):
        gateway.journal("r").commit()
    gateway.journal("other").commit()
    gateway.peers.room.full = True
    told = {a.stream: a.body for _, a in gateway.committed({"r"})}
    assert (told[A]["durable"], told[A]["credit"], told[A]["full"]) == (0, 0, "disk")
    assert told[B]["durable"] == 1
    assert gateway.committed({"r"}) == []
    disk.room = 1 << 20
    gateway.peers.room.full = False
    assert {a.stream: a.body["durable"] for _, a in gateway.commit()} == {A: 3, B: 1}
    assert high_waters(gateway.entries()) == {A: 3}


def test_a_full_disk_holds_no_more_than_so_much_in_memory(gateway: Gateway) -> None:
    """When much waits for room already, new streams have to wait too."""
    gateway.hello(A)
    gateway.commit()
    gateway.peers.room.full = True
    assert gateway.hello(B).type == Type.WELCOME
    gateway.journal("r").pending_bytes = 2 << 20
    answer = gateway.hello(b"c" * 16)
    assert (answer.body["code"], answer.body["fatal"]) == ("full", False)


# --- ticks ---------------------------------------------------------------------------------------


def test_ticks_tell_who_fell_silent_and_who_is_back(gateway: Gateway) -> None:
    """A stream unheard for three pings is named once as quiet, and once as back when it speaks."""
    gateway.hello(A)
    gateway.hello(B)
    start = gateway.now
    assert gateway.peers.tick(start)["r"] == {"quiet": [], "back": [], "dup": 0}
    gateway.now = start + SILENT_NS
    gateway.say(frames.control(Type.PING, SESSION, B, {}))
    later = start + SILENT_NS + 1
    assert gateway.peers.tick(later)["r"]["quiet"] == [A]
    assert gateway.peers.tick(later + 1)["r"]["quiet"] == []
    gateway.now = later + 2
    gateway.data(1)
    assert gateway.peers.tick(later + 3)["r"] == {"quiet": [], "back": [A], "dup": 0}


def test_runs_whose_streams_have_ended_get_no_ticks(gateway: Gateway) -> None:
    """After the last BYE there is nothing more to tell of."""
    gateway.hello()
    gateway.bye(0)
    gateway.commit()
    assert gateway.peers.tick(gateway.now) == {}
    assert gateway.peers.streams == {}


def test_who_never_comes_back_is_forgotten(gateway: Gateway, tmp_path: Path) -> None:
    """A stream, or a file on its way, that is silent for long holds no place and no descriptor."""
    gateway.hello(A)
    gateway.hello(B, kind="blob", sha256="a" * 64, size=5, of=A, media=1)
    fds = len(os.listdir("/proc/self/fd"))
    gateway.peers.tick(gateway.now + GONE_NS + 1)
    assert gateway.peers.streams == {}
    assert len(os.listdir("/proc/self/fd")) == fds - 1


def test_expected_streams_are_told_of_until_they_come(gateway: Gateway) -> None:
    """After a restart, streams that had not ended count as open, and fall silent if they stay
    away; those that had ended are not waited for."""
    gateway.hello(A)
    gateway.hello(B)
    gateway.bye(0, B)
    gateway.commit()
    gateway.start(SESSION)
    assert gateway.peers.expect(gateway.now, "r")
    assert list(gateway.peers.streams) == [A]
    assert gateway.peers.tick(gateway.now + SILENT_NS + 1)["r"]["quiet"] == [A]
    assert gateway.hello(A).body["durable"] == 0


# --- files ---------------------------------------------------------------------------------------

CONTENT = bytes(range(256)) * 2000  # two chunks
SHA = hashlib.sha256(CONTENT).hexdigest()
BLOB = b"f" * 16


def blob_hello(gateway: Gateway, of: bytes = A, media: int = 7, sha256: str = SHA) -> Control:
    return gateway.hello(
        BLOB, kind="blob", sha256=sha256, size=len(CONTENT), of=of, media=media, last=2
    )


def chunk(n: int, content: bytes = CONTENT) -> bytes:
    piece = content[(n - 1) * CHUNK_BYTES : n * CHUNK_BYTES]
    return frames.data(SESSION, BLOB, n, 1, piece)


def blobs(gateway: Gateway) -> list[tuple[bytes, int, str, int]]:
    bodies = [unpack_map(bytes(e.body)) for e in gateway.entries() if e.kind == Kind.BLOB]
    return [(b["stream"], b["media"], b["sha256"], b["size"]) for b in bodies]


def test_a_file_travels_as_a_stream(gateway: Gateway) -> None:
    """Chunks are acknowledged by number; after the last and BYE the file is there and an entry
    says for which record."""
    gateway.hello(A)
    assert blob_hello(gateway).body["durable"] == 0
    gateway.say(chunk(1))
    assert gateway.commit()[-1][1].body["durable"] == 1
    assert gateway.bye(2, BLOB) == []
    gateway.say(chunk(2))
    gateway.bye(2, BLOB)
    assert [c.type for _, c in gateway.commit()] == [Type.BYE_ACK]
    assert blob_path(gateway.root / "r", SHA).read_bytes() == CONTENT
    assert blobs(gateway) == [(A, 7, SHA, len(CONTENT))]
    assert Kind.BATCH not in gateway.kinds()


def test_a_file_resumes_after_a_restart(gateway: Gateway) -> None:
    """A gateway that is started again goes on after the last whole chunk."""
    blob_hello(gateway)
    gateway.say(chunk(1))
    gateway.commit()
    gateway.start(SESSION)
    assert blob_hello(gateway).body["durable"] == 1
    gateway.say(chunk(2))
    gateway.bye(2, BLOB)
    gateway.commit()
    assert blobs(gateway) == [(A, 7, SHA, len(CONTENT))]


def test_a_file_that_is_not_what_was_announced_is_not_acknowledged(gateway: Gateway) -> None:
    """Bytes with another hash get no BYE_ACK, leave no file and no entry, and the sender, told to
    say HELLO, begins again from nothing."""
    blob_hello(gateway)
    wrong = bytes(len(CONTENT))
    gateway.say(chunk(1, wrong))
    gateway.say(chunk(2, wrong))
    gateway.bye(2, BLOB)
    assert [c for _, c in gateway.commit() if c.type == Type.BYE_ACK] == []
    assert blobs(gateway) == []
    assert not blob_path(gateway.root / "r", SHA).exists()
    assert gateway.bye(2, BLOB)[0][1].type == Type.UNKNOWN
    assert blob_hello(gateway).body["durable"] == 0
    gateway.say(chunk(1))
    gateway.say(chunk(2))
    gateway.bye(2, BLOB)
    assert [c.type for _, c in gateway.commit()] == [Type.BYE_ACK]


def test_a_chunk_of_a_wrong_length_is_not_taken(gateway: Gateway) -> None:
    """A chunk that cannot be right moves nothing and is counted."""
    blob_hello(gateway)
    gateway.say(frames.data(SESSION, BLOB, 1, 1, b"short"))
    assert gateway.commit()[0][1].body["durable"] == 0
    assert list(gateway.peers.counts) == ["bad blob: a chunk of the wrong length"]


def test_everyone_who_logged_a_file_is_told_of_it(gateway: Gateway) -> None:
    """Two records of one content share the bytes, and each gets its entry; one that comes when
    the file is there already gets it at once."""
    blob_hello(gateway, A, 7)
    blob_hello(gateway, B, 9)
    gateway.say(chunk(1))
    gateway.say(chunk(2))
    gateway.bye(2, BLOB)
    gateway.commit()
    gateway.peers.tick(gateway.now)
    assert blob_hello(gateway, A, 12).body["durable"] == 2
    gateway.bye(2, BLOB)
    assert [c.type for _, c in gateway.commit()] == [Type.BYE_ACK]
    assert [(of, media) for of, media, _, _ in blobs(gateway)] == [(A, 7), (B, 9), (A, 12)]


def test_a_disk_that_cannot_sync_a_file_gets_it_again(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the last sync of a file fails, nobody knows what is on the disk: it is thrown away,
    not acknowledged, and sent again from its first byte."""
    disk = OsDisk()
    monkeypatch.setattr(gateway, "disk", disk)
    failing = [True]

    def sync(fd: int) -> None:
        if failing:
            raise OSError(5, "Input/output error")
        os.fdatasync(fd)

    monkeypatch.setattr(disk, "sync", sync)
    blob_hello(gateway)
    gateway.say(chunk(1))
    gateway.say(chunk(2))
    [(_, answer)] = gateway.bye(2, BLOB)
    assert answer.type == Type.UNKNOWN
    assert gateway.commit() == []
    assert not Path(f"{blob_path(gateway.root / 'r', SHA)}.part").exists()
    failing.clear()
    assert blob_hello(gateway).body["durable"] == 0
    gateway.say(chunk(1))
    gateway.say(chunk(2))
    gateway.bye(2, BLOB)
    assert [c.type for _, c in gateway.commit()] == [Type.BYE_ACK]
    assert blobs(gateway) == [(A, 7, SHA, len(CONTENT))]


def test_a_chunk_without_room_comes_again(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk that the disk has no room for is not acknowledged and stops all data; when there
    is room the sender is told where to go on."""
    disk = OsDisk()
    monkeypatch.setattr(gateway, "disk", disk)
    blob_hello(gateway)
    gateway.commit()
    monkeypatch.setattr(disk, "write_at", lambda fd, piece, at: len(piece) - 1)
    gateway.say(chunk(1))
    [(_, told)] = gateway.commit()
    assert (told.body["durable"], told.body["full"]) == (0, "disk")
    monkeypatch.undo()
    gateway.peers.room.full = False
    [(_, told)] = gateway.commit()
    assert told.body["back"] == 1
    gateway.say(chunk(1))
    gateway.say(chunk(2))
    gateway.bye(2, BLOB)
    assert [c.type for _, c in gateway.commit()] == [Type.BYE_ACK]


def test_two_streams_never_write_one_file(gateway: Gateway) -> None:
    """Another stream that announces a file on its way, or it with another size, is refused."""
    blob_hello(gateway)
    other = gateway.hello(b"g" * 16, kind="blob", sha256=SHA, size=len(CONTENT))
    assert (other.type, other.body["code"]) == (Type.REJECT, "stream")
    size = gateway.hello(BLOB, kind="blob", sha256=SHA, size=5)
    assert (size.type, size.body["code"]) == (Type.REJECT, "stream")


# --- files, by another thread --------------------------------------------------------------------


class Later:
    """Jobs that are carried out when a test says so, as another thread would."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.jobs: list[Job] = []
        gateway.work = self.jobs.append
        gateway.start(SESSION)

    def run(self, n: int = 99) -> list[Control]:
        out: list[tuple[bytes, bytes]] = []
        for job in self.jobs[:n]:
            job.run()
            self.gateway.peers.done(self.gateway.now, job, out)
        del self.jobs[:n]
        return [frames.read_control(frame) for _, frame in out]


def announce(gateway: Gateway) -> list[tuple[bytes, Control]]:
    body = {"v": [1, 1], "run": "r", "kind": "blob", "of": A, "media": 7, "nonce": b"n"}
    body |= {"sha256": SHA, "size": len(CONTENT)}
    return gateway.say(frames.control(Type.HELLO, 0, BLOB, body))


def test_a_file_is_welcomed_when_it_is_open(gateway: Gateway) -> None:
    """While what there is of a file is read again, its HELLO has no answer; a repetition makes no
    second job, and the one answer goes to the last of them."""
    later = Later(gateway)
    assert announce(gateway) == announce(gateway) == []
    assert [job.verb for job in later.jobs] == ["open"]
    assert gateway.say(chunk(1)) == []
    assert gateway.peers.counts == {"chunk of a file not taken": 1}
    [welcome] = later.run()
    assert (welcome.type, welcome.body["durable"], welcome.body["nonce"]) == (Type.WELCOME, 0, b"n")


def test_chunks_are_acknowledged_when_they_are_written(gateway: Gateway) -> None:
    """Chunks are taken while earlier ones wait for the disk, acknowledged as they get there, and
    BYE is answered only when the file is whole and its entry committed."""
    later = Later(gateway)
    announce(gateway)
    later.run()
    gateway.commit()
    assert gateway.say(chunk(1)) == gateway.say(chunk(2)) == []
    assert gateway.commit() == []
    later.run(1)
    assert [c.body["durable"] for _, c in gateway.commit()] == [1]
    gateway.bye(2, BLOB)
    assert gateway.bye(2, BLOB) == []
    assert [job.verb for job in later.jobs] == ["write", "finish"]
    later.run(1)
    assert [c.type for _, c in gateway.commit()] == [Type.ACK]
    later.run()
    assert [c.type for _, c in gateway.commit()] == [Type.BYE_ACK]
    assert blobs(gateway) == [(A, 7, SHA, len(CONTENT))]


def test_records_are_acknowledged_while_a_file_waits(gateway: Gateway) -> None:
    """However long the disk works on a file, other streams get their acknowledgements."""
    later = Later(gateway)
    announce(gateway)
    gateway.hello(A)
    gateway.data(1, 3)
    assert [(c.stream, c.body["durable"]) for _, c in gateway.commit()] == [(A, 3)]
    assert later.jobs


def test_after_a_chunk_that_failed_the_next_ones_come_again(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk that was handed over behind one that could not be written is not taken for the one
    that is missing, in whatever order they come again."""
    later = Later(gateway)
    announce(gateway)
    later.run()
    with monkeypatch.context() as patch:
        patch.setattr(gateway.disk, "write_at", lambda *_: 0, raising=False)
        gateway.say(chunk(1))
        gateway.say(chunk(2))
        later.run(1)
    gateway.peers.room.full = False
    gateway.say(chunk(1))
    later.run()
    gateway.say(chunk(1))
    gateway.say(chunk(2))
    later.run()
    gateway.say(chunk(2))
    gateway.bye(2, BLOB)
    later.run()
    gateway.commit()
    assert blob_path(gateway.root / "r", SHA).read_bytes() == CONTENT


def test_what_peers_send_of_files_is_held_only_so_far(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks beyond the queue's limit are not taken, whoever ignores credit; they come again."""
    monkeypatch.setattr(peers, "QUEUED_TOP_BYTES", CHUNK_BYTES)
    later = Later(gateway)
    announce(gateway)
    later.run()
    gateway.say(chunk(1))
    gateway.say(chunk(2))
    assert len(later.jobs) == 1
    later.run()
    gateway.say(chunk(2))
    assert len(later.jobs) == 1
    later.run()


def test_a_job_of_a_forgotten_file_changes_nothing(gateway: Gateway) -> None:
    """When a file is given up while the disk works on it, its end is of no interest, and a second
    announcement begins anew behind it."""
    later = Later(gateway)
    announce(gateway)
    later.run()
    gateway.say(chunk(1))
    gateway.peers.forget("r")
    assert [job.verb for job in later.jobs] == ["write", "close"]
    announce(gateway)
    [welcome] = later.run()
    assert welcome.body["durable"] == 1
    assert gateway.peers.streams[BLOB].file.taken == 1


# --- against the real client ---------------------------------------------------------------------


def test_client_and_gateway_understand_each_other(gateway: Gateway) -> None:
    """The client's session and this gateway carry a stream to its end, past a restart."""
    source = ToySource(last=40)
    session = ClientSession(A, lambda: {"run": "r", "kind": "live", "rank": 0}, source, lambda: 0.5)
    now = 0.0
    while session.state != "closed":
        now += 0.05
        assert now < 60
        if source.last < 80:
            source.last += 1
        else:
            session.end({"status": "completed"})
        if 1.0 < now < 1.05:
            gateway.start(SESSION + 1)
        for data in session.tick(now):
            out: list[tuple[bytes, bytes]] = []
            gateway.peers.receive(int(now * 1e9), PEER, data, out)
            for _, reply in out:
                session.receive(now, reply)
        for journal in gateway.journals.values():
            journal.commit()
        for _, reply in gateway.peers.committed():
            session.receive(now, reply)
    gateway.commit()
    assert high_waters(gateway.entries()) == {A: 80}
    assert gateway.kinds()[-1] == Kind.BYE
    assert not session.journal_changed


# --- whatever they say ---------------------------------------------------------------------------

ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=4)
    | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
FIELDS = st.sampled_from(
    ["v", "run", "kind", "first", "last", "final", "status", "sha256", "size", "of", "media", "t"]
)
GOOD = {"v": [1, 1], "run": "r", "kind": "live", "first": 1}


@pytest.fixture(scope="module")
def a_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("root")


@settings(max_examples=150, deadline=None)
@given(
    talk=st.lists(
        st.tuples(
            st.sampled_from([Type.HELLO, Type.PING, Type.BYE, Type.ACK, Type.DRAIN]),
            st.dictionaries(FIELDS, ANYTHING, max_size=4),
            st.booleans(),
        ),
        max_size=6,
    )
)
def test_nothing_a_peer_says_stops_the_gateway(
    a_root: Path, talk: list[tuple[Type, dict[str, Any], bool]]
) -> None:
    """Any control messages, in any order, raise nothing, and what was written down can be read
    by the next life of the gateway."""
    gateway = Gateway(a_root)
    gateway.hello(B)
    for type_, body, good in talk:
        body = {**body, **GOOD} if good else body
        gateway.say(frames.control(type_, SESSION, A, body))
        gateway.commit()
        gateway.peers.tick(gateway.now)
    for run, disk in gateway.disks.items():
        assert not make(disk.copy()).damage, run
        for entry in gateway.entries(run):
            unpack_map(bytes(entry.body))
    gateway.data(1, stream=B)
    assert gateway.commit()[-1][1].body["durable"] == 1
