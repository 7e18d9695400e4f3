"""The bytes of files: content-addressed, written chunk by chunk, whole or not there."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHUNK_BYTES = 256 << 10  #: as the client cuts them
_SHA256 = re.compile(r"[0-9a-f]{64}")


class BadBlob(ValueError):
    """What a peer says of a file makes no sense, or its bytes are not what it said."""


def blob_path(run_dir: Path, sha256: str) -> Path:
    return run_dir / "media" / sha256[:2] / sha256


@dataclass(eq=False)
class Blob:
    """A file on its way. `high_water` counts whole chunks written, `refs` who waits for it."""

    run: str
    sha256: str
    size_bytes: int
    path: Path
    high_water: int = 0
    whole: bool = False
    refs: list[tuple[bytes, int]] = field(default_factory=list)
    _fd: int = -1
    _digest: Any = None

    @property
    def chunks(self) -> int:
        return -(-self.size_bytes // CHUNK_BYTES)

    @classmethod
    def open(cls, run: str, run_dir: Path, sha256: Any, size: Any) -> Blob:
        """Find what there already is of it. Raises BadBlob, OSError."""
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise BadBlob("no sha256")
        if not isinstance(size, int) or size < 0:
            raise BadBlob("no size")
        path = blob_path(run_dir, sha256)
        blob = cls(run, sha256, size, path)
        if path.exists():
            blob.whole, blob.high_water = True, blob.chunks
            return blob
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        blob._fd = os.open(f"{path}.part", flags, 0o600)
        blob._resume()
        return blob

    def _resume(self) -> None:
        """Go on where a killed gateway stopped: hash again what the part file holds."""
        self._digest = hashlib.sha256()
        self.high_water = os.fstat(self._fd).st_size // CHUNK_BYTES
        os.ftruncate(self._fd, self.high_water * CHUNK_BYTES)
        for n in range(self.high_water):
            self._digest.update(os.pread(self._fd, CHUNK_BYTES, n * CHUNK_BYTES))

    def write(self, piece: bytes | memoryview) -> None:
        """The next chunk. Raises BadBlob for one that cannot be right, OSError."""
        left = self.size_bytes - self.high_water * CHUNK_BYTES
        if len(piece) != min(CHUNK_BYTES, left):
            raise BadBlob("a chunk of the wrong length")
        at = self.high_water * CHUNK_BYTES
        written = os.pwrite(self._fd, piece, at)
        if written != len(piece):
            raise OSError(28, "No space left on device")
        self._digest.update(piece)
        self.high_water += 1

    def finish(self) -> None:
        """Check, sync and rename; afterwards the file is there under its name for ever."""
        if self.whole:
            return
        if self._digest.hexdigest() != self.sha256:
            os.close(self._fd)
            self._fd = -1
            Path(f"{self.path}.part").unlink()
            raise BadBlob("the bytes do not have the sha256 they were announced with")
        os.fsync(self._fd)
        os.close(self._fd)
        self._fd = -1
        Path(f"{self.path}.part").rename(self.path)
        directory = os.open(self.path.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
        self.whole = True

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
