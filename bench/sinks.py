"""Points a second that reach each backend, through our sink and through the vendor's own calls,
and the memory of the process that sends them.

The backends are the stand-ins of `tests/servers`, each in a process of its own on this machine:
what is measured is the client and the requests it makes, not a network or a real server.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .measure import ROOT, cpu_seconds, say
from .throughput import heard, tell

KEYS = 20
#: (backend, how) → rows of 20 points; HUB has no vendor's call per point
CASES = {
    ("clearml", "sink"): 5_000,
    ("clearml", "calls"): 500,
    ("neptune", "sink"): 5_000,
    ("neptune", "calls"): 500,
    ("hub platform", "sink"): 1_000,
    ("hub legacy", "sink"): 1_000,
}
CALLS = {"clearml": "Logger.report_scalar, flush", "neptune": "run[key].append, wait"}
KEPT = ("arrived", "sent", "cpu_us_per_point", "memory")
WAIT_SECONDS = 180
#: its start and its flush take 10 s each, whatever the number of points
TOO_SLOW_FOR_QUICK = ("clearml", "calls")


def run(directory: Path, quick: bool) -> dict[str, Any]:
    found: dict[tuple[str, str], list[dict[str, Any]]] = {case: [] for case in CASES}
    if quick:
        found[TOO_SLOW_FOR_QUICK] = [{"problem": "left out of a quick run"}]
    for round_ in range(1 if quick else 3):
        for (backend, how), rows in CASES.items():
            if quick and (backend, how) == TOO_SLOW_FOR_QUICK:
                continue
            n = max(50, rows // 5) if quick else rows
            folder = directory / f"{backend}-{how}-{round_}".replace(" ", "-")
            folder.mkdir()
            found[backend, how].append(_once(backend, how, n, folder))
    backends = dict.fromkeys(backend for backend, _ in CASES)
    out = {name: _summary(name, found) for name in backends}
    _table(out)
    return {"unit": "points/s", "server": "stand-in, one process", "backends": out}


@contextmanager
def _stand_in(backend: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    server = subprocess.Popen(
        [sys.executable, "-m", "bench.stand_in", backend],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield server, heard(server)
    finally:
        server.kill()
        server.communicate()


def _once(backend: str, how: str, rows: int, folder: Path) -> dict[str, Any]:
    """One delivery to a fresh server; how many points it holds afterwards is its own count."""
    config = {"backend": backend, "how": how, "rows": rows, "keys": KEYS, "folder": str(folder)}
    with _stand_in(backend) as (server, env):
        try:
            done = subprocess.run(
                [sys.executable, "-m", "bench.deliver", json.dumps(config)],
                cwd=ROOT,
                env=_clean_environment(folder) | env | {"PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
                timeout=WAIT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"problem": f"not done within {WAIT_SECONDS} s"}
        tell(server)
        arrived = heard(server)
        server_s = cpu_seconds(server.pid)
    try:
        result = json.loads(done.stdout.strip().rpartition("\n")[2])
    except ValueError:
        return {"problem": f"exit code {done.returncode}: {done.stderr.strip()[-400:]}"}
    rate = arrived / result["seconds"]
    cpu = {"client": result["cpu_s"], "server": server_s}
    cpu_us = {name: round(s / arrived * 1e6, 1) for name, s in cpu.items()} if arrived else {}
    of_points = {"rate": rate, "arrived": arrived, "sent": rows * KEYS}
    return of_points | {"cpu_us_per_point": cpu_us, "memory": result["memory"]}


def _clean_environment(folder: Path) -> dict[str, str]:
    """No setting and no file of the user's reaches a vendor's package."""
    (folder / "clearml.conf").write_text("{}")
    theirs = ("CLEARML_", "TRAINS_", "NEPTUNE_", "ULTRALYTICS_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
    return env | {
        "HOME": str(folder),
        "CLEARML_CONFIG_FILE": str(folder / "clearml.conf"),
        "CLEARML_CACHE_DIR": str(folder / "cache"),
        "NEPTUNE_DATA_DIRECTORY": str(folder / "neptune"),
    }


def _summary(backend: str, found: dict[tuple[str, str], list[dict[str, Any]]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for how in ("sink", "calls"):
        rounds = found.get((backend, how), [])
        good = [r for r in rounds if "rate" in r]
        if good:
            out[how] = {"rate": round(statistics.median(r["rate"] for r in good))}
            out[how] |= {name: good[-1][name] for name in KEPT}
        elif rounds:
            out[how] = {"problem": rounds[-1]["problem"]}
    if "calls" in out:
        out["calls"]["through"] = CALLS[backend]
    rates = [out.get(how, {}).get("rate") for how in ("sink", "calls")]
    out["times_faster"] = round(rates[0] / rates[1], 1) if all(rates) else None
    return out


def _table(out: dict[str, Any]) -> None:
    say("\nsinks, points/s         sink    vendor's calls   times   RSS of the sink's process, MB")
    for name, result in out.items():
        sink, calls = (result.get(how, {}).get("rate", "–") for how in ("sink", "calls"))
        peak = result.get("sink", {}).get("memory", {}).get("peak_mb", "–")
        say(f"{name:16}{sink:>12}{calls:>18}{result['times_faster'] or '–':>8}{peak:>10}")
