"""What `rankgate doctor` looks at: the data directory, its gateway, the spool, this machine and
what is installed. Disks are in `disks.py`, keys and addresses in `reach.py`."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import apsw
import zmq

from rank_client import orphans
from rank_client.rendezvous import ipc_address
from rank_client.wire.disk import tree_bytes

from .check import Check
from .disks import DATA, SPOOL, data_checks, existing, spool_checks
from .reach import address_check, key_checks
from .serving import gateway_of
from .words import duration, plural, size

ENOUGH_FILES = 4096  #: a socket and a few files per rank, and SQLite's
SHOWN_LEFTOVERS = 5
SKEW_SECONDS = 2.0
EARLIEST = 1_700_000_000  #: no clock that is right says less

EXTRAS = ("neptune", "clearml", "torch", "pyarrow")
MINIMUM = {"pyzmq": (26,), "apsw": (3, 51, 3), "msgpack": (1, 2, 1), "numpy": (1, 26)}


def look(
    data_dir: Path, spool: Path, environ: Mapping[str, str], reserve_bytes: int, now_ns: int
) -> list[Check]:
    """Every check, in the order in which one depends on another. `environ` is that of the ranks,
    `reserve_bytes` is what the gateway's config keeps free."""
    parts: dict[str, Callable[[], Iterator[Check]]] = {
        DATA: lambda: data_checks(data_dir, reserve_bytes),
        "gateway": lambda: _gateway(data_dir, now_ns),
        "key": lambda: key_checks(data_dir, environ),
        "RANKGATE_ADDR": lambda: _address(environ),
        SPOOL: lambda: spool_checks(spool, environ),
        "spool: leftovers": lambda: _leftovers(data_dir, spool),
        "open files": _limits,
        "clock": lambda: _clock(data_dir, now_ns),
        "rankgate": _versions,
    }
    return [check for name, part in parts.items() for check in _guarded(name, part)]


def _guarded(name: str, part: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """What cannot be looked at is bad; the rest is looked at all the same."""
    try:
        yield from part()
    except OSError as error:
        text = f"cannot look at {error.filename}: {error.strerror}"
        yield Check(name, "bad", text, "look as the user whom it belongs to, or choose another")


# --- gateway and spool ---------------------------------------------------------------------------


def _look_into(directory: Path) -> None:
    """Raises OSError where we may not: those that search it pass that over."""
    with suppress(FileNotFoundError, NotADirectoryError):
        os.listdir(directory)


def _gateway(data_dir: Path, now_ns: int) -> Iterator[Check]:
    _look_into(data_dir)
    gateway = gateway_of(data_dir, now_ns)
    log = data_dir / "gateway.log"
    if gateway.state == "serving":
        up = duration(gateway.up_seconds)
        yield Check("gateway", "ok", f"serves {', '.join(gateway.addresses)}, up {up}")
        advice = f"look into {log}"
        yield address_check("gateway: socket", ipc_address(data_dir), {}, advice)
        if gateway.full:
            yield Check(
                "gateway: disk", "bad", "full: it takes nothing", "make room; no log is lost"
            )
    elif gateway.state == "not answering":
        text = "holds its lock and does not answer"
        yield Check("gateway", "bad", text, f"look into {log}")
    else:
        yield Check("gateway", "ok", "not running; a rank or `rankgate serve` starts one")


def _address(environ: Mapping[str, str]) -> Iterator[Check]:
    """The gateway on another node that ranks started here would look for."""
    address = environ.get("RANKGATE_ADDR")
    if address:
        advice = "start it there (rankgate serve --bind tcp), or unset RANKGATE_ADDR"
        yield address_check("RANKGATE_ADDR", address, environ, advice)


def _leftovers(data_dir: Path, spool: Path) -> Iterator[Check]:
    """What processes left in the spool that are gone, by run and by who can take it."""
    _look_into(spool)
    found: dict[tuple[str, str], list[orphans.Orphan]] = {}
    for orphan in orphans.find(spool, None, lambda _: True, holes=True):
        found.setdefault((orphan.run, _ships(orphan, data_dir)), []).append(orphan)
    if not found:
        yield Check("spool: leftovers", "ok", "none")
    for (run, command), own in list(found.items())[:SHOWN_LEFTOVERS]:
        held = size(sum(tree_bytes(o.directory) for o in own))
        text = f"run {run}: {plural(len(own), 'stream')} not shipped, {held}"
        yield Check("spool: leftovers", "warn", text, command)
    if len(found) > SHOWN_LEFTOVERS:
        rest = [o for own in list(found.values())[SHOWN_LEFTOVERS:] for o in own]
        text = f"and {plural(len(rest), 'stream')} of {len(found) - SHOWN_LEFTOVERS} more runs"
        yield Check("spool: leftovers", "warn", text, f"all are in {spool}")


def _ships(orphan: orphans.Orphan, data_dir: Path) -> str:
    """The command that ships an orphan."""
    gap = " --accept-gap" if (orphan.directory / "hole").exists() else ""
    address, home = str(orphan.hello.get("addr") or ""), str(orphan.hello.get("dir") or data_dir)
    here = (data_dir / "runs" / orphan.run).is_dir()
    if not here and address.startswith("tcp://"):
        return f"rankgate sweep{gap} --address {address}"
    return f"rankgate {'sweep --accept-gap' if gap else 'drain'} --dir {data_dir if here else home}"


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
    ahead = _last_word(data_dir) - now_ns / 1e9
    if ahead > SKEW_SECONDS:
        problems.append(f"a gateway wrote here {duration(ahead)} in our future: it was set back")
    with suppress(OSError):  # that it cannot be looked at was said of the gateway
        problems += _rank_skews(data_dir, now_ns)
    for text in problems:
        yield Check("clock", "warn", text, "set the time by NTP; order is kept, times are not")
    if not problems:
        synced = "kept by NTP" if _synchronised() else "not known to be kept by NTP"
        text = f"{time.strftime('%Y-%m-%d %H:%M:%S %z')} {synced}"
        yield Check("clock", "ok", f"{text}, corrected by {_corrected():+.0f} ppm since boot")


def _last_word(data_dir: Path) -> float:
    """When a gateway last said that it is there, by its own clock; 0 where none ever did."""
    try:
        return float(json.loads((data_dir / "ingest.json").read_bytes())["at_ns"]) / 1e9
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def _corrected() -> float:
    """By how much the kernel's clock was slewed against the bare oscillator, in millionths."""
    if not hasattr(time, "CLOCK_MONOTONIC_RAW"):
        return 0.0
    bare = time.clock_gettime(time.CLOCK_MONOTONIC_RAW)
    return (time.clock_gettime(time.CLOCK_MONOTONIC) - bare) / max(bare, 1.0) * 1e6


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
    yield Check("rankgate", "ok", _version("rankgate") or "not installed, run from its folder")
    yield Check("python", "ok", f"{platform.python_version()} on {platform.system()}")
    more = {"pyzmq": f"libzmq {zmq.zmq_version()}", "apsw": f"SQLite {apsw.sqlite_lib_version()}"}
    for name, needed in MINIMUM.items():
        found = _version(name)
        text = f"{found} ({more[name]})" if name in more else found
        wanted = ".".join(map(str, needed))
        enough = _numbers(found) >= needed
        advice = "" if enough else f"pip install '{name}>={wanted}'"
        yield Check(name, "ok" if enough else "bad", text or "missing", advice)
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
