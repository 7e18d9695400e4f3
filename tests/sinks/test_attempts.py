"""A backend that keeps one value of a name and step has the newest attempt's, however they came."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from gateway.series.reader import Reader
from gateway.sinks.attempts import OLDER, SENT, NewestSink
from gateway.sinks.base import Item, Rows, Sent, Unavailable
from gateway.sinks.loop import Loop
from gateway.sinks.memory import MemorySink
from gateway.sinks.process import run_info
from gateway.sinks.retry import Backoff
from gateway.sinks.store import SinkView, Store, read_view
from tests.build import RankBuilder, RunBuilder


def deliver(run_dir: Path, sink: MemorySink, lives: int = 1) -> SinkView:
    """What there is so far; the sink's process begins anew so often."""
    path = run_dir / "sinks" / "memory.db"
    for _ in range(lives):
        store = Store(path)
        with Reader(run_dir) as reader:
            wrapped = NewestSink(sink, reader)
            loop = Loop(reader, store, wrapped, run_info(reader), Backoff(lambda: 0.0))
            for _ in range(10):
                loop.step()
                if loop.done:
                    break
            passed = sum(n for k, n in reader.about().counters.items() if k.startswith("passed "))
        store.close()
    view = read_view(path)
    assert view.delivered + sum(view.skipped.values()) + view.quarantined == passed
    return view


def kept(sink: MemorySink) -> dict[tuple[str, int], float]:
    """What a backend has that replaces values by name and step."""
    return {
        (key, step): float(value)
        for item in sink.received
        if isinstance(item, Rows)
        for key, values in item.columns.items()
        for step, value in zip(item.step.tolist(), values.tolist(), strict=True)
    }


def newer(made: RunBuilder, old: RankBuilder) -> RankBuilder:
    """The second attempt, steps 2 to 5, which found the first one's spool on its node."""
    rank = made.rank(0, restart=1, earlier=[old.stream])
    for step in range(2, 6):
        rank.log({"loss": 100.0 + step}, step=step)
    return rank.flush()


def older(rank: RankBuilder) -> RankBuilder:
    """The first attempt: steps 0 to 3, and a key of its own."""
    for step in range(4):
        rank.log({"loss": float(step)}, step=step).log({"lr": 0.5}, step=step)
    return rank.log({"loss": 0.0, "val": 9.0}, step=2)


WANT = {
    **{("loss", step): float(step) for step in (0, 1)},
    **{("loss", step): 100.0 + step for step in range(2, 6)},
    **{("lr", step): 0.5 for step in range(4)},
    ("val", 2): 9.0,
}


@pytest.mark.parametrize("at_once", [False, True])
def test_what_is_left_of_an_older_attempt_replaces_nothing(tmp_path: Path, at_once: bool) -> None:
    """Points of steps that a newer attempt has are skipped, those of others arrive; whether a
    batch holds both attempts or the sink was begun anew in between."""
    made = RunBuilder(tmp_path, "r1")
    first = made.rank(0)
    second = newer(made, first)
    sink = MemorySink()
    if not at_once:
        deliver(made.close(), sink)
    older(first).end()
    second.end()
    view = deliver(made.close(), sink)
    assert kept(sink) == WANT
    assert view.skipped == {OLDER: 3}


def test_in_their_order_nothing_is_skipped(tmp_path: Path) -> None:
    """Attempts that come one after the other replace by themselves: all is handed on."""
    made = RunBuilder(tmp_path, "r1")
    first = older(made.rank(0)).flush()
    newer(made, first).end()
    first.end()
    sink = MemorySink()
    assert deliver(made.close(), sink).skipped == {}
    assert kept(sink) == WANT


def test_other_ranks_are_other_series(tmp_path: Path) -> None:
    """Only attempts of the same rank replace each other."""
    made = RunBuilder(tmp_path, "r1")
    for rank in made.ranks(2):
        rank.log({"loss": float(rank.rank)}, step=0)
    for rank in made.lives:
        rank.end()
    with Reader(made.close()) as reader:
        streams = [(s.rank, s.id) for s in reader.streams()]
        wrapped = NewestSink(MemorySink(), reader)
        assert all(wrapped._newer(rows, set(streams)) == [] for rows in _rows(reader))


def _rows(reader: Reader) -> list[Rows]:
    sink = MemorySink()
    store = Store(reader.run_dir / "sinks" / "all.db")
    Loop(reader, store, sink, run_info(reader), Backoff(lambda: 0.0)).step()
    store.close()
    found = [item for item in sink.received if isinstance(item, Rows)]
    assert found
    return found


def test_a_call_that_fails_remembers_nothing(tmp_path: Path) -> None:
    """What was not confirmed is not known to be there."""

    class Away(MemorySink):
        def send(self, batch: Sequence[Item], again: bool) -> Sent:
            raise Unavailable("away")

    made = RunBuilder(tmp_path, "r1")
    first = made.rank(0)
    newer(made, first).end()
    run_dir = made.close()
    with Reader(run_dir) as reader:
        store = Store(run_dir / "sinks" / "memory.db")
        Loop(
            reader, store, NewestSink(Away(), reader), run_info(reader), Backoff(lambda: 0.0)
        ).step()
        assert store.get(SENT) is None
        store.close()
