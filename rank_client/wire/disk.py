"""The few storage calls that logs are made of, so that a test can stand in for the disk."""

from __future__ import annotations

import fcntl
import os
from typing import Protocol


class Disk(Protocol):
    """What a segment log asks of storage. Every method may raise OSError."""

    def make_dir(self, path: str) -> None: ...
    def names(self, path: str) -> list[str]: ...
    def create(self, path: str) -> int: ...
    def open_append(self, path: str) -> int: ...
    def open_read(self, path: str) -> int: ...
    def open_edit(self, path: str) -> int: ...
    def lock(self, path: str) -> int: ...
    def write(self, fd: int, data: bytes | bytearray | memoryview) -> int: ...
    def write_at(self, fd: int, data: bytes | memoryview, at: int) -> int: ...
    def pread(self, fd: int, size: int, at: int) -> bytes: ...
    def size(self, fd: int) -> int: ...
    def truncate(self, fd: int, size: int) -> None: ...
    def sync(self, fd: int) -> None: ...
    def sync_dir(self, path: str) -> None: ...
    def close(self, fd: int) -> None: ...
    def exists(self, path: str) -> bool: ...
    def rename(self, path: str, to: str) -> None: ...
    def unlink(self, path: str) -> None: ...


def is_at(fd: int, path: str) -> bool:
    """Is this open file still the one that its path names? Somebody may have deleted it, or put
    another in its place."""
    try:
        there = os.stat(path)  # noqa: PTH116 - paths are str here
    except OSError:
        return False
    here = os.fstat(fd)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def tree_bytes(root: str | os.PathLike[str]) -> int:
    """What the files in a folder and below it hold; nothing where there is no such folder."""
    total = 0
    for folder, _, names in os.walk(root):
        for name in names:
            try:
                total += os.lstat(f"{folder}/{name}").st_size
            except OSError:
                continue  # sent, renamed or removed since it was listed
    return total


class OsDisk:
    """The real disk. Files are 0600, directories 0700: logs may hold what others must not read."""

    write = staticmethod(os.write)
    write_at = staticmethod(os.pwrite)
    pread = staticmethod(os.pread)
    truncate = staticmethod(os.ftruncate)
    sync = staticmethod(os.fdatasync)
    close = staticmethod(os.close)
    exists = staticmethod(os.path.exists)
    rename = staticmethod(os.rename)
    unlink = staticmethod(os.unlink)
    names = staticmethod(os.listdir)

    def make_dir(self, path: str) -> None:
        os.makedirs(path, mode=0o700, exist_ok=True)  # noqa: PTH103 - paths are str here

    def create(self, path: str) -> int:
        # For reading too: should somebody delete the file, nobody else could read it any more.
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(path, flags, 0o600)

    def open_append(self, path: str) -> int:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)

    def open_read(self, path: str) -> int:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)

    def open_edit(self, path: str) -> int:
        """For reading and writing anywhere; made when it is not there."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def lock(self, path: str) -> int:
        """Hold a file for as long as this process lives. Raises OSError when another holds it.

        A POSIX lock, not flock: a forked child would keep a flock alive after our death. Opened
        once: closing any other descriptor of the file would drop the lock.
        """
        fd = self.open_edit(path)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise
        return fd

    def size(self, fd: int) -> int:
        return os.fstat(fd).st_size

    def sync_dir(self, path: str) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
