"""The reader of a spool that is being written: what the sender takes from it, frame by frame."""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

from .wire.records import UNNUMBERED, walk

if TYPE_CHECKING:
    from .spool import Spool


class Segment:
    """What the reader must know of a segment. `marks` are (number that starts there, offset);
    `base` counts the bytes of all segments before it."""

    __slots__ = ("base", "end", "fd", "first", "index", "lost", "marks", "path")

    def __init__(self, index: int, path: str, first: int, start: int, base: int) -> None:
        self.index = index
        self.path = path
        self.first = first
        self.base = base
        self.lost = False  #: it is gone or cut, and what is still missing of it will never come
        self.marks: list[tuple[int, int]] = [(first, start)]
        self.end: tuple[int, int] | None = None  #: set once, when the segment is sealed
        self.fd = -1


class SpoolReader:
    """Reads one spool in the sender's thread, beside the threads that write it."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._at: tuple[Segment, int, int] | None = None  # (segment, number, offset) of the end
        self._follows = 1  # the number that a reader who goes on asks for

    def forget(self, segment: Segment) -> None:
        """It is dropped: the next read does not begin there."""
        if self._at and self._at[0] is segment:
            self._at = None

    def read(self, first: int, max_bytes: int) -> tuple[int, bytes]:
        """(n, bytes) of the numbered records from `first` on, with the schemas between them.

        All schemas stand before the first record after a jump, and before the first that is kept
        when those before it are not: it may be for a journal that has none of them.
        """
        restated = b""
        if first != self._follows or 1 < first == self._spool.first_kept:
            restated = b"".join(s.pack(first) for s in self._spool.schemas[:])
        n, data = self._read(first, max_bytes - len(restated))
        if n == 0:
            return 0, b""
        self._follows = first + n
        return n, restated + data

    def _read(self, first: int, max_bytes: int) -> tuple[int, bytes]:
        if self._spool.ring:
            with self._spool.lock:
                if self._spool.ring and first >= self._spool.ring[0][0]:
                    return self._read_ring(first, max_bytes)
        newest = self._spool.log_end
        if newest is None or not self._spool.segments or first < self._spool.segments[0].first:
            return 0, b""
        segment, at = self._find(first, newest)
        while True:
            end = segment.end or (newest[1:] if segment is newest[0] else None)
            if end is None:
                return 0, b""
            if first < end[0]:
                break
            following = self._spool.segments.index(segment) + 1
            if following >= len(self._spool.segments):
                return 0, b""
            segment = self._spool.segments[following]
            at = segment.marks[0][1]
        number, offset = self._cut(segment, at, end, max_bytes)
        try:
            data = self._spool.disk.pread(self._fd(segment), offset - at, at)
        except FileNotFoundError:
            data = b""
        if len(data) != offset - at:
            return self._read_torn(segment, first, at, data)
        self._at = (segment, number, offset)
        return number - first, data

    def _read_torn(self, segment: Segment, first: int, at: int, data: bytes) -> tuple[int, bytes]:
        """Somebody cut or deleted our file. What is whole is read; once the gateway has that,
        `acknowledge` gives up the rest, and it is told as a gap."""
        whole = [h for h in walk(data) if h.kind not in UNNUMBERED]
        if not whole:
            segment.lost = True
            return 0, b""
        end = whole[-1].at + whole[-1].size
        self._at = (segment, first + len(whole), at + end)
        return len(whole), data[:end]

    def _read_ring(self, first: int, max_bytes: int) -> tuple[int, bytes]:
        parts: list[bytes] = []
        size = 0
        for number, record, _ in self._spool.ring:
            if number < first:
                continue
            if parts and size + len(record) > max_bytes:
                break
            parts.append(record)
            size += len(record)
        return len(parts), b"".join(parts)

    def _find(self, first: int, newest: tuple[Segment, int, int]) -> tuple[Segment, int]:
        """The segment that holds `first`, and the offset where it (or its schemas) starts."""
        if self._at and self._at[1] == first:
            return self._at[0], self._at[2]
        segments = self._spool.segments
        segment = segments[bisect_right([s.first for s in segments], first) - 1]
        marks = segment.marks
        number, at = marks[max(0, bisect_right(marks, (first, 1 << 62)) - 1)]
        if number == first:
            return segment, at
        # Between two marks: only after a reconnect, so walking is cheap enough.
        end = segment.end[1] if segment.end else newest[2] if segment is newest[0] else at
        size = end - at
        start = at
        try:
            data = self._spool.disk.pread(self._fd(segment), size, start)
        except FileNotFoundError:
            return segment, at  # `_read` comes to the same, and tells
        for head in walk(data):
            if head.kind not in UNNUMBERED:
                if head.seq >= first:
                    break
                at = start + head.at + head.size  # the schemas of `first` start here
        return segment, at

    def _cut(
        self, segment: Segment, at: int, end: tuple[int, int], max_bytes: int
    ) -> tuple[int, int]:
        """(next number, offset) where a frame that starts at `at` ends."""
        if end[1] - at <= max_bytes:
            return end
        marks = segment.marks
        i = bisect_right(marks, at + max_bytes, key=lambda m: m[1]) - 1
        if i >= 0 and marks[i][1] > at:
            return marks[i]
        return marks[i + 1] if i + 1 < len(marks) else end

    def _fd(self, segment: Segment) -> int:
        if segment.fd < 0:
            segment.fd = self._spool.disk.open_read(segment.path)
        return segment.fd
