"""The spool: where a rank's records stand, on its own disk, before `log` returns.

The thread that logs writes; the sender thread reads what was written through `read`, and there is
no queue between them. When the disk refuses, a bounded memory ring takes over and says so
(`volatile`); past its end calls are refused and counted. So they are, class by class, when more
waits for the gateway than the spool's cap allows.
"""

from __future__ import annotations

import errno
import os
import threading
from bisect import bisect_right
from collections import deque
from typing import Any

from .counts import COUNTS_BYTES, packed_counts
from .spool_place import SPOOL_CAP_BYTES, SPOOL_KEEP_BYTES
from .spool_reader import Segment, SpoolReader
from .wire.disk import Disk, OsDisk
from .wire.records import (
    MAX_EVENT_BYTES,
    MAX_SCHEMA_BYTES,
    MAX_SCHEMAS,
    Kind,
    Schema,
    pack_map,
)
from .wire.segments import SPOOL_SEGMENT_BYTES, SegmentLog, segment_path, sync_names

MARK_BYTES = 32 << 10  #: a place to cut a frame, so that the sender never parses records
RING_BYTES = 16 << 20
COPY_BYTES = 1 << 20
LOSS_BYTES = 1024  #: of a LOSS record, at most

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


class TooLargeError(Exception):
    """A record beyond what a frame may hold."""


class Spool:
    """One stream's log. `append` and `refuse` from any thread under `lock`; `read`,
    `acknowledge`, `trim`, `sync` and `heal` from the sender's thread.

    `last` is the highest number given, `refused` counts calls that got none, by reason; `closed`
    names the classes of records that are refused now.
    """

    # Slots: an instance with more than 30 attributes in a dict makes every access slower.
    __slots__ = (
        "_acked_at", "_closed", "_counts_fd", "_ended", "_gone", "_head", "_keep_bytes",
        "_lock_fd", "_log", "_marked", "_open_appends", "_reader", "_retired", "_rolling",
        "_schema_bytes", "_turn", "_unsynced", "bad_values", "cap_bytes", "closed", "directory",
        "disk", "last", "lock", "log_end", "owed", "refused", "ring", "schemas", "segments",
        "volatile", "watchful",
    )  # fmt: skip

    def __init__(
        self,
        directory: str | None,
        head: dict[str, Any],
        disk: Disk | None = None,
        segment_bytes: int = SPOOL_SEGMENT_BYTES,
        keep_bytes: int = SPOOL_KEEP_BYTES,
        cap_bytes: int = SPOOL_CAP_BYTES,
        nowhere: str = "there is no directory for the spool",
    ) -> None:
        # Reentrant: a signal handler may log while its own thread is inside `append`.
        self.lock = threading.RLock()
        self.directory = directory
        self.last = 0
        self.refused: dict[str, int] = {}
        self.bad_values = 0
        self.volatile = ""  #: why the records are in memory only, or empty
        self.schemas: list[Schema] = []
        self.disk = disk or OsDisk()
        self._head = head
        self._keep_bytes = keep_bytes
        self.cap_bytes = cap_bytes
        self.owed: dict[str, int] = {}  # refusals no LOSS record tells of yet
        self.closed: frozenset[str] = frozenset()
        self.watchful = False  #: a class is closed or a LOSS owed: `admit` before an append
        self._acked_at = 0  # of all bytes ever written, those before this are acknowledged
        self.segments: list[Segment] = []
        #: (number, record, where it ends in all the bytes ever put in)
        self.ring: deque[tuple[int, bytes, int]] = deque()
        self._retired: list[int] = []  # fds the sender syncs and closes
        self._lock_fd = -1
        self._counts_fd = -1
        self._log = SegmentLog(self.disk, directory or "", self._opening, segment_bytes)
        self.log_end: tuple[Segment, int, int] | None = None  # one tuple: no torn view
        self._marked = 0
        self._open_appends = 0  # begun and not ended: by handlers within one another, or broken off
        self._turn = 0
        self._ended = 0  # the turn that was committed last
        self._rolling = False
        self._closed = False
        self._schema_bytes = 0
        self._gone = 0  # the highest number that was only ever in memory, and is forgotten
        self._unsynced = False
        self._reader = SpoolReader(self)
        if directory is None:
            self.volatile = nowhere
            return
        try:
            self._open()
        except OSError as error:
            self.volatile = f"cannot write the spool in {directory}: {error.strerror or error}"

    # --- writing -------------------------------------------------------------

    def _open(self) -> None:
        assert self.directory is not None
        self.disk.make_dir(self.directory)
        self._lock_fd = self.disk.lock(f"{self.directory}/lock")
        own_spools.add(self.directory)
        self._counts_fd = self.disk.open_edit(f"{self.directory}/counts")
        self.disk.write_at(self._counts_fd, bytes(COUNTS_BYTES), 0)
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
        log, newest = self._log, self.log_end
        if newest is not None and newest[0].index == log.index:
            return
        opening = len(self._opening()[0])
        path = segment_path(self.directory or "", log.index)
        base = 0
        if newest is not None:
            newest[0].end = newest[1:]
            base = newest[0].base + newest[2]
        segment = Segment(log.index, path, self.last + 1, opening, base)
        self.segments.append(segment)
        self._unsynced = True
        self._marked = log.size
        self.log_end = (segment, self.last + 1, log.size)

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
        while self.ring and self.ring[-1][0] > self.last:
            self.ring.pop()
        if self._log.fd < 0 or self.volatile:
            return
        if self.log_end is not None and self.log_end[0].index != self._log.index:
            self._adopt()
        if self.log_end is not None:
            # Both before the call: a handler that logs after it must not be undone.
            self._log.size = self.log_end[2]
            self.disk.truncate(self._log.fd, self.log_end[2])

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
            segment, number, _ = self.log_end  # type: ignore[misc]
            self.last = number
            self.log_end = (segment, number + 1, log.size)
            self._ended = turn
            self._open_appends -= 1
        else:
            self._cut_back()
            self._open_appends -= 1
            return None
        if log.size - self._marked >= MARK_BYTES:
            self._mark(segment, number + 1)
        return True

    def _mark(self, segment: Segment, number: int) -> None:
        """Note where a frame may be cut; roll when the segment is full."""
        log = self._log
        if self.log_end is not None and self.log_end[:2] == (segment, number):
            segment.marks.append((number, self.log_end[2]))
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
            counts = packed_counts(sum(self.refused.values()), self.bad_values, self.owed)
            try:
                self.disk.write_at(self._counts_fd, counts, 0)
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
        before = self.ring[-1][2] if self.ring else 0
        self.ring.append((number, record, before + len(record)))
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
        if not self.ring:
            return 0
        return self.ring[-1][2] - self.ring[0][2] + len(self.ring[0][1])

    # --- what there is -------------------------------------------------------

    @property
    def first_kept(self) -> int:
        if self.segments:
            return max(self.segments[0].first, self._gone + 1)
        return self.ring[0][0] if self.ring else self.last + 1

    @property
    def memory_records(self) -> int:
        """How many records are in memory only."""
        return len(self.ring)

    @property
    def kept_bytes(self) -> int:
        sealed = sum(s.end[1] for s in self.segments if s.end)
        return sealed + (self.log_end[2] if self.log_end else 0) + self._ring_bytes

    @property
    def unacknowledged_bytes(self) -> int:
        """What stands here and no gateway has said to have."""
        newest = self.log_end
        written = newest[0].base + newest[2] if newest else 0
        return max(0, written - self._acked_at) + self._ring_bytes

    def read(self, first: int, max_bytes: int) -> tuple[int, bytes]:
        """(n, bytes) of the numbered records from `first` on; see `SpoolReader.read`."""
        return self._reader.read(first, max_bytes)

    # --- upkeep: the sender's thread -----------------------------------------

    def sync(self) -> None:
        """Bring what was written to the disk itself. Called each second, never by `log`."""
        if self._closed:
            return
        self._look()
        for fd in self._retired[:]:
            self.disk.sync(fd)
            self.disk.close(fd)
            self._retired.remove(fd)
        if self._log.fd >= 0:
            self.disk.sync(self._log.fd)
            if self._unsynced:
                self._unsynced = False
                sync_names(self.disk, self._log.directory, above=2)  # the run's, the spool's

    def _look(self) -> None:
        """Has somebody deleted or cut our files? What is still open of them is written anew."""
        segments = self.segments[:]
        if self.directory is None or self._lock_fd < 0 or not segments:
            return
        try:
            names = set(self.disk.names(self.directory))
        except FileNotFoundError:
            names = set()
        gone = [s for s in segments if s.path.rpartition("/")[2] not in names]
        with self.lock:
            newest, log = self.log_end, self._log
            if newest is None or log.fd < 0 or self._closed:
                pass
            elif "lock" not in names or newest[0] in gone:
                self._forsake("somebody deleted the spool", lock_too="lock" not in names)
            elif self.disk.size(log.fd) != log.size:
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
        log, segment = self._log, self.segments[-1]
        if segment.fd < 0:
            segment.fd = log.fd  # nobody else can open it any more
        else:
            self._retired.append(log.fd)
        log.fd = -1
        if lock_too:
            for fd in (self._lock_fd, self._counts_fd):
                self.disk.close(fd)
            self._lock_fd = self._counts_fd = -1
        self.volatile = why

    def _write_anew(self, segment: Segment) -> None:
        assert segment.end is not None
        fd = self.disk.create(segment.path)
        try:
            at = 0
            while at < segment.end[1]:
                piece = self.disk.pread(segment.fd, COPY_BYTES, at)
                if not piece or self.disk.write(fd, piece) != len(piece):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), segment.path)
                at += len(piece)
            self.disk.sync(fd)
        except OSError:
            self.disk.unlink(segment.path)
            raise
        finally:
            self.disk.close(fd)

    def heal(self) -> None:
        """Try to bring the memory ring to the disk; the order of numbers is kept."""
        with self.lock:
            if not self.volatile or self.directory is None or self._closed:
                return
            ring, self.ring = self.ring, deque()
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
                self.ring, self.last = ring, last
                return
            self.last = last
            segment = self.segments[-1]
            self.log_end = (segment, last + 1, self._log.size)
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
        newest, segments = self.log_end, self.segments
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
            while self.ring and self.ring[0][0] <= durable:
                self._gone = self.ring.popleft()[0]
        self.acknowledge(durable)
        kept = self.kept_bytes
        while len(self.segments) > 1 and kept > self._keep_bytes:
            oldest = self.segments[0]
            if oldest.end is None or oldest.end[0] - 1 > durable:
                return
            kept -= oldest.end[1]
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        oldest = self.segments.pop(0)
        self._reader.forget(oldest)
        if oldest.fd >= 0:
            self.disk.close(oldest.fd)
        try:
            self.disk.unlink(oldest.path)
        except FileNotFoundError:
            pass  # somebody was faster

    def close(self) -> None:
        """Let go of every descriptor, the lock too: others may now ship what is left."""
        with self.lock:
            self._closed = True
            own_spools.discard(self.directory or "")
            for segment in self.segments:
                if segment.fd >= 0:
                    self.disk.close(segment.fd)
                    segment.fd = -1
            for fd in (*self._retired, self._log.fd, self._counts_fd, self._lock_fd):
                if fd >= 0:
                    self.disk.close(fd)
            self._retired.clear()
            self._log.fd = self._counts_fd = self._lock_fd = -1
            self.volatile = self.volatile or "closed"


#: directories of the spools this process has open: a look at their lock would drop it
own_spools: set[str] = set()
