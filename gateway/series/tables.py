"""What stands in the tables of series.db, as frozen values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class About:
    """The run as a whole, as of journal entry `cursor`."""

    build: bytes
    journal: bytes
    cursor: int
    state: str  #: running | completed | failed | lost
    reason: str
    now_ns: int
    duplicates: int
    counters: dict[str, int]
    generations: list[int]  #: ids, oldest first
    launchers: dict[str, int]
    damage: tuple[str, ...] = ()  #: stretches of the journal that could not be read


@dataclass(frozen=True, slots=True)
class StreamRow:
    """One life of one process; see schema.sql."""

    index: int
    id: bytes
    hello: dict[str, Any]
    generation: int
    rank: int
    kind: str
    last_seq: int
    stored: int
    projected: int
    control: int
    quarantined: int
    gaps: int
    refused: int
    status: str
    text: str
    bye: bool
    ended_ns: int
    quiet_ns: int
    last_step: int
    last_wall_ns: int
    bad: int

    @property
    def node(self) -> str:
        return str(self.hello.get("node", ""))

    @property
    def local_rank(self) -> int:
        value = self.hello.get("local_rank")
        return value if isinstance(value, int) else 0

    @property
    def ended(self) -> bool:
        return bool(self.status or self.bye)


@dataclass(frozen=True, slots=True)
class Points:
    """Points of one key: arrays of one length. `value` is float64, int64, bool, or object where
    the key changed its type."""

    stream: npt.NDArray[np.int64]
    seq: npt.NDArray[np.int64]
    step: npt.NDArray[np.int64]
    wall_ns: npt.NDArray[np.int64]
    value: npt.NDArray[Any]

    def __len__(self) -> int:
        return len(self.seq)

    def pick(self, index: npt.NDArray[Any]) -> Points:
        """A selection or reordering of all columns."""
        arrays = (self.stream, self.seq, self.step, self.wall_ns, self.value)
        return Points(*(a[index] for a in arrays))


@dataclass(frozen=True, slots=True)
class FeedEntry:
    id: int
    entry: int
    kind: str
    keyset: int
    stream: int
    first: int
    last: int
    rule: str


@dataclass(frozen=True, slots=True)
class MediaRow:
    stream: int
    seq: int
    wall_ns: int
    step: int | None
    what: str
    key: str
    name: str
    meta: dict[str, Any]
    sha256: str | None
    size_bytes: int | None
    lost: str | None


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of one key set, in journal order within a stream: (n,) heads and (n, keys) of raw
    8-byte values."""

    stream: npt.NDArray[np.int64]
    seq: npt.NDArray[np.int64]
    step: npt.NDArray[np.int64]
    wall_ns: npt.NDArray[np.int64]
    values: npt.NDArray[np.uint64]
