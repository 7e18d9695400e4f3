"""Shipping what dead processes left in the spool, under their own stream ids.

Read-only towards the records: only its own process ever appends to a stream, so a number is never
used twice, and two shippers of one stream are harmless.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .link import Link
from .media import send_file
from .sender import Carrier, jitter
from .wire.disk import OsDisk
from .wire.records import UNNUMBERED, BadRecord, Head, Kind, read_head, unpack_map
from .wire.segments import SPOOL_KINDS, read_whole, scan_segment, segment_indexes, segment_path
from .wire.session import ClientSession

KEEP_DONE_SECONDS = 7 * 86400.0
STALL_SECONDS = 10.0  #: without an acknowledgement, a stream is left for a later try


@dataclass(frozen=True)
class Orphan:
    """A stream whose process is gone and which nobody is known to have whole."""

    directory: Path
    run: str
    stream: bytes
    hello: dict[str, Any]

    @property
    def media(self) -> list[int]:
        try:
            return sorted(int(n) for n in os.listdir(self.directory / "media") if n.isdigit())
        except OSError:
            return []


@dataclass
class Shipped:
    """What became of an orphan. `damage` names what could not be read."""

    records: int = 0
    files: int = 0
    whole: bool = False
    damage: list[str] = field(default_factory=list)


def read_hello(directory: Path) -> dict[str, Any] | None:
    """The HELLO map a spool opens with, None where there is none to read."""
    disk = OsDisk()
    for index in segment_indexes(disk, str(directory)):
        try:
            buf = read_whole(disk, segment_path(str(directory), index))
        except OSError:
            continue
        head = read_head(buf, 0, len(buf))
        if head is not None and head.kind == Kind.HEAD:
            try:
                return unpack_map(buf[head.body])
            except BadRecord:
                continue
    return None


def find(root: Path, data_dir: Path, has_run: Callable[[str], bool]) -> list[Orphan]:
    """The orphans that are this data directory's: by the run, or by what they themselves say."""
    out: list[Orphan] = []
    for directory in _streams(root):
        if (directory / "done").exists() or (directory / "rejected").exists():
            continue
        if _alive(directory):
            continue
        hello = read_hello(directory)
        if hello is None:
            continue
        run, stream = directory.parent.name, hello.pop("stream", b"")
        ours = has_run(run) or os.path.realpath(str(hello.get("dir"))) == os.path.realpath(data_dir)
        if ours and isinstance(stream, bytes) and len(stream) == 16:
            if hello.get("kind") != "tool":
                hello["kind"] = "replay"
            out.append(Orphan(directory, run, stream, hello))
    return out


def _streams(root: Path) -> Iterator[Path]:
    """Every stream's directory in a spool."""
    try:
        if root.lstat().st_uid != os.getuid():
            return
        for run in sorted(root.iterdir()):
            if run.is_dir():
                yield from (d for d in sorted(run.iterdir()) if len(d.name) == 32 and d.is_dir())
    except OSError:
        return


def _alive(directory: Path) -> bool:
    """Does its process hold the lock? A stream without a lock file is just being made."""
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
def _held(directory: Path) -> Iterator[bool]:
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


class OrphanSource:
    """A dead process's spool as a session's source: good records, up to the first hole."""

    def __init__(self, directory: Path) -> None:
        self._directory = str(directory)
        self._disk = OsDisk()
        self._index: dict[int, tuple[int, int]] = {}  # segment → its first and last number
        self._loaded: tuple[int, bytes, list[Head]] | None = None
        self.damage: list[str] = []
        self.first_kept = 1
        self.last = 0
        self._survey()

    def _survey(self) -> None:
        for position, index in enumerate(segment_indexes(self._disk, self._directory)):
            _, found = scan_segment(self._disk, self._directory, index, SPOOL_KINDS)
            if position == 0 and found.heads:
                self.first_kept = found.heads[0].seq
                self.last = self.first_kept - 1
            first = self.last + 1
            for head in found.heads:
                if head.kind in UNNUMBERED or head.seq <= self.last:
                    continue
                if head.seq != self.last + 1:
                    path = segment_path(self._directory, index)
                    self.damage.append(f"{path}: no readable record {self.last + 1}")
                    return
                self.last = head.seq
            self._index[index] = first, self.last

    def read(self, first: int, max_bytes: int) -> tuple[int, bytes]:
        index = next((i for i, (a, b) in self._index.items() if a <= first <= b), None)
        if index is None:
            return 0, b""
        if self._loaded is None or self._loaded[0] != index:
            buf, found = scan_segment(self._disk, self._directory, index, SPOOL_KINDS)
            self._loaded = index, buf, found.heads
        _, buf, heads = self._loaded
        parts: list[bytes] = []
        size = number = 0
        schemas: list[bytes] = []
        for head in heads:
            record = buf[head.at : head.at + head.size]
            if head.kind == Kind.SCHEMA and (head.seq >= first or first == self._index[index][0]):
                schemas.append(record)
            elif head.kind not in UNNUMBERED and first <= head.seq <= self._index[index][1]:
                size += sum(map(len, schemas)) + head.size
                if parts and size > max_bytes:
                    break
                parts += [*schemas, record]
                schemas = []
                number += 1
        return number, b"".join(parts)


def ship(orphan: Orphan, address: str, seconds: float) -> Shipped:
    """Send one orphan's records and files. `whole` is False when the time was too short."""
    deadline = time.monotonic() + seconds
    shipped = Shipped()
    with _held(orphan.directory) as ours:
        if not ours:
            return shipped
        source = OrphanSource(orphan.directory)
        shipped.damage = source.damage
        link = Link(address)
        try:
            session = ClientSession(orphan.stream, lambda: orphan.hello, source, jitter)
            carrier = Carrier(session, link)
            _carry(carrier, deadline, lambda: session.idle)
            shipped.records = session.durable
            if session.state == "rejected":
                (orphan.directory / "rejected").write_text(session.reject_reason)
                shipped.damage.append(f"refused by the gateway: {session.reject_reason}")
            if not session.idle:
                return shipped
            for media in orphan.media:
                path = orphan.directory / "media" / str(media)
                late = lambda: time.monotonic() >= deadline  # noqa: E731
                if not send_file(path, orphan.run, orphan.stream, media, link, late):
                    return shipped
                path.unlink()
                shipped.files += 1
            session.end({"status": "adopted"})  # nothing more will come of this life
            _carry(carrier, deadline, lambda: False)
            if session.state != "closed":
                return shipped
            note = f"{(session.journal or b'').hex()} {session.durable}\n"
            (orphan.directory / "done").write_text(note)
            shipped.whole = True
        finally:
            link.close()
    return shipped


def _carry(carrier: Carrier, deadline: float, enough: Callable[[], bool]) -> None:
    session = carrier.session
    moved_at, durable = time.monotonic(), -1
    while time.monotonic() < deadline and session.state not in ("closed", "rejected"):
        carrier.step(time.monotonic())
        if enough():
            return
        if session.durable != durable:
            moved_at, durable = time.monotonic(), session.durable
        if time.monotonic() - moved_at > STALL_SECONDS:
            return
        carrier.link.wait(0.01)


def tidy(root: Path, now: float) -> int:
    """Remove the spools that were shipped long ago; how many."""
    removed = 0
    for directory in _streams(root):
        try:
            old = now - (directory / "done").stat().st_mtime > KEEP_DONE_SECONDS
        except OSError:
            continue
        if old and not _alive(directory):
            shutil.rmtree(directory, ignore_errors=True)
            removed += 1
    return removed
