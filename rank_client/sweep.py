"""Shipping what dead processes left in the spool, under their own stream ids.

Read-only towards the records: only its own process ever appends to a stream, so a number is never
used twice, and two shippers of one stream are harmless. What became of a stream is noted beside
its records: `done` (the gateway has all of it), `hole` (it has all before numbers that cannot be
read), `rejected`.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .counts import read_counts
from .link import Link
from .media import send_file
from .sender import Carrier, Warn, jitter
from .spool import own_spools
from .spool_place import SPOOL_KEEP_BYTES
from .wire.disk import Disk, OsDisk
from .wire.keys import Key, key_of
from .wire.records import (
    MAX_EVENT_BYTES,
    UNNUMBERED,
    BadRecord,
    Head,
    Kind,
    read_head,
    unpack_map,
)
from .wire.segments import SPOOL_KINDS, scan_segment, segment_indexes, segment_path
from .wire.session import ClientSession

KEEP_DONE_SECONDS = 7 * 86400.0
NEIGHBOURS_SECONDS = 2.0  #: between two looks at what they left
NEIGHBOUR_SHIP_SECONDS = 30.0
STALL_SECONDS = 10.0  #: without an acknowledgement, a stream is left for a later try


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


@dataclass
class Shipped:
    """What became of an orphan. `damage` names what could not be read; `unreachable` counts the
    records that a gap would have to be opened for."""

    records: int = 0
    files: int = 0
    unreachable: int = 0
    whole: bool = False
    journal_changed: bool = False
    damage: list[str] = field(default_factory=list)

    @property
    def over(self) -> bool:
        """Nothing can be done about it any more by trying again."""
        return self.whole or self.unreachable > 0


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


# --- finding -----------------------------------------------------------------


def find(
    root: Path, data_dir: Path | None, has_run: Callable[[str], bool], holes: bool = False
) -> list[Orphan]:
    """The orphans that are this data directory's: by the run, or by what they themselves say.
    With `holes`, those too of which all was shipped that can be without opening a gap."""
    out: list[Orphan] = []
    notes = ("done", "rejected") if holes else ("done", "rejected", "hole")
    for directory in _streams(root):
        if data_dir is None and not has_run(directory.parent.name):
            continue
        if any((directory / name).exists() for name in notes) or _alive(directory):
            continue
        orphan = _orphan(directory)
        if orphan is None:
            continue
        there = os.path.realpath(str(orphan.hello.get("dir")))
        if has_run(orphan.run) or (data_dir and there == os.path.realpath(data_dir)):
            out.append(orphan)
    return out


def kept(root: Path, doubted: Callable[[Path, bytes], bool]) -> list[Orphan]:
    """Of the dead streams that were shipped those whose journal may have lost them: asked of
    `doubted(directory, journal)`."""
    out: list[Orphan] = []
    for directory in _streams(root):
        acked = read_note(directory, "done") or read_note(directory, "hole")
        if acked is not None and doubted(directory, acked[0]) and not _alive(directory):
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


# --- reading -----------------------------------------------------------------


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


# --- shipping ----------------------------------------------------------------


def ship(
    orphan: Orphan,
    address: str,
    seconds: float,
    key: Key | None = None,
    accept_gap: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Shipped:
    """Send one orphan's records and files. Neither whole nor `unreachable` when the time was too
    short, or somebody else ships it.

    Only with `accept_gap` are numbers given up that cannot be read, so that those behind them
    can be shipped.
    """
    deadline = time.monotonic() + seconds
    late = lambda: stop() or time.monotonic() >= deadline  # noqa: E731
    with _held(orphan.directory) as ours:
        if not ours:
            return Shipped()
        link = Link(address, key)
        try:
            return _Shipment(orphan, link, late).run(accept_gap)
        finally:
            link.close()


class _Shipment:
    """One try to ship one orphan over a link."""

    def __init__(self, orphan: Orphan, link: Link, late: Callable[[], bool]) -> None:
        self.orphan = orphan
        self.link = link
        self.late = late
        self.source = OrphanSource(orphan.directory)
        self.shipped = Shipped(damage=self.source.damage)
        self.gap = False

    def run(self, accept_gap: bool) -> Shipped:
        carrier = self._session()
        done = self._records(carrier)
        while done and accept_gap and self.source.skip_hole():
            self.gap = True
            carrier = self._session()
            done = self._records(carrier)
        session = carrier.session
        self.shipped.records = session.durable
        if session.state == "rejected":
            write_note(self.orphan.directory, "rejected", session.reject_reason)
            self.shipped.damage.append(f"refused by the gateway: {session.reject_reason}")
        if not done or not self._files():
            return self.shipped
        unreachable = self.source.unreachable(session.durable)
        if unreachable or self._say_bye(carrier):
            try:
                self._note(session, unreachable)
            except OSError as error:  # shipped once more, and dropped as duplicates
                self.shipped.damage.append(f"{self.orphan.directory}: {error.strerror or error}")
        return self.shipped

    def _session(self) -> Carrier:
        session = ClientSession(self.orphan.stream, self._hello, self.source, jitter)
        if self.orphan.acked and not self.gap:
            session.journal, session.durable = self.orphan.acked
        return Carrier(session, self.link)

    def _hello(self) -> dict[str, Any]:
        more = {"gap": True} if self.gap else {}
        return {**self.orphan.hello, "last": self.source.end, **more}

    def _records(self, carrier: Carrier) -> bool:
        """Ship the stretch that goes on from what the gateway has; False when it took too long."""
        session = carrier.session

        def enough() -> bool:
            if session.state == "open":
                self.source.follow(session.durable)
            return session.idle

        self._carry(carrier, enough)
        self.shipped.journal_changed |= session.journal_changed
        return session.idle

    def _files(self) -> bool:
        orphan = self.orphan
        for media in orphan.media:
            path = orphan.directory / "media" / str(media)
            try:
                if not send_file(path, orphan.run, orphan.stream, media, self.link, self.late):
                    return False
            except OSError as error:
                self.shipped.damage.append(f"{path}: {error.strerror or error}")
                return False
            path.unlink()
            self.shipped.files += 1
        return True

    def _say_bye(self, carrier: Carrier) -> bool:
        """Nothing more will come of this life; what its LOSS records could not tell is told."""
        counts = read_counts(OsDisk(), str(self.orphan.directory))
        carrier.session.end(
            {
                "status": "adopted",
                "refused": counts.refused,
                "bad": counts.bad_values,
                "owed": counts.owed,
            }
        )
        self._carry(carrier, lambda: False)
        self.shipped.whole = carrier.session.state == "closed"
        return self.shipped.whole

    def _note(self, session: ClientSession, unreachable: int) -> None:
        directory = self.orphan.directory
        text = f"{(session.journal or b'').hex()} {session.durable}"
        self.shipped.unreachable = unreachable
        if unreachable:
            write_note(directory, "hole", f"{text} {unreachable} {self.source.end}\n")
            (directory / "done").unlink(missing_ok=True)
        else:
            write_note(directory, "done", f"{text}\n")
            (directory / "hole").unlink(missing_ok=True)

    def _carry(self, carrier: Carrier, enough: Callable[[], bool]) -> None:
        session = carrier.session
        moved_at, durable = time.monotonic(), -1
        while not self.late() and session.state not in ("closed", "rejected"):
            carrier.step(time.monotonic())
            if enough():
                return
            if session.durable != durable:
                moved_at, durable = time.monotonic(), session.durable
            if time.monotonic() - moved_at > STALL_SECONDS:
                return
            self.link.wait(0.01)


class Neighbours(threading.Thread):
    """Ships what earlier lives of a run left on this node, where only its ranks can see that: the
    gateway is on another. In one rank of a node, beside its own data, and never before it."""

    def __init__(
        self,
        run_dir: Path,
        session: ClientSession,
        address: str,
        environ: Mapping[str, str],
        warn: Warn,
    ) -> None:
        super().__init__(name="rankgate-neighbours", daemon=True)
        self._run_dir = run_dir
        self._session = session
        self._address = address
        self._environ = environ
        self._warn = warn
        self._leave = threading.Event()
        self._asked: set[tuple[Path, bytes]] = set()  # kept spools, and the journal that has them

    def run(self) -> None:
        while not self._leave.wait(NEIGHBOURS_SECONDS):
            try:
                if self._session.idle:
                    self._look()
                    tidy(self._run_dir.parent, time.time())
            except Exception as error:  # nothing may escape into the training process
                self._warn("neighbours", f"shipping what earlier processes left failed: {error}")

    def stop(self, seconds: float) -> None:
        self._leave.set()
        self.join(max(0.0, seconds))

    def _look(self) -> None:
        root, run = self._run_dir.parent, self._run_dir.name
        for orphan in (*find(root, None, lambda r: r == run), *kept(root, self._doubted)):
            if self._leave.is_set() or not self._session.idle:
                return
            shipped = ship(
                orphan,
                self._address,
                NEIGHBOUR_SHIP_SECONDS,
                key_of(self._environ),
                stop=self._leave.is_set,
            )
            for text in shipped.damage:
                self._warn(f"damage {orphan.directory}", f"{text}; see: rankgate sweep --help")
            if shipped.over and self._session.journal:
                self._asked.add((orphan.directory, self._session.journal))

    def _doubted(self, directory: Path, _journal: bytes) -> bool:
        """Each is asked for once: this process cannot know what became of the journal before."""
        asked = (directory, self._session.journal or b"")
        return directory.parent == self._run_dir and asked not in self._asked


# --- what was shipped --------------------------------------------------------


def tidy(root: Path, now: float, keep_bytes: int = SPOOL_KEEP_BYTES) -> int:
    """Of the spools that were shipped, remove those of long ago, and the oldest beyond what a
    node keeps, which its living processes have a part of; how many."""
    shipped: list[tuple[float, Path]] = []
    room = keep_bytes
    for directory in _streams(root):
        if _alive(directory):
            room -= _bytes_of(directory)
            continue
        try:
            shipped.append(((directory / "done").stat().st_mtime, directory))
        except OSError:
            continue  # it waits for a gateway, and is never removed
    removed = 0
    for when, directory in sorted(shipped, reverse=True):
        size = _bytes_of(directory)
        with _held(directory) as ours:
            if ours and (room <= 0 or now - when > KEEP_DONE_SECONDS):
                shutil.rmtree(directory, ignore_errors=True)
                removed += 1
            elif ours and size > room:
                _cut(directory, size - room)
        room -= size
    return removed


def _bytes_of(directory: Path) -> int:
    try:
        return sum(entry.stat().st_size for entry in os.scandir(directory))
    except OSError:
        return 0  # somebody removes it just now


def _cut(directory: Path, excess: int) -> None:
    """Remove the oldest segments, but never the last: it tells whose they were."""
    for index in segment_indexes(OsDisk(), str(directory))[:-1]:
        if excess <= 0:
            return
        path = Path(segment_path(str(directory), index))
        excess -= path.stat().st_size
        path.unlink()
