"""Files: a snapshot beside the spool, then its bytes to the gateway as a stream of its own.

One daemon thread, started by the first file, copies what could not be cloned at once and sends
one file after the other, so that a large checkpoint never stands before a metric.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from .link import Link
from .sender import Carrier, Warn, jitter
from .spool import Spool
from .wire.disk import tree_bytes
from .wire.records import Kind
from .wire.session import ClientSession, Source

CHUNK_BYTES = 256 << 10
COPY_TRIES = 3
RETRY_SECONDS = 0.2
RETRY_MAX_SECONDS = 30.0
FICLONE = 0x40049409  # linux/fs.h: share the blocks of one file with another
INLINE_COPY_BYTES = 1 << 20

Job = tuple[int, Callable[[Path], None] | None]


class FileSource:
    """A file as a session's source: number n is the n-th chunk."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        self.size_bytes = os.fstat(self._fd).st_size
        self.first_kept = 1
        self.last = -(-self.size_bytes // CHUNK_BYTES)
        digest = hashlib.sha256()
        at = 0
        while piece := os.pread(self._fd, 1 << 20, at):
            digest.update(piece)
            at += len(piece)
        self.sha256 = digest.hexdigest()

    def read(self, first: int, max_bytes: int) -> tuple[int, bytes]:
        piece = os.pread(self._fd, CHUNK_BYTES, (first - 1) * CHUNK_BYTES)
        return (1, piece) if piece else (0, b"")

    def close(self) -> None:
        os.close(self._fd)


class Chunks(Source, Protocol):
    """What a file is to its session: number n is the n-th chunk of its bytes."""

    @property
    def sha256(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...


def blob_session(
    source: Chunks,
    run: str,
    stream: bytes,
    media: int,
    random: Callable[[], float] = jitter,
    path: str = "",
) -> ClientSession:
    """The session that carries a file; its id follows from the content, so two senders agree.
    `path` tells a gateway of this node where the bytes lie."""
    blob = hashlib.sha256(f"{run}:{source.sha256}".encode()).digest()[:16]
    which = {"of": stream, "media": media}
    hello = {
        "kind": "blob",
        "run": run,
        **which,
        "sha256": source.sha256,
        "size": source.size_bytes,
        **({"path": path} if path else {}),
    }
    session = ClientSession(blob, lambda: hello, source, random)
    session.end(which)  # said again: others may bring the same bytes for a record of their own
    return session


def send_file(
    path: Path, run: str, stream: bytes, media: int, link: Link, stop: Callable[[], bool]
) -> bool:
    """Carry one file; True when the gateway has all of it on disk. Raises OSError."""
    source = FileSource(path)
    try:
        near = str(path.absolute()) if link.near else ""
        carrier = Carrier(blob_session(source, run, stream, media, path=near), link)
        while not stop():
            carrier.step(time.monotonic())
            if carrier.session.state in ("closed", "rejected"):
                break
            if link.refused():
                raise ConnectionError("the gateway refuses the connection")
            link.wait(0.02)
        if carrier.session.state == "rejected":
            raise OSError(f"the gateway refuses {path.name}: {carrier.session.reject_reason}")
        return carrier.session.state == "closed"
    finally:
        source.close()


def snapshot(source: Path, target: Path) -> bool:
    """Clone the file's blocks (instant, where the file system can); False where it cannot."""
    try:
        with source.open("rb") as have, target.open("xb") as want:
            fcntl.ioctl(want.fileno(), FICLONE, have.fileno())
    except OSError:
        target.unlink(missing_ok=True)
        return False
    return True


class Rewritten(Exception):
    """A file changed each time it was copied."""


def copy_unchanged(source: Path, target: Path, as_of: os.stat_result | None = None) -> None:
    """Copy a file that somebody may be rewriting. `as_of`: how it stood when it was logged, as a
    later content must not pass for that one. Raises Rewritten, OSError."""
    for _ in range(COPY_TRIES):
        if as_of is not None and _which(as_of) != _which(source.stat()):
            raise Rewritten(f"{source} was rewritten before it could be copied")
        before = source.stat()
        shutil.copyfile(source, target)
        after = source.stat()
        if _which(before) == _which(after) and target.stat().st_size == before.st_size:
            return
    raise Rewritten(f"{source} was rewritten during each of {COPY_TRIES} copies")


def _which(about: os.stat_result) -> tuple[int, int, int]:
    """What a content is known by, without reading it."""
    return about.st_size, about.st_mtime_ns, about.st_ino


class MediaSender:
    """Queue of files of one stream. `add` never waits; the bytes stand in `directory`."""

    def __init__(
        self,
        directory: Path,
        run: str,
        stream: bytes,
        spool: Spool,
        connect: Callable[[], Link | None],
        warn: Warn,
        clean: Callable[[str], str] = str,
    ) -> None:
        self._directory = directory
        self._run = run
        self._stream = stream
        self._spool = spool
        self._connect = connect
        self._warn = warn
        self._clean = clean  #: takes secrets out of the text of an error
        self._jobs: deque[Job] = deque()
        self._wake = threading.Condition()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._unmade = 0  # jobs whose bytes are not on disk yet
        self._unsent = 0

    def add(self, body: dict[str, Any], make: Callable[[Path], None], now: bool) -> None:
        """Write the MEDIA record, then have `make(path)` write the bytes (`now`: in this call)."""
        if not self._spool.admit_file(tree_bytes(self._directory)):
            return
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = self._directory / f".{os.urandom(6).hex()}"
        if now:
            try:
                make(part)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
        number = self._spool.append_map(Kind.MEDIA, body)
        if not number:
            part.unlink(missing_ok=True)
            return
        if now:
            part.rename(self._directory / str(number))
        with self._wake:
            self._unsent += 1
            self._unmade += not now
            self._jobs.append((number, None if now else make))
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run_thread, name="rankgate-media", daemon=True
                )
                self._thread.start()
            self._wake.notify_all()

    def wait(self, deadline: float, sent: bool) -> bool:
        """Until every snapshot is made (and sent); False when the deadline came first."""
        with self._wake:
            while (self._unsent if sent else self._unmade) and not self._stop.is_set():
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._wake.wait(min(left, 0.1))
        return True

    def close(self) -> None:
        self._stop.set()
        with self._wake:
            self._wake.notify_all()
        if self._thread:
            self._thread.join(1.0)

    # --- the thread ----------------------------------------------------------

    def _run_thread(self) -> None:
        link: Link | None = None
        pause = RETRY_SECONDS
        while not self._stop.is_set():
            with self._wake:
                if not self._jobs and link:  # nobody would ask it whether it is refused
                    link.close()
                    link = None
                while not self._jobs and not self._stop.is_set():
                    self._wake.wait(1.0)
                if self._stop.is_set():
                    break
                number, make = self._jobs[0]
            try:
                made = self._make(number, make)
                if made:
                    with self._wake:
                        self._jobs[0] = (number, None)
                link = link or self._connect()
                sent = not made or (link is not None and self._send(number, link))
            except FileNotFoundError as error:
                self._lose(number, "media lost", error)
                sent = True
            except Exception as error:  # nothing may escape into the training process
                self._warn("media", f"sending a file failed ({error!r}); it is tried again")
                sent = False
                if link:
                    link.close()
                    link = None
            if sent:
                pause = RETRY_SECONDS
                with self._wake:
                    self._jobs.popleft()
                    self._unsent -= 1
                    self._wake.notify_all()
            else:
                self._stop.wait(pause)
                pause = min(pause * 2, RETRY_MAX_SECONDS)
        if link:
            link.close()

    def _make(self, number: int, make: Callable[[Path], None] | None) -> bool:
        """Write the bytes of a job that has none yet; False when they are lost, and told so."""
        if make is None:
            return True
        part = self._directory / f"{number}.part"
        try:
            make(part)
            part.rename(self._directory / str(number))
            return True
        except Exception as error:  # the user's file, figure or array may fail in any way
            part.unlink(missing_ok=True)
            reason = "media lost (rewritten)" if isinstance(error, Rewritten) else "media lost"
            self._lose(number, reason, error)
            return False
        finally:
            with self._wake:
                self._unmade -= 1
                self._wake.notify_all()

    def _lose(self, number: int, reason: str, error: Exception) -> None:
        text = self._clean(str(error))[:500]
        body = {"n": 0, "media": number, "reason": reason, "text": text}
        self._spool.append_map(Kind.LOSS, body)
        self._warn(reason, f"a file could not be kept: {text}")

    def _send(self, number: int, link: Link) -> bool:
        path = self._directory / str(number)
        done = send_file(path, self._run, self._stream, number, link, self._stop.is_set)
        if done:
            path.unlink(missing_ok=True)
        return done
