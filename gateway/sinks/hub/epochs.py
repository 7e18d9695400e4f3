"""Scalars by step become values by epoch, which is all HUB knows. Pure: no I/O, no clock.

A row with a whole number under the key `epoch` closes that epoch for its stream; the epoch gets
each key's last value up to and with that row. Each stream closes its own epochs, because another
rank may already be in the next one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from gateway.sinks.base import Rows
from gateway.sinks.naming import NOT_IN_ORIGINAL, hub_key

EPOCH = "epoch"
HIGHEST_EPOCH = 2**31  #: above it the key `epoch` means something else
NOT_LAST = "not the last of its epoch"
NOT_WHOLE = "epoch is not a whole number"
NO_EPOCH = "no epoch"

Number = float | int
NameOf = Callable[[str, int], str | None]  #: (key, rank) → the name over there, None: no place


@dataclass(slots=True)
class Closed:
    """One epoch's values. `points` of them wait for its confirmation, its `epoch` points too."""

    epoch: int
    values: dict[str, Number] = field(default_factory=dict)
    points: int = 0
    not_finite: int = 0  #: of those points


@dataclass(slots=True)
class Taken:
    """What became of some rows; the points in neither `closed` nor `skipped` still wait."""

    closed: dict[int, Closed] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)

    def skip(self, reason: str, items: int) -> None:
        if items:
            self.skipped[reason] = self.skipped.get(reason, 0) + items

    def close(self, epoch: int, values: dict[str, Number]) -> None:
        closed = self.closed.setdefault(epoch, Closed(epoch))
        again = len(closed.values.keys() & values.keys())
        self.skip(NOT_LAST, again)
        closed.values.update(values)
        closed.points += len(values) - again + 1


class OpenEpochs:
    """The values no epoch has taken yet: per stream and key the last one, with its sequence."""

    def __init__(self, saved: Any = None, name_of: NameOf = hub_key) -> None:
        self._name_of = name_of
        self._streams: dict[str, dict[str, tuple[int, Number]]] = {
            stream: {key: (seq, value) for key, (seq, value) in values.items()}
            for stream, values in (saved or {}).items()
        }

    def dump(self) -> dict[str, dict[str, list[Number]]]:
        """The same in msgpack types, for `OpenEpochs(saved)`."""
        return {
            stream: {key: list(pair) for key, pair in values.items()}
            for stream, values in self._streams.items()
        }

    @property
    def points(self) -> int:
        return sum(map(len, self._streams.values()))

    def take(self, rows: Sequence[Rows]) -> Taken:
        """Add rows; those of one stream may come by key set, and are put in sequence here."""
        taken = Taken()
        streams: dict[bytes, list[Rows]] = {}
        for part in rows:
            streams.setdefault(part.stream, []).append(part)
        for stream, parts in streams.items():
            waiting = self._streams.pop(stream.hex(), {})
            _take_stream(waiting, parts, self._name_of, taken)
            if waiting:
                self._streams[stream.hex()] = waiting
        return taken


def _take_stream(
    waiting: dict[str, tuple[int, Number]], parts: Sequence[Rows], name_of: NameOf, taken: Taken
) -> None:
    closers = sorted(pair for part in parts for pair in _closers(part, taken))
    bounds = np.array([seq for seq, _ in closers], dtype=np.int64)
    # Span i is what lies up to closer i; the last one is what stays open.
    spans: list[dict[str, tuple[int, Number]]] = [{} for _ in range(len(closers) + 1)]
    for part in parts:
        _last_of_spans(part, bounds, spans, name_of, taken)
    for number, span in enumerate(spans):
        for key, pair in span.items():
            _keep_newer(waiting, key, pair, taken)
        if number < len(closers):
            seq, epoch = closers[number]
            # A key set may arrive ahead of the closing row; its later rows belong to the next.
            ready = [key for key, pair in waiting.items() if pair[0] <= seq]
            taken.close(epoch, {key: waiting.pop(key)[1] for key in ready})


def _closers(part: Rows, taken: Taken) -> list[tuple[int, int]]:
    """(sequence, epoch) of each row that closes one."""
    column = part.columns.get(EPOCH)
    if column is None or column.dtype == np.bool_:
        return []
    pairs = []
    for seq, value in zip(part.seq.tolist(), column.tolist(), strict=True):
        # Some trainers log a fraction (0.37 epochs seen) with every step: no epoch ends there.
        if math.isfinite(value) and 0 <= value < HIGHEST_EPOCH and value == int(value):
            pairs.append((seq, int(value)))
        else:
            taken.skip(NOT_WHOLE, 1)
    return pairs


def _last_of_spans(
    part: Rows,
    bounds: npt.NDArray[np.int64],
    spans: list[dict[str, tuple[int, Number]]],
    name_of: NameOf,
    taken: Taken,
) -> None:
    keys = {}
    for key, column in part.columns.items():
        if key == EPOCH and column.dtype != np.bool_:
            continue
        name = name_of(key, part.rank)
        if name is None:
            taken.skip(NOT_IN_ORIGINAL, len(part.seq))
        else:
            keys[name] = column
    if not len(part.seq) or not keys:
        return
    order = np.argsort(part.seq, kind="stable")
    span_of = np.searchsorted(bounds, part.seq[order], side="left")
    ends = np.flatnonzero(np.append(np.diff(span_of) != 0, True))
    taken.skip(NOT_LAST, (len(order) - len(ends)) * len(keys))
    for end in ends.tolist():
        row = int(order[end])
        span = spans[int(span_of[end])]
        for key, column in keys.items():
            pair = (int(part.seq[row]), _number(column[row].item()))
            _keep_newer(span, key, pair, taken)


def _keep_newer(
    values: dict[str, tuple[int, Number]], key: str, pair: tuple[int, Number], taken: Taken
) -> None:
    old = values.get(key)
    if old is not None:
        taken.skip(NOT_LAST, 1)
    if old is None or old[0] <= pair[0]:
        values[key] = pair


def _number(value: Number) -> Number:
    return int(value) if isinstance(value, bool) else value
