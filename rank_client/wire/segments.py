"""A log of records in numbered segment files: the one form of a rank's spool and of the journal.

A segment opens with the records its owner's `head` gives (unnumbered), so that it can be read
without those before it. There is no index and no second file that must agree: recovery scans.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from .disk import Disk
from .records import FIRST_JOURNAL_KIND, Scan, scan

SPOOL_SEGMENT_BYTES = 8 << 20
JOURNAL_SEGMENT_BYTES = 64 << 20

SPOOL_KINDS = range(1, FIRST_JOURNAL_KIND)
JOURNAL_KINDS = range(FIRST_JOURNAL_KIND, 256)


def segment_path(directory: str, index: int) -> str:
    return f"{directory}/{index:08d}.log"


def segment_indexes(disk: Disk, directory: str) -> list[int]:
    """The numbers of the segments in a directory, in order. A missing directory has none."""
    try:
        names = disk.names(directory)
    except FileNotFoundError:
        return []
    return sorted(int(n[:-4]) for n in names if n.endswith(".log") and n[:-4].isdigit())


def sync_names(disk: Disk, directory: str, above: int) -> None:
    """Bring the names in a directory to the disk, and its own in so many directories above it,
    which may have been made with it. Raises OSError."""
    for _ in range(above + 1):
        if directory:
            disk.sync_dir(directory)
        directory = directory.rpartition("/")[0]


def read_whole(disk: Disk, path: str) -> bytes:
    fd = disk.open_read(path)
    try:
        return disk.pread(fd, disk.size(fd), 0)
    finally:
        disk.close(fd)


def scan_segment(disk: Disk, directory: str, index: int, kinds: range) -> tuple[bytes, Scan]:
    """One segment's bytes and the good records in them."""
    buf = read_whole(disk, segment_path(directory, index))
    return buf, scan(buf, kinds)


class SegmentLog:
    """The writing end. One thread writes; a failed write leaves the file as it was before it.

    `head(next_seq)` gives the records that open a segment; `fd`, `index` and `size` tell where
    the next byte goes.
    """

    def __init__(
        self,
        disk: Disk,
        directory: str,
        head: Callable[[], list[bytes]],
        segment_bytes: int = SPOOL_SEGMENT_BYTES,
    ) -> None:
        self.disk = disk
        self.directory = directory
        self.segment_bytes = segment_bytes
        self.index = 0
        self.size = 0
        self.fd = -1
        self._head = head
        self._write = disk.write

    def start(self, index: int) -> int:
        """Begin segment `index` and return the fd of the one before it (-1 if none).

        The caller syncs and closes that fd and syncs the directory: when is its own affair (a
        rank must not wait for a disk inside `log`). On failure the log stays where it was, and no
        half-made file stays behind.
        """
        path = segment_path(self.directory, index)
        try:
            fd = self.disk.create(path)
        except FileExistsError:  # left by a start that a signal handler ended
            self.disk.unlink(path)
            fd = self.disk.create(path)
        opening = b"".join(self._head())
        try:
            if self._write(fd, opening) != len(opening):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        except BaseException:
            self.disk.close(fd)
            self.disk.unlink(path)
            raise
        before = self.fd
        self.fd, self.index, self.size = fd, index, len(opening)
        return before

    def resume(self, index: int, size: int, sure: int) -> None:
        """Go on in an existing segment, of which the first `size` bytes are good, and bring them
        to the disk. Of them `sure` are known to be there.

        The rest is written again, as it is: after a failed fsync the page cache shows bytes that
        are not on the disk, and that no later fsync brings there.
        """
        path = segment_path(self.directory, index)
        self.fd = self.disk.open_append(path)
        if self.disk.size(self.fd) != size:
            self.disk.truncate(self.fd, size)
        # Not through the appending descriptor: its writes go to the end, wherever they are aimed.
        edit = self.disk.open_edit(path)
        try:
            self.disk.write_at(edit, self.disk.pread(edit, size - sure, sure), sure)
        finally:
            self.disk.close(edit)
        self.disk.sync(self.fd)
        self.index, self.size = index, size

    def append(self, data: bytes | bytearray) -> None:
        """Append whole records with one write, or none of them. Raises OSError."""
        try:
            written = self._write(self.fd, data)
        except OSError:
            self.disk.truncate(self.fd, self.size)
            raise
        if written != len(data):
            # A full disk takes a part of it; what stays must be whole records.
            self.disk.truncate(self.fd, self.size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.directory)
        self.size += written

    @property
    def full(self) -> bool:
        return self.size >= self.segment_bytes

    def sync(self) -> None:
        self.disk.sync(self.fd)

    def close(self) -> None:
        if self.fd >= 0:
            self.disk.close(self.fd)
            self.fd = -1
