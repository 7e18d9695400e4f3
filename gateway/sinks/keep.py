"""Which checkpoints a run keeps once its sinks have them: `[gateway] checkpoints`.

The choice is made from the series and the sinks' own files; ingest, which owns `media/`, is asked
to carry it out. The record of a file that went stays, and says why it is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import apsw
import msgpack

from ..ingest.drop import Request, ask
from ..ingest.media import blob_path
from ..series.db import fetch, open_reader
from ..series.reader import Reader
from ..series.tables import MediaRow

DROPPED = "media dropped by policy"  #: how the reason of each begins, and why sinks skip it
HOLDS = "holds"  #: of a sink's memory: sha256 of files it needs even after their receipt

Record = tuple[bytes, int]  #: (stream, number): what a file was logged as


@dataclass(frozen=True, slots=True)
class Policy:
    """`checkpoints` is all, best or last; `cap_bytes` 0: no cap."""

    checkpoints: str
    cap_bytes: int

    @property
    def keeps_all(self) -> bool:
        return self.checkpoints == "all" and not self.cap_bytes


def surplus(rows: Sequence[MediaRow], rank_of: Callable[[int], int], policy: Policy) -> list[Gone]:
    """The checkpoints to drop, oldest first. Each key of each rank is looked at for itself; what
    was logged as `final` stays, and so does the newest, whatever the cap."""
    whole = [row for row in rows if row.what == "checkpoint" and row.sha256 and not row.lost]
    whole.sort(key=lambda row: (row.wall_ns, row.stream, row.seq))
    keep: dict[tuple[int, int], MediaRow] = {}
    for row in whole:
        if policy.checkpoints == "all" or row.meta.get("final"):
            keep[row.stream, row.seq] = row
    if policy.checkpoints != "all":
        for row in _newest(whole, rank_of, policy.checkpoints == "best"):
            keep[row.stream, row.seq] = row
    setting = f'checkpoints = "{policy.checkpoints}"'
    gone = [Gone(row, setting) for row in whole if (row.stream, row.seq) not in keep]
    if policy.cap_bytes:
        kept = sorted(keep.values(), key=lambda row: (_rank(row), row.wall_ns, row.seq))
        gone += [Gone(row, "checkpoints_gib") for row in _above(kept, whole[-1:], policy.cap_bytes)]
    return gone


@dataclass(frozen=True, slots=True)
class Gone:
    """A checkpoint that is not kept, and the setting that says so."""

    row: MediaRow
    setting: str


def _newest(
    whole: Sequence[MediaRow], rank_of: Callable[[int], int], best: bool
) -> Iterable[MediaRow]:
    """Of each key of each rank the newest, or (`best`) the newest best one, where there is one."""
    found: dict[tuple[int, str], MediaRow] = {}
    for row in whole:
        who = rank_of(row.stream), row.key
        before = found.get(who)
        if not best or before is None or row.meta.get("best") or not before.meta.get("best"):
            found[who] = row
    return found.values()


def _rank(row: MediaRow) -> int:
    """What the cap takes first: neither best nor final, then best."""
    return 2 if row.meta.get("final") else 1 if row.meta.get("best") else 0


def _above(
    kept: Sequence[MediaRow], newest: Sequence[MediaRow], cap_bytes: int
) -> Iterable[MediaRow]:
    sizes = {row.sha256: row.size_bytes or 0 for row in kept}
    total = sum(sizes.values())
    for row in kept:
        if total <= cap_bytes:
            return
        if row not in newest:
            others = sum(other.sha256 == row.sha256 for other in kept)
            total -= sizes[row.sha256] if others == 1 else 0
            yield row


@dataclass(frozen=True, slots=True)
class Taken:
    """What the store of one sink tells: files it has dealt with, those of them that it has set
    aside, and the sha256 of those it needs even after their receipt."""

    records: set[Record]
    aside: set[Record]
    held: set[str]

    def needs(self, record: Record) -> bool:
        return record not in self.records or record in self.aside


def choose(
    reader: Reader, policy: Policy, stores: Iterable[Taken], is_there: Callable[[str], bool]
) -> dict[str, str]:
    """sha256 → reason of the files that no policy keeps and no sink still needs. `stores` are
    those of all sinks the run goes to, looked at after the series."""
    # Nobody knows yet what these were logged as. First, as a record may come between two looks.
    early = reader.media_early()
    rows, passed = reader.media(), reader.media_passed()
    streams = {stream.index: stream for stream in reader.streams()}
    gone = surplus(rows, lambda index: streams[index].rank, policy)
    named = {(one.row.stream, one.row.seq) for one in gone}
    needed = {row.sha256 for row in rows if (row.stream, row.seq) not in named and not row.lost}
    needed |= early
    for taken in stores:
        needed |= taken.held
        for one in gone:
            record = streams[one.row.stream].id, one.row.seq
            if (one.row.stream, one.row.seq) in passed and taken.needs(record):
                needed.add(one.row.sha256)
    wanted = {
        one.row.sha256: f"{DROPPED} ({one.setting})"
        for one in gone
        if one.row.sha256 and one.row.sha256 not in needed
    }
    # Of one that was entered in the journal and is still there, a gateway died in between.
    return wanted | {
        row.sha256: row.lost
        for row in rows
        if row.sha256 and row.lost and row.lost.startswith(DROPPED) and row.sha256 not in needed
        if is_there(row.sha256)
    }


def drop_surplus(run_dir: Path, policy: Policy, stores: Sequence[Path]) -> int:
    """Ask ingest to drop what no policy keeps and no sink still needs; how many files that are.

    `stores` are the files of all sinks the run goes to; one that is not there has taken nothing.
    Raises apsw.Error while there is no series.
    """
    with Reader(run_dir) as reader:
        about = reader.about()
        is_there = lambda sha256: blob_path(run_dir, sha256).exists()  # noqa: E731
        wanted = choose(reader, policy, map(taken_by, stores), is_there)
    if wanted:
        ask(run_dir, Request(about.journal, about.cursor, wanted))
    return len(wanted)


def taken_by(path: Path) -> Taken:
    """Raises nothing: of a store that cannot be read now, no file was dealt with."""
    try:
        with closing(open_reader(path)) as db:
            records = set(fetch(db, "SELECT stream, seq FROM taken_media"))
            aside = set(fetch(db, "SELECT stream, seq FROM quarantine WHERE kind = 'media'"))
            held = fetch(db, "SELECT value FROM memory WHERE name = ?", (HOLDS,))
    except apsw.Error:
        return Taken(set(), set(), set())
    return Taken(records, aside, set(msgpack.unpackb(held[0][0]) or ()) if held else set())
