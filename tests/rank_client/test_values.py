"""Values: what is a scalar, what is refused, and how keys become text."""

from __future__ import annotations

import enum
import math
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rank_client.values import (
    INT64_MAX,
    INT64_MIN,
    BadValue,
    clean_key,
    column_type,
    flatten,
    known,
    on_device,
    plain,
    scalar,
)


class Level(enum.IntEnum):
    LOW = 3


class Name(str, enum.Enum):
    LOSS = "loss"


@given(st.floats() | st.integers(INT64_MIN, INT64_MAX) | st.booleans())
def test_python_scalars_stay_what_they_are(value: float) -> None:
    """A Python float, int or bool is itself, exactly, and keeps its type."""
    result = scalar(value)
    assert type(result) is type(value)
    assert result == value or math.isnan(value)


@pytest.mark.parametrize(
    ("value", "expected", "column"),
    [
        (np.float32(0.5), 0.5, "f8"),
        (np.float64(math.inf), math.inf, "f8"),
        (np.float16(2), 2.0, "f8"),
        (np.int8(-3), -3, "i8"),
        (np.uint64(INT64_MAX), INT64_MAX, "i8"),
        (np.int64(INT64_MIN), INT64_MIN, "i8"),
        (np.bool_(True), True, "bool"),
        (np.array(2**53 + 1), 2**53 + 1, "i8"),
        (np.array([7]), 7, "i8"),
        (np.array(True), True, "bool"),
        (np.array([[0.25]], np.float32), 0.25, "f8"),
        (Level.LOW, 3, "i8"),
    ],
)
def test_numpy_scalars_and_arrays_of_one(value: Any, expected: Any, column: str) -> None:
    """numpy scalars, arrays of one element and enums of ints become the Python scalar they hold,
    integers exactly, each of its own column type."""
    result = scalar(value)
    assert result == expected
    assert type(result) is type(expected)
    assert column_type(result) == column


def test_torch_tensors_on_the_host() -> None:
    """Tensors of one element give their value: bf16, 0-dim, with gradient, integers exactly."""
    torch = pytest.importorskip("torch")
    assert scalar(torch.tensor(1.5, dtype=torch.bfloat16)) == 1.5
    assert scalar(torch.tensor([[2.5]], requires_grad=True)) == 2.5
    assert scalar(torch.tensor(2**53 + 1)) == 2**53 + 1
    assert scalar(torch.tensor(True)) is True
    assert not on_device(torch.tensor(1.0))
    with pytest.raises(BadValue, match="2 elements"):
        scalar(torch.ones(2))
    with pytest.raises(BadValue, match="complex"):
        scalar(torch.tensor(1j))


@pytest.mark.parametrize(
    "value",
    [
        None,
        "1.5",
        [1.0],
        {"a": 1},
        object(),
        1j,
        Decimal("1.5"),
        np.complex64(1),
        np.array([1, 2]),
        np.array([]),
        np.str_("a"),
        np.datetime64("2026-01-01"),
        np.array(["a"]),
    ],
)
def test_what_is_no_number_is_refused(value: Any) -> None:
    """Everything that is not one number is a BadValue with a reason a person can read."""
    with pytest.raises(BadValue, match=r"^(is|has|holds) "):
        scalar(value)


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, np.uint64(2**63), 10**100])
def test_integers_beyond_64_bits_are_refused(value: Any) -> None:
    """An integer that 64 bits cannot hold is refused rather than rounded."""
    with pytest.raises(BadValue, match="64 bits"):
        scalar(value)


def test_known_types_never_include_arrays() -> None:
    """Only scalar types have a fixed way to be written; arrays and tensors are looked at."""
    assert known(np.float32) is not None
    assert known(np.ndarray) is None
    assert known(np.datetime64) is None
    assert known(str) is None


class OnDevice:
    """What a tensor looks like that is on an accelerator."""

    class device:  # noqa: N801
        type = "cuda"

        def __str__(self) -> str:
            return "cuda:0"

    def item(self) -> float:
        raise AssertionError("would wait for the device")

    def __str__(self) -> str:
        raise AssertionError("would wait for the device")


def test_parameters_never_wait_for_a_device() -> None:
    """A parameter that is on a device is written as a note of what it is."""
    assert on_device(OnDevice())
    assert "OnDevice" in str(plain(OnDevice()))


def test_parameters_are_scalars_or_text() -> None:
    """Scalars and None stay, all else becomes text, whole: it is cut where it is clean."""
    assert plain(3) == 3
    assert plain(None) is None
    assert plain([1, 2]) == "[1, 2]"
    assert plain(np.float32(0.5)) == 0.5
    assert plain(10**30) == str(10**30)
    assert plain("x" * 100_000) == "x" * 100_000


def test_nested_dicts_are_flattened() -> None:
    """Nested keys are joined by a slash; keys that are no text become text."""
    nested = {"a": {"b": {"c": 1}, 2: 3}, Name.LOSS: 4}
    assert dict(flatten(nested)) == {"a/b/c": 1, "a/2": 3, "loss": 4}


def test_a_dict_that_holds_itself_ends() -> None:
    """Flattening stops at a depth, so that a dict within itself does no harm."""
    loop: dict[str, Any] = {"x": 1}
    loop["self"] = loop
    keys = [key for key, _ in flatten(loop)]
    assert keys[0] == "x"
    assert len(keys) < 20


@given(st.text() | st.integers() | st.none() | st.binary(max_size=4))
def test_every_key_becomes_storable_text(key: Any) -> None:
    """A key becomes non-empty text that UTF-8 can hold, without NUL, of at most 512 characters."""
    text = clean_key(key)
    assert 0 < len(text) <= 512
    assert "\0" not in text
    text.encode("utf-8")


@given(st.text("ab/_ é漢", min_size=1, max_size=30))
def test_ordinary_keys_stay_as_they_are(key: str) -> None:
    """Slashes, spaces and letters of any script are kept."""
    assert clean_key(key) == key


@pytest.mark.parametrize("key", ["", "\ud800", "a\0b", "x" * 5000])
def test_keys_that_no_store_can_hold_are_changed(key: str) -> None:
    """Empty keys, lone surrogates, NUL and overlong keys are replaced or cut, never refused."""
    text = clean_key(key)
    assert text != key
    assert text
