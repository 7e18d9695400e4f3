"""What a batch becomes in Neptune: the writes, and what is skipped, from data alone.

Neptune's server refuses a step that does not rise and a time that goes back, point by point, so
both are settled here, before anything is sent. After a lost answer the planner is told what the
server has (`Tail`) and leaves that out.
"""

from __future__ import annotations

import importlib
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gateway.sinks import naming
from gateway.sinks.base import (
    Item,
    Media,
    Memory,
    Params,
    Rows,
    RunInfo,
    Sent,
    Summary,
    Text,
    Value,
)

VALUE_CHARACTERS = 16_384  #: of a single value; the client cuts longer ones off
LINE_CHARACTERS = 1000  #: the client cuts longer values of a string series off
IMAGE_BYTES = 32 * 1024 * 1024  #: the client replaces a larger image in a series by an empty one
EXACT_INTEGER = 2**53  #: beyond it a float is not exact
MARKED_LEVELS = ("debug", "warning", "error", "critical")

NOT_FINITE = "not finite"
NOT_RISING = "step not rising"
CONFLICT = "type conflict"
NO_KEY = "empty key"
FILE_GONE = "file gone"

NOT_FINITE_FOLDER = "rankgate/not_finite"
CUT_MARK = " … (cut; the whole text is under files/)"

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
class WriteWhole:
    """The whole of a text whose field holds only its beginning."""

    path: str
    text: str
    items: int = 0


@dataclass(frozen=True)
class WriteAtoms:
    values: dict[str, Atom]
    items: int = 1


Write = WriteFloats | WriteLines | WriteImage | WriteFile | WriteWhole | WriteAtoms

NEVER = -(2**63)


@dataclass
class FloatPlace:
    """How far a float series is: `step` is the last one dealt with, `last` the server's."""

    step: int
    at_ms: int
    last: int
    held: npt.NDArray[np.float64]  #: steps beyond `step` that the server has
    floor: float  #: what is below it was too far back to be read, and is taken to be there

    @classmethod
    def read(cls, step: int, at_ms: int, tail: Tail) -> FloatPlace:
        held = np.array([point[0] for point in tail.points], np.float64)
        floor = -math.inf if tail.whole else float(held[0])
        if not len(held):
            return cls(step, at_ms, step, held, floor)
        last = max(step, math.floor(held[-1]))
        return cls(step, max(at_ms, tail.points[-1][2]), last, held, floor)

    def known(self, steps: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which of the steps the server has."""
        found: npt.NDArray[np.bool_] = np.isin(steps, self.held) | (steps < self.floor)
        return found

    def let_go(self) -> None:
        """Of what has been passed; after a lost memory it may be all of a long series."""
        if len(self.held):
            self.held = self.held[self.held > self.step]


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

    def let_go(self) -> None:
        """Of what was read, once each line of it has been matched."""
        if self.next == len(self.tail.points):
            self.tail, self.next, self._where = Tail(), 0, {}

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

    def let_go(self) -> None:
        """A number takes no room."""

    @property
    def ahead(self) -> int:
        return max(0, self.tail.count - self.count)


Place = FloatPlace | LinePlace | ImagePlace


@dataclass(frozen=True)
class Points:
    """Finite points of one key in the order they were logged; all of shape (n,)."""

    step: npt.NDArray[np.int64]
    value: npt.NDArray[np.float64]
    at_ms: npt.NDArray[np.int64]

    def pick(self, chosen: npt.NDArray[np.bool_]) -> Points:
        return Points(self.step[chosen], self.value[chosen], self.at_ms[chosen])


class Planner:
    """Remembers how far each series is; `plan` drafts, `commit` makes the draft true.

    A draft that is not committed is as if it had never been made. `read` is asked once per series
    after `forget`, and once per series and plan when `unsure`.

    A step that does not rise in its series is of a training that went back to a checkpoint, when
    an earlier life of the rank has logged before: it goes to the series `attempts/N/PATH` of the
    Nth life. Within one life it is a step logged twice, which is skipped.
    """

    def __init__(
        self, memory: Memory, read: Read, drawable: Callable[[Media], bool], run: RunInfo
    ) -> None:
        self._run = run
        self._memory = memory
        self._read = read
        self._drawable = drawable
        self._places: dict[tuple[Kind, str], Place] = {}
        self._draft: dict[tuple[Kind, str], Place] = {}
        self._notes: dict[str, Any] = {}  #: of the draft, to be remembered
        self._unsure = False

    def forget(self) -> None:
        """A new connection: what the server has must be read again."""
        self._places.clear()

    def plan(self, batch: Sequence[Item], unsure: bool) -> tuple[list[Write], Sent]:
        """The writes of a batch, and what will have become of it if they all succeed."""
        self._draft, self._notes, self._unsure = {}, {}, unsure
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
            place.let_go()
        for name, value in self._notes.items():
            self._memory.put(name, value)
        self._places.update(self._draft)
        self._draft, self._notes = {}, {}

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
            return FloatPlace.read(step, at_ms, tail)
        if kind == "lines":
            return LinePlace(step, at_ms, tail)
        return ImagePlace(step, at_ms, count, tail)

    def _noted(self, name: str) -> Any:
        return self._notes.get(name) or self._memory.get(name)

    def _life(self, rank: int, stream: bytes) -> int:
        """Which of the rank's lives this is, from 1 on."""
        name = f"lives:{rank}"
        lives: list[bytes] = self._noted(name) or []
        if stream not in lives:
            lives = [*lives, stream]
            self._notes[name] = lives
        return lives.index(stream) + 1

    def _floats(
        self, rows: Rows, key: str, column: npt.NDArray[Any], writes: list[Write], sent: Sent
    ) -> None:
        named = naming.neptune_scalar(key, rows.rank, self._run.source)
        if not clean(key) or named is None:
            return sent.skip(NO_KEY if named else naming.NOT_IN_ORIGINAL, len(column))
        path, values = clean(named), column.astype(np.float64)
        steps = rows.step + naming.neptune_step_offset(self._run.source)
        points = Points(steps, values, rows.wall_ns // 1_000_000)
        finite = np.isfinite(values)
        if not finite.all():
            self._not_finite(path, points.pick(~finite), writes, sent)
            points = points.pick(finite)
        left = self._series(path, points, writes, sent)
        life = self._life(rows.rank, rows.stream)
        if len(left.step) and life > 1:
            left = self._series(attempt(path, life), left, writes, sent)
        return sent.skip(NOT_RISING, len(left.step))

    def _not_finite(self, path: str, points: Points, writes: list[Write], sent: Sent) -> None:
        """Neptune 2.x has no such number: where they begin is said once, beside the series."""
        sent.skip(NOT_FINITE, len(points.step))
        if not self._noted(f"odd:{path}"):
            self._notes[f"odd:{path}"] = True
            text = f"{points.value[0]} first at step {points.step[0]}"
            writes.append(WriteAtoms({f"{NOT_FINITE_FOLDER}/{path}": text}, items=0))

    def _series(self, path: str, points: Points, writes: list[Write], sent: Sent) -> Points:
        """Write what is new; returns the points that have no place in this series."""
        place = self._place("floats", path)
        assert isinstance(place, FloatPlace)
        before = np.maximum.accumulate(np.concatenate(([place.step], points.step)))
        rising = points.step > before[:-1]
        new = rising & (points.step > place.last)
        there = rising & ~new
        there[there] = place.known(points.step[there])
        count = int(np.count_nonzero(new))
        sent.delivered += count + int(np.count_nonzero(there))
        place.step = int(before[-1])
        if count:
            chosen = points.pick(new)
            at_ms = np.maximum.accumulate(np.maximum(chosen.at_ms, place.at_ms))
            place.last, place.at_ms = place.step, int(at_ms[-1])
            steps, values = chosen.step.tolist(), chosen.value.tolist()
            writes.append(WriteFloats(path, values, steps, seconds(at_ms), count))
        return points.pick(~(new | there))

    def _text(self, text: Text, writes: list[Write], sent: Sent) -> None:
        path = naming.neptune_lines(text.level, text.rank)
        place = self._place("lines", path)
        assert isinstance(place, LinePlace)
        mark = f"[{text.level}] " if text.level.lower() in MARKED_LEVELS else ""
        pieces = [p for p in cut(mark + text.text) if not place.match(p)]
        sent.delivered += 1
        if pieces:
            place.at_ms = max(place.at_ms, text.wall_ns // 1_000_000)
            steps = list(range(place.last + 1, place.last + 1 + len(pieces)))
            place.step = place.last = steps[-1]
            at = seconds(np.full(len(pieces), place.at_ms, np.int64))
            writes.append(WriteLines(path, pieces, steps, at))

    def _media(self, media: Media, writes: list[Write], sent: Sent) -> None:
        path = self._media_path(media)
        if not path:
            return sent.skip(NO_KEY)
        if not media.path.is_file():
            return sent.skip(FILE_GONE)
        if media.what != "image" or naming.neptune_picture_is_file(self._run.source):
            writes.append(WriteFile(path, media))
        elif not self._drawable(media):
            aside = naming.neptune_file(f"{media.key}/{media.name}", media.rank)
            writes.append(WriteFile(clean(aside), media))
        elif not self._image(path, media, writes):
            life = self._life(media.rank, media.stream)
            if life == 1 or not self._image(attempt(path, life), media, writes):
                return sent.skip(NOT_RISING)
        sent.delivered += 1
        return None

    def _media_path(self, media: Media) -> str:
        """Files and checkpoints have names, which may be anything; the rest have their keys."""
        name = media.name or media.key
        if media.what == "file":
            return clean(name) and clean(naming.neptune_file(name, media.rank))
        if media.what == "checkpoint":
            info = self._run
            return clean(naming.neptune_checkpoint(name, info.name, media.rank, info.source))
        return clean(media.key) and clean(naming.neptune_path(media.key, media.rank))

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
        source = self._run.source
        name = naming.neptune_param if isinstance(item, Params) else naming.neptune_summary
        values: dict[str, Atom] = {}
        for key, value in item.values.items():
            if clean(key):
                path, found = clean(name(key, item.rank, source)), atom(value, source)
                if isinstance(found, str) and len(found) > VALUE_CHARACTERS:
                    writes.append(WriteWhole(clean(naming.neptune_file(path, -1)), found))
                    found = found[: VALUE_CHARACTERS - len(CUT_MARK)] + CUT_MARK
                values[path] = found
        if item.values and not values:
            return sent.skip(NO_KEY)
        writes.append(WriteAtoms(values))
        sent.delivered += 1
        return None


def attempt(path: str, life: int) -> str:
    """Where the points of a later life go that have no place after those of the earlier ones."""
    return f"attempts/{life}/{path}"


def first_fields(info: RunInfo) -> WriteAtoms:
    """What tells people, and a later search, where the run comes from."""
    whence: dict[str, Atom] = {"rankgate/run_id": info.run_id, "rankgate/project": info.project}
    return WriteAtoms(whence | {"rankgate/state": "running", "rankgate/reason": ""}, items=0)


def last_fields(state: str, reason: str) -> WriteAtoms:
    """How the run ended."""
    failed = {"sys/failed": state == "failed"}
    ended: dict[str, Atom] = {"rankgate/state": state, "rankgate/reason": reason}
    return WriteAtoms(ended | failed, items=0)


def drawable(media: Media) -> bool:
    """Whether the file can be a point of an image series."""
    if media.size_bytes > IMAGE_BYTES:
        return False
    image = importlib.import_module("PIL.Image")  # the package needs it, so it is there
    try:
        with image.open(media.path):
            return True
    except Exception:  # whatever the decoder of a broken file raises
        return False


def clean(path: str) -> str:
    """The path as Neptune reads it: empty parts are dropped, so `/a//b/` is `a/b`."""
    return "/".join(part for part in path.split("/") if part)


def extension(media: Media) -> str:
    return PurePosixPath(media.name).suffix.removeprefix(".")


def atom(value: Value, source: str = "") -> Atom:
    """A value for a single-value field, always of the same type for the same kind of value.

    Numbers are floats: a field that began as an integer would truncate a later 0.5 to 0, and
    Neptune's integers have 32 bits. Those that a float cannot hold are kept whole as text.
    """
    if isinstance(value, bool | str):
        return value
    if value is None:
        return naming.neptune_none(source)
    if isinstance(value, int) and abs(value) > EXACT_INTEGER:
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
