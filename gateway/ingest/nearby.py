"""A file of this node, brought without the network: its blocks are shared, else copied.

A rank that reaches us over the ipc socket (so it is this user's) names its snapshot. What comes of
it is checked like bytes that were sent; when anything is odd, the bytes are sent after all.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator

FICLONE = 0x40049409  # linux/fs.h: share the blocks of one file with another
PIECE_BYTES = 1 << 20
FREE_BYTES = 1 << 30  #: of the disk stay free; where there is less, credit sees to it


def open_near(path: str, size_bytes: int) -> int:
    """A descriptor of the snapshot. Raises OSError for what is not a plain file of ours of that
    size."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    fd = os.open(path, flags)
    about = os.fstat(fd)
    if (
        not stat.S_ISREG(about.st_mode)
        or about.st_uid != os.geteuid()
        or about.st_size != size_bytes
    ):
        os.close(fd)
        raise OSError(22, "not the snapshot that was announced", path)
    return fd


def has_room(fd: int, size_bytes: int) -> bool:
    """Is there room for so much more on the disk of an open file?"""
    about = os.fstatvfs(fd)
    return about.f_bavail * about.f_frsize >= size_bytes + FREE_BYTES


def clone(source: int, target: int) -> bool:
    """Share the blocks; False where the file system cannot."""
    try:
        fcntl.ioctl(target, FICLONE, source)
    except OSError:
        return False
    return True


def pieces(fd: int) -> Iterator[tuple[int, bytes]]:
    """(where, bytes) from the beginning to the end."""
    at = 0
    while piece := os.pread(fd, PIECE_BYTES, at):
        yield at, piece
        at += len(piece)
