"""The bytes of files: content-addressed, written chunk by chunk, whole or not there."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rank_client.wire.disk import Disk, OsDisk

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
    disk: Disk = field(default_factory=OsDisk)
    _fd: int = -1
    _digest: Any = None

    @property
    def chunks(self) -> int:
        return -(-self.size_bytes // CHUNK_BYTES)

    @classmethod
    def open(cls, disk: Disk, run: str, run_dir: Path, sha256: Any, size: Any) -> Blob:
        """Find what there already is of it. Raises BadBlob, OSError."""
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise BadBlob("no sha256")
        if not isinstance(size, int) or size < 0:
            raise BadBlob("no size")
        path = blob_path(run_dir, sha256)
        blob = cls(run, sha256, size, path, disk=disk)
        if disk.exists(str(path)):
            blob.whole, blob.high_water = True, blob.chunks
            return blob
        disk.make_dir(str(path.parent))
        blob._fd = disk.open_edit(f"{path}.part")
        blob._resume()
        return blob

    def _resume(self) -> None:
        """Go on where a killed gateway stopped: hash again what the part file holds."""
        self._digest = hashlib.sha256()
        self.high_water = self.disk.size(self._fd) // CHUNK_BYTES
        self.disk.truncate(self._fd, self.high_water * CHUNK_BYTES)
        for n in range(self.high_water):
            self._digest.update(self.disk.pread(self._fd, CHUNK_BYTES, n * CHUNK_BYTES))

    def write(self, piece: bytes | memoryview) -> None:
        """The next chunk. Raises BadBlob for one that cannot be right, OSError."""
        left = self.size_bytes - self.high_water * CHUNK_BYTES
        if len(piece) != min(CHUNK_BYTES, left):
            raise BadBlob("a chunk of the wrong length")
        at = self.high_water * CHUNK_BYTES
        written = self.disk.write_at(self._fd, piece, at)
        if written != len(piece):
            raise OSError(28, "No space left on device")
        self._digest.update(piece)
        self.high_water += 1

    def finish(self) -> None:
        """Check, sync and rename; afterwards the file is there under its name for ever."""
        if self.whole:
            return
        if self._digest.hexdigest() != self.sha256:
            self.close()
            self.disk.unlink(f"{self.path}.part")
            raise BadBlob("the bytes do not have the sha256 they were announced with")
        self.disk.sync(self._fd)
        self.close()
        self.disk.rename(f"{self.path}.part", str(self.path))
        self.disk.sync_dir(str(self.path.parent))
        self.whole = True

    def close(self) -> None:
        if self._fd >= 0:
            self.disk.close(self._fd)
            self._fd = -1
