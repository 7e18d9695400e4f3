"""The spool: where a rank's records stand, on its own disk, before `log` returns.

The thread that logs writes; the sender thread reads what was written through `read`, and there is
no queue between them. When the disk refuses, a bounded memory ring takes over and says so
(`volatile`); past its end calls are refused and counted. So they are, class by class, when more
waits for the gateway than the spool's cap allows.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import msgpack

from .wire.disk import Disk, OsDisk
from .wire.records import (
    MAX_EVENT_BYTES,
    MAX_SCHEMA_BYTES,
    MAX_SCHEMAS,
    UNNUMBERED,
    BadRecord,
    Kind,
    Schema,
    pack_map,
    unpack_map,
    walk,
)
from .wire.segments import (
    SPOOL_SEGMENT_BYTES,
    SegmentLog,
    read_whole,
    segment_path,
    sync_names,
)

MARK_BYTES = 32 << 10  #: a place to cut a frame, so that the sender never parses records
RING_BYTES = 16 << 20
COPY_BYTES = 1 << 20
LOSS_BYTES = 1024  #: of a LOSS record, at most
SPOOL_KEEP_BYTES = (
    256 << 20
)  #: per node, kept after acknowledgement: a gateway may lose its journal
SPOOL_CAP_BYTES = 1 << 30  #: per node, of what no gateway has acknowledged
SPOOL_CAP_FREE = 0.1  #: and no more than this part of the disk's free space

#: class of records → the part of the cap from which it is refused. END and LOSS are always taken
SHARES = {"console": 0.5, "metrics": 0.75, "records": 1.0}
CLASSES = {
    Kind.KV: "metrics",
    Kind.TEXT: "records",
    Kind.PARAMS: "records",
    Kind.SUMMARY: "records",
    Kind.MEDIA: "records",
}
BEYOND_CAP = "beyond the spool's cap"

COUNTS_BYTES = 4096
COUNTS = struct.Struct("<QQ")  # refused calls, bad values; then _REASONS and a map of the reasons
_REASONS = struct.Struct("<II")  # checksum and length of the map


class TooLargeError(Exception):
    """A record beyond what a frame may hold."""


class Counts(NamedTuple):
    """What a spool says of its refusals; `owed` are those that no LOSS record may tell of."""

    refused: int
    bad_values: int
    owed: dict[str, int]


def read_counts(disk: Disk, directory: str) -> Counts:
    """The counts of a spool, of a killed process too; all zero where there are none to read."""
    try:
        page = read_whole(disk, f"{directory}/counts")
        refused, bad = COUNTS.unpack_from(page)
        check, size = _REASONS.unpack_from(page, COUNTS.size)
    except (OSError, struct.error):
        return Counts(0, 0, {})
    at = COUNTS.size + _REASONS.size
    packed = page[at : at + size]
    try:
        owed = unpack_map(packed) if crc32(packed) == check else {}
    except BadRecord:
        owed = {}
    return Counts(refused, bad, {k: n for k, n in owed.items() if isinstance(n, int)})


class _Segment:
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


class Spool:
    """One stream's log. `append` and `refuse` from any thread under `lock`; `read`,
    `acknowledge`, `trim`, `sync` and `heal` from the sender's thread.

    `last` is the highest number given, `refused` counts calls that got none, by reason; `closed`
    names the classes of records that are refused now.
    """

    # Slots: an instance with more than 30 attributes in a dict makes every access slower.
    __slots__ = (
        "_acked_at", "_at", "_closed", "_counts_fd", "_disk", "_ended", "_follows", "_gone",
        "_head", "_keep_bytes", "_lock_fd", "_log", "_log_end", "_marked", "_open_appends",
        "_retired", "_ring", "_rolling", "_schema_bytes", "_segments", "_turn", "_unsynced",
        "bad_values", "cap_bytes", "closed", "directory", "last", "lock", "owed", "refused",
        "schemas", "volatile", "watchful",
    )  # fmt: skip

    def __init__(
        self,
        directory: str | None,
        head: dict[str, Any],
        disk: Disk | None = None,
        segment_bytes: int = SPOOL_SEGMENT_BYTES,
        keep_bytes: int = SPOOL_KEEP_BYTES,
        cap_bytes: int = SPOOL_CAP_BYTES,
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
        self.cap_bytes = cap_bytes
        self.owed: dict[str, int] = {}  # refusals no LOSS record tells of yet
        self.closed: frozenset[str] = frozenset()
        self.watchful = False  #: a class is closed or a LOSS owed: `admit` before an append
        self._acked_at = 0  # of all bytes ever written, those before this are acknowledged
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
        self._follows = 1  # the number that a reader who goes on asks for
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
        own_spools.add(self.directory)
        self._counts_fd = self._disk.open_edit(f"{self.directory}/counts")
        self._disk.write_at(self._counts_fd, bytes(COUNTS_BYTES), 0)
        self._write_counts()
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
        base = 0
        if newest is not None:
            newest[0].end = newest[1:]
            base = newest[0].base + newest[2]
        segment = _Segment(log.index, path, self.last + 1, opening, base)
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
        self._reckon()
        if log.full and not self._rolling:
            try:
                self._roll()
            except OSError:
                pass  # goes on in the old segment; the next full mark tries again

    def append_map(self, kind: Kind, body: dict[str, Any], console: bool = False) -> int:
        """Number and write a record whose body is a map; its number, 0 when refused. `console`:
        a line the program printed, which is the first to be refused."""
        with self.lock:
            if self.watchful and not self.admit("console" if console else CLASSES.get(kind, "")):
                return 0
            return self._put(kind, body)

    def admit(self, what: str) -> bool:
        """May a record of this class be written? Else it is counted as refused. The caller holds
        `lock`."""
        if what in self.closed:
            self.refuse(f"{what} {BEYOND_CAP}")
            return False
        if self.owed:
            self.tell_losses()
        return True

    def admit_file(self, waiting_bytes: int) -> bool:
        """May a file join those of `waiting_bytes` that are not sent yet? Else it is counted as
        refused. Files never close a class: a checkpoint may be larger than the cap, and the
        metrics beside it must not be refused for it."""
        if self.unacknowledged_bytes + waiting_bytes < self.cap_bytes:
            return True
        self.refuse(f"files {BEYOND_CAP}")
        return False

    def _reckon(self) -> None:
        """Say which classes are refused from now on. By both threads, each MARK_BYTES and each
        tick: what one of them sets from old figures, the next corrects."""
        used = self.unacknowledged_bytes
        if used < self.cap_bytes * SHARES["console"]:
            self.closed = frozenset()
        else:
            self.closed = frozenset(
                c for c, part in SHARES.items() if used >= part * self.cap_bytes
            )
        self.watchful = bool(self.closed or self.owed)

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

    def add_schema(self, keys: tuple[str, ...], types: tuple[str, ...]) -> Schema | None:
        """Intern a schema; its record must be given as `before` of the first row that uses it.

        None when there are too many: all of them open each segment, and so stand in one frame.
        """
        with self.lock:
            left = MAX_SCHEMA_BYTES - self._schema_bytes
            if len(self.schemas) >= MAX_SCHEMAS or sum(map(len, keys)) > left:
                return None
            schema = Schema(len(self.schemas), keys, types)
            size = len(schema.pack(0))
            if size > left:
                return None
            self._schema_bytes += size
            self.schemas.append(schema)
            return schema

    def refuse(self, reason: str, calls: int = 1) -> None:
        """Count calls that get no number; a LOSS record tells of them with the next append."""
        with self.lock:
            self.refused[reason] = self.refused.get(reason, 0) + calls
            self.owed[reason] = self.owed.get(reason, 0) + calls
            self.watchful = True
            self._write_counts()

    def count_bad(self, values: int) -> None:
        with self.lock:
            self.bad_values += values
            self._write_counts()

    def final_counts(self) -> dict[str, int]:
        """What an END record tells: all calls that got no number, all values left out."""
        return {"refused": sum(self.refused.values()), "bad": self.bad_values}

    def _write_counts(self) -> None:
        if self._counts_fd >= 0:
            try:
                owed: bytes = msgpack.packb(self.owed, unicode_errors="replace")
                if COUNTS.size + _REASONS.size + len(owed) > COUNTS_BYTES:
                    owed = b""  # the sums are what must be right
                head = COUNTS.pack(sum(self.refused.values()), self.bad_values)
                packed = head + _REASONS.pack(crc32(owed), len(owed)) + owed
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
        self.watchful = bool(self.closed or self.owed)
        self._write_counts()

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

    @property
    def unacknowledged_bytes(self) -> int:
        """What stands here and no gateway has said to have."""
        newest = self._log_end
        written = newest[0].base + newest[2] if newest else 0
        return max(0, written - self._acked_at) + self._ring_bytes

    def read(self, first: int, max_bytes: int) -> tuple[int, bytes]:
        """(n, bytes) of the numbered records from `first` on, with the schemas between them.

        All schemas stand before the first record after a jump: it may be for a journal that has
        none of them.
        """
        restated = b""
        if first != self._follows:
            restated = b"".join(s.pack(first) for s in self.schemas[:])
        n, data = self._read(first, max_bytes - len(restated))
        if n == 0:
            return 0, b""
        self._follows = first + n
        return n, restated + data

    def _read(self, first: int, max_bytes: int) -> tuple[int, bytes]:
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
        try:
            data = self._disk.pread(self._fd(segment), offset - at, at)
        except FileNotFoundError:
            data = b""
        if len(data) != offset - at:
            return self._read_torn(segment, first, at, data)
        self._at = (segment, number, offset)
        return number - first, data

    def _read_torn(self, segment: _Segment, first: int, at: int, data: bytes) -> tuple[int, bytes]:
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
        try:
            data = self._disk.pread(self._fd(segment), size, start)
        except FileNotFoundError:
            return segment, at  # `_read` comes to the same, and tells
        for head in walk(data):
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
        self._look()
        for fd in self._retired[:]:
            self._disk.sync(fd)
            self._disk.close(fd)
            self._retired.remove(fd)
        if self._log.fd >= 0:
            self._disk.sync(self._log.fd)
            if self._unsynced:
                self._unsynced = False
                sync_names(self._disk, self._log.directory, above=2)  # the run's, the spool's

    def _look(self) -> None:
        """Has somebody deleted or cut our files? What is still open of them is written anew."""
        segments = self._segments[:]
        if self.directory is None or self._lock_fd < 0 or not segments:
            return
        try:
            names = set(self._disk.names(self.directory))
        except FileNotFoundError:
            names = set()
        gone = [s for s in segments if s.path.rpartition("/")[2] not in names]
        with self.lock:
            newest, log = self._log_end, self._log
            if newest is None or log.fd < 0 or self._closed:
                pass
            elif "lock" not in names or newest[0] in gone:
                self._forsake("somebody deleted the spool", lock_too="lock" not in names)
            elif self._disk.size(log.fd) != log.size:
                self._forsake("somebody cut the spool's file", lock_too=False)
        for segment in gone:
            if segment.end is None:
                continue  # the one just forsaken: sealed by `heal`, and looked at again
            if segment.fd < 0:
                segment.lost = True
            elif names:
                self._write_anew(segment)

    def _forsake(self, why: str, lock_too: bool) -> None:
        """Write no more to the newest file; `heal` begins another. The caller holds `lock`."""
        log, segment = self._log, self._segments[-1]
        if segment.fd < 0:
            segment.fd = log.fd  # nobody else can open it any more
        else:
            self._retired.append(log.fd)
        log.fd = -1
        if lock_too:
            for fd in (self._lock_fd, self._counts_fd):
                self._disk.close(fd)
            self._lock_fd = self._counts_fd = -1
        self.volatile = why

    def _write_anew(self, segment: _Segment) -> None:
        assert segment.end is not None
        fd = self._disk.create(segment.path)
        try:
            at = 0
            while at < segment.end[1]:
                piece = self._disk.pread(segment.fd, COPY_BYTES, at)
                if not piece or self._disk.write(fd, piece) != len(piece):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), segment.path)
                at += len(piece)
            self._disk.sync(fd)
        except OSError:
            self._disk.unlink(segment.path)
            raise
        finally:
            self._disk.close(fd)

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

    def acknowledge(self, durable: int) -> None:
        """The gateway has all up to `durable`; less than before when its journal is another."""
        newest, segments = self._log_end, self._segments
        if newest is not None and segments:
            if durable + 1 >= newest[1]:
                self._acked_at = newest[0].base + newest[2]
            else:
                i = max(0, bisect_right([s.first for s in segments], durable + 1) - 1)
                marks = segments[i].marks
                j = max(0, bisect_right(marks, (durable + 1, 1 << 62)) - 1)
                self._acked_at = segments[i].base + marks[j][1]
            lost = [s for s in segments if s.lost and s.first <= durable + 1 and s.end]
            while lost and segments and segments[0].index <= lost[-1].index:
                self._drop_oldest()
        self._reckon()

    def trim(self, durable: int) -> None:
        """Forget acknowledged segments past `keep_bytes`, and acknowledged records in memory."""
        with self.lock:
            while self._ring and self._ring[0][0] <= durable:
                self._gone = self._ring.popleft()[0]
        self.acknowledge(durable)
        kept = self.kept_bytes
        while len(self._segments) > 1 and kept > self._keep_bytes:
            oldest = self._segments[0]
            if oldest.end is None or oldest.end[0] - 1 > durable:
                return
            kept -= oldest.end[1]
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        oldest = self._segments.pop(0)
        if self._at and self._at[0] is oldest:
            self._at = None
        if oldest.fd >= 0:
            self._disk.close(oldest.fd)
        try:
            self._disk.unlink(oldest.path)
        except FileNotFoundError:
            pass  # somebody was faster

    def close(self) -> None:
        """Let go of every descriptor, the lock too: others may now ship what is left."""
        with self.lock:
            self._closed = True
            own_spools.discard(self.directory or "")
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


#: directories of the spools this process has open: a look at their lock would drop it
own_spools: set[str] = set()


class Share(NamedTuple):
    """What one stream may hold, in bytes: unacknowledged, and kept after acknowledgement."""

    cap: int
    keep: int


def spool_share(root: Path, environ: Mapping[str, str], streams: int) -> Share:
    """The part that each of a node's `streams` has of the cap (`RANKGATE_SPOOL_CAP_MIB` is per
    node) and of what is kept."""
    cap = SPOOL_CAP_BYTES
    try:
        stats = os.statvfs(root)
        cap = min(cap, int(stats.f_bavail * stats.f_frsize * SPOOL_CAP_FREE))
    except OSError:
        pass  # there is no spool then, and the memory ring has its own bound
    wanted = environ.get("RANKGATE_SPOOL_CAP_MIB", "")
    if wanted.isdecimal() and int(wanted):
        cap = int(wanted) << 20
    return Share(cap // max(1, streams), SPOOL_KEEP_BYTES // max(1, streams))


def spool_root(environ: Mapping[str, str]) -> Path:
    """Node-local, never shared memory: `RANKGATE_SPOOL`, Slurm's or a local TMPDIR, /var/tmp."""
    if environ.get("RANKGATE_SPOOL"):
        return Path(environ["RANKGATE_SPOOL"])
    for name in ("SLURM_TMPDIR", "TMPDIR"):
        if environ.get(name):
            return Path(environ[name]) / f"rankgate-{os.getuid()}"
    return Path(f"/var/tmp/rankgate-{os.getuid()}")  # noqa: S108 - 0700, and the owner is checked
