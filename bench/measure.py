"""What every benchmark needs: percentiles, medians of rounds, /proc, the disk, a place to write."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent / "out"
ROOT = Path(__file__).parents[1]
_TICKS = os.sysconf("SC_CLK_TCK")


@contextmanager
def workplace() -> Iterator[Path]:
    """An empty directory on the disk of this checkout; removed afterwards."""
    OUT.mkdir(exist_ok=True)
    directory = Path(tempfile.mkdtemp(dir=OUT))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def spread(values: Sequence[float], digits: int = 2) -> dict[str, float]:
    """Median, least and most of the rounds."""
    named = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in named.items()}


def best_of(times: int, call: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of a call: the first (cold) and the median of the others (warm)."""
    taken = []
    for _ in range(times + 1):
        start = time.perf_counter()
        call()
        taken.append((time.perf_counter() - start) * 1e3)
    return {"first_ms": round(taken[0], 2), "median_ms": round(statistics.median(taken[1:]), 2)}


def rss_mb(pid: int | str = "self") -> dict[str, float]:
    """Resident memory of a process, now and at its highest, in MB."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    names = {"rss_mb": "VmRSS", "peak_mb": "VmHWM"}
    return {name: round(int(fields[f].split()[0]) / 1024, 1) for name, f in names.items()}


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def fdatasync_ms(directory: Path, times: int) -> dict[str, Any]:
    """How long this disk takes to make an append durable: the floor under every commit."""
    out: dict[str, Any] = {}
    for label, size in (("4KiB", 4 << 10), ("1MiB", 1 << 20)):
        path = directory / "fdatasync"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        data, taken = os.urandom(size), []
        for _ in range(times):
            os.write(fd, data)
            start = time.perf_counter()
            os.fdatasync(fd)
            taken.append((time.perf_counter() - start) * 1e3)
        os.close(fd)
        path.unlink()
        taken.sort()
        out[label] = {f"p{p}": round(percentile(taken, p / 100), 2) for p in (50, 99)}
    return out


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    cpu = [n for n in Path("/proc/cpuinfo").read_text().splitlines() if n.startswith("model name")]
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": cpu[0].partition(":")[2].strip() if cpu else platform.machine(),
        "python": platform.python_version(),
        "system": platform.release(),
        "load_before": round(os.getloadavg()[0], 2),
        "disk": _filesystem(OUT.parent),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _filesystem(path: Path) -> str:
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    inside = [m for m in mounts if str(path).startswith(m[0])]
    return str(max(inside, key=lambda m: len(m[0]))[1]) if inside else "unknown"


def say(text: str) -> None:
    """The table for people, beside the document for machines."""
    print(text, file=sys.stderr, flush=True)
