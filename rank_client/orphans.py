"""What dead processes left in the spool: finding it, and what is noted beside it.

`done`: the gateway has all of it. `hole`: it has all before numbers that cannot be read.
`rejected`: it wants none of it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .meant import meant_for
from .spool import own_spools
from .wire.disk import OsDisk
from .wire.records import MAX_EVENT_BYTES, BadRecord, Kind, read_head, unpack_map
from .wire.segments import segment_indexes, segment_path


@dataclass(frozen=True)
class Orphan:
    """A stream whose process is gone. `acked` is (journal, number) of who is noted to have it, up
    to there; None where nobody is."""

    directory: Path
    run: str
    stream: bytes
    hello: dict[str, Any]
    acked: tuple[bytes, int] | None = None

    @property
    def media(self) -> list[int]:
        try:
            return sorted(int(n) for n in os.listdir(self.directory / "media") if n.isdigit())
        except OSError:
            return []


def read_hello(directory: Path) -> dict[str, Any] | None:
    """The HELLO map a spool opens with, None where there is none to read."""
    disk = OsDisk()
    for index in segment_indexes(disk, str(directory)):
        try:
            fd = disk.open_read(segment_path(str(directory), index))
            buf = disk.pread(fd, MAX_EVENT_BYTES, 0)
            disk.close(fd)
        except OSError:
            continue
        head = read_head(buf, 0, len(buf))
        if head is not None and head.kind == Kind.HEAD:
            try:
                return unpack_map(buf[head.body])
            except BadRecord:
                continue
    return None


def find(
    root: Path, data_dir: Path | None, has_run: Callable[[str], bool], holes: bool = False
) -> list[Orphan]:
    """The orphans that are meant for this data directory; without one, those of the runs there
    are. With `holes`, those too of which all was shipped that can be without opening a gap."""
    out: list[Orphan] = []
    notes = ("done", "rejected") if holes else ("done", "rejected", "hole")
    for directory in stream_directories(root):
        if data_dir is None and not has_run(directory.parent.name):
            continue
        if any((directory / name).exists() for name in notes) or alive(directory):
            continue
        orphan = _orphan(directory)
        if orphan is None:
            continue
        if data_dir is None or meant_for(orphan.hello, orphan.run, data_dir, has_run):
            out.append(orphan)
    return out


def kept(root: Path, doubted: Callable[[Path, bytes], bool]) -> list[Orphan]:
    """Of the dead streams that were shipped those whose journal may have lost them: asked of
    `doubted(directory, journal)`."""
    out: list[Orphan] = []
    for directory in stream_directories(root):
        acked = read_note(directory, "done") or read_note(directory, "hole")
        if acked is not None and doubted(directory, acked[0]) and not alive(directory):
            orphan = _orphan(directory, acked)
            out += [orphan] if orphan else []
    return out


def _orphan(directory: Path, acked: tuple[bytes, int] | None = None) -> Orphan | None:
    hello = read_hello(directory)
    if hello is None:
        return None
    stream = hello.pop("stream", b"")
    if not isinstance(stream, bytes) or len(stream) != 16:
        return None
    if hello.get("kind") != "tool":
        hello["kind"] = "replay"
    return Orphan(directory, directory.parent.name, stream, hello, acked)


def stream_directories(root: Path) -> Iterator[Path]:
    """Every stream's directory in a spool."""
    try:
        if root.lstat().st_uid != os.getuid():
            return
        for run in sorted(root.iterdir()):
            if run.is_dir():
                yield from (d for d in sorted(run.iterdir()) if len(d.name) == 32 and d.is_dir())
    except OSError:
        return


def alive(directory: Path) -> bool:
    """Does its process hold the lock? A stream without a lock file is just being made."""
    if str(directory) in own_spools:
        return True
    try:
        fd = os.open(directory / "lock", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return True
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


@contextmanager
def held(directory: Path) -> Iterator[bool]:
    """Keep other sweepers off while we ship; not by its process's lock, so that the stream is
    seen as an orphan until it is whole."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(directory / "sweep.lock", flags, 0o600)
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(fd)


def read_note(directory: Path, name: str) -> tuple[bytes, int] | None:
    """(journal, number) of a `done` or `hole` note; None where there is none, or no good one."""
    try:
        journal, durable = (directory / name).read_text().split()[:2]
        return bytes.fromhex(journal), int(durable)
    except (OSError, ValueError):
        return None


def write_note(directory: Path, name: str, text: str) -> None:
    """By rename: a note is there whole, or not at all."""
    part = directory / f".{name}"
    part.write_text(text)
    part.rename(directory / name)
