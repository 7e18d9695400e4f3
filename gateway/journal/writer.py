"""Appending to a run's journal: entries are buffered, a commit makes them durable, a mark says so.

Used by the ingest thread alone, and by the simulator: storage is passed in, time comes with each
entry.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any
from zlib import crc32

from rank_client.wire.disk import Disk
from rank_client.wire.frames import DATA_HEAD
from rank_client.wire.records import (
    HEADER_BYTES,
    PAD_MASK,
    UNNUMBERED,
    BadRecord,
    Head,
    Kind,
    Scan,
    pack,
    pack_map,
    unpack_map,
)
from rank_client.wire.segments import (
    JOURNAL_KINDS,
    JOURNAL_SEGMENT_BYTES,
    SegmentLog,
    scan_segment,
    segment_indexes,
    segment_path,
    sync_names,
)

from .salvage import RECEIVED, broken_batches, in_order, salvage, stream_of

RECEIVED_BYTES = RECEIVED.size
_BATCH_HEAD = struct.Struct("<IQBBHIq")  # a record's header after its checksum, then `received`
_BATCH_HEAD_BYTES = 4 + _BATCH_HEAD.size
_MARK_BODY = b""
DIRECTORIES_ABOVE = 3  #: run, runs and the data directory, which may be as new as the journal
NEW_BYTES = 4096  #: the first segment of a journal that was never written to is smaller


class JournalDamaged(Exception):
    """A journal that cannot be appended to safely; the text says which file and what to do."""


class SyncFailed(Exception):
    """The disk could not say that it has what was written."""


@dataclass(slots=True)
class Mark:
    """How far one stream is stored: the whole of the dedupe state."""

    high_water: int = 0
    ended: bool = False


class Journal:
    """The writing end of one run's journal.

    `seq` is the last entry given a number, `durable_seq` the last on disk. `streams` holds each
    stream's high water, entries not yet committed included.
    """

    def __init__(
        self,
        disk: Disk,
        directory: str,
        uuid: bytes,
        segment_bytes: int = JOURNAL_SEGMENT_BYTES,
    ) -> None:
        """Open or make the journal in `directory`; `uuid` names it if it is new.

        Recovery keeps every whole entry of the newest segments and cuts a torn tail. Raises
        JournalDamaged, OSError.
        """
        self.uuid = uuid
        self.seq = 0
        self.durable_seq = 0
        self.received_ns = 0
        self.streams: dict[bytes, Mark] = {}
        self.pending_bytes = 0
        self.damage: list[str] = []
        self._disk = disk
        self._pending: list[bytes] = []
        self._marked_seq = 0
        self._log = SegmentLog(disk, directory, self._opening, segment_bytes)
        disk.make_dir(directory)
        try:
            self._open(directory)
        except BaseException:
            self._log.close()
            raise

    def _open(self, directory: str) -> None:
        indexes = segment_indexes(self._disk, directory)
        if indexes:
            self._recover(directory, indexes)
        else:
            self._log.start(1)
            self._log.sync()
            sync_names(self._disk, directory, DIRECTORIES_ABOVE)

    # --- appending -----------------------------------------------------------

    def append_map(self, kind: Kind, now_ns: int, body: dict[str, Any]) -> int:
        """Buffer an entry other than a batch; its `r` is the time it was received."""
        self.seq += 1
        self.received_ns = max(self.received_ns, now_ns)
        self._push(pack_map(kind, self.seq, {"r": self.received_ns, **body}))
        return self.seq

    def append_batch(self, now_ns: int, frame: bytes) -> None:
        """Buffer a DATA frame verbatim; the caller has checked that it follows what is stored."""
        self.seq += 1
        if now_ns > self.received_ns:
            self.received_ns = now_ns
        # As `pack` would, without copying 64 KiB three times.
        pad = -len(frame) & PAD_MASK
        size = _BATCH_HEAD_BYTES + len(frame) + pad
        head = _BATCH_HEAD.pack(size, self.seq, Kind.BATCH, pad, 0, 0, self.received_ns)
        crc = crc32(bytes(pad), crc32(frame, crc32(head)))
        self._pending += (crc.to_bytes(4, "little") + head, frame + bytes(pad))
        self.pending_bytes += size

    def _push(self, record: bytes) -> None:
        self._pending.append(record)
        self.pending_bytes += len(record)

    def commit(self) -> None:
        """Bring everything buffered to the disk. Raises OSError, and then nothing is durable
        that was not before: the caller must not acknowledge. Raises SyncFailed, and then nobody
        knows: the caller must stop."""
        if not self._pending:
            return
        data = b"".join(self._pending)
        if self._marked_seq < self.durable_seq:
            data = self._mark() + data
        self._log.append(data)
        self._sync()
        self._pending.clear()
        self.pending_bytes = 0
        self._marked_seq, self.durable_seq = self.durable_seq, self.seq
        if self._log.full:
            self._roll()

    def _sync(self) -> None:
        try:
            self._log.sync()
        except OSError as error:
            # The kernel may have dropped the pages; a second fsync would say that all is well.
            raise SyncFailed(str(error)) from error

    def mark(self) -> None:
        """When idle: tell the readers of the last commit, which no next write will tell them."""
        if self._marked_seq < self.durable_seq:
            self._log.append(self._mark())
            self._marked_seq = self.durable_seq

    @property
    def file(self) -> tuple[int, str]:
        """The descriptor and the path of the segment being written."""
        return self._log.fd, segment_path(self._log.directory, self._log.index)

    def close(self) -> None:
        self._log.close()

    def _mark(self) -> bytes:
        return pack(Kind.MARK, self.durable_seq, _MARK_BODY)

    def _opening(self) -> list[bytes]:
        table = {
            "uuid": self.uuid,
            "r": self.received_ns,
            "streams": [[s, m.high_water, m.ended] for s, m in self.streams.items()],
        }
        return [pack_map(Kind.TABLE, self.durable_seq + 1, table)]

    def _roll(self) -> None:
        """Begin a segment. Nothing is buffered now: its table must not tell of what is not on
        disk, or a crash before the next commit would lose it unseen."""
        try:
            self.mark()
            self._sync()  # first: a torn mark in front of another segment would be called damage
            before = self._log.start(self._log.index + 1)
        except OSError:
            return  # no room: goes on in the old one, the next commit tries again
        self._disk.close(before)
        self._log.sync()
        self._disk.sync_dir(self._log.directory)

    # --- recovery ------------------------------------------------------------

    def _recover(self, directory: str, indexes: list[int]) -> None:
        """Start from the newest segment whose table is whole, read on to the end."""
        scans: list[tuple[int, bytes, Scan]] = []
        for index in reversed(indexes):
            buf, found = scan_segment(self._disk, directory, index, JOURNAL_KINDS)
            scans.insert(0, (index, buf, found))
            if found.heads and found.heads[0].kind == Kind.TABLE:
                break
        else:
            if len(buf) < NEW_BYTES and len(indexes) == 1 and not found.heads:
                self._begin(indexes[0])  # the crash came while the journal was made
                return
            raise JournalDamaged(
                f"no segment in {directory} starts with a readable table. Move the directory away "
                "to start a new journal; the ranks send again what they keep"
            )
        index, buf, found = scans[-1]
        size = _sound_bytes(found, len(buf))
        for number, data, pieces in scans:
            end = size if number == index else len(data)
            self._replay_segment(segment_path(directory, number), data, pieces, end)
        self.durable_seq = self.seq
        if size == 0:  # the crash came between making a segment and writing its table
            self._begin(index)
        else:
            marks = [h.at for h in found.heads if h.kind == Kind.MARK and h.at < size]
            self._log.resume(index, size, sure=marks[-1] if marks else 0)
            # Whoever made the segment, or all of it, may have died before it was synced.
            sync_names(self._disk, directory, DIRECTORIES_ABOVE)
        self._marked_seq = -1
        self.mark()

    def _begin(self, index: int) -> None:
        """Write the table of a segment that has nothing readable yet."""
        self._log.resume(index, 0, sure=0)
        self._log.append(b"".join(self._opening()))
        self._log.sync()
        sync_names(self._disk, self._log.directory, DIRECTORIES_ABOVE)

    def _replay_segment(self, path: str, buf: bytes, found: Scan, size: int) -> None:
        """Take in what stands in the first `size` bytes of a segment."""
        for piece in in_order(found):
            if piece[0] >= size:
                return
            if isinstance(piece, Head):
                try:
                    self._replay(piece, buf)
                except (BadRecord, KeyError, TypeError, ValueError, struct.error) as error:
                    self.seq = max(self.seq, piece.seq)
                    self.damage.append(f"{path}: entry {piece.seq} is not readable: {error}")
                continue
            start, end = piece
            self.damage.append(f"{path}: bytes {start} to {end} are not readable")
            for _, body in broken_batches(buf, start, end, self.seq + 1):
                self._replay_broken(body)

    def _replay_broken(self, body: memoryview) -> None:
        """As the rules do: a stream is stored up to the last record that is still good."""
        mark = self.streams.get(stream_of(body))
        if mark is not None:
            heads = salvage(body, mark.high_water).heads
            numbers = [h.seq for h in heads if h.kind not in UNNUMBERED]
            mark.high_water = max([mark.high_water, *numbers])

    def _replay(self, head: Head, buf: bytes) -> None:
        if head.kind == Kind.MARK:
            self.seq = max(self.seq, head.seq)  # the entries before it may be damaged
            return
        if head.kind == Kind.BATCH:
            at = head.at + HEADER_BYTES + RECEIVED_BYTES
            _, _, _, _, _, stream, first, n, _ = DATA_HEAD.unpack_from(buf, at)
            self.streams.setdefault(stream, Mark()).high_water = first + n - 1
            (received,) = RECEIVED.unpack_from(buf, head.at + HEADER_BYTES)
        else:
            body = unpack_map(buf[head.body])
            received = body.get("r", 0)
            self._replay_map(head.kind, body)
        self.received_ns = max(self.received_ns, received)
        self.seq = head.seq if head.kind != Kind.TABLE else head.seq - 1

    def _replay_map(self, kind: int, body: dict[str, Any]) -> None:
        if kind == Kind.TABLE:
            self.uuid = body["uuid"]
            self.streams = {s: Mark(high, ended) for s, high, ended in body["streams"]}
        elif kind == Kind.OPEN:
            self.streams.setdefault(body["stream"], Mark())
        elif kind == Kind.GAP:
            self.streams.setdefault(body["stream"], Mark()).high_water = body["to"]
        elif kind == Kind.BYE:
            mark = self.streams.setdefault(body["stream"], Mark())
            # More only where a batch is damaged: the rules count the rest as lost.
            mark.high_water = max(mark.high_water, body.get("final", 0))
            mark.ended = True


def _sound_bytes(found: Scan, size: int) -> int:
    """How much of the newest segment to keep: up to the first damage without a mark after it.

    What stands after the last mark may never have been synced, and its pages reach the disk in any
    order: a good entry behind a hole would tell that its stream is stored, the hole included.
    """
    marks = [h.at for h in found.heads if h.kind in (Kind.MARK, Kind.TABLE)]
    sure = max(marks, default=size)
    return min((start for start, end in found.damage if start > sure or end == size), default=size)
