"""Scalars in: what a value is, how it is written in 8 bytes, and what is refused.

torch and numpy are recognised by the types a user passes in, never imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
MAX_TEXT_VALUE = 64 << 10  #: characters; more of a text are left out

#: type → (column type, how to make struct take it; None where struct takes it as it is)
_KNOWN: dict[type, tuple[str, Callable[[Any], Any] | None]] = {
    float: ("f8", None),
    int: ("i8", None),
    bool: ("bool", None),
}
_NUMPY_KINDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "f": ("f8", float),
    "i": ("i8", int),
    "u": ("i8", int),
    "b": ("bool", bool),
}


class BadValue(TypeError):
    """A value that is no scalar; the text says which and what would do."""


def known(type_: type) -> tuple[str, Callable[[Any], Any] | None] | None:
    """How values of exactly this type are written, or None when each must be looked at."""
    found = _KNOWN.get(type_)
    if found is None and type_.__module__ == "numpy" and _is_scalar_type(type_):
        try:
            found = _NUMPY_KINDS.get(type_(0).dtype.kind)
        except (TypeError, ValueError):
            return None
        if found:
            _KNOWN[type_] = found
    return found


def _is_scalar_type(type_: type) -> bool:
    """numpy.float32 and its like; an array's type holds values of any kind."""
    return any(base.__name__ == "generic" for base in type_.__mro__)


def on_device(value: Any) -> bool:
    """A tensor whose value would have to be waited for: `.item()` would stall the training."""
    device = getattr(value, "device", None)
    return device is not None and getattr(device, "type", "cpu") not in ("cpu", "meta")


def scalar(value: Any) -> float | int | bool:
    """A Python scalar of a Python, numpy or (host) torch scalar. Raises BadValue."""
    found = known(type(value))
    if found is not None:
        result = found[1](value) if found[1] else value
    elif hasattr(value, "item") and getattr(value, "size", None) is not None:
        count = value.numel() if hasattr(value, "numel") else value.size
        if count != 1:
            raise BadValue(f"has {count} elements; log one number, e.g. its mean")
        result = value.item()
    elif isinstance(value, float | int):  # subclasses: enums, numpy-like floats
        result = float(value) if isinstance(value, float) else int(value)
    else:
        raise BadValue(f"is a {type(value).__name__}, not a number")
    if isinstance(result, bool) or type(result) is float:
        return result
    if isinstance(result, int):
        if not INT64_MIN <= result <= INT64_MAX:
            raise BadValue("is an integer beyond 64 bits; log float(x) if that is enough")
        return result
    raise BadValue(f"holds a {type(result).__name__}, not a number")


def column_type(value: float | int | bool) -> str:
    return "bool" if isinstance(value, bool) else "i8" if isinstance(value, int) else "f8"


def flatten(
    values: Mapping[Any, Any], prefix: str = "", depth: int = 8
) -> Iterator[tuple[str, Any]]:
    """Nested dicts as (key, value) with keys joined by `/`."""
    for key, value in values.items():
        # An enum of texts equals its text, so it must be named by it too.
        name = prefix + (str.__str__(key) if isinstance(key, str) else str(key))
        if isinstance(value, Mapping) and depth > 0:
            yield from flatten(value, f"{name}/", depth - 1)
        else:
            yield name, value


def plain(value: Any) -> float | int | bool | str | None:
    """A parameter's value: scalars and text as they are, all else as its text, however long."""
    if value is None or isinstance(value, str):
        return value
    if on_device(value):
        return f"<{type(value).__name__} on {value.device}>"
    try:
        return scalar(value)
    except (BadValue, RuntimeError):
        return str(value)


def clean_key(key: Any) -> str:
    """A key as text that every store can hold: no lone surrogates, at most 512 characters."""
    text = key if type(key) is str else str(key)
    if text.isascii() and 0 < len(text) <= 512 and "\0" not in text:
        return text
    text = text.encode("utf-8", "replace").decode("utf-8").replace("\0", "�")[:512]
    return text or "_"
