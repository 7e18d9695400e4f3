"""Rows: every value that can be logged is, exactly; what cannot is counted, and said once."""

from __future__ import annotations

import enum
import math
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rank_client import rows as rows_module
from rank_client.rows import Rows
from rank_client.spool import Spool
from rank_client.wire.frames import MAX_FRAME_BYTES
from rank_client.wire.records import MAX_KEYS, MAX_SCHEMAS, Kind
from tests.rank_client.read import Written, on_disk


class Rank:
    """Rows over a real spool; `warned` is what the user was told."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.warned: list[tuple[str, str]] = []
        self.spool = Spool(str(directory), {"run": "r"})
        self.rows = Rows(self.spool, lambda what, text: self.warned.append((what, text)))
        self.log = self.rows.log

    def written(self) -> list[Written]:
        assert not self.spool.volatile
        return on_disk(self.directory)

    def values(self) -> list[dict[str, Any]]:
        return [w.values for w in self.written()]


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[Rank]:
    rank = Rank(tmp_path)
    yield rank
    rank.spool.close()


KEYS = st.text("abc/é", min_size=1, max_size=4)
VALUES = st.floats() | st.integers(-(2**63), 2**63 - 1) | st.booleans()


@settings(max_examples=50, deadline=None)
@given(calls=st.lists(st.tuples(st.dictionaries(KEYS, VALUES, min_size=1), st.integers(0, 9))))
@example(calls=[({"x": math.nan, "y": math.inf, "z": -0.0}, 1)] * 3)
@example(calls=[({"x": 2**63 - 1, "y": -(2**63)}, 1), ({"x": 2**53 + 1, "y": 0}, 2)] * 2)
def test_what_is_logged_is_what_is_written(calls: list[tuple[dict[str, Any], int]]) -> None:
    """Any calls in any order give one record each: keys in the call's order, values and types
    exact, on the first and on later calls."""
    with tempfile.TemporaryDirectory() as directory:
        rank = Rank(Path(directory))
        for values, step in calls * 2:
            rank.log(values, step)
        found = [(w.step, list(w.values), repr(w.values)) for w in rank.written()]
        rank.spool.close()
    assert found == [(step, list(values), repr(values)) for values, step in calls * 2]
    assert rank.spool.last == len(calls) * 2
    assert not rank.warned


def test_the_order_of_keys_is_part_of_the_schema(rank: Rank) -> None:
    """The same keys in another order keep each its own value."""
    rank.log({"a": 1.0, "b": 2.0}, 0)
    rank.log({"b": 3.0, "a": 4.0}, 1)
    rank.log({"a": 5.0, "b": 6.0}, 2)
    assert rank.values() == [{"a": 1.0, "b": 2.0}, {"b": 3.0, "a": 4.0}, {"a": 5.0, "b": 6.0}]
    assert len(rank.spool.schemas) == 2


def test_a_dict_that_is_changed_between_calls(rank: Rank) -> None:
    """One dict object, mutated and logged again, is logged as it is at each call."""
    values = {"a": 1.0}
    rank.log(values, 0)
    values["b"] = 2.0
    rank.log(values, 1)
    del values["a"]
    rank.log(values, 2)
    assert rank.values() == [{"a": 1.0}, {"a": 1.0, "b": 2.0}, {"b": 2.0}]


def test_a_changed_type_is_another_schema(rank: Rank) -> None:
    """A key that is now a float, now an int or a bool keeps each type."""
    for value in (1.0, 1, True, 1.0, 1):
        rank.log({"a": value}, 0)
    assert [repr(v["a"]) for v in rank.values()] == ["1.0", "1", "True", "1.0", "1"]
    assert len(rank.spool.schemas) == 3


def test_fast_and_slow_path_write_the_same(rank: Rank) -> None:
    """What a plain dict takes the fast path for, another mapping takes the slow one for, and the
    records are alike."""
    values = {"a": 1.5, "b": 2, "c": True}
    for mapping in (values, values, OrderedDict(values), MappingProxyType(values)):
        rank.log(mapping, 1)
    assert rank.values() == [values] * 4
    assert len(rank.spool.schemas) == 1


def test_numpy_and_torch_scalars(rank: Rank) -> None:
    """numpy scalars, 0-dim arrays and host tensors are logged by value, on every path."""
    torch = pytest.importorskip("torch")
    values = {
        "f32": np.float32(0.5),
        "i64": np.int64(2**53 + 1),
        "u8": np.uint8(7),
        "flag": np.bool_(True),
        "zero-dim": np.array(2**60 + 1),
        "bf16": torch.tensor(1.5, dtype=torch.bfloat16),
        "0-dim": torch.tensor(3),
        "grad": torch.tensor([2.0], requires_grad=True),
    }
    expected = {
        "f32": 0.5,
        "i64": 2**53 + 1,
        "u8": 7,
        "flag": True,
        "zero-dim": 2**60 + 1,
        "bf16": 1.5,
        "0-dim": 3,
        "grad": 2.0,
    }
    for _ in range(3):
        rank.log(values, 0)
    assert [repr(v) for v in rank.values()] == [repr(expected)] * 3
    assert not rank.warned


def test_a_numpy_integer_that_grows_past_64_bits(rank: Rank) -> None:
    """On the fast path too, an unsigned integer beyond int64 is refused and the rest is kept."""
    rank.log({"a": np.uint64(5), "b": 1.0}, 0)
    rank.log({"a": np.uint64(2**63), "b": 2.0}, 1)
    assert rank.values() == [{"a": 5, "b": 1.0}, {"b": 2.0}]
    assert rank.spool.bad_values == 1


def test_nested_dicts_become_paths(rank: Rank) -> None:
    """Nested dicts are logged under keys joined by a slash."""
    rank.log({"train": {"loss": 1.0, "box": {"iou": 0.5}}, "lr": 0.1}, 0)
    assert rank.values() == [{"train/loss": 1.0, "train/box/iou": 0.5, "lr": 0.1}]


def test_a_bad_value_is_left_out_and_told_once(rank: Rank) -> None:
    """What is no number is left out and counted each time, warned of once per key by the caller's
    rule, and the rest of the call is kept."""
    for step in range(3):
        rank.log({"a": 1.0, "bad": "text", "none": None}, step)
    assert rank.values() == [{"a": 1.0}] * 3
    assert rank.spool.bad_values == 6
    assert {what for what, _ in rank.warned} == {"value of bad", "value of none"}
    assert "the rest of the call is kept" in rank.warned[0][1]


class Exploding:
    """A value whose every question raises."""

    size = 1

    def item(self) -> float:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_value_that_raises_is_a_bad_value(rank: Rank) -> None:
    """An exception from a value's own code is that value's trouble, not the call's."""
    rank.log({"a": 1.0, "x": Exploding()}, 0)
    assert rank.values() == [{"a": 1.0}]
    assert "illegal memory access" in rank.warned[0][1]


def test_a_call_without_any_good_value_is_refused(rank: Rank) -> None:
    """A call of which nothing is left gets no number, is counted, and a LOSS record tells of it."""
    rank.log({"a": "x"}, 0)
    assert rank.spool.last == 0
    assert rank.spool.refused == {"no good value": 1}
    rank.log({"a": 1.0}, 1)
    loss, row = rank.written()
    assert (loss.kind, loss.values) == (Kind.LOSS, {"n": 1, "reason": "no good value"})
    assert (row.seq, row.values) == (2, {"a": 1.0})


@pytest.mark.parametrize("values", [None, 5, "abc", [("a", 1.0)], {1, 2}])
def test_what_is_no_dict_is_refused(rank: Rank, values: Any) -> None:
    """Anything but a mapping is refused and counted, and raises nothing."""
    rank.log(values, 0)
    assert rank.spool.refused == {"not a dict": 1}


def test_an_empty_call_is_nothing(rank: Rank) -> None:
    """An empty dict writes nothing and is no refusal."""
    rank.log({}, 0)
    assert (rank.spool.last, rank.spool.refused) == (0, {})


class Metric(str, enum.Enum):
    LOSS = "loss"


def test_hostile_keys(rank: Rank) -> None:
    """Keys of any kind become text: other types, surrogates, NUL, empty, very long; and an enum
    of texts is the same key as its text, whichever came first."""
    rank.log({1: 1.0, None: 2.0, "": 3.0, "\ud800": 4.0, "a\0": 5.0, "k" * 900: 6.0}, 0)
    [found] = rank.values()
    assert list(found.values()) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert list(found)[:2] == ["1", "None"]
    rank.log({Metric.LOSS: 1.0}, 0)
    rank.log({"loss": 2.0}, 0)
    rank.log({Metric.LOSS: 3.0}, 0)
    assert rank.values()[1:] == [{"loss": 1.0}, {"loss": 2.0}, {"loss": 3.0}]


def test_two_keys_that_become_one_are_told_of(rank: Rank) -> None:
    """Where two keys of a call end as the same text the first is kept, the second is counted."""
    rank.log({"a/b": 1.0, "a": {"b": 2.0}}, 0)
    assert rank.values() == [{"a/b": 1.0}]
    assert rank.spool.bad_values == 1


def test_a_key_and_its_number_are_two_schemas_of_one_name(rank: Rank) -> None:
    """A dict with the key 1 and one with the key "1" both log under "1"."""
    for _ in range(2):
        rank.log({1: 1.0}, 0)
        rank.log({"1": 2.0}, 0)
    assert rank.values() == [{"1": 1.0}, {"1": 2.0}] * 2


def test_fifty_keys_in_one_call(rank: Rank) -> None:
    """A call of fifty keys is one record, on every path."""
    values = {f"metric/{i}": float(i) for i in range(50)}
    for step in range(3):
        rank.log(values, step)
    assert rank.values() == [values] * 3
    assert rank.spool.last == 3


def test_keys_beyond_the_limit_are_refused_and_counted(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the limit of keys new ones are left out and counted, known ones go on."""
    monkeypatch.setattr(rows_module, "MAX_KEYS", 5)
    rank.log({f"k{i}": float(i) for i in range(7)}, 0)
    rank.log({"k0": 9.0, "new": 1.0}, 1)
    assert rank.values() == [{f"k{i}": float(i) for i in range(5)}, {"k0": 9.0}]
    assert rank.spool.bad_values == 3


def test_more_keys_than_allowed_in_one_call(rank: Rank) -> None:
    """A call of 20,005 keys keeps 20,000 of them, in records no larger than a frame may be."""
    rank.log({f"key/{i:06d}": float(i) for i in range(MAX_KEYS + 5)}, 0)
    found: dict[str, Any] = {}
    for values in rank.values():
        found |= values
    assert found == {f"key/{i:06d}": float(i) for i in range(MAX_KEYS)}
    assert rank.spool.bad_values == 5


def test_schemas_beyond_the_limit_become_maps(rank: Rank) -> None:
    """After 1,024 schemas a row of a new shape is written as a map; known shapes stay rows."""
    for i in range(MAX_SCHEMAS + 3):
        rank.log({f"k{i}": float(i)}, i)
    rank.log({"k0": 1.0}, 9999)
    found = rank.written()
    assert [w.values for w in found[:-1]] == [{f"k{i}": float(i)} for i in range(MAX_SCHEMAS + 3)]
    assert [w.kind for w in found[-4:]] == [Kind.KV, Kind.KV, Kind.KV, Kind.ROW]


def test_long_keys_never_make_a_frame_too_long(rank: Rank) -> None:
    """Thousands of long keys, in many shapes, still travel in frames below the limit."""
    long = {f"{'漢' * 500}{i}": 1.0 for i in range(700)}
    for i in range(6):
        rank.log({f"{i}": 0.0, **long}, i)
    at = 1
    while at <= rank.spool.last:
        n, data = rank.spool.read(at, 64 << 10)
        assert len(data) < MAX_FRAME_BYTES - 100
        at += n
    counts = [len(w.values) for w in rank.written()]
    assert sum(counts) == 6 * 701


@pytest.mark.parametrize(
    ("step", "expected"),
    [(7, 7), (np.int32(7), 7), (np.float32(7), 7), (7.0, 7), (True, 1), (-3, -3), (np.array(5), 5)],
)
def test_steps_of_any_integer_kind(rank: Rank, step: Any, expected: int) -> None:
    """A step may be a Python or numpy integer, or a float without a fraction."""
    rank.log({"a": 1.0}, step)
    rank.log({"a": 1.0}, step)
    assert [w.step for w in rank.written()] == [expected] * 2


@pytest.mark.parametrize("step", [1.5, math.nan, math.inf, "7", 2**63, [1], object()])
def test_a_step_that_is_no_integer_is_refused(rank: Rank, step: Any) -> None:
    """A call with a bad step is refused and counted, on the first call and on the fast path."""
    rank.log({"a": 1.0}, step)
    rank.log({"a": 1.0}, 0)
    rank.log({"a": 1.0}, step)
    assert [w.step for w in rank.written() if w.kind == Kind.ROW] == [0]
    assert rank.spool.refused == {"bad step": 2}


def test_a_step_left_out_counts_such_calls(rank: Rank) -> None:
    """Without a step, calls are numbered from 0 among those without one."""
    for step in (None, 50, None, None):
        rank.log({"a": 1.0}, step)
    assert [w.step for w in rank.written()] == [0, 50, 1, 2]


def test_numbers_are_contiguous_from_one(rank: Rank) -> None:
    """Records of all kinds, good and refused calls mixed, are numbered 1, 2, 3 without a hole."""
    for i in range(20):
        rank.log({"a": 1.0} if i % 3 else {"a": "bad"}, i)
        rank.log({"b": i, "c": float(i)}, i)
    assert [w.seq for w in rank.written()] == list(range(1, rank.spool.last + 1))
