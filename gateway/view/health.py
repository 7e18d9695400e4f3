"""What `rankgate doctor` looks at: this machine, the data directory, the spool. Writes one small
file into each directory it measures, and removes it."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import apsw
import zmq

from rank_client import sweep

from .queries import gateway_of, tree_bytes
from .words import duration, plural, size

FSYNCS = 20
SLOW_FSYNC_SECONDS = 0.02
ENOUGH_FILES = 4096  #: a socket and a few files per rank, and SQLite's
ENOUGH_BYTES = 1 << 30
SKEW_SECONDS = 2.0
EARLIEST = 1_700_000_000  #: no clock that is right says less

NETWORK = (
    "nfs",
    "cifs",
    "smb",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "glusterfs",
    "fuse.sshfs",
    "9p",
)
MEMORY = ("tmpfs", "ramfs")
EXTRAS = ("neptune", "clearml", "torch", "pyarrow")
MINIMUM = {"pyzmq": (26,), "apsw": (3, 51, 3), "msgpack": (1, 2, 1), "numpy": (1, 26)}


@dataclass(frozen=True, slots=True)
class Check:
    """`state`: ok | warn | fail; `text` is the finding, `advice` what to do about it."""

    name: str
    state: str
    text: str
    advice: str = ""


def look(data_dir: Path, spool: Path, now_ns: int) -> list[Check]:
    """Every check, in the order in which one depends on another."""
    parts: tuple[Callable[[], Iterator[Check]], ...] = (
        lambda: _directory("data directory", data_dir),
        lambda: _gateway(data_dir, now_ns),
        lambda: _directory("spool", spool),
        lambda: _leftovers(data_dir, spool),
        _limits,
        lambda: _clock(data_dir, now_ns),
        _versions,
    )
    return [check for part in parts for check in part()]


# --- directories ---------------------------------------------------------------------------------


def _directory(name: str, path: Path) -> Iterator[Check]:
    where = existing(path)
    missing = "" if where == path else ", made by the first run"
    if not os.access(where, os.W_OK | os.X_OK):
        yield Check(name, "fail", f"{path} cannot be written", f"choose another, or chmod {where}")
        return
    if not missing and where.stat().st_uid == os.getuid() and where.stat().st_mode & 0o077:
        advice = f"chmod 700 {path}: logs may hold what others must not read"
        yield Check(name, "warn", f"{path} is open to other users", advice)
    else:
        yield Check(name, "ok", f"{path}{missing}")
    yield _file_system(name, where)
    yield _room(name, where)
    yield _fsync(name, where)


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.absolute()
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


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


def _file_system(name: str, path: Path) -> Check:
    kind = file_system(path)
    label = f"{name}: file system"
    if kind.startswith(NETWORK):
        advice = "SQLite is slow and unsafe there: put it on a disk of this node"
        return Check(label, "warn", f"{kind}, a network disk", advice)
    if kind in MEMORY:
        return Check(label, "warn", f"{kind}, in memory", "it is gone after a reboot: use a disk")
    return Check(label, "ok", kind)


def _room(name: str, path: Path) -> Check:
    stats = os.statvfs(path)
    free = stats.f_bavail * stats.f_frsize
    state = "ok" if free > ENOUGH_BYTES else "warn"
    advice = "" if state == "ok" else "ranks keep their logs when it is full; make room"
    return Check(f"{name}: room", state, f"{size(free)} free", advice)


def _fsync(name: str, path: Path) -> Check:
    """How long a 4 KiB write takes to reach the disk: what an acknowledgement waits for."""
    label, spans = f"{name}: fsync", []
    try:
        fd, file = tempfile.mkstemp(prefix=".doctor-", dir=path)
    except OSError as error:
        return Check(label, "fail", f"cannot write in {path}: {error.strerror}")
    try:
        for _ in range(FSYNCS):
            os.write(fd, b"\0" * 4096)
            start = time.perf_counter()
            os.fdatasync(fd)
            spans.append(time.perf_counter() - start)
    except OSError as error:
        return Check(label, "fail", f"cannot write in {path}: {error.strerror}")
    finally:
        os.close(fd)
        Path(file).unlink()
    middle, worst = statistics.median(spans), max(spans)
    slow = middle > SLOW_FSYNC_SECONDS
    advice = "acknowledgements wait for it; log() does not" if slow else ""
    text = f"{middle * 1000:.1f} ms, at worst {worst * 1000:.1f} ms of {FSYNCS}"
    return Check(label, "warn" if slow else "ok", text, advice)


# --- gateway and spool ---------------------------------------------------------------------------


def _gateway(data_dir: Path, now_ns: int) -> Iterator[Check]:
    gateway = gateway_of(data_dir, now_ns)
    if gateway.state == "serving":
        up = duration(gateway.up_seconds)
        yield Check("gateway", "ok", f"answers: {', '.join(gateway.addresses)}, up {up}")
        if gateway.full:
            yield Check(
                "gateway: disk", "fail", "full: it takes nothing", "make room; no log is lost"
            )
    elif gateway.state == "not answering":
        text = "holds its lock and does not answer"
        yield Check("gateway", "fail", text, f"look into {data_dir / 'gateway.log'}")
    else:
        yield Check("gateway", "ok", "not running; a rank or `rankgate serve` starts one")


def _leftovers(data_dir: Path, spool: Path) -> Iterator[Check]:
    """Per run, what processes left in the spool that are gone."""
    orphans = sweep.find(spool, data_dir, lambda run: (data_dir / "runs" / run).is_dir())
    if not orphans:
        yield Check("spool: leftovers", "ok", "none")
        return
    for run in sorted({o.run for o in orphans}):
        own = [o for o in orphans if o.run == run]
        held = size(sum(tree_bytes(o.directory) for o in own))
        text = f"run {run}: {plural(len(own), 'stream')} not shipped, {held}"
        yield Check("spool: leftovers", "warn", text, f"rankgate drain --dir {data_dir}")


# --- machine -------------------------------------------------------------------------------------


def _limits() -> Iterator[Check]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= ENOUGH_FILES:
        yield Check("open files", "ok", f"{soft:,} allowed")
        return
    advice = (
        f"for more than {soft // 4} ranks: ulimit -n {min(hard, 65_536) if hard > 0 else 65_536}"
    )
    yield Check("open files", "warn", f"{soft:,} allowed", advice)


def _clock(data_dir: Path, now_ns: int) -> Iterator[Check]:
    problems = []
    if now_ns / 1e9 < EARLIEST:
        problems.append(f"this machine believes it is {time.strftime('%Y-%m-%d')}")
    skew = _disk_skew(existing(data_dir))
    if abs(skew) > SKEW_SECONDS:
        problems.append(f"the data directory's clock is {skew:+.1f} s from ours")
    problems += _rank_skews(data_dir, now_ns)
    for text in problems:
        yield Check("clock", "warn", text, "set the time by NTP; order is kept, times are not")
    if not problems:
        synced = {True: "kept by NTP", False: "not known to be kept by NTP"}.get(
            _synchronised(), ""
        )
        yield Check("clock", "ok", f"{time.strftime('%Y-%m-%d %H:%M:%S %z')} {synced}".strip())


def _disk_skew(path: Path) -> float:
    """A file server's clock against ours: seconds by which a new file is from the future."""
    try:
        with tempfile.NamedTemporaryFile(prefix=".doctor-", dir=path) as file:
            before = time.time()
            file.write(b"\0")
            file.flush()
            return os.fstat(file.fileno()).st_mtime - before
    except OSError:
        return 0.0


def _rank_skews(data_dir: Path, now_ns: int) -> Iterator[str]:
    """Nodes whose ranks logged in our future."""
    ahead: dict[str, float] = {}
    for path in (data_dir / "runs").glob("*/live.json"):
        try:
            told = json.loads(path.read_bytes())
            streams = told["streams"] if now_ns - told["at_ns"] < 60 * 10**9 else []
            for stream in streams:
                skew = ((stream.get("logged") or 0) - stream["heard_ns"]) / 1e9
                node = str(stream.get("node"))
                ahead[node] = max(ahead.get(node, 0.0), skew)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    for node, skew in sorted(ahead.items()):
        if skew > SKEW_SECONDS:
            yield f"{node} is {skew:.0f} s ahead of the gateway"


def _synchronised() -> bool:
    """Does the kernel say that its clock is kept?"""
    try:
        libc = ctypes.CDLL(None)
        state = libc.adjtimex(ctypes.create_string_buffer(512))
    except (OSError, AttributeError):
        return False
    return bool(0 <= state < 5)  # 5 is TIME_ERROR: nobody keeps it


def _versions() -> Iterator[Check]:
    yield Check("python", "ok", f"{platform.python_version()} on {platform.system()}")
    more = {"pyzmq": f"libzmq {zmq.zmq_version()}", "apsw": f"SQLite {apsw.sqlite_lib_version()}"}
    for name, needed in MINIMUM.items():
        found = _version(name)
        text = f"{found} ({more[name]})" if name in more else found
        wanted = ".".join(map(str, needed))
        enough = _numbers(found) >= needed
        advice = "" if enough else f"pip install '{name}>={wanted}'"
        yield Check(name, "ok" if enough else "fail", text or "missing", advice)
    have: Mapping[str, str] = {name: _version(name) for name in EXTRAS}
    listed = ", ".join(f"{name} {v}" if v else f"no {name}" for name, v in have.items())
    yield Check("extras", "ok", listed)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())
