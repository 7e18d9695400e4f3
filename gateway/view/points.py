"""Points of keys: which attempt wins, reductions over ranks, the last step that all ranks have.

Everything is done on whole columns with numpy: a key may hold ten million points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import BadConfig
from ..rules.generations import UNORDERED
from ..series.reader import Reader
from ..series.tables import About, Points, StreamRow

REDUCTIONS = ("mean", "min", "max", "sum", "count")
SPARK_STEPS = 100

_EXACT_SUM = 2**62  #: integer sums that may pass this are made with Python's integers

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Lives:
    """What the streams of a run are to its points; arrays are indexed by stream.

    `position` is the place of a stream's generation, UNORDERED for one that must never win;
    `before` counts the attempts of the generations before it; `order` sorts by (rank, position).
    """

    rank: Ints
    position: Ints
    before: Ints
    order: npt.NDArray[Any]
    attempts: int  #: how many there are in the run
    repeats: bool  #: some stream logged a (key, step) more than once


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """One key's part of a query: columns of one length, sorted by (rank, step), or by step for a
    reduction."""

    key: str
    reduction: str  #: empty for raw values
    rank: Ints | None  #: None for a reduction
    attempt: Ints
    step: Ints
    time_ns: Ints
    value: npt.NDArray[Any]

    def __len__(self) -> int:
        return len(self.step)


@dataclass(frozen=True, slots=True)
class NotFinite:
    """Values of one rank that are no numbers: `what` is NaN, Inf or -Inf."""

    key: str
    rank: int
    what: str
    first_step: int
    last_step: int
    values: int


@dataclass(frozen=True, slots=True)
class KeyRow:
    """A key at the last step that all its ranks have; `values` are (rank, value)."""

    key: str
    step: int
    ranks: int
    expected: int
    mean: float | None
    min: float | int | bool | None
    min_rank: int | None
    max: float | int | bool | None
    max_rank: int | None
    same: bool
    values: tuple[tuple[int, float | int | bool], ...]
    spark: tuple[float, ...]
    not_finite: tuple[NotFinite, ...]


# --- attempts ----------------------------------------------------------------


def lives_of(reader: Reader, about: About, streams: Sequence[StreamRow]) -> Lives:
    """Number the attempts: dense over the (generation, take) pairs that occur in the run."""
    places = {id_: place for place, id_ in enumerate(about.generations)}
    rank = np.array([s.rank for s in streams], np.int64)
    position = np.array([places.get(s.generation, UNORDERED) for s in streams], np.int64)
    takes = _takes_per_stream(reader, len(streams))
    per_generation = np.zeros(len(places), np.int64)
    ordered = position >= 0
    np.maximum.at(per_generation, position[ordered], takes[ordered])
    starts = np.concatenate(([0], np.cumsum(per_generation)))
    # An unordered life has no number of its own: -take + take = 0 stands for it.
    before = np.where(ordered, starts[position], -1)
    order = np.empty(len(streams), np.uint16 if len(streams) < 2**16 else np.int64)
    order[np.lexsort((position, rank))] = np.arange(len(streams))
    repeats = bool((takes > 1).any())
    return Lives(rank, position, before, order, max(1, int(starts[-1])), repeats)


def _takes_per_stream(reader: Reader, streams: int) -> Ints:
    """How often at most each stream logged one (key, step); 0 for a stream without points.

    Keys that stand in the same key sets share their steps, so each such group is looked at once.
    """
    homes: dict[str, list[int]] = {}
    for keyset, names in reader.keysets().items():
        for name in names:
            homes.setdefault(name, []).append(keyset)
    takes = np.zeros(streams, np.int64)
    for group in {tuple(h) for h in homes.values()}:
        parts = [reader.heads(keyset) for keyset in group]
        stream, seq, step = (np.concatenate(column) for column in zip(*parts, strict=True))
        takes[np.unique(stream)] = np.maximum(takes[np.unique(stream)], 1)
        order = _by(stream.astype(np.uint16) if streams < 2**16 else stream)
        stream, seq, step = stream[order], seq[order], step[order]
        falls = (step[1:] <= step[:-1]) | (seq[1:] <= seq[:-1])
        odd = np.unique(stream[1:][falls & (stream[1:] == stream[:-1])])
        if len(odd):
            chosen = np.isin(stream, odd)
            stream, seq, step = stream[chosen], seq[chosen], step[chosen]
            np.maximum.at(takes, stream, take_numbers(stream, seq, step))
    return takes


def take_numbers(stream: Ints, seq: Ints, step: Ints) -> Ints:
    """For each point, the how-manieth of its (stream, step) it is: 1, 2, …"""
    order = np.lexsort((seq, step, stream))
    s, t = stream[order], step[order]
    starts = _starts((s[1:] != s[:-1]) | (t[1:] != t[:-1]))
    out = np.empty(len(order), np.int64)
    out[order] = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(s)))) + 1
    return out


def _starts(new: Mask) -> Ints:
    """Where groups start, of `new[i]` = element i + 1 is of another group than i."""
    return np.concatenate(([0], np.flatnonzero(new) + 1)) if len(new) else np.zeros(1, np.int64)


def _by(values: npt.NDArray[Any]) -> Ints:
    """A stable order: linear for 16-bit numbers, nearly so for what is in runs."""
    return np.argsort(values, kind="stable")


# --- one key -----------------------------------------------------------------


def in_order(points: Points, lives: Lives) -> Points:
    """Sorted by rank, then as it came: by generation, then by number in the stream."""
    points = points.pick(_by(lives.order[points.stream]))
    same = points.stream[1:] == points.stream[:-1]
    if (same & (points.seq[1:] <= points.seq[:-1])).any():  # rows of several key sets
        points = points.pick(np.lexsort((points.seq, lives.order[points.stream])))
    return points


def latest(points: Points, lives: Lives) -> Points:
    """Of `in_order` points, per (rank, step) the one with the highest (generation, number)."""
    ordered = lives.position[points.stream] >= 0
    if not ordered.all():
        points = points.pick(ordered)
    if len(points) == 0:
        return points
    rank, step = lives.rank[points.stream], points.step
    if ((step[1:] > step[:-1]) | (rank[1:] != rank[:-1])).all():
        return points
    order = _by_rank_and_step(rank, step)
    r, t = rank[order], step[order]
    is_last = np.append((r[1:] != r[:-1]) | (t[1:] != t[:-1]), True)
    return points.pick(order[is_last])


def _by_rank_and_step(rank: Ints, step: Ints) -> Ints:
    """A stable order by (rank, step); one sort of nearly sorted numbers where they fit."""
    low, high = int(step.min()), int(step.max())
    span = high - low + 1
    if span * (int(rank.max()) + 2) < 2**62:
        return _by((rank + 1) * span + (step - low))
    return np.lexsort((step, rank))


def attempt_numbers(points: Points, lives: Lives) -> Ints:
    """The attempt of each point; 0 for a life that no launch is known of."""
    before = lives.before[points.stream]
    if not lives.repeats:
        return before + 1
    takes = take_numbers(points.stream, points.seq, points.step)
    return np.where(before < 0, 0, before + takes)


# --- the query ---------------------------------------------------------------


def matching_keys(reader: Reader, globs: Sequence[str]) -> list[str]:
    """The keys that the globs mean, in the order of the globs; an exact match goes first and
    stands for itself alone."""
    names = reader.key_names()
    known = set(names)
    out: dict[str, None] = {}
    for glob in globs:
        if glob in known:
            out[glob] = None
        else:
            out.update(dict.fromkeys(n for n in names if fnmatchcase(n, glob)))
    return list(out)


def query_key(
    reader: Reader,
    lives: Lives,
    key: str,
    ranks: frozenset[int] | None,
    steps: tuple[int | None, int | None],
    all_attempts: bool,
    reduction: str,
) -> Answer:
    """One key of a query. `steps` is half-open; `ranks` None is all."""
    points = reader.points(key)
    # Attempts are counted over all a stream logged, so before anything is left out.
    attempt = attempt_numbers(points, lives) if lives.repeats else None
    if attempt is not None:
        points, attempt = _with_attempts(points, attempt, lives, all_attempts)
    else:
        points = in_order(points, lives)
        points = points if all_attempts else latest(points, lives)
        attempt = attempt_numbers(points, lives)
    keep = _chosen(points, lives, ranks, steps)
    if keep is not None:
        points, attempt = points.pick(keep), attempt[keep]
    rank = lives.rank[points.stream]
    if reduction:
        return reduce_over_ranks(key, reduction, points, attempt, all_attempts)
    if all_attempts:
        order = np.lexsort((points.seq, attempt, points.step, rank))
        points, attempt, rank = points.pick(order), attempt[order], rank[order]
    return Answer(key, "", rank, attempt, points.step, points.wall_ns, points.value)


def _with_attempts(
    points: Points, attempt: Ints, lives: Lives, all_attempts: bool
) -> tuple[Points, Ints]:
    """`in_order` and `latest` with the attempts carried along in place of the stream's number."""
    index = np.arange(len(points), dtype=np.int64)
    tagged = Points(points.stream, points.seq, points.step, index, points.value)
    tagged = in_order(tagged, lives)
    if not all_attempts:
        tagged = latest(tagged, lives)
    return points.pick(tagged.wall_ns), attempt[tagged.wall_ns]


def _chosen(
    points: Points,
    lives: Lives,
    ranks: frozenset[int] | None,
    steps: tuple[int | None, int | None],
) -> Mask | None:
    low, high = steps
    keep: Mask | None = None
    if ranks is not None:
        keep = np.isin(lives.rank, sorted(ranks))[points.stream]
    if low is not None:
        keep = (points.step >= low) if keep is None else keep & (points.step >= low)
    if high is not None:
        keep = (points.step < high) if keep is None else keep & (points.step < high)
    return keep


def reduce_over_ranks(
    key: str, reduction: str, points: Points, attempt: Ints, all_attempts: bool
) -> Answer:
    """One value per step (and attempt); time is that of the last rank, attempt the newest."""
    if reduction not in REDUCTIONS:
        raise BadConfig(f"A reduction is one of {', '.join(REDUCTIONS)}, not {reduction!r}.")
    step, group = points.step, attempt if all_attempts else np.zeros(len(points), np.int64)
    order = np.lexsort((step, group)) if all_attempts else _by(step)
    s, g = step[order], group[order]
    if len(s) == 0:
        none = np.empty(0, np.int64)
        return Answer(key, reduction, None, none, none, none, np.empty(0))
    starts = _starts((s[1:] != s[:-1]) | (g[1:] != g[:-1]))
    value = _reduced(reduction, points.value[order], starts)
    out_attempt = np.maximum.reduceat(attempt[order], starts)
    wall_ns = np.maximum.reduceat(points.wall_ns[order], starts)
    return Answer(key, reduction, None, out_attempt, s[starts], wall_ns, value)


def _reduced(reduction: str, value: npt.NDArray[Any], starts: Ints) -> npt.NDArray[Any]:
    counts = np.diff(np.append(starts, len(value)))
    if reduction == "count":
        return counts
    value = _plain_numbers(value)
    if reduction == "min":
        return np.minimum.reduceat(value, starts)
    if reduction == "max":
        return np.maximum.reduceat(value, starts)
    if reduction == "mean":
        with np.errstate(over="ignore", invalid="ignore"):
            return np.add.reduceat(value.astype(np.float64), starts) / counts
    if value.dtype.kind == "b":
        value = value.astype(np.int64)
    if value.dtype.kind == "i":
        largest = max(abs(int(value.min())), abs(int(value.max())))
        if largest * int(counts.max()) > _EXACT_SUM:
            value = value.astype(object)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(np.add.reduceat(value, starts))


def _plain_numbers(value: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A key that changed its type holds objects: whole numbers stay so, else all are floats."""
    if value.dtype != object:
        return value
    whole = all(isinstance(v, int) for v in value.tolist())
    return value.astype(np.int64 if whole else np.float64)


# --- a key at a glance -------------------------------------------------------


def key_row(
    reader: Reader, lives: Lives, key: str, newest: int, wanted: frozenset[int]
) -> KeyRow | None:
    """A key at the last step that all its ranks have; None for one without points.

    `newest` is the newest generation's place, `wanted` its ranks. What older attempts logged
    beyond the newest one's step is left out: those are ghosts.
    """
    points = in_order(reader.points(key), lives)
    if len(points) == 0:
        return None
    present = set(np.unique(lives.rank[points.stream]).tolist())
    end = _newest_step(points, lives, newest)
    points = latest(points, lives)
    if end is not None:
        points = points.pick(points.step <= end)
    ranks = present & wanted or present
    if not ranks >= present:
        points = points.pick(np.isin(lives.rank, sorted(ranks))[points.stream])
    if len(points) == 0:
        return None
    step = _common_step(points, lives)
    here = points.pick(points.step == step)
    values = tuple(zip(lives.rank[here.stream].tolist(), here.value.tolist(), strict=True))
    return _row(
        key, step, values, len(wanted), _spark(points, step), _not_finite(key, points, lives)
    )


def _newest_step(points: Points, lives: Lives, newest: int) -> int | None:
    """How far the newest generation is with this key; None where it has not begun."""
    ends = np.append(points.stream[1:] != points.stream[:-1], True)
    last = ends & (lives.position[points.stream] == newest)
    steps = points.step[last]
    return int(steps.max()) if len(steps) else None


def _common_step(points: Points, lives: Lives) -> int:
    """The last step that all ranks have, else the last of those that most have."""
    rank, step = lives.rank[points.stream], points.step
    ends = np.append(rank[1:] != rank[:-1], True)
    ranks = int(ends.sum())
    candidate = int(step[ends].min())  # sorted by (rank, step): every rank is at least here
    if int((step == candidate).sum()) == ranks:
        return candidate
    steps, counts = np.unique(step[step <= candidate], return_counts=True)
    full = steps[counts == ranks]
    if len(full):
        return int(full[-1])
    steps, counts = np.unique(step, return_counts=True)
    return int(steps[counts == counts.max()][-1])


def _row(
    key: str,
    step: int,
    values: tuple[tuple[int, Any], ...],
    expected: int,
    spark: tuple[float, ...],
    not_finite: tuple[NotFinite, ...],
) -> KeyRow:
    numbers = [(v, r) for r, v in values if v == v]  # all but NaN
    low = min(numbers, default=(None, None))
    high = max(numbers, key=lambda p: (p[0], -p[1]), default=(None, None))
    floats = np.array([float(v) for _, v in values])
    with np.errstate(over="ignore", invalid="ignore"):
        mean = float(floats.mean())
    same = len(values) > 1 and len(numbers) == len(values) and low[0] == high[0]
    if same:
        mean = float(floats[0])
    return KeyRow(
        key, step, len(values), max(expected, len(values)), mean,
        low[0], low[1], high[0], high[1], same, values, spark, not_finite,
    )  # fmt: skip


def _spark(points: Points, end: int) -> tuple[float, ...]:
    """The mean over ranks at each of the last hundred steps, up to the one that all ranks have:
    past it, a mean would move because ranks are missing."""
    step = points.step
    steps = np.unique(step[(step <= end) & (step > end - 100 * SPARK_STEPS)])
    if len(steps) < SPARK_STEPS:  # logged seldom
        steps = np.unique(step[step <= end])
    chosen = points.pick((step >= steps[-SPARK_STEPS:][0]) & (step <= end))
    order = _by(chosen.step)
    s = chosen.step[order]
    means = _reduced("mean", chosen.value[order], _starts(s[1:] != s[:-1]))
    return tuple(means.tolist())


def _not_finite(key: str, points: Points, lives: Lives) -> tuple[NotFinite, ...]:
    value = points.value
    if value.dtype.kind in "ib":
        return ()
    numbers = value.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(numbers))
    if not len(bad):
        return ()
    rank, step, number = lives.rank[points.stream[bad]], points.step[bad], numbers[bad]
    what = np.where(np.isnan(number), 0, np.where(number > 0, 1, 2))
    order = np.lexsort((step, rank, what))
    what, rank, step = what[order], rank[order], step[order]
    starts = _starts((what[1:] != what[:-1]) | (rank[1:] != rank[:-1]))
    names = ("NaN", "Inf", "-Inf")
    return tuple(
        NotFinite(key, int(rank[a]), names[what[a]], int(step[a]), int(step[b - 1]), int(b - a))
        for a, b in pairwise([*starts.tolist(), len(what)])
    )
