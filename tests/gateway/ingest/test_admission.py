"""Admission: only known keys come in, only to their run, and each defence is seen to be there."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from gateway.ingest import admission
from gateway.ingest.admission import (
    AllowList,
    Gatekeeper,
    Guarded,
    Unguarded,
    self_test,
    server_public,
    wrong_run,
)
from gateway.ingest.journals import RunStore
from gateway.ingest.peers import Peers
from gateway.ingest.sockets import bind, guard
from rank_client.link import Link
from rank_client.wire import frames
from rank_client.wire.frames import Code, Type
from rank_client.wire.keys import ANY_RUN, BadKey, Key, write_keyfile
from tests.flow.job import free_port

KEY = Key(b"k" * 32)
STREAM = b"s" * 16


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Guarded]:
    made = Guarded(bind([]), KEY, tmp_path)
    yield made
    made.router.context.destroy(0)


@pytest.fixture
def links() -> Iterator[Callable[..., Link]]:
    made: list[Link] = []

    def link(*arguments: Any, **options: Any) -> Link:
        made.append(Link(*arguments, **options))
        return made[-1]

    yield link
    for one in made:
        one.close()


def bound(guarded: Guarded) -> str:
    """Listen on a free port; the address."""
    guarded.router.bind("tcp://127.0.0.1:*")
    return str(guarded.router.get_string(zmq.LAST_ENDPOINT))


def peers(tmp_path: Path) -> Peers:
    return Peers(7, RunStore(tmp_path / "data"), 1 << 20, lambda _: False)


def hello(run: str, stream: bytes = STREAM) -> bytes:
    body = {"v": [1, 1], "run": run, "kind": "live", "first": 1, "rank": 0}
    return frames.control(Type.HELLO, 0, stream, body)


def take(guarded: Guarded, known: Peers, seconds: float = 30.0) -> list[bytes]:
    """The next message that comes in, with the gatekeeper at work; [] when none does, or the
    peers have counted one as refused."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not known.counts:
        guarded.gatekeeper.answer()
        try:
            return guarded.receive(known)
        except zmq.Again:
            time.sleep(0.005)
    return []


def send(link: Link, frame: bytes, guarded: Guarded) -> None:
    deadline = time.monotonic() + 30
    while not link.send(frame):
        assert time.monotonic() < deadline, "nobody lets us in"
        guarded.gatekeeper.answer()
        time.sleep(0.005)


def answer(link: Link) -> frames.Control:
    assert link.wait(30)
    return frames.read_control(link.receive()[0])


# --- the self-test -------------------------------------------------------------------------------


def test_a_guarded_socket_passes_its_own_test(guarded: Guarded) -> None:
    """Our key is let in, another and none are refused, in much less than the time allowed."""
    before = time.monotonic()
    self_test(guarded, bound(guarded))
    assert time.monotonic() - before < admission.SELF_TEST_SECONDS / 2


def test_without_allow_list_the_test_fails(guarded: Guarded) -> None:
    """A gatekeeper that knows every key is found out."""
    guarded.gatekeeper._run_of = lambda _: ANY_RUN
    with pytest.raises(Unguarded, match="an unknown key was let in"):
        self_test(guarded, bound(guarded))


def test_without_gatekeeper_nobody_comes_in(guarded: Guarded) -> None:
    """With the ZAP handler gone the socket fails closed: even the right key is refused."""
    guarded.gatekeeper.socket.unbind(admission.ZAP_ADDRESS)
    with pytest.raises(Unguarded, match="the right key was refused"):
        self_test(guarded, bound(guarded))


def test_without_gatekeeper_and_enforcement_the_test_fails(guarded: Guarded) -> None:
    """libzmq alone lets every key in when nobody answers its question; that is found out."""
    guarded.gatekeeper.socket.unbind(admission.ZAP_ADDRESS)
    guarded.router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 0)
    with pytest.raises(Unguarded, match="an unknown key was let in"):
        self_test(guarded, bound(guarded))


def test_a_gatekeeper_that_is_stuck_is_found_out(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When nobody answers in time, we do not serve."""
    monkeypatch.setattr(admission, "SELF_TEST_SECONDS", 0.3)
    monkeypatch.setattr(Gatekeeper, "answer", lambda _: None)
    with pytest.raises(Unguarded, match="the right key was not answered"):
        self_test(guarded, bound(guarded))


def test_without_encryption_the_test_fails(tmp_path: Path) -> None:
    """A plain socket under the same name lets in who has no key, and is found out."""
    router = bind([])
    open_door = Guarded(bind([]), KEY, tmp_path)
    router.bind("tcp://127.0.0.1:*")
    with pytest.raises(Unguarded):
        self_test(open_door, router.get_string(zmq.LAST_ENDPOINT))
    router.context.destroy(0)
    open_door.router.context.destroy(0)


def test_the_gateway_does_not_serve_a_door_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`guard` runs the test on each address before anything is served."""
    monkeypatch.setattr(AllowList, "run_of", lambda *_: ANY_RUN)
    with pytest.raises(Unguarded):
        guard(tmp_path, ["ipc:///nowhere", f"tcp://127.0.0.1:{free_port()}"], KEY)


# --- who comes in --------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["another secret", "another client key", "no key"])
def test_a_stranger_sends_nothing(
    guarded: Guarded, links: Callable[..., Link], tmp_path: Path, what: str
) -> None:
    """Neither a message nor a place in a queue: the link says that it is refused."""
    key = {
        "another secret": Key(b"x" * 32),
        "another client key": Key(b"x" * 32, server=server_public(KEY)),
        "no key": None,
    }[what]
    link = links(bound(guarded), key, watched=True)
    deadline = time.monotonic() + 30
    while not link.refused():
        assert time.monotonic() < deadline
        assert not link.send(hello("r1"))
        guarded.gatekeeper.answer()
        time.sleep(0.005)
    assert take(guarded, peers(tmp_path), 0.1) == []


def test_a_refusal_at_the_first_moment_is_told(
    guarded: Guarded, links: Callable[..., Link], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However slow the process is to ask for events: libzmq never tries again after this one."""
    watch = zmq.Socket.get_monitor_socket

    def slow(socket: zmq.Socket[bytes], *arguments: Any) -> zmq.Socket[bytes]:
        time.sleep(0.3)  # a handshake takes a millisecond
        return watch(socket, *arguments)

    monkeypatch.setattr(zmq.Socket, "get_monitor_socket", slow)
    link = links(bound(guarded), None, watched=True)
    deadline = time.monotonic() + 30
    while not link.refused():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_known_key_is_let_in_and_answered(
    guarded: Guarded, links: Callable[..., Link], tmp_path: Path
) -> None:
    """The frame arrives as it was sent, under a peer's name that leads back to its sender."""
    link = links(bound(guarded), KEY)
    send(link, hello("r1"), guarded)
    peer, frame = take(guarded, peers(tmp_path))
    assert frame == hello("r1")
    assert peer.startswith(admission.PEER_PREFIX)
    guarded.send(peer, frames.control(Type.PONG, 7, STREAM, {}))
    assert answer(link).type == Type.PONG
    assert not link.refused()


def test_a_key_of_one_run_opens_no_other(
    guarded: Guarded, links: Callable[..., Link], tmp_path: Path
) -> None:
    """HELLO for another run is answered with REJECT and counted, and never gets to the peers."""
    mine = Key(b"m" * 32, "mine", server_public(KEY))
    write_keyfile(tmp_path / "mine.key", mine)
    guarded.gatekeeper._run_of = AllowList(KEY, tmp_path, time.monotonic).run_of
    known = peers(tmp_path)
    link = links(bound(guarded), mine)
    send(link, hello("yours"), guarded)
    assert take(guarded, known) == []
    told = answer(link)
    assert (told.type, told.stream) == (Type.REJECT, STREAM)
    assert (told.body["code"], told.body["fatal"]) == (Code.KEY, True)
    assert "run mine only" in told.body["text"]
    assert known.counts == {"refused: the key is for another run": 1}
    known.counts.clear()
    send(link, hello("mine"), guarded)
    assert take(guarded, known)[1] == hello("mine")


def test_a_key_of_one_run_touches_no_stream_of_another(tmp_path: Path) -> None:
    """Every kind of frame for a stream of another run is refused, not only HELLO."""
    known = peers(tmp_path)
    known.receive(1, b"peer", hello("theirs"), [])
    data = frames.data(7, STREAM, 1, 1, b"x" * 32)
    bye = frames.control(Type.BYE, 7, STREAM, {"final": 0})
    for frame in (data, bye, hello("theirs"), hello("mine")):
        assert "run mine only" in wrong_run(known, frame, "mine")
        if frame != hello("mine"):
            assert wrong_run(known, frame, "theirs") == ""
    for junk in (b"", b"x", b"RG\x01\x01" + b"x" * 60):
        assert wrong_run(known, junk, "mine") == ""  # the peers count it as what it is


def test_new_keys_count_at_once_and_removed_ones_no_more(tmp_path: Path) -> None:
    """Keyfiles come and go while the gateway runs; one that is bad harms no other."""
    now = [0.0]
    listed = AllowList(KEY, tmp_path, lambda: now[0])
    mine = Key(b"m" * 32, "mine", server_public(KEY))
    public = admission._client_public(mine)
    assert listed.run_of(public) is None
    write_keyfile(tmp_path / "b.key", mine)
    (tmp_path / "a.key").write_text("junk")
    now[0] += 2
    assert listed.run_of(public) == "mine"
    assert listed.run_of(admission._client_public(KEY)) == ANY_RUN
    (tmp_path / "b.key").unlink()
    now[0] += 2
    assert listed.run_of(public) is None


def test_a_rewritten_run_in_a_keyfile_is_another_key(tmp_path: Path) -> None:
    """Who writes another run into his copy of a keyfile has a key that nobody knows."""
    write_keyfile(tmp_path / "a.key", Key(b"m" * 32, "mine", server_public(KEY)))
    listed = AllowList(KEY, tmp_path, time.monotonic)
    forged = Key(b"m" * 32, "yours", server_public(KEY))
    assert listed.run_of(admission._client_public(forged)) is None


def test_a_gateway_does_not_take_a_key_of_ranks(tmp_path: Path) -> None:
    """A keyfile made for one run at another gateway is not what a gateway serves with."""
    router = bind([])
    with pytest.raises(BadKey, match="for the ranks of one run"):
        Guarded(router, Key(b"m" * 32, "mine", server_public(KEY)), tmp_path)
    router.context.destroy(0)


# --- the gatekeeper ------------------------------------------------------------------------------


def ask(*parts: bytes, run_of: Callable[[bytes], str | None]) -> list[bytes]:
    """What a gatekeeper says to a question as libzmq, or something else, would put it."""
    context: zmq.Context[Any] = zmq.Context()
    try:
        gatekeeper = Gatekeeper(context, run_of)
        asking = context.socket(zmq.REQ)
        asking.connect(admission.ZAP_ADDRESS)
        for _ in range(2):  # it goes on after whatever it was asked
            asking.send_multipart(parts)
            assert gatekeeper.socket.poll(5000)
            gatekeeper.answer()
            assert asking.poll(5000)
            said = asking.recv_multipart()
        return said
    finally:
        context.destroy(0)


GOOD = (b"1.0", b"1", b"rankgate", b"127.0.0.1", b"", b"CURVE", os.urandom(32))


def test_a_known_key_is_told_its_run() -> None:
    """200, with the run as the connection's user id."""
    assert ask(*GOOD, run_of=lambda _: "r1") == [b"1.0", b"1", b"200", b"OK", b"r1", b""]


@pytest.mark.parametrize("at", range(7))
def test_a_question_that_is_not_ours_is_denied(at: int) -> None:
    """Another version, domain or mechanism, or a part too few or too many: 400."""
    known = lambda _: "r1"  # noqa: E731
    if at in (0, 2, 5):
        assert ask(*GOOD[:at], b"other", *GOOD[at + 1 :], run_of=known)[2] == b"400"
    assert ask(*GOOD[: at + 1], b"more", *GOOD[at + 1 :], run_of=known)[2] == b"400"
    if at:
        assert ask(*GOOD[:at], run_of=known)[2] == b"400"


def test_an_error_while_judging_denies() -> None:
    """Whatever goes wrong inside, nobody is let in, and the next is answered."""

    def run_of(_: bytes) -> str:
        raise OSError("no such disk")

    assert ask(*GOOD, run_of=run_of)[2] == b"400"
