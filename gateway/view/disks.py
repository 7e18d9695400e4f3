"""Is a directory fit for what is to be kept in it: rights, file system, room, speed. Writes one
small file into each directory it measures, and removes it."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from rank_client.spool_place import spool_share

from .check import Check
from .words import size

FSYNCS = 20
SLOW_FSYNC_SECONDS = 0.02
ENOUGH_BYTES = 1 << 30  #: of a data directory, beyond its reserve
ENOUGH_WAITING_BYTES = 100 << 20  #: of a spool: hours of a rank that nobody listens to
FEW_INODES = 1000

NETWORK = (
    "nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "gluster", "fuse.", "9p", "afs",
    "panfs", "wekafs",
)  # fmt: skip
MEMORY = ("tmpfs", "ramfs")
DATA, SPOOL = "data directory", "spool"

#: by what is kept there: why not on a network disk, and what to do
_NETWORK_ADVICE = {
    DATA: "journal/ and media/ are safe there, series.db and sinks/ (SQLite) are not: use a disk "
    "of this node (--dir), and copy runs/ over when the job is done",
    SPOOL: "log() writes to it, so training waits for that network: set RANKGATE_SPOOL to a disk "
    "of this node",
}
_MEMORY_ADVICE = {
    DATA: "all of it is gone after a reboot: use a disk (--dir)",
    SPOOL: "it takes memory from the training, and is gone after a reboot: set RANKGATE_SPOOL to "
    "a disk of this node",
}


def data_checks(path: Path, reserve_bytes: int) -> Iterator[Check]:
    """A data directory, there or not yet."""
    where = existing(path)
    yield (rights := _rights(DATA, path, where))
    yield judged(DATA, file_system(where))
    yield _room_for_data(where, reserve_bytes)
    if rights.state != "bad":
        yield _fsync(DATA, where)


def spool_checks(path: Path, environ: Mapping[str, str]) -> Iterator[Check]:
    """A spool root, there or not yet."""
    where = existing(path)
    yield (rights := _rights(SPOOL, path, where))
    yield judged(SPOOL, file_system(where))
    yield _room_for_spool(where, environ)
    if rights.state != "bad":
        yield _fsync(SPOOL, where)


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there and that we may see."""
    path = path.absolute()
    while not os.path.isdir(path) and path != path.parent:  # noqa: PTH112 - it raises nothing
        path = path.parent
    return path


def _rights(name: str, path: Path, where: Path) -> Check:
    info, path = where.stat(), path.absolute()
    if path != where and os.path.lexists(below := where / path.relative_to(where).parts[0]):
        return Check(name, "bad", f"{below} is a file", "choose another, or move it away")
    if not os.access(where, os.W_OK | os.X_OK):
        return Check(name, "bad", f"{path} cannot be written", f"choose another, or chmod {where}")
    if where != path:
        return Check(name, "ok", f"{path}, made by the first run")
    if name == SPOOL and info.st_uid != os.getuid():
        text = f"{path} belongs to uid {info.st_uid}, so ranks keep their logs in memory only"
        return Check(name, "bad", text, "set RANKGATE_SPOOL to a directory of yours")
    if info.st_uid == os.getuid() and info.st_mode & 0o077:
        advice = f"chmod 700 {path}: logs may hold what others must not read"
        return Check(name, "warn", f"{path} is open to other users", advice)
    return Check(name, "ok", str(path))


def file_system(path: Path, mounts: str | None = None) -> str:
    """The kind of file system a path is on, as Linux names it; `unknown` elsewhere."""
    try:
        table = Path("/proc/self/mounts").read_text() if mounts is None else mounts
    except OSError:
        return "unknown"
    real, best, kind = os.path.realpath(path), -1, "unknown"
    for line in table.splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        point = fields[1].replace("\\040", " ")
        inside = point == "/" or real == point or real.startswith(f"{point}/")
        if inside and len(point) >= best:
            best, kind = len(point), fields[2]
    return kind


def judged(name: str, kind: str) -> Check:
    """What a kind of file system means for what is kept on it."""
    label = f"{name}: file system"
    if kind.startswith(NETWORK):
        return Check(label, "warn", f"{kind}, a network disk", _NETWORK_ADVICE[name])
    if kind in MEMORY:
        return Check(label, "warn", f"{kind}, in memory", _MEMORY_ADVICE[name])
    if kind == "overlay":
        return Check(label, "warn", "overlay, of a container", "it goes with it: use a volume")
    return Check(label, "ok", kind)


def _room_for_data(where: Path, reserve_bytes: int) -> Check:
    label, free = f"{DATA}: room", _free(where)
    text = f"{size(free)} free, of which {size(reserve_bytes)} stay free"
    if free < reserve_bytes:
        advice = "a gateway takes nothing until there is more, ranks keep their logs: make room"
        return Check(label, "bad", text, advice)
    if free < reserve_bytes + ENOUGH_BYTES:
        return Check(label, "warn", text, "ranks keep their logs when it is full: make room")
    return _inodes(label, where) or Check(label, "ok", text)


def _room_for_spool(where: Path, environ: Mapping[str, str]) -> Check:
    label, free = f"{SPOOL}: room", _free(where)
    waiting = min(free, spool_share(where, environ, 1).cap)
    text = f"{size(free)} free, of which {size(waiting)} may wait for a gateway"
    if waiting < ENOUGH_WAITING_BYTES:
        advice = "beyond that calls are refused, and counted: make room, or set RANKGATE_SPOOL"
        return Check(label, "warn" if free else "bad", text, advice)
    return _inodes(label, where) or Check(label, "ok", text)


def _free(where: Path) -> int:
    stats = os.statvfs(where)
    return stats.f_bavail * stats.f_frsize


def _inodes(label: str, where: Path) -> Check | None:
    stats = os.statvfs(where)
    if stats.f_files and stats.f_favail < FEW_INODES:
        text = f"{stats.f_favail:,} more files can be made, however much room there is"
        return Check(label, "bad", text, "delete some, or use another disk")
    return None


def _fsync(name: str, where: Path) -> Check:
    """How long a 4 KiB write takes to reach the disk: what an acknowledgement waits for."""
    label = f"{name}: fsync"
    try:
        spans = sync_seconds(where)
    except OSError as error:
        text = f"cannot write in {where}: {error.strerror}"
        return Check(label, "bad", text, "make room, or use another disk")
    middle, worst = statistics.median(spans), max(spans)
    slow = middle > SLOW_FSYNC_SECONDS
    advice = "slow: acknowledgements wait for it; log() does not" if slow else ""
    text = f"{middle * 1000:.1f} ms, at worst {worst * 1000:.1f} ms of {FSYNCS}"
    return Check(label, "warn" if slow else "ok", text, advice)


def sync_seconds(where: Path) -> list[float]:
    """Of FSYNCS appends of 4 KiB, each with its fdatasync. Raises OSError."""
    spans = []
    fd, file = tempfile.mkstemp(prefix=".doctor-", dir=where)
    try:
        for _ in range(FSYNCS):
            start = time.perf_counter()
            os.write(fd, b"\0" * 4096)
            os.fdatasync(fd)
            spans.append(time.perf_counter() - start)
    finally:
        os.close(fd)
        Path(file).unlink()
    return spans
