"""The contract of a sink (`gateway/sinks/base.py`), held against every sink there is."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from gateway.rules.follow import rebuild
from gateway.sinks.base import Item, Memory, Refused, Rows, RunInfo, Sent, Sink, Unavailable
from gateway.sinks.loop import FETCH_RECORDS
from gateway.sinks.retry import TOP_SECONDS
from tests.build import RunBuilder

from .backends import BACKENDS, Backend, Legacy, Neptune, Platform, Twin, build_run, standing
from .lives import Lives

pytestmark = [  # the vendor's configuration reader uses old names of pyparsing
    pytest.mark.filterwarnings("ignore::DeprecationWarning:clearml.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:pyparsing.*"),
]


@pytest.fixture(params=BACKENDS, ids=lambda made: made.name)
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backend]:
    with standing(request.param, tmp_path / "backend") as found:
        yield found


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return build_run(tmp_path)


class Between:
    """Between the loop and a sink; a subclass goes wrong on purpose."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink

    @property
    def stop_asked(self) -> str:
        return self.sink.stop_asked

    def open(self, run: RunInfo, memory: Memory) -> None:
        self.sink.open(run, memory)

    def send(self, batch: Sequence[Item], again: bool) -> Sent:
        return self.sink.send(batch, again)

    def close(self, state: str, reason: str) -> Sent:
        return self.sink.close(state, reason)


def has_point(batch: Sequence[Item], key: str, step: int) -> bool:
    return any(isinstance(i, Rows) and key in i.columns and step in i.step for i in batch)


def test_a_whole_run_arrives_once(backend: Backend, run_dir: Path) -> None:
    """Points, lines, params, files and the final state; the sums of the accounting identity."""
    with Lives(backend, run_dir) as lives:
        lives.finish()
        lives.assert_arrived()
        assert lives.view().maybe_duplicate == 0


def test_open_is_idempotent(backend: Backend, run_dir: Path) -> None:
    """Three lives that only opened leave one run behind."""
    with Lives(backend, run_dir) as lives:
        for _ in range(2):
            lives.loop._sink.open(lives.loop._info, lives.store)
            lives.again()
        lives.finish()
        lives.assert_arrived()
        assert backend.have().runs == 1


def test_close_is_idempotent(backend: Backend, run_dir: Path) -> None:
    """Closed, and opened and closed once more by another life: nothing is told twice."""
    with Lives(backend, run_dir) as lives:
        lives.finish()
        lives.again()
        lives.finish()
        lives.assert_arrived()


def test_a_death_before_the_receipt_doubles_nothing(backend: Backend, run_dir: Path) -> None:
    """Everything is delivered, the process dies with the answer in its hands, and delivers again:
    what a backend cannot tell is counted."""
    if isinstance(backend, Twin):
        pytest.skip("the twin keeps no record of its own to read back")

    class Dies(Between):
        dead = False

        def send(self, batch: Sequence[Item], again: bool) -> Sent:
            sent = super().send(batch, again)
            if not Dies.dead:
                Dies.dead = True
                raise SystemExit
            return sent

    with Lives(backend, run_dir, Dies) as lives:
        with pytest.raises(SystemExit):
            lives.finish()
        lives.again()
        lives.finish()
        lives.assert_arrived()


def test_one_refused_item_is_kept_aside(backend: Backend, run_dir: Path) -> None:
    """The batch is halved down to the point; the rest arrives, and the point is told of."""

    class Picky(Between):
        def send(self, batch: Sequence[Item], again: bool) -> Sent:
            if has_point(batch, "train/loss", 12):
                raise Refused("not this one")
            return super().send(batch, again)

    with Lives(backend, run_dir, Picky) as lives:
        lives.finish()
        have, want = backend.have(), backend.want()
        want.points.pop(("train/loss", 12, 3.25), None)
        assert have.lost(want) == []
        assert have.doubled(want) == []
        assert lives.view().quarantined == 1
        lives.assert_accounted()


def test_an_outage_is_waited_out(backend: Backend, run_dir: Path) -> None:
    """Forty failures: the waits grow to the top and no further, and then everything arrives."""

    class Away(Between):
        left = 40

        def send(self, batch: Sequence[Item], again: bool) -> Sent:
            if Away.left:
                Away.left -= 1
                raise Unavailable("away")
            return super().send(batch, again)

    with Lives(backend, run_dir, Away) as lives:
        lives.finish()
        assert TOP_SECONDS / 2 <= lives.longest_seconds <= TOP_SECONDS
        assert lives.waited_seconds > 3600
        lives.assert_arrived()


def test_a_vendors_own_error_is_an_outage(backend: Backend, run_dir: Path) -> None:
    """Whatever a package raises, and wherever: it is tried again."""

    class Raises(Between):
        faults: ClassVar = ["open", "send", "close"]

        def _fault(self, where: str) -> None:
            if where in self.faults:
                self.faults.remove(where)
                raise ZeroDivisionError(where)

        def open(self, run: RunInfo, memory: Memory) -> None:
            self._fault("open")
            super().open(run, memory)

        def send(self, batch: Sequence[Item], again: bool) -> Sent:
            self._fault("send")
            return super().send(batch, again)

        def close(self, state: str, reason: str) -> Sent:
            self._fault("close")
            return super().close(state, reason)

    with Lives(backend, run_dir, Raises) as lives:
        lives.finish()
        assert Raises.faults == []
        lives.assert_arrived()


def test_a_rebuilt_series_is_not_sent_twice(backend: Backend, run_dir: Path) -> None:
    """Half of the run is delivered; the series is made anew from the journal; nothing repeats."""
    with Lives(backend, run_dir, HalfAtFirst) as lives:
        HalfAtFirst.cut = True
        with pytest.raises(SystemExit):
            lives.finish()
        lives.reader.close()
        for path in run_dir.glob("series.db*"):
            path.unlink()
        rebuild(run_dir)
        lives.again()
        lives.finish()
        if isinstance(backend, Twin):
            lives.assert_accounted()
        else:
            lives.assert_arrived()


class HalfAtFirst(Between):
    """Dies after the first half of a batch."""

    cut = False

    def send(self, batch: Sequence[Item], again: bool) -> Sent:
        if HalfAtFirst.cut:
            HalfAtFirst.cut = False
            super().send(batch[: len(batch) // 2], again)
            raise SystemExit
        return super().send(batch, again)


def test_a_quiet_minute_changes_nothing(backend: Backend, run_dir: Path) -> None:
    """The empty batch that comes while nothing is to be sent is no item and no duplicate."""
    with Lives(backend, run_dir) as lives:
        lives.loop._sink.open(lives.loop._info, lives.store)
        for _ in range(2):
            sent = lives.loop._sink.send([], False)
            assert (sent.delivered, sent.skipped) == (0, {})
        lives.finish()
        lives.assert_arrived()


OFFLINE = [made for made in BACKENDS if made is not Twin]


@pytest.mark.parametrize("made", OFFLINE, ids=lambda made: made.name)
def test_an_export_accounts_for_every_item(made: Any, tmp_path: Path, run_dir: Path) -> None:
    """Offline the same contract holds: all is dealt with, one refused item is kept aside."""

    class Picky(Between):
        def send(self, batch: Sequence[Item], again: bool) -> Sent:
            if has_point(batch, "train/loss", 12):
                raise Refused("not this one")
            return super().send(batch, again)

    with standing(made, tmp_path / "backend") as backend:
        with Lives(backend, run_dir, Picky, offline=True) as lives:
            lives.finish()
            assert lives.view().quarantined == 1
            lives.assert_accounted()
        assert any((tmp_path / "backend").rglob("*"))


def test_a_long_outage_costs_disk_and_not_memory(tmp_path: Path) -> None:
    """200,000 records wait: each batch stays bounded, and so does what the loop holds."""
    made = RunBuilder(tmp_path, "run-1")
    rank = made.rank(0)
    for step in range(200_000):
        rank.log({"loss": 0.5}, step=step)
    rank.end()
    run_dir = made.close()
    sizes: list[int] = []

    class Counts(Between):
        def send(self, batch: Sequence[Item], again: bool) -> Sent:
            sizes.append(sum(i.items for i in batch))
            if len(sizes) < 20:
                raise Unavailable("away")
            return Sent(delivered=sizes[-1])

    with standing(Twin, tmp_path / "backend") as backend, Lives(backend, run_dir, Counts) as lives:
        lives.step()
        tracemalloc.start()
        lives.finish()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert max(sizes) < 2 * FETCH_RECORDS
        assert peak < 8 << 20
        lives.assert_accounted()


def test_the_table_of_backends_is_whole() -> None:
    """Every built-in sink is in the suite, HUB with both of its protocols."""
    assert {made.kind for made in BACKENDS} == {"memory", "jsonl", "clearml", "neptune", "hub"}
    assert {Platform, Legacy, Neptune} <= set(BACKENDS)
