"""Deferred values: a device's numbers are waited for by nobody, and none is lost silently."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rank_client.deferred import MAX_PENDING, Deferral
from rank_client.rows import Rows
from rank_client.spool import Spool
from rank_client.wire.records import Kind
from tests.rank_client.read import Written, on_disk


class Tensor:
    """A number on a device. Reading it there would wait, so that is an error here."""

    class device:  # noqa: N801
        type = "cuda"

    def __init__(self, value: Any, elements: int = 1) -> None:
        self.value = value
        self._elements = elements

    def numel(self) -> int:
        return self._elements

    def item(self) -> Any:
        raise AssertionError("would wait for the device")

    __float__ = __int__ = item


class Device:
    """Copies that are ready when their event is set; asking never waits."""

    def __init__(self) -> None:
        self.events: list[bool] = []
        self.broken = False

    def begin(self, tensors: list[Any]) -> tuple[Callable[[], bool], Callable[[], list[Any]]]:
        number = len(self.events)
        self.events.append(False)
        values = [t.value for t in tensors]

        def ready() -> bool:
            if self.broken:
                raise RuntimeError("CUDA error: device-side assert triggered")
            return self.events[number]

        return ready, lambda: values


class Rank:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.device = Device()
        self.warned: list[str] = []
        self.spool = Spool(str(directory), {})
        self.rows = Rows(
            self.spool,
            lambda what, text: self.warned.append(what),
            Deferral(self.device.begin),
        )

    def rows_written(self) -> list[Written]:
        return [w for w in on_disk(self.directory) if w.kind == Kind.ROW]


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[Rank]:
    rank = Rank(tmp_path)
    yield rank
    rank.spool.close()


def test_a_value_on_a_device_is_written_when_it_is_there(rank: Rank) -> None:
    """Until the event is set nothing is written; then the row is, with its other values."""
    rank.rows.log({"a": 1.0, "loss": Tensor(2.5)}, 3)
    assert rank.rows.settle() == 1
    assert rank.rows_written() == []
    rank.device.events[0] = True
    assert rank.rows.settle() == 0
    [row] = rank.rows_written()
    assert (row.step, row.values) == (3, {"a": 1.0, "loss": 2.5})


def test_later_plain_calls_do_not_wait(rank: Rank) -> None:
    """A plain call after a deferred one is written at once, and numbers follow the writing."""
    rank.rows.log({"loss": Tensor(1.0)}, 0)
    rank.rows.log({"a": 1.0}, 1)
    assert [w.step for w in rank.rows_written()] == [1]
    rank.device.events[0] = True
    rank.rows.settle()
    assert [(w.seq, w.step) for w in rank.rows_written()] == [(1, 1), (2, 0)]


def test_step_and_time_are_those_of_the_call(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deferred row has the step and the wall time of its call, not of its writing."""
    monkeypatch.setattr("rank_client.rows.time_ns", lambda: 1000)
    rank.rows.log({"loss": Tensor(1.0)}, None)
    monkeypatch.setattr("rank_client.rows.time_ns", lambda: 2000)
    rank.rows.log({"a": 1.0}, None)
    rank.device.events[0] = True
    rank.rows.settle()
    assert [(w.step, w.wall_ns) for w in rank.rows_written()] == [(1, 2000), (0, 1000)]


def test_ready_calls_are_written_oldest_first(rank: Rank) -> None:
    """Of several calls that are ready the oldest is written first; one that is not holds back
    no other."""
    for step in range(4):
        rank.rows.log({"loss": Tensor(float(step))}, step)
    rank.device.events[1:] = [True] * 3
    assert rank.rows.settle() == 1
    rank.device.events[0] = True
    rank.rows.settle()
    assert [w.step for w in rank.rows_written()] == [1, 2, 3, 0]


def test_too_many_pending_calls_are_refused_and_counted(rank: Rank) -> None:
    """At most 64 calls wait; further ones are refused, counted and warned of once."""
    for step in range(MAX_PENDING + 3):
        rank.rows.log({"loss": Tensor(1.0)}, step)
    assert rank.rows.settle() == MAX_PENDING
    assert rank.spool.refused == {"too many device values pending": 3}
    rank.device.events = [True] * MAX_PENDING
    assert rank.rows.settle() == 0
    assert [w.step for w in rank.rows_written()] == list(range(MAX_PENDING))
    assert set(rank.warned) == {"too many device values pending"}


def test_what_never_came_is_counted_at_exit(rank: Rank) -> None:
    """Calls whose values are not there at exit are refused, each one counted."""
    for step in range(3):
        rank.rows.log({"loss": Tensor(1.0)}, step)
    rank.device.events[1] = True
    rank.rows.settle()
    rank.rows.abandon()
    assert rank.spool.refused == {"device value not ready at exit": 2}
    assert rank.rows.settle() == 0
    assert [w.step for w in rank.rows_written()] == [1]


def test_a_tensor_of_several_elements_is_a_bad_value(rank: Rank) -> None:
    """A device tensor that is no single number is left out without being looked at."""
    rank.rows.log({"a": 1.0, "big": Tensor(0, elements=5)}, 0)
    assert rank.device.events == []
    assert [w.values for w in rank.rows_written()] == [{"a": 1.0}]
    assert rank.spool.bad_values == 1


def test_a_value_that_turns_out_bad_is_left_out(rank: Rank) -> None:
    """A value that is no number when it arrives is counted, the rest of the call is kept."""
    rank.rows.log({"a": 1.0, "z": Tensor(1j), "n": Tensor(2)}, 0)
    rank.device.events[0] = True
    rank.rows.settle()
    assert [w.values for w in rank.rows_written()] == [{"a": 1.0, "n": 2}]
    assert rank.spool.bad_values == 1


def test_a_device_that_fails_loses_only_its_own_values(rank: Rank) -> None:
    """When asking the device raises, its values are counted as bad, the host's values of the same
    calls are kept, and later calls are logged as ever."""
    rank.rows.log({"a": 1.0, "loss": Tensor(1.0)}, 0)
    rank.rows.log({"loss": Tensor(1.0)}, 1)
    rank.device.broken = True
    assert rank.rows.settle() == 0
    rank.rows.log({"b": 2.0}, 2)
    assert [w.values for w in rank.rows_written()] == [{"a": 1.0}, {"b": 2.0}]
    assert rank.spool.bad_values == 2
    assert rank.spool.refused == {"no good value": 1}
