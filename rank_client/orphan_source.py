"""Reading the spool of a dead process, around what cannot be read of it."""

from __future__ import annotations

from pathlib import Path

from .wire.disk import Disk, OsDisk
from .wire.records import UNNUMBERED, Head, Kind
from .wire.segments import SPOOL_KINDS, scan_segment, segment_indexes, segment_path


class OrphanSource:
    """A dead process's spool as a session's source: good records, up to the first hole.

    `stretches` are the (first, last) numbers between holes, in order; `first_kept` and `last`
    are those of the one being shipped, `end` is the highest number there is to know of.
    """

    def __init__(self, directory: Path, disk: Disk | None = None) -> None:
        self._directory = str(directory)
        self._disk = disk or OsDisk()
        self._segments: list[tuple[int, int, int]] = []  # (index, first number, last number)
        self._loaded: tuple[int, bytes, list[Head]] | None = None
        self._follows = 1  # the number that a reader who goes on asks for
        self._position = 0  # and where in `_loaded` it stands
        self.stretches: list[tuple[int, int]] = []
        self.damage: list[str] = []
        for index in segment_indexes(self._disk, self._directory):
            self._survey(index)
        self.first_kept, self.last = self.stretches[0] if self.stretches else (1, 0)
        self.end = self.stretches[-1][1] if self.stretches else 0

    def _survey(self, index: int) -> None:
        try:
            _, found = scan_segment(self._disk, self._directory, index, SPOOL_KINDS)
        except OSError as error:
            path = segment_path(self._directory, index)
            self.damage.append(f"{path}: {error.strerror or error}")
            return
        first = 0
        for head in found.heads:  # an unnumbered record has the number of the next one
            if not self.stretches:
                self.stretches.append((head.seq, head.seq - 1))
            begin, last = self.stretches[-1]
            if head.seq > last + 1:
                missing = f"records {last + 1} to {head.seq - 1} cannot be read"
                self.damage.append(f"{self._directory}: {missing}")
                begin, last = head.seq, head.seq - 1
                self.stretches.append((begin, last))
            if head.kind not in UNNUMBERED and head.seq == last + 1:
                first = first or head.seq
                self.stretches[-1] = (begin, head.seq)
        if first:
            self._segments.append((index, first, self.stretches[-1][1]))

    def follow(self, durable: int) -> None:
        """Ship the stretch that goes on from what the gateway has; none where a hole comes next."""
        reached = [last for first, last in self.stretches if first <= durable + 1]
        self.last = max(durable, reached[-1] if reached else 0)

    def skip_hole(self) -> bool:
        """Ship the stretch behind the next hole; False when there is none."""
        behind = next((s for s in self.stretches if s[0] > self.last + 1), None)
        if behind is not None:
            self.first_kept, self.last = behind
        return behind is not None

    def unreachable(self, durable: int) -> int:
        """How many numbers above what the gateway has are in holes."""
        count, at = 0, durable
        for first, last in self.stretches:
            count += max(0, first - 1 - at)
            at = max(at, last)
        return count

    def read(self, first: int, max_bytes: int) -> tuple[int, bytes]:
        """(n, bytes); after a jump all schemas known at `first` stand before it."""
        here = next((s for s in self._segments if s[1] <= first <= s[2]), None)
        if here is None:
            return 0, b""
        index = here[0]
        if self._loaded is None or self._loaded[0] != index:
            buf, found = scan_segment(self._disk, self._directory, index, SPOOL_KINDS)
            self._loaded = index, buf, found.heads
            self._position = 0
        _, buf, heads = self._loaded
        goes_on = first == self._follows
        parts: list[bytes] = []
        schemas: list[bytes] = []
        size = number = 0
        for position in range(self._position if goes_on else 0, len(heads)):
            head = heads[position]
            record = buf[head.at : head.at + head.size]
            if head.kind == Kind.SCHEMA:  # by where it stands
                schemas.append(record)
            elif head.kind not in UNNUMBERED and head.seq == first + number <= self.last:
                size += sum(map(len, schemas)) + head.size
                if parts and size > max_bytes:
                    break
                parts += [*schemas, record]
                schemas = []
                number += 1
                self._position = position + 1
        self._follows = first + number
        return number, b"".join(parts)
