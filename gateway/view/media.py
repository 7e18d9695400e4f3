"""The files of a run for people: whose, how large, with which checksum, and why one is not here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..series.reader import Reader
from ..series.tables import StreamRow


@dataclass(frozen=True, slots=True)
class FileRow:
    """A file that was logged; `sha256` is empty until its last byte has come."""

    rank: int
    step: int | None
    what: str  #: image | figure | table | file | checkpoint
    key: str
    name: str
    size_bytes: int | None
    sha256: str
    lost: str  #: why it is not here, or empty


def files_of(reader: Reader, streams: Sequence[StreamRow]) -> tuple[FileRow, ...]:
    """In the order in which they were logged."""
    return tuple(
        FileRow(
            streams[row.stream].rank,
            row.step,
            row.what,
            row.key,
            row.name,
            row.size_bytes,
            row.sha256 or "",
            row.lost or "",
        )
        for row in reader.media()
    )
