"""What a batch becomes in Neptune: the writes, and what is skipped, from data alone.

Neptune's server refuses a step that does not rise and a time that goes back, point by point and
without telling the caller, so both are settled here, before anything is sent. After a lost answer
the planner is told what the server has (`Tail`) and leaves that out.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gateway.sinks.base import Item, Media, Memory, Params, Rows, Sent, Summary, Text, Value
from gateway.sinks.naming import neptune_path

LINE_CHARACTERS = 1000  #: the client cuts longer values of a string series off
IMAGE_BYTES = 32 * 1024 * 1024  #: the client replaces a larger image in a series by an empty one
EXACT_INTEGER = 2**53  #: beyond it a float is not exact
MARKED_LEVELS = ("debug", "warning", "error", "critical")

NOT_FINITE = "not finite"
NOT_RISING = "step not rising"
CONFLICT = "type conflict"
NO_KEY = "empty key"
FILE_GONE = "file gone"

Kind = Literal["floats", "lines", "images"]
Atom = float | bool | str
Point = tuple[float, Any, int]  #: step, value, milliseconds


@dataclass(frozen=True)
class Tail:
    """What the server holds of one series beyond the step that was asked about."""

    points: Sequence[Point] = ()
    whole: bool = True  #: False: the first `points` are not the first ones beyond that step
    count: int = 0  #: all points of the series, the older ones too


Read = Callable[[Kind, str, float], Tail]


@dataclass(frozen=True)
class WriteFloats:
    path: str
    values: list[float]
    steps: list[int]
    seconds: list[float]
    items: int


@dataclass(frozen=True)
class WriteLines:
    path: str
    values: list[str]
    steps: list[int]
    seconds: list[float]
    items: int = 1


@dataclass(frozen=True)
class WriteImage:
    path: str
    media: Media
    step: int
    seconds: float
    items: int = 1


@dataclass(frozen=True)
class WriteFile:
    path: str
    media: Media
    items: int = 1


@dataclass(frozen=True)
class WriteAtoms:
    values: dict[str, Atom]
    items: int = 1


Write = WriteFloats | WriteLines | WriteImage | WriteFile | WriteAtoms

NEVER = -(2**63)


@dataclass
class FloatPlace:
    """How far a float series is: `step` is the last one dealt with, `last` the server's."""

    step: int
    at_ms: int
    tail: Tail = field(default_factory=Tail)
    last: int = NEVER

    def __post_init__(self) -> None:
        self.last = self.step
        if self.tail.points:
            self.last = max(self.last, math.floor(self.tail.points[-1][0]))
            self.at_ms = max(self.at_ms, self.tail.points[-1][2])

    def known(self, steps: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which of the steps the server has; what was too far back to read counts as there."""
        if not len(steps):
            return np.zeros(0, np.bool_)
        held = np.array([p[0] for p in self.tail.points])
        there: npt.NDArray[np.bool_] = np.isin(steps, held)
        if not self.tail.whole:
            there |= steps < held[0]
        return there


@dataclass
class LinePlace:
    """How far a string series is; its steps are our own count, as lines share training steps."""

    step: int
    at_ms: int
    tail: Tail = field(default_factory=Tail)
    last: int = 0
    next: int = 0  #: the first point of the tail that no line has been matched with

    def __post_init__(self) -> None:
        self.last = self.step
        self._where: dict[str, list[int]] = {}
        for n, (_, value, _) in enumerate(self.tail.points):
            self._where.setdefault(value, []).append(n)
        if self.tail.points:
            self.last = max(self.last, math.ceil(self.tail.points[-1][0]))
            self.at_ms = max(self.at_ms, self.tail.points[-1][2])

    def match(self, value: str) -> bool:
        """True if the server has this line already, beyond those matched before."""
        found = self._where.get(value, [])
        n = bisect_left(found, self.next)
        if n == len(found):
            return False
        self.next = found[n] + 1
        self.step = max(self.step, math.ceil(self.tail.points[found[n]][0]))
        return True


@dataclass
class ImagePlace:
    """How far an image series is; of these the server tells no steps, only how many it has."""

    step: int
    at_ms: int
    count: int
    tail: Tail = field(default_factory=Tail)

    @property
    def ahead(self) -> int:
        return max(0, self.tail.count - self.count)


Place = FloatPlace | LinePlace | ImagePlace


class Planner:
    """Remembers how far each series is; `plan` drafts, `commit` makes the draft true.

    A draft that is not committed is as if it had never been made. `read` is asked once per series
    after `forget`, and once per series and plan when `unsure`.
    """

    def __init__(self, memory: Memory, read: Read, drawable: Callable[[Media], bool]) -> None:
        self._memory = memory
        self._read = read
        self._drawable = drawable
        self._places: dict[tuple[Kind, str], Place] = {}
        self._draft: dict[tuple[Kind, str], Place] = {}
        self._unsure = False

    def forget(self) -> None:
        """A new connection: what the server has must be read again."""
        self._places.clear()

    def plan(self, batch: Sequence[Item], unsure: bool) -> tuple[list[Write], Sent]:
        """The writes of a batch, and what will have become of it if they all succeed."""
        self._draft, self._unsure = {}, unsure
        sent, writes = Sent(), list[Write]()
        for item in batch:
            if isinstance(item, Rows):
                for key, column in item.columns.items():
                    self._floats(item, key, column, writes, sent)
            elif isinstance(item, Text):
                self._text(item, writes, sent)
            elif isinstance(item, Media):
                self._media(item, writes, sent)
            else:
                self._atoms(item, writes, sent)
        return writes, sent

    def commit(self) -> None:
        """The writes of the last plan are confirmed."""
        for (kind, path), place in self._draft.items():
            counted = [place.count] if isinstance(place, ImagePlace) else []
            self._memory.put(f"{kind}:{path}", [place.step, place.at_ms, *counted])
        self._places.update(self._draft)
        self._draft = {}

    def _place(self, kind: Kind, path: str) -> Place:
        place = self._draft.get((kind, path))
        if place is None:
            old = None if self._unsure else self._places.get((kind, path))
            place = copy(old) if old is not None else self._fresh(kind, path)
            self._draft[kind, path] = place
        return place

    def _fresh(self, kind: Kind, path: str) -> Place:
        kept = self._memory.get(f"{kind}:{path}")
        step, at_ms, count = (*kept, 0)[:3] if kept else (0 if kind == "lines" else NEVER, 0, 0)
        tail = self._read(kind, path, step)
        if kind == "floats":
            return FloatPlace(step, at_ms, tail)
        if kind == "lines":
            return LinePlace(step, at_ms, tail)
        return ImagePlace(step, at_ms, count, tail)

    def _floats(
        self, rows: Rows, key: str, column: npt.NDArray[Any], writes: list[Write], sent: Sent
    ) -> None:
        path = clean(neptune_path(key, rows.rank))
        if not path:
            return sent.skip(NO_KEY, len(column))
        place = self._place("floats", path)
        assert isinstance(place, FloatPlace)
        values = column.astype(np.float64)
        finite = np.isfinite(values)
        sent.skip(NOT_FINITE, int(np.count_nonzero(~finite)))
        steps, at_ms = rows.step[finite], rows.wall_ns[finite] // 1_000_000
        before = np.maximum.accumulate(np.concatenate(([place.step], steps)))
        rising = steps > before[:-1]
        new = rising & (steps > place.last)
        there = int(np.count_nonzero(place.known(steps[rising & ~new])))
        count = int(np.count_nonzero(new))
        sent.delivered += count + there
        sent.skip(NOT_RISING, len(steps) - count - there)
        place.step = int(before[-1])
        if count:
            at_ms = np.maximum.accumulate(np.maximum(at_ms[new], place.at_ms))
            place.last, place.at_ms = place.step, int(at_ms[-1])
            kept, chosen = values[finite][new].tolist(), steps[new].tolist()
            writes.append(WriteFloats(path, kept, chosen, seconds(at_ms), count))
        return None

    def _text(self, text: Text, writes: list[Write], sent: Sent) -> None:
        path = neptune_path("logs", text.rank)
        place = self._place("lines", path)
        assert isinstance(place, LinePlace)
        mark = f"[{text.level}] " if text.level.lower() in MARKED_LEVELS else ""
        pieces = [p for p in cut(mark + text.text) if not place.match(p)]
        sent.delivered += 1
        if not pieces:
            return
        place.at_ms = max(place.at_ms, text.wall_ns // 1_000_000)
        steps = list(range(place.last + 1, place.last + 1 + len(pieces)))
        place.step = place.last = steps[-1]
        at = seconds(np.full(len(pieces), place.at_ms, np.int64))
        before = writes[-1] if writes else None
        if isinstance(before, WriteLines) and before.path == path:  # one call for many lines
            writes[-1] = WriteLines(
                path,
                before.values + pieces,
                before.steps + steps,
                before.seconds + at,
                before.items + 1,
            )
        else:
            writes.append(WriteLines(path, pieces, steps, at))

    def _media(self, media: Media, writes: list[Write], sent: Sent) -> None:
        path = clean(neptune_path(media_key(media), media.rank))
        if not path:
            return sent.skip(NO_KEY)
        if not media.path.is_file():
            return sent.skip(FILE_GONE)
        if media.what != "image":
            writes.append(WriteFile(path, media))
        elif not self._drawable(media):
            aside = f"files/{media.key}/{media.name}"
            writes.append(WriteFile(clean(neptune_path(aside, media.rank)), media))
        elif not self._image(path, media, writes):
            return sent.skip(NOT_RISING)
        sent.delivered += 1
        return None

    def _image(self, path: str, media: Media, writes: list[Write]) -> bool:
        place = self._place("images", path)
        assert isinstance(place, ImagePlace)
        step = max(place.step, -1) + 1 if media.step is None else media.step
        if step <= place.step:
            return False
        there = place.ahead > 0
        place.step, place.count = step, place.count + 1
        place.at_ms = max(place.at_ms, media.wall_ns // 1_000_000)
        if there:
            return True
        (at,) = seconds(np.array([place.at_ms]))
        writes.append(WriteImage(path, media, step, at))
        return True

    def _atoms(self, item: Params | Summary, writes: list[Write], sent: Sent) -> None:
        folder = "parameters" if isinstance(item, Params) else "summary"
        values = {
            clean(neptune_path(f"{folder}/{key}", item.rank)): atom(value)
            for key, value in item.values.items()
            if clean(key)
        }
        if item.values and not values:
            return sent.skip(NO_KEY)
        writes.append(WriteAtoms(values))
        sent.delivered += 1
        return None


def clean(path: str) -> str:
    """The path as Neptune reads it: empty parts are dropped, so `/a//b/` is `a/b`."""
    return "/".join(part for part in path.split("/") if part)


def media_key(media: Media) -> str:
    """Files and checkpoints have names, which may be anything; the rest goes under its own key."""
    if media.what in ("file", "checkpoint"):
        return f"{media.what}s/{media.name or media.key}"
    return media.key


def extension(media: Media) -> str:
    return PurePosixPath(media.name).suffix.removeprefix(".")


def atom(value: Value) -> Atom:
    """A value for a single-value field, always of the same type for the same kind of value.

    Numbers are floats: a field that began as an integer would truncate a later 0.5 to 0, and
    Neptune's integers have 32 bits. Those that a float cannot hold are kept whole as text.
    """
    if isinstance(value, bool | str):
        return value
    if value is None or (isinstance(value, int) and abs(value) > EXACT_INTEGER):
        return str(value)
    return float(value) if math.isfinite(value) else str(float(value))


def cut(text: str) -> list[str]:
    """Pieces of at most LINE_CHARACTERS, cut after a line end if there is one; joined, the text."""
    pieces = []
    while len(text) > LINE_CHARACTERS:
        end = text.rfind("\n", 0, LINE_CHARACTERS) + 1 or LINE_CHARACTERS
        pieces.append(text[:end])
        text = text[end:]
    return [*pieces, text] if text or not pieces else pieces


def seconds(at_ms: npt.NDArray[np.int64]) -> list[float]:
    """Seconds that the client turns back into these very milliseconds.

    It computes `int(seconds * 1000)`, which for some values is one less: then the next float up.
    """
    found = at_ms / 1000.0
    short = (found * 1000).astype(np.int64) < at_ms
    found[short] = np.nextafter(found[short], np.inf)
    chosen: list[float] = found.tolist()
    return chosen
