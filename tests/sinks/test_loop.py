"""The loop around every sink: retries, splitting, quarantine, receipts, and no item twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import apsw
import pytest

from gateway.rules.follow import Follower, rebuild
from gateway.series.reader import Reader
from gateway.series.tables import FeedEntry
from gateway.sinks.base import Item, Media, Off, Refused, Rows, Sent, Unavailable
from gateway.sinks.loop import DEADLY, FILES_SECONDS, KEEP_ALIVE_SECONDS, Loop
from gateway.sinks.memory import MemorySink
from gateway.sinks.process import run_info
from gateway.sinks.retry import TOP_SECONDS, Backoff, asked_seconds
from gateway.sinks.store import Store, read_view
from rank_client.wire.records import Kind
from tests.build import RunBuilder

Point = tuple[str, int, float]


def points(items: Sequence[Item]) -> Counter[Point]:
    return Counter(
        (key, step, float(value))
        for item in items
        if isinstance(item, Rows)
        for key, values in item.columns.items()
        for step, value in zip(item.step.tolist(), values.tolist(), strict=True)
    )


def builder(tmp_path: Path, steps: int = 30) -> RunBuilder:
    made = RunBuilder(tmp_path, "r1")
    for rank in made.ranks(2):
        rank.params({"lr": 0.1})
        for step in range(steps):
            rank.log({"loss": step + 0.5, "lr": 0.1}, step=step)
            if step % 10 == 9:
                rank.log({"acc": step / 100}, step=step).flush()
        rank.text("done").media("best.pt", b"weights", what="checkpoint")
        rank.end()
    return made


def want(steps: int = 30) -> Counter[Point]:
    rows = [("loss", s, s + 0.5) for s in range(steps)] + [("lr", s, 0.1) for s in range(steps)]
    return Counter(rows + [("acc", s, s / 100) for s in range(9, steps, 10)])


class Driven:
    """A loop on a run, with the sink's memory on disk; `again` begins a new life of it."""

    def __init__(self, run_dir: Path, sink: MemorySink) -> None:
        self.run_dir = run_dir
        self.sink = sink
        self.path = run_dir / "sinks" / "memory.db"
        self.open()

    def open(self) -> None:
        self.store = Store(self.path)
        self.reader = Reader(self.run_dir)
        info = run_info(self.reader)
        self.loop = Loop(self.reader, self.store, self.sink, info, Backoff(lambda: 0.0))

    def close(self) -> None:
        self.reader.close()
        self.store.close()

    def run(self) -> None:
        for _ in range(100):
            self.loop.step()
            if self.loop.done or self.loop.off:
                return
        raise AssertionError("the loop does not end")

    def check(self) -> None:
        """delivered + skipped + quarantined = what the rules passed."""
        view = read_view(self.path)
        passed = sum(
            n for name, n in self.reader.about().counters.items() if name.startswith("passed ")
        )
        assert view.delivered + sum(view.skipped.values()) + view.quarantined == passed


def test_everything_that_passed_is_delivered_once(tmp_path: Path) -> None:
    """Rank 0's items, in order, then the run's end."""
    driven = Driven(builder(tmp_path).close(), MemorySink())
    driven.run()
    assert points(driven.sink.received) == want()
    assert {item.rank for item in driven.sink.received} == {0}
    assert driven.sink.closed == [("completed", "")]
    driven.check()


def test_an_unavailable_backend_gets_the_same_batch_again(tmp_path: Path) -> None:
    """After a failure the batch comes again, marked so, and nothing is delivered twice."""
    sink = MemorySink()
    sink.faults = [Unavailable("503"), ConnectionError("cut"), Unavailable("429", 7.0)]
    driven = Driven(builder(tmp_path).close(), sink)
    waits = [driven.loop.step() for _ in range(3)]
    assert waits[2] >= 7.0
    assert read_view(driven.path).state == "retrying"
    driven.run()
    assert points(sink.received) == want()
    assert sink.again[0] is True
    driven.check()


class Picky(MemorySink):
    """Refuses every batch that holds one certain point."""

    def send(self, batch: Sequence[Item], again: bool) -> Sent:
        if ("loss", 13, 13.5) in points(batch):
            raise Refused("not this one")
        return super().send(batch, again)


def test_one_bad_point_is_kept_aside_and_the_rest_goes_on(tmp_path: Path) -> None:
    """A refused batch is halved down to the point, which is quarantined with its reason."""
    driven = Driven(builder(tmp_path).close(), Picky())
    driven.run()
    assert points(driven.sink.received) == want() - Counter([("loss", 13, 13.5)])
    assert read_view(driven.path).quarantined == 1
    [(what, reason)] = driven.store.db.execute("SELECT what, reason FROM quarantine").fetchall()
    assert what == "loss step 13 rank 0"
    assert reason == "not this one"
    driven.check()


def test_a_sink_that_cannot_work_here_says_why(tmp_path: Path) -> None:
    """Off ends the loop, with the text for people."""
    sink = MemorySink()
    sink.faults = [Off("no key: set KEY")]
    driven = Driven(builder(tmp_path).close(), sink)
    driven.run()
    assert driven.loop.off == "no key: set KEY"
    view = read_view(driven.path)
    assert (view.state, view.reason) == ("off", "no key: set KEY")


@pytest.mark.parametrize("rebuilt", [False, True])
def test_a_new_life_sends_nothing_twice(tmp_path: Path, rebuilt: bool) -> None:
    """After a restart, and after the series was built anew, only what is new is sent."""
    made = RunBuilder(tmp_path, "r1")
    rank = made.rank(0)
    for step in range(10):
        rank.log({"loss": float(step)}, step=step)
    driven = Driven(made.close(), MemorySink())
    for _ in range(3):
        driven.loop.step()
    driven.close()
    for step in range(10, 20):
        rank.log({"loss": float(step)}, step=step)
    rank.end()
    made.close()
    if rebuilt:
        for path in driven.run_dir.glob("series.db*"):
            path.unlink()
        rebuild(driven.run_dir)
    driven.open()
    driven.run()
    assert points(driven.sink.received) == Counter(("loss", s, float(s)) for s in range(20))
    driven.check()


@pytest.mark.parametrize("rebuilt", [False, True])
def test_changed_rules_send_nothing_twice(tmp_path: Path, rebuilt: bool) -> None:
    """Rules that let more through, then less, change what is sent from there on; what was sent
    under the rules before is not sent again, in whatever build of the series."""
    made = RunBuilder(tmp_path, "r1")
    first, second = made.ranks(2)
    driven: Driven | None = None
    everybody = {"name": "everybody", "kinds": ["metric"], "ranks": "all"}
    nobody = {"name": "nobody", "kinds": ["metric"], "ranks": []}
    for number, rules in enumerate(([], [everybody], [nobody])):
        if rules:
            made.entry(Kind.RULES, {"rules": rules})
        for rank in (first, second):
            rank.log({f"loss{rank.rank}": float(number)}, step=number).flush()
        if number == 2:
            first.end()
            second.end()
        run_dir = made.close()
        if driven is None:
            driven = Driven(run_dir, MemorySink())
        else:
            driven.close()
            if rebuilt:
                for path in run_dir.glob("series.db*"):
                    path.unlink()
                rebuild(run_dir)
            driven.open()
        for _ in range(5):
            driven.loop.step()
    assert driven is not None
    driven.run()
    want = [("loss0", 0, 0.0), ("loss0", 1, 1.0), ("loss1", 1, 1.0)]
    assert points(driven.sink.received) == Counter(want)
    driven.check()


def test_a_death_between_delivery_and_receipt_is_told_to_the_sink(tmp_path: Path) -> None:
    """The batch of an intent without a receipt comes again, marked so."""

    class Killed(MemorySink):
        def send(self, batch: Sequence[Item], again: bool) -> Sent:
            super().send(batch, again)
            raise SystemExit  # the process dies with the answer in its hands

    sink = Killed()
    driven = Driven(builder(tmp_path).close(), sink)
    with pytest.raises(SystemExit):
        driven.loop.step()
    driven.close()
    driven.sink = MemorySink()
    driven.open()
    driven.run()
    assert driven.sink.again[0] is True
    assert points(driven.sink.received) == want()
    driven.check()


def test_what_came_after_a_death_waits_for_the_batch_in_doubt(tmp_path: Path) -> None:
    """The very same batch comes again: its requests must be those that may have been answered."""

    class Killed(MemorySink):
        def send(self, batch: Sequence[Item], again: bool) -> Sent:
            super().send(batch, again)
            raise SystemExit

    made = RunBuilder(tmp_path, "r1")
    rank = made.rank(0).text("before")
    sink = Killed()
    driven = Driven(made.close(), sink)
    with pytest.raises(SystemExit):
        driven.loop.step()
    driven.close()
    rank.params({"lr": 0.1}).text("after").end()
    made.close()
    second = driven.sink = MemorySink()
    driven.open()
    driven.loop.step()
    assert (second.received, second.again) == (sink.received, [True])
    driven.run()
    assert second.again == [True, False]
    driven.check()


def test_a_receipt_that_finds_no_room_leaves_its_batch_in_doubt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the sink's own disk is full after a delivery, the loop lives on, and the batch comes
    again marked as one that may be there."""
    driven = Driven(builder(tmp_path).close(), MemorySink())
    note = driven.store.note

    def full(**_: object) -> None:
        raise apsw.FullError("database or disk is full")

    def no_retry_noted(**values: object) -> None:
        full() if values.get("state") == "retrying" else note(**values)

    with monkeypatch.context() as no_room:
        no_room.setattr(driven.store, "receipt", full)
        no_room.setattr(driven.store, "note", no_retry_noted)
        assert driven.loop.step() > 0
        assert driven.sink.again == [False]
    driven.run()
    assert driven.sink.again[:2] == [False, True]
    driven.check()


def test_waits_grow_to_five_minutes_and_never_end() -> None:
    """Doubling, less up to a half by chance; what the backend asks for is the least."""
    backoff = Backoff(lambda: 0.0)
    waits = [backoff.next_seconds() for _ in range(20)]
    assert waits[:3] == [0.5, 1.0, 2.0]
    assert waits[-1] == TOP_SECONDS
    assert backoff.next_seconds(1000.0) == 1000.0
    backoff.reset()
    assert backoff.next_seconds() == 0.5
    assert Backoff(lambda: 0.5).next_seconds() == 0.375


def test_retry_after_is_read_in_both_its_forms() -> None:
    """Seconds, or a date; anything else is left to our own growing waits."""
    at = 1_445_412_480.0
    assert asked_seconds(" 120 ", at) == 120.0
    assert asked_seconds("Wed, 21 Oct 2015 07:28:30 GMT", at) == 30.0
    assert asked_seconds("Wed, 21 Oct 2015 07:27:00 GMT", at) == 0.0
    assert [asked_seconds(text, at) for text in ("", "soon", "-5", "nan")] == [None] * 4


def test_nothing_to_deliver_for_a_minute_still_calls_the_sink(tmp_path: Path) -> None:
    """So that it can say that the run lives; what it held before gets a receipt."""

    class Holding(MemorySink):
        def send(self, batch: Sequence[Item], again: bool) -> Sent:
            super().send(batch, again)
            return Sent(delivered=0 if batch else 1)

    made = RunBuilder(tmp_path, "r1")
    made.rank(0).log({"loss": 0.5}, step=0)
    driven = Driven(made.close(), Holding())
    waited = 0.0
    while waited < 1.5 * KEEP_ALIVE_SECONDS:
        waited += driven.loop.step()
    assert driven.sink.again == [False, False]
    assert read_view(driven.path).delivered == 1


def ended_before_its_file(tmp_path: Path) -> tuple[Driven, Callable[[], None]]:
    """A run at its end whose last file is still on its way, and what makes it arrive."""
    made = RunBuilder(tmp_path, "r1")
    rank = made.rank(0).media("best.pt", b"", what="checkpoint", arrives=False)
    number = rank.last
    rank.end(bye=False)

    def arrive() -> None:
        rank.arrive(number, b"weights")
        made.journal.commit()
        made.journal.mark()
        follower = Follower(made.path)
        while follower.step():
            pass
        follower.close()

    return Driven(made.close(), MemorySink()), arrive


def test_a_backends_run_is_open_until_the_last_file_is_here(tmp_path: Path) -> None:
    """A rank tells its end before its last files are sent; closed then, the backend's run would be
    opened again for them."""
    driven, arrive = ended_before_its_file(tmp_path)
    waited = 0.0
    while waited < FILES_SECONDS / 2:
        waited += driven.loop.step()
    assert not driven.sink.closed
    arrive()
    driven.run()
    assert [type(item) for item in driven.sink.received] == [Media]
    assert driven.sink.closed == [("completed", "")]
    driven.check()


def test_a_file_that_never_comes_does_not_keep_a_run_open(tmp_path: Path) -> None:
    """Its rank's node may be gone; it is waited for as long as its rank would have."""
    driven, _ = ended_before_its_file(tmp_path)
    waited = 0.0
    while not driven.loop.done:
        waited += driven.loop.step()
        assert waited < FILES_SECONDS + 1
    assert waited >= FILES_SECONDS
    assert driven.sink.closed == [("completed", "")]


def test_items_that_come_with_the_end_are_delivered_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last point and the end arrive just after the loop found nothing more in the feed."""
    made = RunBuilder(tmp_path, "r1")
    rank = made.rank(0).log({"loss": 0.5}, step=0)
    driven = Driven(made.close(), MemorySink())
    driven.loop.step()
    look = driven.loop._fetch

    def look_just_before() -> tuple[list[FeedEntry], list[Item]]:
        found = look()
        if not rank.ended:
            rank.log({"loss": 1.5}, step=1).end()
            made.journal.commit()
            made.journal.mark()
            follower = Follower(made.path)
            while follower.step():
                pass
            follower.close()
        return found

    monkeypatch.setattr(driven.loop, "_fetch", look_just_before)
    received = driven.sink.received
    monkeypatch.setattr(
        driven.sink, "close", lambda *_: Sent() if len(received) == 2 else pytest.fail("too early")
    )
    driven.run()
    driven.check()


class Deadly(MemorySink):
    """Ends its process whenever a certain point is delivered."""

    def send(self, batch: Sequence[Item], again: bool) -> Sent:
        if ("loss", 13, 13.5) in points(batch):
            raise SystemExit
        return super().send(batch, again)


def test_a_point_that_ends_every_process_is_kept_aside(tmp_path: Path) -> None:
    """Life after life the batch is halved, until it is known which point it is."""
    driven = Driven(builder(tmp_path).close(), Deadly())
    lives = 1
    while not driven.loop.done:
        try:
            driven.run()
        except SystemExit:
            lives += 1
            driven.close()
            driven.open()
    assert lives < 30  # the halvings, and those that end in that point
    delivered = set(points(driven.sink.received))  # all of it: this sink cannot read back
    assert delivered == set(want()) - {("loss", 13, 13.5)}
    [(what, reason)] = driven.store.db.execute("SELECT what, reason FROM quarantine").fetchall()
    assert what == "loss step 13 rank 0"
    assert "processes in a row ended" in reason
    driven.check()


def test_a_few_deaths_keep_nothing_aside(tmp_path: Path) -> None:
    """A process killed in the middle of one and the same item is no proof against that item."""
    made = RunBuilder(tmp_path, "r1")
    made.rank(0).log({"loss": 13.5}, step=13).end()
    driven = Driven(made.close(), Deadly())
    for _ in range(DEADLY - 1):
        with pytest.raises(SystemExit):
            driven.run()
        driven.close()
        driven.open()
    assert read_view(driven.path).state == "retrying"
    driven.sink = MemorySink()
    driven.close()
    driven.open()
    driven.run()
    assert points(driven.sink.received) == Counter([("loss", 13, 13.5)])
    assert read_view(driven.path).quarantined == 0
