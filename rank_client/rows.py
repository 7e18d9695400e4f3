"""`log`: one call becomes one row record with a single write.

The fast path looks the schema up by `tuple(values)` (a mutated dict gives another tuple) and packs
into a buffer that the schema owns. Everything else goes through `_slow`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from time import monotonic_ns, time_ns
from typing import Any
from zlib import crc32

from .deferred import Deferral
from .spool import Spool
from .values import BadValue, clean_key, column_type, flatten, known, on_device, scalar
from .wire.records import (
    COLUMN_CODES,
    HEADER_BYTES,
    MAX_EVENT_BYTES,
    MAX_KEYS,
    ROW_HEAD_BYTES,
    Kind,
    Schema,
)

KV_BYTES = 128 << 10  #: of a map, so that a frame with it stays far below its limit

_CRC = struct.Struct("<I").pack_into
_FLOATS = frozenset({float})
_NOTHING: tuple[None, None] = (None, None)
_ROW = int(Kind.ROW)


class _Packer:
    """A schema's ready-made row: buffer, its view without the checksum, and the packing call."""

    __slots__ = ("before", "buf", "id", "into", "size", "tail")

    def __init__(self, schema: Schema) -> None:
        codes = "".join(COLUMN_CODES[t] for t in schema.types)
        self.id = schema.id
        self.size = schema.row_bytes
        self.buf = bytearray(self.size)
        self.tail = memoryview(self.buf)[4:]
        self.into = struct.Struct(f"<IQBBHIqqq{codes}").pack_into
        self.before = schema.pack(0)  # its own record, until a row has brought it along


class Rows:
    """Writes scalars to a spool. `warn(what, text)` is called once per kind of trouble."""

    def __init__(
        self, spool: Spool, warn: Callable[[str, str], None], deferral: Deferral | None = None
    ) -> None:
        self._spool = spool
        self._warn = warn
        self._floats: dict[tuple[str, ...], _Packer] = {}
        self._mixed: dict[tuple[tuple[str, ...], tuple[type, ...]], tuple[_Packer, Any]] = {}
        self._schemas: dict[tuple[tuple[str, ...], tuple[str, ...]], _Packer] = {}
        self._keys: set[str] = set()
        self._deferral = deferral or Deferral()
        self.calls_without_step = 0
        self.last_step = -1
        self.last_log_ns = 0

    def log(self, values: Mapping[str, Any], step: int | None) -> None:
        """Write one row. Never raises for what a user may pass; what is wrong is counted."""
        if step is None:
            step = self.calls_without_step
            self.calls_without_step += 1
        if type(values) is dict and type(step) is int:
            keys = tuple(values)
            v: Any = values.values()
            if _FLOATS.issuperset(map(type, v)):
                packer = self._floats.get(keys)
            else:
                packer, converts = self._mixed.get((keys, tuple(map(type, v))), _NOTHING)
                if converts is not None:
                    v = [x if c is None else c(x) for c, x in zip(converts, v, strict=True)]
            if packer is not None and self._write(packer, step, time_ns(), v):
                return
        self._slow(values, step)

    def _write(self, packer: _Packer, step: int, wall_ns: int, v: Any) -> bool:
        """False when a value does not fit its column; the spool counts what it refuses itself."""
        spool = self._spool
        buf = packer.buf
        with spool.lock:
            if spool.watchful and not spool.admit("metrics"):
                return True
            while True:
                turn = spool.begin()
                try:
                    packer.into(
                        buf, 4, packer.size, spool.last + 1, _ROW, 0, packer.id, 0,
                        step, wall_ns, monotonic_ns(), *v,
                    )  # fmt: skip
                    _CRC(buf, 0, crc32(packer.tail))
                    before = packer.before
                    done = spool.append(turn, buf, before)
                except (struct.error, OverflowError):
                    spool.abandon(turn)
                    return False
                except BaseException:  # a signal handler's, as Ctrl-C
                    spool.abandon(turn)
                    raise
                if done is not None:
                    break
            if done and before:
                packer.before = b""
        self.last_step = step
        self.last_log_ns = wall_ns
        return True

    # --- the slow path -------------------------------------------------------

    def _slow(self, values: Any, step: Any) -> None:
        if not isinstance(values, Mapping):
            self._refuse("not a dict", f"log() takes a dict, not a {type(values).__name__}")
            return
        try:
            number = _step(step)
        except (TypeError, ValueError, OverflowError):
            self._refuse("bad step", f"step must be an integer, not {step!r:.60}")
            return
        good: dict[str, Any] = {}
        waiting: dict[str, Any] = {}
        for key, value in flatten(values):
            self._take(clean_key(key), value, good, waiting)
        if waiting:
            self._defer(number, good, waiting)
        elif good:
            self.write(number, time_ns(), good)
            if tuple(good) == tuple(values):
                self._remember(tuple(good), tuple(map(type, values.values())), good)
        elif values:
            self._refuse("no good value", "no value of the call could be logged")

    def _take(self, key: str, value: Any, good: dict[str, Any], waiting: dict[str, Any]) -> None:
        if key not in self._keys:
            if len(self._keys) >= MAX_KEYS:
                self._bad("keys", key, f"is beyond the {MAX_KEYS:,} keys a rank may log")
                return
            self._keys.add(key)
        if key in good or key in waiting:
            self._bad(f"key {key}", key, "stands twice in the call")
            return
        try:
            if on_device(value):
                if value.numel() != 1:
                    raise BadValue(f"has {value.numel()} elements; log one number, e.g. its mean")
                waiting[key] = value
            else:
                good[key] = scalar(value)
        except Exception as error:  # a value's own `item` or `__float__` may raise anything
            self._bad(f"value of {key}", key, str(error) or type(error).__name__)

    def _bad(self, once: str, key: str, text: str) -> None:
        self._spool.count_bad(1)
        self._warn(once, f"{key!r} {text}; it is left out, the rest of the call is kept")

    def _refuse(self, reason: str, text: str) -> None:
        self._spool.refuse(reason)
        self._warn(reason, f"{text}; the call is not logged, and counted as refused")

    def write(self, step: int, wall_ns: int, values: dict[str, Any]) -> None:
        """Write plain Python scalars; makes the schema when it is new."""
        keys = tuple(values)
        packer = self._packer(keys, tuple(map(column_type, values.values())))
        if packer is None:
            self._write_map(step, wall_ns, values)
        elif not self._write(packer, step, wall_ns, values.values()):
            self._refuse("value out of range", "the step does not fit 64 bits")

    def _packer(self, keys: tuple[str, ...], types: tuple[str, ...]) -> _Packer | None:
        """The packer of a schema, made when it is new; None when it must go as a map."""
        packer = self._schemas.get((keys, types))
        if packer is None:
            if HEADER_BYTES + ROW_HEAD_BYTES + 8 * len(keys) > MAX_EVENT_BYTES:
                return None
            made = self._spool.add_schema(keys, types)
            if made is None:
                return None
            packer = self._schemas[keys, types] = _Packer(made)
        return packer

    def _remember(self, keys: tuple[str, ...], raw: tuple[type, ...], good: dict[str, Any]) -> None:
        """Let the next call with these keys and types take the fast path."""
        kinds = [known(t) for t in raw]
        packer = self._schemas.get((keys, tuple(map(column_type, good.values()))))
        if packer is None or None in kinds:
            return
        if _FLOATS.issuperset(raw):
            self._floats[keys] = packer
        else:
            converts = [k[1] for k in kinds if k]
            self._mixed[keys, raw] = packer, converts if any(converts) else None

    def _write_map(self, step: int, wall_ns: int, values: dict[str, Any]) -> None:
        """The form for streams with too many schemas, in as many records as the size asks."""
        part: dict[str, Any] = {}
        size = 0
        for key, value in values.items():
            length = 4 * len(key) + 12  # at most
            if part and size + length > KV_BYTES:
                self._append_part(step, wall_ns, part)
                part, size = {}, 0
            part[key] = value
            size += length
        self._append_part(step, wall_ns, part)
        self.last_step = step
        self.last_log_ns = wall_ns

    def _append_part(self, step: int, wall_ns: int, part: dict[str, Any]) -> None:
        body = {"s": step, "w": wall_ns, "m": monotonic_ns(), "v": part}
        self._spool.append_map(Kind.KV, body)

    # --- device tensors ------------------------------------------------------

    def _defer(self, step: int, good: dict[str, Any], waiting: dict[str, Any]) -> None:
        if not self._deferral.add(step, time_ns(), good, waiting):
            self._refuse(
                "too many device values pending",
                "64 calls already wait for values from the device",
            )

    def settle(self) -> int:
        """Write the deferred calls whose values have arrived; how many still wait."""
        for step, wall_ns, values, bad in self._deferral.ready():
            for key, text in bad.items():
                self._bad(f"value of {key}", key, text)
            if values:
                self.write(step, wall_ns, values)
            else:
                self._refuse("no good value", "no value of the call could be logged")
        return self._deferral.pending

    def abandon(self) -> None:
        """At exit: what has not come from the device by now is refused, and counted."""
        for _ in range(self._deferral.drop()):
            self._refuse("device value not ready at exit", "a device value came too late")


def _step(step: Any) -> int:
    if isinstance(step, float):
        if not step.is_integer():
            raise ValueError(step)
        return int(step)
    number = scalar(step)
    if isinstance(number, float):
        return _step(number)
    return int(number)
