"""Stand-ins for the disk: one in memory that can be full and can lose power, one real but full."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from rank_client.wire.disk import OsDisk


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class MemoryDisk:
    """Files in memory. `room` bytes may still be written: past it writes are short, then refused.

    `synced` holds what each file would hold after a loss of power, at the least.
    """

    def __init__(self, room: int = 1 << 40) -> None:
        self.room = room
        self.files: dict[str, bytearray] = {}
        self.synced: dict[str, bytes] = {}
        self.calls: list[str] = []
        self._open: dict[int, str] = {}
        self._next = 3

    def make_dir(self, path: str) -> None:
        self.calls.append("make_dir")

    def names(self, path: str) -> list[str]:
        return [p.rpartition("/")[2] for p in self.files if p.rpartition("/")[0] == path]

    def _fd(self, path: str) -> int:
        self._next += 1
        self._open[self._next] = path
        return self._next

    def create(self, path: str) -> int:
        if path in self.files:
            raise FileExistsError(path)
        self.files[path] = bytearray()
        return self._fd(path)

    def open_append(self, path: str) -> int:
        if path not in self.files:
            raise FileNotFoundError(path)
        return self._fd(path)

    open_read = open_append

    def open_edit(self, path: str) -> int:
        self.files.setdefault(path, bytearray())
        return self._fd(path)

    lock = open_edit

    def exists(self, path: str) -> bool:
        return path in self.files

    def write_at(self, fd: int, data: bytes | memoryview, at: int) -> int:
        file = self.files[self._open[fd]]
        if at + len(data) > len(file) + self.room:
            raise full()
        self.room -= max(0, at + len(data) - len(file))
        file[at : at + len(data)] = data
        return len(data)

    def rename(self, path: str, to: str) -> None:
        self.files[to] = self.files.pop(path)
        self.synced[to] = self.synced.pop(path, b"")

    def write(self, fd: int, data: bytes | bytearray | memoryview) -> int:
        self.calls.append("write")
        if self.room <= 0 and len(data):
            raise full()
        piece = bytes(data)[: self.room]
        self.room -= len(piece)
        self.files[self._open[fd]] += piece
        return len(piece)

    def pread(self, fd: int, size: int, at: int) -> bytes:
        return bytes(self.files[self._open[fd]][at : at + size])

    def size(self, fd: int) -> int:
        return len(self.files[self._open[fd]])

    def truncate(self, fd: int, size: int) -> None:
        file = self.files[self._open[fd]]
        self.room += max(0, len(file) - size)
        del file[size:]

    def sync(self, fd: int) -> None:
        self.calls.append("sync")
        path = self._open[fd]
        self.synced[path] = bytes(self.files[path])

    def sync_dir(self, path: str) -> None:
        self.calls.append("sync_dir")

    def close(self, fd: int) -> None:
        del self._open[fd]

    def unlink(self, path: str) -> None:
        self.room += len(self.files.pop(path))
        self.synced.pop(path, None)

    @property
    def descriptors(self) -> int:
        return len(self._open)

    def copy(self) -> MemoryDisk:
        """The same files on a disk of its own, as a crashed process leaves them."""
        made = MemoryDisk()
        made.files = {path: bytearray(data) for path, data in self.files.items()}
        return made


class FullDisk(OsDisk):
    """The real disk, refusing writes while `is_full`; `partly` bytes of the first go through."""

    def __init__(self) -> None:
        self.is_full = False
        self.partly = 0
        self.write: Callable[[int, bytes], int] = self._maybe  # type: ignore[misc]

    def _maybe(self, fd: int, data: bytes) -> int:
        if not self.is_full:
            return os.write(fd, data)
        if self.partly:
            written = os.write(fd, bytes(data)[: self.partly])
            self.partly = 0
            return written
        raise full()

    def create(self, path: str) -> int:
        if self.is_full:
            raise full()
        return super().create(path)
