"""The books of a stream: what it logged, what is stored, on the way, lost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rank_client.counts import COUNTS
from rank_client.wire.disk import OsDisk
from rank_client.wire.records import UNNUMBERED
from rank_client.wire.segments import SPOOL_KINDS, scan_segment, segment_indexes

from ..series.tables import StreamRow
from .serving import whole


@dataclass(frozen=True, slots=True)
class Accounting:
    """Records: logged = stored + on_the_way + lost; lost = gaps + refused + unreachable."""

    logged: int
    stored: int
    on_the_way: int
    lost: int
    gaps: int
    refused: int
    unreachable: int
    spooled_in: str = ""  #: where records on the way stand, when no process carries them

    @classmethod
    def total(cls, parts: Iterable[Accounting]) -> Accounting:
        parts = list(parts)
        names = ("logged", "stored", "on_the_way", "lost", "gaps", "refused", "unreachable")
        sums = {n: sum(getattr(p, n) for p in parts) for n in names}
        places = sorted({p.spooled_in for p in parts if p.spooled_in})
        return cls(**sums, spooled_in=", ".join(places))


@dataclass(frozen=True, slots=True)
class Told:
    """What a stream's own side says: the highest number it gave, the calls it refused."""

    last: int
    refused: int
    spool: str = ""  #: where its records stand, when it was the spool that said so
    holes: int = 0  #: numbers it gave of which the spool has nothing that can be read


def account(stream: StreamRow, told: Told, over: bool) -> Accounting:
    """The books of one stream. `over`: nobody will send the rest any more."""
    last = stream.last_seq if stream.bye else max(stream.last_seq, told.last)
    refused = max(stream.refused, told.refused)
    missing = last - stream.last_seq
    unreachable = missing if over and not told.spool else min(missing, told.holes)
    return Accounting(
        logged=last + refused,
        stored=stream.stored,
        on_the_way=missing - unreachable,
        lost=stream.gaps + refused + unreachable,
        gaps=stream.gaps,
        refused=refused,
        unreachable=unreachable,
        spooled_in=told.spool if missing else "",
    )


def _spool_told(folder: Path) -> Told:
    """What a spool on this node says of its stream: read from its last segment and its counts."""
    disk, last = OsDisk(), 0
    try:
        indexes = segment_indexes(disk, str(folder))
        for index in reversed(indexes):
            _, found = scan_segment(disk, str(folder), index, SPOOL_KINDS)
            if found.heads:
                head = found.heads[-1]
                last = head.seq - (head.kind in UNNUMBERED)
                break
        refused, _ = COUNTS.unpack_from((folder / "counts").read_bytes())
    except (OSError, ValueError, TypeError):
        refused = 0
    return Told(last, refused, str(folder) if last else "", _holes(folder))


def _holes(folder: Path) -> int:
    """As whoever tried to ship it has noted."""
    try:
        return int((folder / "hole").read_text().split()[2])
    except (OSError, ValueError, IndexError):
        return 0


def told_of(
    stream: StreamRow, live: Mapping[str, Any], served: bool, run_spool: Path | None
) -> Told:
    """`live`: what ingest told of the stream; the spool is looked into where nobody carries it."""
    last, refused = whole(live.get("last")), whole(live.get("refused"))
    alive = served and live.get("kind") != "replay"
    if stream.bye or alive or run_spool is None:
        return Told(last, refused)
    found = _spool_told(run_spool / stream.id.hex())
    return Told(max(last, found.last), max(refused, found.refused), found.spool, found.holes)
