"""The last lines of a rank that died by force, written into its spool by the copier.

Only while it holds the spool's lock, which is free since the rank's death; so the rule stands that
a stream has one writer at a time, and whoever ships the spool waits for it.
"""

from __future__ import annotations

import os

from ..counts import packed_counts, read_counts
from ..redact import Redactor
from ..wire.disk import OsDisk
from ..wire.records import UNNUMBERED, Head, Kind, Scan, pack_map, unpack_map
from ..wire.segments import SPOOL_KINDS, scan_segment, segment_indexes, segment_path
from .messages import Message
from .record import REFUSED, Record

OVER = ("done", "hole", "rejected")  #: notes of a spool that was shipped meanwhile


def store(directory: str, lines: list[Message], refused: int) -> None:
    """Append the lines that the rank has not stored, and count the refused. Raises OSError."""
    if any(os.path.exists(f"{directory}/{note}") for note in OVER):  # noqa: PTH110 - paths are str
        return
    disk = OsDisk()
    segments = segment_indexes(disk, directory)
    if not segments:
        return
    buf, found = scan_segment(disk, directory, segments[-1], SPOOL_KINDS)
    if not found.heads or any(h.kind == Kind.END for h in found.heads):
        return
    stored = _last_line(buf, found)
    if not stored and len(segments) > 1:
        stored = _last_line(*scan_segment(disk, directory, segments[-2], SPOOL_KINDS))
    last = found.heads[-1]
    number = last.seq - (last.kind in UNNUMBERED)
    record = Record(Redactor(os.environ))
    packed = bytearray()
    for line in lines:
        for body in record.bodies(line):
            if line.number > stored:
                number += 1
                packed += pack_map(Kind.TEXT, number, body)
    _append(segment_path(directory, segments[-1]), last, bytes(packed))
    if refused:
        _count(disk, directory, refused)


def _last_line(buf: bytes, found: Scan) -> int:
    """The number of the newest printed line among these records, 0 where there is none."""
    for head in reversed(found.heads):
        if head.kind == Kind.TEXT:
            number = unpack_map(buf[head.body]).get("n")
            if isinstance(number, int):
                return number
    return 0


def _append(path: str, last: Head, packed: bytes) -> None:
    """After the last whole record, in the place of what the rank was just writing."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        end = last.at + last.size
        os.ftruncate(fd, end)
        if os.pwrite(fd, packed, end) != len(packed):
            os.ftruncate(fd, end)
        os.fdatasync(fd)
    finally:
        os.close(fd)


def _count(disk: OsDisk, directory: str, refused: int) -> None:
    counts = read_counts(disk, directory)
    owed = {**counts.owed, REFUSED: counts.owed.get(REFUSED, 0) + refused}
    fd = disk.open_edit(f"{directory}/counts")
    try:
        disk.write_at(fd, packed_counts(counts.refused + refused, counts.bad_values, owed), 0)
    finally:
        disk.close(fd)
