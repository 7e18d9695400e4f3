"""Following a journal: the committed entries in order, from any process, while it is written."""

from __future__ import annotations

from typing import NamedTuple

from rank_client.wire.disk import Disk
from rank_client.wire.records import (
    HEADER,
    HEADER_BYTES,
    MAX_RECORD_BYTES,
    PAD_MASK,
    Head,
    Kind,
    read_head,
    scan,
    unpack_map,
)
from rank_client.wire.segments import (
    JOURNAL_KINDS,
    read_whole,
    segment_indexes,
    segment_path,
)

from .salvage import BROKEN_BATCH, broken_batches, in_order

CHUNK_BYTES = 4 << 20
LOOK_AGAIN_POLLS = 100  #: a file of the same size may have been cut and written anew meanwhile


class Entry(NamedTuple):
    """`kind` is of records.Kind, or BROKEN_BATCH."""

    seq: int
    kind: int
    body: memoryview


class JournalReader:
    """Reads entries after `seq`; `read` again gives what was committed since.

    `damage` collects what could not be read. Of the entries there only batches are given, as
    BROKEN_BATCH, as some of their records may be good.
    """

    def __init__(self, disk: Disk, directory: str, after: int = 0) -> None:
        self.directory = directory
        self.damage: list[str] = []
        self._disk = disk
        self._after = after
        self._index = 0
        self._at = 0
        self._fd = -1
        self._nothing = (-1, 0)  # (place, file size) where nothing was to be read
        self._polls = 0  # since then

    def uuid(self) -> bytes | None:
        """The journal's name, None when there is no journal (yet)."""
        for index in segment_indexes(self._disk, self.directory):
            buf = read_whole(self._disk, segment_path(self.directory, index))
            head = read_head(buf, 0, len(buf))
            if head and head.kind == Kind.TABLE:
                uuid: bytes = unpack_map(buf[head.body])["uuid"]
                return uuid
        return None

    def read(self, max_bytes: int = CHUNK_BYTES) -> list[Entry]:
        """The next committed entries, about `max_bytes` of them; empty when there are none."""
        if self._fd < 0 and not self._open_first():
            return []
        while True:
            indexes = segment_indexes(self._disk, self.directory)
            later = [i for i in indexes if i > self._index]
            entries = self._read_here(max_bytes, sealed=bool(later))
            if entries or not later:
                return entries
            if self._disk.size(self._fd) > self._at:
                return []  # a stretch without whole entries: wait or skip on the next poll
            self._open(later[0])

    @property
    def file(self) -> tuple[int, str]:
        """The descriptor (-1: none yet) and the path of the segment being read."""
        return self._fd, segment_path(self.directory, self._index)

    def close(self) -> None:
        if self._fd >= 0:
            self._disk.close(self._fd)
            self._fd = -1

    def _open_first(self) -> bool:
        """Start in the last segment that does not begin beyond what is wanted. One that does not
        say where it begins is come to from those before it."""
        indexes = segment_indexes(self._disk, self.directory)
        for index in indexes[1:]:
            first = self._first_of(index)
            if first > self._after + 1:
                break
            if first:
                indexes[0] = index
        if indexes:
            self._open(indexes[0])
        return bool(indexes)

    def _first_of(self, index: int) -> int:
        """The number of a segment's first entry, by its table; 0 when that is not readable."""
        fd = self._disk.open_read(segment_path(self.directory, index))
        try:
            start = self._disk.pread(fd, HEADER_BYTES, 0)
            size = HEADER.unpack(start)[1] if len(start) == HEADER_BYTES else 0
            table = self._disk.pread(fd, min(size, MAX_RECORD_BYTES), 0)
        finally:
            self._disk.close(fd)
        head = read_head(table, 0, len(table))
        return head.seq if head and head.kind == Kind.TABLE else 0

    def _open(self, index: int) -> None:
        self.close()
        self._fd = self._disk.open_read(segment_path(self.directory, index))
        self._index, self._at = index, 0
        self._nothing = (-1, 0)

    def _read_here(self, max_bytes: int, sealed: bool) -> list[Entry]:
        at, end = self._at, self._disk.size(self._fd)
        size = end - at
        if size <= 0:
            return []
        if self._nothing == (at, end) and not sealed and self._polls < LOOK_AGAIN_POLLS:
            self._polls += 1
            return []
        self._polls = 0
        buf = self._disk.pread(self._fd, min(size, max_bytes), self._at)
        entries, good, bad = self._parse(buf, len(buf) == size, sealed)
        self._at += good
        if not entries and not bad and len(buf) < size:
            return self._read_here(max_bytes if good else max_bytes * 2, sealed)
        if bad and not entries:
            entries = self._skip_damage(sealed)
        if self._at == at:
            self._nothing = (at, end)
        return entries

    def _parse(self, buf: bytes, whole: bool, sealed: bool) -> tuple[list[Entry], int, bool]:
        """(committed entries, bytes they end at, whether what follows is no whole record)."""
        view = memoryview(buf)
        entries: list[Entry] = []
        kept = good = at = 0
        end = len(buf)
        seq = self._after
        while (head := read_head(view, at, end)) is not None:
            at += head.size
            if head.kind == Kind.MARK or head.kind == Kind.TABLE:
                kept, good = len(entries), at
            elif head.seq > seq:  # a stretch that stands there twice counts once
                seq = head.seq
                stop = at - (head.flags & PAD_MASK)
                entries.append(Entry(head.seq, head.kind, view[head.at + HEADER_BYTES : stop]))
        if sealed and whole and at == end:
            kept, good = len(entries), at
        del entries[kept:]
        if entries:
            self._after = entries[-1].seq
        # Its length says that a record goes on beyond what was read: true only if there is more.
        beyond = end - at < HEADER_BYTES or HEADER.unpack_from(view, at)[1] > end - at
        return entries, good, at < end and (whole or not beyond)

    def _skip_damage(self, sealed: bool) -> list[Entry]:
        """Step over a record that will never be whole: one that is only being written has no
        mark after it. What stands after it and is committed still counts."""
        base = self._at
        buf = self._disk.pread(self._fd, self._disk.size(self._fd) - base, base)
        found = scan(buf, JOURNAL_KINDS)
        marks = [h.at + h.size for h in found.heads if h.kind == Kind.MARK]
        good = len(buf) if sealed else max(marks, default=0)
        if good == 0:
            return []
        name = f"journal/{self._index:08d}.log"
        entries: list[Entry] = []
        seq = self._after
        for piece in in_order(found):
            if piece[0] >= good:
                break
            if isinstance(piece, Head):
                if piece.kind not in (Kind.MARK, Kind.TABLE) and piece.seq > seq:
                    seq = piece.seq
                    entries.append(Entry(seq, piece.kind, memoryview(buf)[piece.body]))
                continue
            start, end = piece
            self.damage.append(f"{name}: bytes {base + start} to {base + end} are not readable")
            broken = broken_batches(buf, start, end, seq + 1)
            entries += [Entry(number, BROKEN_BATCH, body) for number, body in broken]
            seq = entries[-1].seq if entries else seq
        self._at = base + good
        self._after = seq
        return entries
