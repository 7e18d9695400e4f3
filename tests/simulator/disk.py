"""A disk whose owner may be killed, whose node may lose power, and which may be full or failing.

Written bytes are in the page cache: they survive the death of the process, and only what was synced
survives a loss of power for certain. Of the rest a part may be there, with holes in it. Changes to
directories survive in order: a prefix of those since the last sync of a directory.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from random import Random

HOLE_BYTES = 64


def refusal(number: int) -> OSError:
    return OSError(number, os.strerror(number))


class File:
    """`synced` is what a loss of power leaves at the least; `entry_synced`: its name as well."""

    __slots__ = ("data", "dropped", "entry_synced", "scanned", "synced")

    def __init__(self) -> None:
        self.data = bytearray()
        self.synced = b""
        self.entry_synced = False
        #: after a failed sync: bytes that reading shows and that no later sync brings to the disk
        self.dropped = (0, 0)
        self.scanned: tuple[int, object] = (0, None)  # for checks.py: what of it was looked at


class SimDisk:
    """The files of one node. Processes see it through `view`."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.files: dict[str, File] = {}
        self.room = 1 << 40
        self.failing_syncs = 0
        self.locks: dict[str, ProcessDisk] = {}
        self.views: list[ProcessDisk] = []
        self.torn = 0
        self._undo: list[Callable[[], None]] = []

    def view(self) -> ProcessDisk:
        made = ProcessDisk(self)
        self.views.append(made)
        return made

    def add(self, path: str) -> File:
        file = self.files[path] = File()
        self._undo.append(lambda: self.files.pop(path, None) and None)
        return file

    def remove(self, path: str) -> None:
        file = self.files.pop(path)
        self.room += len(file.data)
        self._undo.append(lambda: self.files.setdefault(path, file) and None)

    def move(self, path: str, to: str) -> None:
        file, before = self.files.pop(path), self.files.get(to)
        self.files[to] = file

        def back() -> None:
            self.files.pop(to, None)
            self.files[path] = file
            if before is not None:
                self.files[to] = before

        self._undo.append(back)

    def sync_names(self) -> None:
        self._undo.clear()
        for file in self.files.values():
            file.entry_synced = True

    def lose_power(self) -> None:
        """Every process of the node dies, and what was not synced is there in part or not."""
        for view in self.views[:]:
            view.die()
        keep = self.random.randint(0, len(self._undo))
        for undo in reversed(self._undo[keep:]):
            undo()
        self._undo.clear()
        for file in self.files.values():
            self._tear(file)
            file.entry_synced, file.dropped, file.scanned = True, (0, 0), (0, None)

    def _tear(self, file: File) -> None:
        data, synced = bytes(file.data), file.synced
        if data.startswith(synced):
            end = self.random.randint(len(synced), len(data))
            kept = bytearray(data[:end])
            if end > len(synced) and self.random.random() < 0.3:
                # Blocks reach the platter in any order: a later one may be there, this one not.
                at = self.random.randint(len(synced), end - 1)
                kept[at : at + HOLE_BYTES] = bytes(min(HOLE_BYTES, end - at))
        else:  # it was cut or overwritten since
            kept = bytearray(self.random.choice((data, synced)))
        self.torn += len(data) != len(kept)
        self.room += len(file.data) - len(kept)
        file.data, file.synced = kept, bytes(kept)

    def copy_of(self, prefix: str) -> dict[str, bytes]:
        return {p: bytes(f.data) for p, f in self.files.items() if p.startswith(prefix)}

    def restore(self, prefix: str, found: dict[str, bytes]) -> None:
        """Put a copy back in the place of what is there now; an empty one deletes it."""
        for path in [p for p in self.files if p.startswith(prefix)]:
            self.remove(path)
        for path, data in found.items():
            file = self.add(path)
            file.data, file.synced = bytearray(data), data
        self.sync_names()


def unharmed(where: str) -> None:
    """The `kill` of a process that nothing kills inside a call."""


class ProcessDisk:
    """One process's descriptors and locks, which die with it. Implements `wire.disk.Disk`.

    `kill` is asked before each change, and may raise Killed.
    """

    def __init__(self, disk: SimDisk) -> None:
        self.disk = disk
        self.kill: Callable[[str], None] = unharmed
        self._open: dict[int, File] = {}
        self._next = 2

    def die(self) -> None:
        self._open.clear()
        self.disk.locks = {p: v for p, v in self.disk.locks.items() if v is not self}
        if self in self.disk.views:
            self.disk.views.remove(self)

    def _fd(self, file: File) -> int:
        self._next += 1
        self._open[self._next] = file
        return self._next

    def make_dir(self, path: str) -> None:
        pass

    def names(self, path: str) -> list[str]:
        start = len(path) + 1
        return [
            p[start:] for p in self.disk.files if p.startswith(f"{path}/") and "/" not in p[start:]
        ]

    def exists(self, path: str) -> bool:
        return path in self.disk.files

    def create(self, path: str) -> int:
        self.kill("before create")
        if path in self.disk.files:
            raise FileExistsError(path)
        if self.disk.room <= 0:
            raise refusal(errno.ENOSPC)
        return self._fd(self.disk.add(path))

    def open_append(self, path: str) -> int:
        file = self.disk.files.get(path)
        if file is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return self._fd(file)

    open_read = open_append

    def open_edit(self, path: str) -> int:
        return self._fd(self.disk.files.get(path) or self.disk.add(path))

    def lock(self, path: str) -> int:
        if self.disk.locks.setdefault(path, self) is not self:
            raise refusal(errno.EAGAIN)
        return self.open_edit(path)

    def write(self, fd: int, data: bytes | bytearray | memoryview) -> int:
        file = self._open[fd]
        return self._put(file, data, len(file.data))

    def write_at(self, fd: int, data: bytes | memoryview, at: int) -> int:
        return self._put(self._open[fd], data, at)

    def _put(self, file: File, data: bytes | bytearray | memoryview, at: int) -> int:
        self.kill("before write")
        grows = max(0, at + len(data) - len(file.data))
        if grows and self.disk.room <= 0:
            raise refusal(errno.ENOSPC)
        taken = len(data) - max(0, grows - self.disk.room)
        self.disk.room -= min(grows, self.disk.room)
        file.data[at : at + taken] = data[:taken]
        if at <= file.dropped[0] and at + taken >= file.dropped[1]:
            file.dropped = (0, 0)
        return taken

    def pread(self, fd: int, size: int, at: int) -> bytes:
        return bytes(self._open[fd].data[at : at + size])

    def size(self, fd: int) -> int:
        return len(self._open[fd].data)

    def truncate(self, fd: int, size: int) -> None:
        self.kill("before truncate")
        file = self._open[fd]
        self.disk.room += max(0, len(file.data) - size)
        del file.data[size:]
        file.dropped = (min(file.dropped[0], size), min(file.dropped[1], size))

    def sync(self, fd: int) -> None:
        self.kill("before sync")
        file = self._open[fd]
        if self.disk.failing_syncs > 0:
            self.disk.failing_syncs -= 1
            file.dropped = (len(file.synced), len(file.data))
            raise refusal(errno.EIO)
        start, end = file.dropped
        file.synced = bytes(file.data)
        if end > start:
            file.synced = file.synced[:start] + bytes(end - start) + file.synced[end:]
            file.scanned = (0, None)

    def sync_dir(self, path: str) -> None:
        self.kill("before sync of a directory")
        self.disk.sync_names()

    def close(self, fd: int) -> None:
        self._open.pop(fd, None)

    def rename(self, path: str, to: str) -> None:
        self.kill("before rename")
        self.disk.move(path, to)

    def unlink(self, path: str) -> None:
        self.kill("before unlink")
        self.disk.remove(path)
