"""Scalars by step become values by epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.sinks.base import Rows
from gateway.sinks.hub.epochs import NOT_LAST, NOT_WHOLE, OpenEpochs

A, B = b"a" * 16, b"b" * 16


def rows(
    seqs: Sequence[int], columns: Mapping[str, Sequence[Any]], rank: int = 0, stream: bytes = A
) -> Rows:
    seq = np.array(seqs, dtype=np.int64)
    return Rows(stream, rank, seq, seq, seq, {k: np.array(v) for k, v in columns.items()})


def test_last_value_up_to_and_with_the_closing_row() -> None:
    """An epoch gets each key's last value up to its closing row, that row's own values included."""
    taken = OpenEpochs().take(
        [
            rows([1, 2, 4], {"loss": [3.0, 2.0, 1.0]}),
            rows([3, 5], {"epoch": [0, 1], "map": [0.1, 0.2]}),
        ]
    )
    assert taken.closed[0].values == {"loss": 2.0, "map": 0.1}
    assert taken.closed[1].values == {"loss": 1.0, "map": 0.2}
    assert taken.closed[0].points == taken.closed[1].points == 3
    assert taken.skipped == {NOT_LAST: 1}


def test_order_of_key_sets_does_not_matter() -> None:
    """Key sets of one stream are put in sequence, whichever comes first in a batch."""
    parts = [rows([3, 6], {"epoch": [0, 1]}), rows([1, 2, 5], {"x": [1, 2, 5]})]
    for batch in (parts, parts[::-1]):
        taken = OpenEpochs().take(batch)
        assert {e: c.values for e, c in taken.closed.items()} == {0: {"x": 2}, 1: {"x": 5}}


def test_rows_after_the_closing_row_stay_for_the_next_epoch() -> None:
    """A value later than a closing row is not in that row's epoch, even if it came first."""
    epochs = OpenEpochs()
    epochs.take([rows([1, 9], {"x": [1.0, 9.0]})])
    first = epochs.take([rows([5], {"epoch": [0]})])
    assert first.closed[0].values == {}
    assert epochs.take([rows([10], {"epoch": [1]})]).closed[1].values == {"x": 9.0}


def test_open_values_survive_a_dump() -> None:
    """What is open after a dump and a load is what was open before."""
    epochs = OpenEpochs()
    epochs.take([rows([1], {"x": [1.0], "n": [2**60]})])
    again = OpenEpochs(epochs.dump())
    assert again.points == 2
    assert again.take([rows([2], {"epoch": [7]})]).closed[7].values == {"x": 1.0, "n": 2**60}


def test_each_stream_closes_its_own_epochs() -> None:
    """Rank 3 that lags behind does not lose its values to rank 0's epoch."""
    epochs = OpenEpochs()
    taken = epochs.take(
        [
            rows([1, 2], {"x": [1.0, 2.0], "epoch": [0, 1]}),
            rows([1], {"x": [30.0]}, rank=3, stream=B),
        ]
    )
    assert [closed.values for closed in taken.closed.values()] == [{"x": 1.0}, {"x": 2.0}]
    assert epochs.points == 1
    late = epochs.take([rows([2], {"epoch": [0]}, rank=3, stream=B)])
    assert late.closed[0].values == {"rank3/x": 30.0}


def test_a_repeated_epoch_keeps_the_later_value() -> None:
    """An epoch that is closed twice has the later values, and the earlier are counted."""
    taken = OpenEpochs().take([rows([1, 2], {"epoch": [4, 4], "x": [1.0, 2.0]})])
    assert taken.closed[4].values == {"x": 2.0}
    assert (taken.closed[4].points, taken.skipped) == (3, {NOT_LAST: 1})


def test_only_whole_numbers_close() -> None:
    """A fraction, a negative number or NaN under `epoch` closes nothing and is counted."""
    epochs = OpenEpochs()
    taken = epochs.take([rows([1, 2, 3, 4], {"epoch": [0.5, -1.0, math.nan, 1e300], "x": [1] * 4})])
    assert not taken.closed
    assert taken.skipped == {NOT_WHOLE: 4, NOT_LAST: 3}
    assert epochs.take([rows([5], {"epoch": [2.0]})]).closed[2].values == {"x": 1}


def test_bool_columns_become_numbers() -> None:
    """A bool has no place among metrics, so it is 0 or 1."""
    taken = OpenEpochs().take([rows([1], {"epoch": [0], "ok": [True]})])
    assert type(taken.closed[0].values["ok"]) is int


EVENTS = st.lists(
    st.tuples(
        st.sampled_from([(A, 0), (B, 3)]),
        st.one_of(st.sampled_from("xyz"), st.integers(0, 3)),
        st.booleans(),
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(EVENTS)
def test_agrees_with_going_row_by_row(
    events: list[tuple[tuple[bytes, int], str | int, bool]],
) -> None:
    """Batches cut anywhere give what going row by row gives, and all points are counted."""
    epochs, closed, delivered, skipped, total = OpenEpochs(), {}, 0, 0, 0
    plain: dict[bytes, dict[str, float]] = {}
    expected: dict[int, dict[str, float]] = {}
    batch: list[Rows] = []
    for seq, ((stream, rank), what, cut) in enumerate(events, start=1):
        prefix = f"rank{rank}/" if rank else ""
        total += 1
        if isinstance(what, int):
            batch.append(rows([seq], {"epoch": [what]}, rank, stream))
            expected.setdefault(what, {}).update(plain.pop(stream, {}))
        else:
            batch.append(rows([seq], {what: [float(seq)]}, rank, stream))
            plain.setdefault(stream, {})[prefix + what] = float(seq)
        if cut or seq == len(events):
            taken = epochs.take(batch[::-1])
            epochs = OpenEpochs(epochs.dump())
            for epoch, one in taken.closed.items():
                closed.setdefault(epoch, {}).update(one.values)
                delivered += one.points
            skipped += sum(taken.skipped.values())
            batch = []
    assert {e: v for e, v in closed.items() if v} == {e: v for e, v in expected.items() if v}
    assert delivered + skipped + epochs.points == total
