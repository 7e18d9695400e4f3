"""The bytes of files: content-addressed, written chunk by chunk, whole or not there.

A `Blob` is worked on by one thread alone, `Job` by `Job`: hashing and syncing gigabytes takes long,
and nobody who waits for an acknowledgement may wait for it.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rank_client.wire.disk import Disk, OsDisk
from rank_client.wire.segments import sync_names

from . import nearby

CHUNK_BYTES = 256 << 10  #: as the client cuts them
SYNC_BYTES = 4 << 20  #: so much unsynced at most: a journal's sync may have to wait for it
_SHA256 = re.compile(r"[0-9a-f]{64}")

Verb = Literal["open", "write", "finish", "close", "drop"]


class BadBlob(ValueError):
    """What a peer says of a file makes no sense, or its bytes are not what it said."""


class BlobLost(OSError):
    """The disk could not say that it has what was written of a file: its part file is gone."""


def is_sha256(text: str) -> bool:
    return bool(_SHA256.fullmatch(text))


def blob_path(run_dir: Path, sha256: str) -> Path:
    return run_dir / "media" / sha256[:2] / sha256


@dataclass(eq=False)
class Blob:
    """A file on its way. `high_water` counts whole chunks written."""

    run: str
    sha256: str
    size_bytes: int
    path: Path
    high_water: int = 0
    whole: bool = False
    near: str = ""  #: where a rank of this node keeps the same bytes
    disk: Disk = field(default_factory=OsDisk)
    _fd: int = -1
    _digest: Any = None
    _unsynced_bytes: int = 0

    @property
    def chunks(self) -> int:
        return -(-self.size_bytes // CHUNK_BYTES)

    @classmethod
    def announced(cls, disk: Disk, run: str, run_dir: Path, sha256: Any, size: Any) -> Blob:
        """A file by what a peer says of it; nothing is opened yet. Raises BadBlob."""
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise BadBlob("no sha256")
        if not isinstance(size, int) or size < 0:
            raise BadBlob("no size")
        return cls(run, sha256, size, blob_path(run_dir, sha256), disk=disk)

    @property
    def _part(self) -> str:
        return f"{self.path}.part"

    def open(self) -> None:
        """Find what there already is of it, and go on where a killed gateway stopped: hash again
        what the part file holds. Raises OSError."""
        if self.disk.exists(str(self.path)):
            self.whole, self.high_water = True, self.chunks
            return
        self.disk.make_dir(str(self.path.parent))
        self._fd = self.disk.open_edit(self._part)
        self._digest = hashlib.sha256()
        whole = min(self.disk.size(self._fd) // CHUNK_BYTES, self.size_bytes // CHUNK_BYTES)
        self.disk.truncate(self._fd, whole * CHUNK_BYTES)
        for n in range(whole):
            self._digest.update(self.disk.pread(self._fd, CHUNK_BYTES, n * CHUNK_BYTES))
        self.high_water = whole
        if self.near and not whole:
            self._bring()

    def _bring(self) -> None:
        """Take the bytes from the rank's own disk. Where that does not work, nothing has come, and
        they are asked for as chunks. Raises OSError."""
        try:
            source = nearby.open_near(self.near, self.size_bytes)
        except OSError:
            return
        try:
            if nearby.has_room(self._fd, self.size_bytes):
                self._copy(source)
        finally:
            os.close(source)
        if self._digest.hexdigest() == self.sha256:
            self.high_water = self.chunks
        else:
            self.disk.truncate(self._fd, 0)
            self._digest = hashlib.sha256()

    def _copy(self, source: int) -> None:
        cloned = nearby.clone(source, self._fd)
        for at, piece in nearby.pieces(self._fd if cloned else source):
            self._digest.update(piece)
            if cloned:
                continue
            if self.disk.write_at(self._fd, piece, at) != len(piece):
                raise OSError(28, "No space left on device")
            self._unsynced_bytes += len(piece)
            if self._unsynced_bytes >= SYNC_BYTES:
                self._sync()

    def write(self, number: int, piece: bytes | memoryview) -> None:
        """The next chunk. Raises BadBlob for one that cannot be right, OSError."""
        at = self.high_water * CHUNK_BYTES
        if number != self.high_water + 1:
            raise BadBlob("a chunk after one that could not be written")
        if len(piece) != min(CHUNK_BYTES, self.size_bytes - at):
            raise BadBlob("a chunk of the wrong length")
        written = self.disk.write_at(self._fd, piece, at)
        if written != len(piece):
            raise OSError(28, "No space left on device")
        self._digest.update(piece)
        self.high_water += 1
        self._unsynced_bytes += written
        if self._unsynced_bytes >= SYNC_BYTES:
            self._sync()

    def finish(self) -> None:
        """Check, sync and rename; afterwards the file is there under its name for ever."""
        if self.whole:
            return
        if self._digest.hexdigest() != self.sha256:
            self._discard()
            raise BadBlob("the bytes do not have the sha256 they were announced with")
        self._sync()
        self.close()
        self.disk.rename(self._part, str(self.path))
        sync_names(self.disk, str(self.path.parent), above=2)  # media/ab, media, the run's
        self.whole = True

    def _sync(self) -> None:
        try:
            self.disk.sync(self._fd)
        except OSError as error:
            # The kernel may have dropped the pages; a second sync would say that all is well.
            self._discard()
            raise BlobLost(error.errno, f"{error.strerror}; it is asked for again") from error
        self._unsynced_bytes = 0

    def _discard(self) -> None:
        self.close()
        self.disk.unlink(self._part)

    def drop(self) -> None:
        """Remove the whole file. Raises OSError."""
        if self.disk.exists(str(self.path)):
            self.disk.unlink(str(self.path))
            sync_names(self.disk, str(self.path.parent), above=0)

    def close(self) -> None:
        if self._fd >= 0:
            self.disk.close(self._fd)
            self._fd = -1


@dataclass(slots=True, eq=False)
class Job:
    """One thing to do to a file, and how it went. Those of a blob are run in order, by one thread;
    then `Peers.done` is told."""

    stream: bytes
    blob: Blob
    verb: Verb
    number: int = 0
    piece: bytes | memoryview = b""
    error: Exception | None = None

    def run(self) -> None:
        """Never raises: what went wrong is in `error`."""
        try:
            if self.verb == "write":
                self.blob.write(self.number, self.piece)
            elif self.verb == "open":
                self.blob.open()
            elif self.verb == "finish":
                self.blob.finish()
            elif self.verb == "drop":
                self.blob.drop()
            else:
                self.blob.close()
        except Exception as error:  # the thread that runs it must live, and the peer be answered
            self.error = error
