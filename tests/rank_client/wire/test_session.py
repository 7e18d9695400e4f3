"""The client's session against a toy gateway: nothing lost or doubled, whatever the link does."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rank_client.wire import frames
from rank_client.wire.frames import Control, Type
from rank_client.wire.records import Kind, pack, walk
from rank_client.wire.session import CLOCK_SAMPLES, SILENT_SECONDS, ClientSession

STREAM = b"s" * 16


class ToySource:
    """Text records in memory, a few in each frame."""

    def __init__(self, last: int = 0, size: int = 8, a_frame: int = 3) -> None:
        self.first_kept = 1
        self.last = last
        self.size = size
        self.a_frame = a_frame

    def record(self, number: int) -> bytes:
        return pack(Kind.TEXT, number, bytes(self.size))

    def read(self, first: int, max_bytes: int) -> tuple[int, bytes]:
        if first < self.first_kept:
            return 0, b""
        numbers = range(first, min(first + self.a_frame, self.last + 1))
        return len(numbers), b"".join(map(self.record, numbers))


class ToyGateway:
    """Accepts what follows what it has; acknowledges at once. `session` is of one life of it."""

    def __init__(self, credit: int = 1 << 20, journal: bytes = b"j1") -> None:
        self.session = 1
        self.journal = journal
        self.credit = credit
        self.have: list[int] = []
        self.hellos: list[dict[str, Any]] = []
        self.byes: list[dict[str, Any]] = []
        self.pings: list[dict[str, Any]] = []
        self.mute = False

    @property
    def high(self) -> int:
        return self.have[-1] if self.have else 0

    def answer(self, frame: bytes) -> list[bytes]:
        if self.mute:
            return []
        if frames.type_of(frame) == Type.DATA:
            return self._data(frame)
        type_, session, _, body = frames.read_control(frame)
        if type_ == Type.HELLO:
            self.hellos.append(body)
            return [self.welcome(body)]
        if session != self.session:
            return [self.say(Type.UNKNOWN)]
        if type_ == Type.PING:
            self.pings.append(body)
            return [self.say(Type.PONG, durable=self.high)]
        assert type_ == Type.BYE
        self.byes.append(body)
        return [self.say(Type.BYE_ACK, durable=self.high)] if self.high >= body["final"] else []

    def _data(self, frame: bytes) -> list[bytes]:
        head = frames.read_data(frame)
        if head.session != self.session:
            return [self.say(Type.UNKNOWN)]
        if head.first != self.high + 1:
            return [self.say(Type.ACK, durable=self.high, back=self.high + 1)]
        numbers = [h.seq for h in walk(frame[frames.DATA_HEAD_BYTES :])]
        assert numbers == list(range(head.first, head.first + head.n))
        self.have += numbers
        return [self.say(Type.ACK, durable=self.high)]

    def welcome(self, hello: dict[str, Any]) -> bytes:
        nonce = hello["nonce"]
        return self.say(Type.WELCOME, durable=self.high, journal=self.journal, nonce=nonce)

    def say(self, type_: Type, **body: Any) -> bytes:
        body = {"credit": self.credit, **body}
        return frames.control(type_, self.session, STREAM, body)


def a_session(source: ToySource) -> ClientSession:
    return ClientSession(STREAM, lambda: {"run": "r"}, source, lambda: 0.5)


def talk(session: ClientSession, gateway: ToyGateway, now: float, rounds: int = 20) -> float:
    """A perfect link, until nobody says anything more."""
    for _ in range(rounds):
        out = session.tick(now)
        if not out:
            break
        for frame in out:
            for reply in gateway.answer(frame):
                session.receive(now, reply)
        now += 0.01
    return now


def types(out: list[bytes]) -> list[int]:
    return [frames.type_of(f) for f in out]


def controls(out: list[bytes], type_: Type) -> Iterator[Control]:
    return (frames.read_control(f) for f in out if frames.type_of(f) == type_)


# --- a bad link ----------------------------------------------------------------------------------


class BadLink:
    """Drops, doubles, delays and so reorders frames, both ways."""

    def __init__(self, rng: random.Random, drop: float, double: float, delay: float) -> None:
        self.rng = rng
        self.drop, self.double, self.delay = drop, double, delay
        self.queue: list[tuple[float, int, bool, bytes]] = []
        self.count = 0

    def put(self, now: float, to_gateway: bool, frame: bytes) -> None:
        for _ in range(1 + (self.rng.random() < self.double)):
            if self.rng.random() >= self.drop:
                self.count += 1
                due = now + self.rng.random() * self.delay
                self.queue.append((due, self.count, to_gateway, frame))

    def due(self, now: float) -> list[tuple[bool, bytes]]:
        ready = sorted(q for q in self.queue if q[0] <= now)
        self.queue = [q for q in self.queue if q[0] > now]
        return [(to_gateway, frame) for _, _, to_gateway, frame in ready]


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    drop=st.sampled_from([0.0, 0.1, 0.3]),
    double=st.sampled_from([0.0, 0.3]),
    delay=st.sampled_from([0.0, 0.1, 2.0]),
    restarts=st.integers(0, 3),
)
def test_everything_arrives_once_and_in_order(
    seed: int, drop: float, double: float, delay: float, restarts: int
) -> None:
    """Over a link that drops, doubles and reorders, past restarts of the gateway, every record
    arrives once, in order, and the session ends."""
    rng = random.Random(seed)
    source, gateway = ToySource(), ToyGateway(credit=rng.choice([200, 1 << 20]))
    session, link = a_session(source), BadLink(rng, drop, double, delay)
    now, total = 0.0, 60
    restart_at = sorted(rng.uniform(0, 5) for _ in range(restarts))
    while session.state != "closed":
        now += 0.05
        assert now < 1000, "no end in sight"
        if source.last < total and rng.random() < 0.5:
            source.last += 1
        elif source.last == total:
            session.end({"status": "completed"})
        if restart_at and now > restart_at[0]:
            restart_at.pop(0)
            gateway.session += 1
        for frame in session.tick(now):
            link.put(now, True, frame)
        for to_gateway, frame in link.due(now):
            if to_gateway:
                for reply in gateway.answer(frame):
                    link.put(now, False, reply)
            else:
                session.receive(now, frame)
        assert session.durable <= gateway.high
    assert gateway.have == list(range(1, total + 1))
    assert not session.journal_changed


# --- one rule each -------------------------------------------------------------------------------


def test_hello_says_what_there_is_and_is_repeated() -> None:
    """HELLO tells the first and last number kept, and is said again, ever more slowly."""
    source = ToySource(last=7)
    session = a_session(source)
    [hello] = session.tick(0.0)
    body = frames.read_control(hello).body
    assert (body["first"], body["last"], body["run"]) == (1, 7, "r")
    times = [t / 10 for t in range(400) if session.tick(t / 10)]
    waits = [b - a for a, b in pairwise(times)]
    assert waits == sorted(waits)
    assert 4 < waits[-1] <= 6.5


def test_nothing_is_sent_before_a_welcome() -> None:
    """Without an answer to HELLO no data leaves."""
    session = a_session(ToySource(last=7))
    assert all(set(types(session.tick(t / 10))) <= {Type.HELLO} for t in range(100))


def test_sending_starts_after_what_the_gateway_has() -> None:
    """After WELCOME the first frame carries the number that follows `durable`."""
    source, gateway = ToySource(last=9), ToyGateway()
    gateway.have = [1, 2, 3, 4]
    session = a_session(source)
    talk(session, gateway, 0.0)
    assert gateway.have == list(range(1, 10))
    assert session.idle


def test_credit_is_respected() -> None:
    """No frame starts while as many bytes as the gateway's credit are unacknowledged."""
    source = ToySource(last=1000, size=100, a_frame=1)
    size = len(source.record(1))
    gateway = ToyGateway(credit=4 * size)
    session = a_session(source)
    [hello] = session.tick(0.0)
    [welcome] = gateway.answer(hello)
    session.receive(0.0, welcome)
    out = [f for f in session.tick(0.0) if frames.type_of(f) == Type.DATA]
    assert len(out) == 4
    assert session.blocked
    assert Type.DATA not in types(session.tick(0.1))
    session.receive(0.2, gateway.answer(out[0])[0])
    assert types(session.tick(0.2)).count(Type.DATA) == 1


def test_credit_zero_stops_and_credit_again_goes_on() -> None:
    """A gateway that is full stops the data by credit 0, and a later answer lets it go on."""
    source, gateway = ToySource(last=3), ToyGateway(credit=0)
    session = a_session(source)
    now = talk(session, gateway, 0.0)
    assert gateway.have == []
    gateway.credit = 1000
    talk(session, gateway, now + 5.1)
    assert gateway.have == [1, 2, 3]


def test_a_refused_frame_makes_the_session_go_back_at_once() -> None:
    """An answer that names the number the gateway wants is followed without waiting, and only
    once for a burst of refusals."""
    source, gateway = ToySource(last=9), ToyGateway()
    session = a_session(source)
    session.receive(0.0, gateway.answer(session.tick(0.0)[0])[0])
    out = [f for f in session.tick(0.0) if frames.type_of(f) == Type.DATA]
    for frame in out[1:]:  # the first was lost
        session.receive(0.01, gateway.answer(frame)[0])
    again = [f for f in session.tick(0.01) if frames.type_of(f) == Type.DATA]
    assert again == out
    assert session.resent_total == 9


def test_what_was_acknowledged_after_a_go_back_is_not_sent_again() -> None:
    """An acknowledgement that comes after a go-back moves the session on, so that records the
    gateway has can never use up its credit."""
    source = ToySource(last=6, a_frame=1)
    gateway = ToyGateway(credit=4 * len(source.record(1)))
    session = a_session(source)
    session.receive(0.0, gateway.answer(session.tick(0.0)[0])[0])
    answers = [gateway.answer(f)[0] for f in session.tick(0.0) if frames.type_of(f) == Type.DATA]
    session.receive(0.1, gateway.say(Type.ACK, durable=0, back=1))
    for answer in answers:
        session.receive(0.1, answer)
    talk(session, gateway, 0.2)
    assert gateway.have == [1, 2, 3, 4, 5, 6]
    assert session.idle


def test_without_an_answer_data_is_sent_again() -> None:
    """When no answer comes within the time-out, everything unacknowledged is sent again, and the
    time-out doubles."""
    source, gateway = ToySource(last=3), ToyGateway()
    session = a_session(source)
    session.receive(0.0, gateway.answer(session.tick(0.0)[0])[0])
    sent = [t / 10 for t in range(80) if Type.DATA in types(session.tick(t / 10))]
    assert sent == pytest.approx([0.0, 1.0, 3.0, 7.0], abs=0.11)


def test_unknown_leads_to_hello_and_then_goes_on() -> None:
    """A gateway that was restarted says UNKNOWN; the session says HELLO and sends what is left."""
    source, gateway = ToySource(last=3), ToyGateway()
    session = a_session(source)
    now = talk(session, gateway, 0.0)
    gateway.session, source.last = 2, 6
    talk(session, gateway, now + 1)
    talk(session, gateway, now + 2)
    assert len(gateway.hellos) == 2
    assert gateway.hellos[1]["acked"] == 3
    assert gateway.hellos[1]["journal"] == b"j1"
    assert gateway.have == [1, 2, 3, 4, 5, 6]


def test_drain_stops_the_data_until_the_next_welcome() -> None:
    """A gateway that leaves says DRAIN; the session holds its data, and says HELLO after a pause,
    then ever more slowly."""
    source, gateway = ToySource(last=3), ToyGateway()
    session = a_session(source)
    now = talk(session, gateway, 0.0) + 10
    session.receive(now, gateway.say(Type.DRAIN))
    source.last = 6
    seen = [(t, types(session.tick(now + t / 10))) for t in range(200)]
    assert all(set(said) <= {Type.HELLO} for _, said in seen)
    hellos = [t / 10 for t, said in seen if said]
    assert hellos[0] >= 0.4
    waits = [b - a for a, b in pairwise(hellos)]
    assert waits == sorted(waits)
    assert len(hellos) < 8
    talk(session, gateway, now + 30)
    assert gateway.have == [1, 2, 3, 4, 5, 6]


def test_a_drain_of_an_older_life_changes_nothing() -> None:
    """A DRAIN that comes late, of a gateway life that is over, does not stop the data."""
    source, gateway = ToySource(last=3), ToyGateway()
    session = a_session(source)
    now = talk(session, gateway, 0.0)
    late = gateway.say(Type.DRAIN)
    gateway.session, source.last = 2, 4
    talk(session, gateway, now + 1)
    now = talk(session, gateway, now + 2)
    session.receive(now, late)
    assert session.state == "open"


def test_no_storm_of_hellos_whatever_is_said() -> None:
    """A gateway that says UNKNOWN to everything hears at most two HELLOs a second."""
    source, gateway = ToySource(last=3), ToyGateway()
    session = a_session(source)
    hellos = 0
    for t in range(1000):
        for frame in session.tick(t / 100):
            hellos += frames.type_of(frame) == Type.HELLO
            for reply in gateway.answer(frame):
                session.receive(t / 100, reply)
        session.receive(t / 100, gateway.say(Type.UNKNOWN))
    assert hellos <= 21


def test_a_silent_gateway_is_asked_anew() -> None:
    """After three pings without an answer the session says HELLO again."""
    source, gateway = ToySource(last=3), ToyGateway()
    session = a_session(source)
    now = talk(session, gateway, 0.0)
    gateway.mute = True
    seen = []
    while now < SILENT_SECONDS + 3:
        seen += types(session.tick(now))
        now += 0.1
    assert seen.count(Type.PING) == 3
    assert seen.count(Type.HELLO) > 0
    gateway.mute = False
    source.last = 4
    talk(session, gateway, now + 10)
    assert gateway.have == [1, 2, 3, 4]


def test_pings_carry_what_on_ping_gives() -> None:
    """Every PING carries the map of progress, and an answer keeps the session from silence."""
    gateway, session = ToyGateway(), a_session(ToySource())
    session.on_ping(lambda: {"step": 41})
    now = 0.0
    for _ in range(10):
        now = talk(session, gateway, now) + 3
    assert session.state == "open"
    assert all(p["step"] == 41 for p in gateway.pings)
    assert len(gateway.hellos) == 1


def test_bye_waits_for_the_last_acknowledgement() -> None:
    """BYE is said only when everything is acknowledged, is said again when lost, and its answer
    closes the session."""
    source, gateway = ToySource(last=3), ToyGateway()
    session = a_session(source)
    session.receive(0.0, gateway.answer(session.tick(0.0)[0])[0])
    session.end({"status": "completed"})
    out = session.tick(0.0)
    assert Type.BYE not in types(out)
    for frame in out:
        if frames.type_of(frame) == Type.DATA:
            session.receive(0.1, gateway.answer(frame)[0])
    [bye] = controls(session.tick(0.1), Type.BYE)
    assert bye.body["final"] == 3
    assert bye.body["status"] == "completed"
    assert types(session.tick(0.2)) == []
    [again] = [f for f in session.tick(1.2) if frames.type_of(f) == Type.BYE]
    session.receive(1.2, gateway.answer(again)[0])
    assert session.state == "closed"
    assert session.tick(99.0) == []


def test_another_journal_gets_everything_again_and_is_told_of() -> None:
    """A WELCOME of another journal makes the session send all it keeps, and says so."""
    source, gateway = ToySource(last=5), ToyGateway()
    session = a_session(source)
    now = talk(session, gateway, 0.0)
    assert session.durable == 5
    other = ToyGateway(journal=b"j2")
    other.session = 2
    source.last = 6
    talk(session, other, now + 1)
    talk(session, other, now + 2)
    assert other.have == [1, 2, 3, 4, 5, 6]
    assert session.journal_changed


def test_the_same_journal_with_less_than_acknowledged_is_told_of() -> None:
    """A journal that lost what it had acknowledged gets it again, and that is told."""
    source, gateway = ToySource(last=5), ToyGateway()
    session = a_session(source)
    now = talk(session, gateway, 0.0)
    gateway.session, gateway.have = 2, [1, 2]
    source.last = 6
    talk(session, gateway, now + 1)
    talk(session, gateway, now + 2)
    assert gateway.have == [1, 2, 3, 4, 5, 6]
    assert session.journal_changed


def test_a_restart_of_the_same_journal_is_no_change() -> None:
    """A restarted gateway that kept its journal raises no alarm."""
    source, gateway = ToySource(last=5), ToyGateway()
    session = a_session(source)
    now = talk(session, gateway, 0.0)
    gateway.session, source.last = 2, 6
    talk(session, gateway, now + 1)
    talk(session, gateway, now + 2)
    assert gateway.high == 6
    assert not session.journal_changed


def test_a_welcome_frees_the_credit() -> None:
    """When a restarted gateway's WELCOME tells of more than was acknowledged, the frames it has
    no longer count against the credit, and the rest is sent."""
    source = ToySource(last=4, a_frame=1)
    size = len(source.record(1))
    gateway = ToyGateway(credit=2 * size)
    session = a_session(source)
    session.receive(0.0, gateway.answer(session.tick(0.0)[0])[0])
    for frame in session.tick(0.0):
        gateway.answer(frame)  # the answers are lost with the gateway
    assert gateway.have == [1, 2]
    gateway.session = 2
    session.receive(0.1, gateway.say(Type.UNKNOWN))
    talk(session, gateway, 1.0)
    assert gateway.have == [1, 2, 3, 4]


def test_a_late_welcome_of_an_older_gateway_is_ignored() -> None:
    """A WELCOME that was said before a restart, and comes after it, changes nothing: it tells of
    less than is acknowledged by now, and would look like a journal that lost it."""
    source, gateway = ToySource(last=3), ToyGateway()
    session = a_session(source)
    [hello] = session.tick(0.0)
    [late] = gateway.answer(hello)  # durable 0
    gateway.session = 2
    [again] = session.tick(1.0)  # the same HELLO, said again to the next life
    session.receive(1.0, gateway.answer(again)[0])
    now = talk(session, gateway, 1.1)
    session.receive(now, late)
    assert (session.durable, session.state) == (3, "open")
    session.disconnected(now)
    assert session.tick(now + 1) != []
    session.receive(now + 1, late)
    assert session.state == "hello"
    assert not session.journal_changed


def test_a_late_rejection_of_an_older_gateway_is_ignored() -> None:
    """A REJECT that answers another HELLO than the last does not end the session."""
    session, gateway = a_session(ToySource(last=3)), ToyGateway()
    talk(session, gateway, 0.0)
    session.receive(1.0, gateway.say(Type.REJECT, text="no", fatal=True, nonce=b"old"))
    assert session.state == "open"


def test_a_full_gateway_is_told_apart_from_one_that_is_away() -> None:
    """`full` says why there is no credit, whichever answer tells it, until one does not."""
    session, gateway = a_session(ToySource(last=3)), ToyGateway()
    now = talk(session, gateway, 0.0)
    for full in ("disk", "quota"):
        session.receive(now, gateway.say(Type.ACK, durable=3, credit=0, full=full))
        assert session.full == full
    session.receive(now, gateway.say(Type.ACK, durable=3))
    assert session.full == ""
    rejected = gateway.say(Type.REJECT, code="full", text="x", fatal=False, retry_seconds=5)
    session.receive(now, rejected)
    assert (session.full, session.reject_code) == ("disk", "full")


def test_small_credit_makes_small_frames() -> None:
    """What is on the way is never more than twice the credit."""
    asked = []

    class Noting(ToySource):
        def read(self, first: int, max_bytes: int) -> tuple[int, bytes]:
            asked.append(max_bytes)
            return super().read(first, max_bytes)

    talk(a_session(Noting(last=9)), ToyGateway(credit=200), 0.0)
    assert set(asked) == {200}


@pytest.mark.parametrize("ahead", [-3600.0, 0.0, 0.25])
def test_the_offset_of_the_clocks_is_that_of_the_quickest_ping(ahead: float) -> None:
    """Of the last pings the one with the quickest answer tells how far the gateway's clock is
    ahead, and the next PING tells the gateway."""
    gateway, session = ToyGateway(), a_session(ToySource())
    wall = 1.7e9
    now = talk(session, gateway, 0.0)
    session.on_ping(lambda: {"wall": int((wall + now) * 1e9)})
    rng = random.Random(7)
    for n in range(2 * CLOCK_SAMPLES):
        now += 6
        [ping] = controls(session.tick(now), Type.PING)
        out, back = (0.01, 0.01) if n == CLOCK_SAMPLES + 2 else (rng.random(), rng.random())
        theirs = int((wall + now + out + ahead) * 1e9)
        pong = gateway.say(Type.PONG, durable=0, t=ping.body["t"], now=theirs)
        assert session.asked  # the sender waits for it: read late, it would tell less
        session.receive(now + out + back, pong)
        assert not session.asked
    assert session.offset_seconds == pytest.approx(ahead, abs=1e-3)
    now += 6
    [ping] = controls(session.tick(now), Type.PING)
    assert ping.body["offset"] == session.offset_seconds


def test_a_fatal_reject_ends_it_with_its_reason() -> None:
    """A fatal REJECT silences the session for good and keeps the reason."""
    session = a_session(ToySource(last=3))
    session.tick(0.0)
    session.receive(0.0, ToyGateway().say(Type.REJECT, text="no", fatal=True))
    assert (session.state, session.reject_reason) == ("rejected", "no")
    assert session.tick(99.0) == []


def test_a_passing_reject_is_asked_again_later() -> None:
    """A REJECT that is not fatal makes the session say HELLO again after the time it names."""
    session, gateway = a_session(ToySource(last=3)), ToyGateway()
    session.tick(0.0)
    session.receive(0.0, gateway.say(Type.REJECT, text="full", fatal=False, retry_seconds=7))
    assert session.tick(6.9) == []
    talk(session, gateway, 9.0)
    assert gateway.have == [1, 2, 3]


def test_a_wish_to_stop_is_kept() -> None:
    """An answer with `stop` sets the flag, and a later one without it does not take it back."""
    source, gateway = ToySource(last=1), ToyGateway()
    session = a_session(source)
    talk(session, gateway, 0.0)
    session.receive(1.0, gateway.say(Type.PONG, durable=1, stop=True))
    session.receive(1.0, gateway.say(Type.PONG, durable=1))
    assert session.stop


@given(
    st.sampled_from(list(Type)),
    st.dictionaries(
        st.sampled_from(["durable", "credit", "back", "journal", "stop", "fatal", "text"]),
        st.none() | st.integers(-5, 2**64 - 1) | st.text(max_size=3) | st.binary(max_size=3),
    ),
    st.booleans(),
)
def test_no_answer_makes_it_raise_or_lie(type_: Type, body: dict[str, Any], ours: bool) -> None:
    """Whatever a gateway says, the session raises nothing and still sends whole frames."""
    source, gateway = ToySource(last=3), ToyGateway()
    session = a_session(source)
    talk(session, gateway, 0.0)
    source.last = 6
    session.receive(1.0, frames.control(type_, 1, STREAM if ours else b"x" * 16, body))
    for frame in session.tick(2.0):
        frames.type_of(frame)
    if not ours:
        assert session.state == "open"
