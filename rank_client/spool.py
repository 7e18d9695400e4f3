"""The spool: where a rank's records stand, on its own disk, before `log` returns.

The thread that logs writes; the sender thread reads what was written through `read`, and there is
no queue between them. When the disk refuses, a bounded memory ring takes over and says so
(`volatile`); past its end calls are refused and counted.
"""

from __future__ import annotations

import os
import struct
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .wire.disk import Disk, OsDisk
from .wire.records import (
    MAX_EVENT_BYTES,
    MAX_SCHEMA_BYTES,
    MAX_SCHEMAS,
    UNNUMBERED,
    Kind,
    Schema,
    pack_map,
    walk,
)
from .wire.segments import SPOOL_SEGMENT_BYTES, SegmentLog, segment_path

MARK_BYTES = 32 << 10  #: a place to cut a frame, so that the sender never parses records
RING_BYTES = 16 << 20
LOSS_BYTES = 1024  #: of a LOSS record, at most
SPOOL_KEEP_BYTES = 256 << 20  #: kept after acknowledgement, for a gateway that lost its journal
COUNTS = struct.Struct("<QQ")  # refused calls, bad values


class TooLargeError(Exception):
    """A record beyond what a frame may hold."""


class _Segment:
    """What the reader must know of a segment. `marks` are (number that starts there, offset)."""

    __slots__ = ("end", "fd", "first", "index", "marks", "path")

    def __init__(self, index: int, path: str, first: int, start: int) -> None:
        self.index = index
        self.path = path
        self.first = first
        self.marks: list[tuple[int, int]] = [(first, start)]
        self.end: tuple[int, int] | None = None  #: set once, when the segment is sealed
        self.fd = -1


class Spool:
    """One stream's log. `append` and `refuse` from any thread under `lock`; `read`, `trim`,
    `sync` and `heal` from the sender's thread.

    `last` is the highest number given, `refused` counts calls that got none, by reason.
    """

    def __init__(
        self,
        directory: str | None,
        head: dict[str, Any],
        disk: Disk | None = None,
        segment_bytes: int = SPOOL_SEGMENT_BYTES,
        keep_bytes: int = SPOOL_KEEP_BYTES,
    ) -> None:
        # Reentrant: a signal handler may log while its own thread is inside `append`.
        self.lock = threading.RLock()
        self.directory = directory
        self.last = 0
        self.refused: dict[str, int] = {}
        self.bad_values = 0
        self.volatile = ""  #: why the records are in memory only, or empty
        self.schemas: list[Schema] = []
        self._disk = disk or OsDisk()
        self._head = head
        self._keep_bytes = keep_bytes
        self.owed: dict[str, int] = {}  # refusals no LOSS record tells of yet
        self._segments: list[_Segment] = []
        #: (number, record, where it ends in all the bytes ever put in)
        self._ring: deque[tuple[int, bytes, int]] = deque()
        self._retired: list[int] = []  # fds the sender syncs and closes
        self._lock_fd = -1
        self._counts_fd = -1
        self._log = SegmentLog(self._disk, directory or "", self._opening, segment_bytes)
        self._log_end: tuple[_Segment, int, int] | None = None  # one tuple: no torn view
        self._marked = 0
        self._open_appends = 0  # begun and not ended: by handlers within one another, or broken off
        self._turn = 0
        self._ended = 0  # the turn that was committed last
        self._rolling = False
        self._closed = False
        self._schema_bytes = 0
        self._gone = 0  # the highest number that was only ever in memory, and is forgotten
        self._unsynced = False
        self._at: tuple[_Segment, int, int] | None = None  # reader: (segment, number, offset)
        try:
            self._open()
        except OSError as error:
            self.volatile = f"cannot write the spool in {directory}: {error.strerror or error}"

    # --- writing -------------------------------------------------------------

    def _open(self) -> None:
        if self.directory is None:
            raise OSError("no directory")
        self._disk.make_dir(self.directory)
        self._lock_fd = self._disk.lock(f"{self.directory}/lock")
        self._counts_fd = self._disk.open_edit(f"{self.directory}/counts")
        self._disk.write_at(self._counts_fd, bytes(4096), 0)
        self._roll()

    def _opening(self) -> list[bytes]:
        seq = self.last + 1
        return [pack_map(Kind.HEAD, seq, self._head), *(s.pack(seq) for s in self.schemas)]

    def _roll(self) -> None:
        """Go on in a new segment. Raises OSError, and then the old one goes on."""
        self._rolling = True
        self._open_appends += 1
        try:
            before = self._log.start(self._log.index + 1)
        except BaseException:
            self._open_appends -= 1
            self._rolling = False
            raise
        if before >= 0:
            self._retired.append(before)
        self._adopt()
        self._open_appends -= 1
        self._rolling = False

    def _adopt(self) -> None:
        """Make the file the log has begun the newest segment, unless it is."""
        log, newest = self._log, self._log_end
        if newest is not None and newest[0].index == log.index:
            return
        opening = len(self._opening()[0])
        path = segment_path(self.directory or "", log.index)
        segment = _Segment(log.index, path, self.last + 1, opening)
        if newest is not None:
            newest[0].end = newest[1:]
        self._segments.append(segment)
        self._unsynced = True
        self._marked = log.size
        self._log_end = (segment, self.last + 1, log.size)

    def begin(self) -> int:
        """Begin an append, with the number `last + 1`; the caller holds `lock`. The turn it gives
        belongs to `append`.

        A signal handler may raise, or log itself, in the middle of an append. What that one left
        behind is cut off here, and should it go on, it finds its turn over.
        """
        if self._open_appends:
            self._cut_back()
        self._open_appends += 1
        self._turn += 1
        return self._turn

    def abandon(self, turn: int) -> None:
        """The append of this turn ends with an exception; it may have got as far as its commit."""
        self._cut_back()
        if self._ended != turn and self._open_appends:
            self._open_appends -= 1

    def _cut_back(self) -> None:
        """Back to what is counted: nothing after it belongs to a call that returned."""
        while self._ring and self._ring[-1][0] > self.last:
            self._ring.pop()
        if self._log.fd < 0 or self.volatile:
            return
        if self._log_end is not None and self._log_end[0].index != self._log.index:
            self._adopt()
        if self._log_end is not None:
            # Both before the call: a handler that logs after it must not be undone.
            self._log.size = self._log_end[2]
            self._disk.truncate(self._log.fd, self._log_end[2])

    def append(self, turn: int, record: bytes | bytearray, before: bytes = b"") -> bool | None:
        """Write the record numbered `last + 1`, after the unnumbered records `before`.

        The caller holds `lock`, and packed after `begin`. False: refused (and counted). None: a
        signal handler has logged meanwhile: begin again, with another number.
        """
        if self.volatile:
            return self._append_ring(turn, before + bytes(record))
        log = self._log
        try:
            log.append(before + record if before else record)
        except OSError as error:
            self.volatile = f"the spool's disk refuses: {error.strerror or error}"
            return self._append_ring(turn, before + bytes(record))
        # No call from here to the end of the commit: the interpreter runs signal handlers at
        # calls and loops only, so none comes in between.
        if turn == self._turn:
            segment, number, _ = self._log_end  # type: ignore[misc]
            self.last = number
            self._log_end = (segment, number + 1, log.size)
            self._ended = turn
            self._open_appends -= 1
        else:
            self._cut_back()
            self._open_appends -= 1
            return None
        if log.size - self._marked >= MARK_BYTES:
            self._mark(segment, number + 1)
        return True

    def _mark(self, segment: _Segment, number: int) -> None:
        """Note where a frame may be cut; roll when the segment is full."""
        log = self._log
        if self._log_end is not None and self._log_end[:2] == (segment, number):
            segment.marks.append((number, self._log_end[2]))
        self._marked = log.size
        self._unsynced = True
        if log.full and not self._rolling:
            try:
                self._roll()
            except OSError:
                pass  # goes on in the old segment; the next full mark tries again

    def append_map(self, kind: Kind, body: dict[str, Any]) -> int:
        """Number and write a record whose body is a map; its number, 0 when refused."""
        with self.lock:
            if self.owed:
                self.tell_losses()
            return self._put(kind, body)

    def _put(self, kind: Kind, body: dict[str, Any]) -> int:
        while True:
            turn = self.begin()
            try:
                number = self.last + 1
                record = pack_map(kind, number, body)
                if len(record) > MAX_EVENT_BYTES:
                    raise TooLargeError
                done = self.append(turn, record)
            except TooLargeError:
                self.abandon(turn)
                self.refuse("too large")
                return 0
            except BaseException:
                self.abandon(turn)
                raise
            if done is not None:
                return number if done else 0

    def add_schema(
        self, keys: tuple[str, ...], types: tuple[str, ...]
    ) -> tuple[Schema, bytes] | None:
        """Intern a schema; its record must be given as `before` of the first row that uses it.

        None when there are too many: all of them open each segment, and so stand in one frame.
        """
        with self.lock:
            left = MAX_SCHEMA_BYTES - self._schema_bytes
            if len(self.schemas) >= MAX_SCHEMAS or sum(map(len, keys)) > left:
                return None
            schema = Schema(len(self.schemas), keys, types)
            record = schema.pack(self.last + 1)
            if len(record) > left:
                return None
            self._schema_bytes += len(record)
            self.schemas.append(schema)
            return schema, record

    def refuse(self, reason: str, calls: int = 1) -> None:
        """Count calls that get no number; a LOSS record tells of them with the next append."""
        with self.lock:
            self.refused[reason] = self.refused.get(reason, 0) + calls
            self.owed[reason] = self.owed.get(reason, 0) + calls
            self._write_counts()

    def count_bad(self, values: int) -> None:
        with self.lock:
            self.bad_values += values
            self._write_counts()

    def _write_counts(self) -> None:
        if self._counts_fd >= 0:
            try:
                packed = COUNTS.pack(sum(self.refused.values()), self.bad_values)
                self._disk.write_at(self._counts_fd, packed, 0)
            except OSError:
                pass  # the numbers are still told by LOSS records and pings

    def tell_losses(self) -> None:
        """Write LOSS records for the refusals since the last; the caller holds `lock`."""
        owed, self.owed = self.owed, {}
        for reason, calls in owed.items():
            if self.volatile and self._ring_bytes + LOSS_BYTES > RING_BYTES:
                self.owed[reason] = self.owed.get(reason, 0) + calls  # later, when there is room
            else:
                self._put(Kind.LOSS, {"n": calls, "reason": reason})

    def _append_ring(self, turn: int, record: bytes) -> bool | None:
        if self._ring_bytes + len(record) > RING_BYTES:
            self.abandon(turn)
            self.refuse("spool unwritable and memory ring full")
            return False
        number = self.last + 1
        before = self._ring[-1][2] if self._ring else 0
        self._ring.append((number, record, before + len(record)))
        if turn == self._turn:  # as in `append`: no call from here on
            self.last = number
            self._ended = turn
            self._open_appends -= 1
            return True
        self._cut_back()
        self._open_appends -= 1
        return None

    @property
    def _ring_bytes(self) -> int:
        if not self._ring:
            return 0
        return self._ring[-1][2] - self._ring[0][2] + len(self._ring[0][1])

    # --- reading: the sender's thread ----------------------------------------

    @property
    def first_kept(self) -> int:
        if self._segments:
            return max(self._segments[0].first, self._gone + 1)
        return self._ring[0][0] if self._ring else self.last + 1

    @property
    def memory_records(self) -> int:
        """How many records are in memory only."""
        return len(self._ring)

    @property
    def kept_bytes(self) -> int:
        sealed = sum(s.end[1] for s in self._segments if s.end)
        return sealed + (self._log_end[2] if self._log_end else 0) + self._ring_bytes

    def read(self, first: int, max_bytes: int) -> tuple[int, bytes]:
        """(n, bytes) of the numbered records from `first` on, with the schemas between them."""
        if self._ring:
            with self.lock:
                if self._ring and first >= self._ring[0][0]:
                    return self._read_ring(first, max_bytes)
        newest = self._log_end
        if newest is None or not self._segments or first < self._segments[0].first:
            return 0, b""
        segment, at = self._find(first, newest)
        while True:
            end = segment.end or (newest[1:] if segment is newest[0] else None)
            if end is None:
                return 0, b""
            if first < end[0]:
                break
            following = self._segments.index(segment) + 1
            if following >= len(self._segments):
                return 0, b""
            segment = self._segments[following]
            at = segment.marks[0][1]
        number, offset = self._cut(segment, at, end, max_bytes)
        data = self._disk.pread(self._fd(segment), offset - at, at)
        if len(data) != offset - at:
            return 0, b""  # somebody cut our file: what is gone is told as a gap
        self._at = (segment, number, offset)
        return number - first, data

    def _read_ring(self, first: int, max_bytes: int) -> tuple[int, bytes]:
        parts: list[bytes] = []
        size = 0
        for number, record, _ in self._ring:
            if number < first:
                continue
            if parts and size + len(record) > max_bytes:
                break
            parts.append(record)
            size += len(record)
        return len(parts), b"".join(parts)

    def _find(self, first: int, newest: tuple[_Segment, int, int]) -> tuple[_Segment, int]:
        """The segment that holds `first`, and the offset where it (or its schemas) starts."""
        if self._at and self._at[1] == first:
            return self._at[0], self._at[2]
        segments = self._segments
        segment = segments[bisect_right([s.first for s in segments], first) - 1]
        marks = segment.marks
        number, at = marks[max(0, bisect_right(marks, (first, 1 << 62)) - 1)]
        if number == first:
            return segment, at
        # Between two marks: only after a reconnect, so walking is cheap enough.
        end = segment.end[1] if segment.end else newest[2] if segment is newest[0] else at
        size = end - at
        start = at
        for head in walk(self._disk.pread(self._fd(segment), size, start)):
            if head.kind not in UNNUMBERED:
                if head.seq >= first:
                    break
                at = start + head.at + head.size  # the schemas of `first` start here
        return segment, at

    def _cut(
        self, segment: _Segment, at: int, end: tuple[int, int], max_bytes: int
    ) -> tuple[int, int]:
        """(next number, offset) where a frame that starts at `at` ends."""
        if end[1] - at <= max_bytes:
            return end
        marks = segment.marks
        i = bisect_right(marks, at + max_bytes, key=lambda m: m[1]) - 1
        if i >= 0 and marks[i][1] > at:
            return marks[i]
        return marks[i + 1] if i + 1 < len(marks) else end

    def _fd(self, segment: _Segment) -> int:
        if segment.fd < 0:
            segment.fd = self._disk.open_read(segment.path)
        return segment.fd

    # --- upkeep: the sender's thread -----------------------------------------

    def sync(self) -> None:
        """Bring what was written to the disk itself. Called each second, never by `log`."""
        if self._closed:
            return
        for fd in self._retired[:]:
            self._disk.sync(fd)
            self._disk.close(fd)
            self._retired.remove(fd)
        if self._log.fd >= 0:
            self._disk.sync(self._log.fd)
            if self._unsynced:
                self._unsynced = False
                self._disk.sync_dir(self._log.directory)

    def heal(self) -> None:
        """Try to bring the memory ring to the disk; the order of numbers is kept."""
        with self.lock:
            if not self.volatile or self.directory is None or self._closed:
                return
            ring, self._ring = self._ring, deque()
            last = self.last
            try:
                self.last = ring[0][0] - 1 if ring else last
                if self._lock_fd < 0:
                    self._open()
                else:
                    self._roll()
                marks = self._marks_of(ring)
                if ring:
                    self._log.append(b"".join(record for _, record, _ in ring))
            except OSError:
                self._ring, self.last = ring, last
                return
            self.last = last
            segment = self._segments[-1]
            self._log_end = (segment, last + 1, self._log.size)
            segment.marks += marks
            self._marked = segment.marks[-1][1]
            self.volatile = ""

    def _marks_of(self, ring: deque[tuple[int, bytes, int]]) -> list[tuple[int, int]]:
        """Where frames of what is about to be appended may be cut."""
        marks = []
        at = marked = self._log.size
        for number, record, _ in ring:
            if at - marked >= MARK_BYTES:
                marks.append((number, at))
                marked = at
            at += len(record)
        return marks

    def trim(self, durable: int) -> None:
        """Forget acknowledged segments past `keep_bytes`, and acknowledged records in memory."""
        with self.lock:
            while self._ring and self._ring[0][0] <= durable:
                self._gone = self._ring.popleft()[0]
        kept = self.kept_bytes
        while len(self._segments) > 1 and kept > self._keep_bytes:
            oldest = self._segments[0]
            if oldest.end is None or oldest.end[0] - 1 > durable:
                return
            kept -= oldest.end[1]
            del self._segments[0]
            if self._at and self._at[0] is oldest:
                self._at = None
            if oldest.fd >= 0:
                self._disk.close(oldest.fd)
            self._disk.unlink(oldest.path)

    def close(self) -> None:
        """Let go of every descriptor, the lock too: others may now ship what is left."""
        with self.lock:
            self._closed = True
            for segment in self._segments:
                if segment.fd >= 0:
                    self._disk.close(segment.fd)
                    segment.fd = -1
            for fd in (*self._retired, self._log.fd, self._counts_fd, self._lock_fd):
                if fd >= 0:
                    self._disk.close(fd)
            self._retired.clear()
            self._log.fd = self._counts_fd = self._lock_fd = -1
            self.volatile = self.volatile or "closed"


def spool_root(environ: Mapping[str, str]) -> Path:
    """Node-local, never shared memory: `RANKGATE_SPOOL`, Slurm's or a local TMPDIR, /var/tmp."""
    if environ.get("RANKGATE_SPOOL"):
        return Path(environ["RANKGATE_SPOOL"])
    for name in ("SLURM_TMPDIR", "TMPDIR"):
        if environ.get(name):
            return Path(environ[name]) / f"rankgate-{os.getuid()}"
    return Path(f"/var/tmp/rankgate-{os.getuid()}")  # noqa: S108 - 0700, and the owner is checked
