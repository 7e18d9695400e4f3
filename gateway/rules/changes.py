"""What the projection knows of a stream, and what one fetch of entries adds to the series."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

SYSTEM = "system/"  #: how the keys of machine metrics begin


@dataclass(slots=True, eq=False)
class Stream:
    """One life of one process, as far as the journal tells."""

    index: int
    id: bytes
    hello: dict[str, Any]
    generation: int
    rank: int
    kind: str
    last_seq: int = 0
    stored: int = 0
    projected: int = 0
    control: int = 0
    quarantined: int = 0
    gaps: int = 0
    refused: int = 0
    bad: int = 0  #: values left out of calls that were kept
    status: str = ""  #: how its END record says it ended
    text: str = ""
    bye: bool = False
    ended_ns: int = 0
    quiet_ns: int = 0  #: since when nothing was heard, 0 while it is
    last_step: int = -1
    last_wall_ns: int = 0
    layouts: dict[int, Layout] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """How one stream's schema lies in its key set. `take` is None where the order is the same."""

    schema: int
    keyset: int
    row_bytes: int
    take: npt.NDArray[np.int64] | None
    columns: tuple[tuple[str, str], ...]

    @property
    def kind(self) -> str:
        """What the rules call its points; a machine's own metrics stand in rows of their own."""
        return "system" if all(key.startswith(SYSTEM) for key, _ in self.columns) else "metric"


@dataclass(slots=True)
class Changes:
    """What one fetch adds; tables and columns as in series/schema.sql. `tail` is the checksum of
    the entry at `cursor`: by it a journal is known that was put back to an older state."""

    cursor: int = 0
    tail: int = 0
    keys: list[tuple[int, str, str]] = field(default_factory=list)
    keysets: list[tuple[int, bytes]] = field(default_factory=list)
    layouts: list[tuple[int, int, int, bytes]] = field(default_factory=list)
    rows: list[tuple[int, npt.NDArray[np.uint64]]] = field(default_factory=list)
    texts: list[tuple[Any, ...]] = field(default_factory=list)
    maps: list[tuple[Any, ...]] = field(default_factory=list)
    media: list[tuple[Any, ...]] = field(default_factory=list)
    blobs: list[tuple[str, int, int, int]] = field(default_factory=list)
    #: (how many of `blobs` came before, sha256, reason)
    dropped: list[tuple[int, str, str]] = field(default_factory=list)
    lost_media: list[tuple[str, int, int]] = field(default_factory=list)
    losses: list[tuple[Any, ...]] = field(default_factory=list)
    quarantine: list[tuple[Any, ...]] = field(default_factory=list)
    feed: list[tuple[Any, ...]] = field(default_factory=list)
    streams: dict[int, Stream] = field(default_factory=dict)  #: new or changed
