"""How many points a second reach the journal and series.db, from 1 to 1,024 ranks.

`clients`: real processes that call `run.log` without a pause, spool and sender included. `frames`:
one process that feeds the gateway rows made beforehand, so that the gateway is what is measured.
Committed: from the first call to the last acknowledgement, which follows the fdatasync.
Projected: until series.db holds the last row.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .gateway import Gateway, wait_for
from .measure import ROOT, fdatasync_ms, say, spread

KEYS = 20
CLIENT_MB = 60  #: of memory that one client process may need
FULL_FRAME = 315  #: rows of 208 bytes in the 64 KiB of a frame
PROJECT_SECONDS = 120


@dataclass(frozen=True)
class Case:
    """`frame`: rows in a frame; 0 = real client processes, whose senders decide."""

    streams: int
    frame: int
    rows: int  #: per stream

    @property
    def name(self) -> str:
        return f"{self.streams} × {self.frame}" if self.frame else f"{self.streams} clients"

    @property
    def points(self) -> int:
        return self.streams * self.rows * KEYS


#: rows of all streams together, as (streams, frame) → rows; a tenth or less for --quick
CASES = {
    (1, 0): 400_000,
    (8, 0): 400_000,
    (64, 0): 400_000,
    (1, FULL_FRAME): 500_000,
    (8, FULL_FRAME): 500_000,
    (64, 20): 500_000,
    (1024, 1): 300_000,
    (1024, 4): 500_000,
}
QUICK_ROWS = 40_000


def cases(quick: bool) -> list[Case]:
    rows = {k: min(n, QUICK_ROWS) if quick else n for k, n in CASES.items()}
    return [Case(s, f, max(1, n // s)) for (s, f), n in rows.items() if not (quick and s == 64)]


def run(directory: Path, quick: bool) -> dict[str, Any]:
    found: dict[str, list[dict[str, Any]]] = {}
    skipped: dict[str, str] = {}
    disk = fdatasync_ms(directory, 20 if quick else 200)
    for round_ in range(1 if quick else 3):
        for case in cases(quick):
            if not case.frame and _free_mb() < case.streams * CLIENT_MB:
                skipped[case.name] = f"{_free_mb()} MB of memory are not enough"
                continue
            result = _once(case, directory / f"{case.streams}-{case.frame}-{round_}")
            found.setdefault(case.name, []).append(result)
    out = {name: _summary(rounds) for name, rounds in found.items()}
    _table(out, disk)
    rounds = 1 if quick else 3
    about = {"unit": "million points/s", "row": f"{KEYS} float64", "rounds": rounds}
    return {**about, "fdatasync_ms": disk, "cases": out, "skipped": skipped}


def _free_mb() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(n.split()[1]) // 1024 for n in lines if n.startswith("MemAvailable"))


def _once(case: Case, directory: Path) -> dict[str, Any]:
    with Gateway(directory) as gateway:
        senders = start(case, gateway)
        try:
            wait_for(lambda: gateway.projected()[0] == case.streams, 60, "not all streams opened")
            before = gateway.cpu()
            for sender in senders:
                tell(sender)
            results = [heard(sender) for sender in senders]
            goal = case.streams * case.rows
            wait_for(lambda: gateway.projected()[1] >= goal, PROJECT_SECONDS, "not projected")
            end = time.monotonic()
            cpu = {name: s - before[name] for name, s in gateway.cpu().items()}
            return _rates(case, results, end, cpu) | {"memory": gateway.memory()}
        finally:
            stop(senders)


def _rates(
    case: Case, results: list[dict[str, Any]], end: float, cpu: dict[str, float]
) -> dict[str, Any]:
    start = min(r["started"] for r in results)
    acked = max(r["acked"] for r in results) - start
    cpu["senders"] = sum(r["cpu_s"] for r in results)
    out = {
        "committed": case.points / acked / 1e6,
        "projected": case.points / (end - start) / 1e6,
        "resent": sum(r["resent"] for r in results),
        "cpu_share": {name: round(s / (end - start), 2) for name, s in cpu.items()},
    }
    for name in ("ingest", "rules"):  # what it would reach with a core of its own
        out[f"{name}_per_cpu_s"] = case.points / max(cpu[name], 0.01) / 1e6
    if not case.frame:
        out["logged"] = case.points / (max(r["logged"] for r in results) - start) / 1e6
    return out


# --- the sending processes --------------------------------------------------------------------


def start(case: Case, gateway: Gateway) -> list[subprocess.Popen[str]]:
    """Start the senders and wait until each is ready."""
    config = {
        "address": gateway.address,
        "directory": str(gateway.directory),
        "spool": str(gateway.directory / "spool"),
        "rows": case.rows,
        "keys": KEYS,
    }
    if case.frame:
        config |= {"streams": case.streams, "frame": case.frame}
        senders = [spawn("load", config)]
    else:
        config["world_size"] = case.streams
        senders = [spawn("client", {**config, "rank": r}) for r in range(case.streams)]
    for sender in senders:
        heard(sender)
    return senders


def spawn(module: str, config: dict[str, Any]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", f"bench.{module}", json.dumps(config)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def tell(sender: subprocess.Popen[str]) -> None:
    assert sender.stdin
    sender.stdin.write("go\n")
    sender.stdin.flush()


def heard(sender: subprocess.Popen[str]) -> Any:
    """The next line a sender prints. Raises RuntimeError when it died."""
    assert sender.stdout
    line = sender.stdout.readline()
    if not line:
        raise RuntimeError(f"a sender ended with {sender.wait()}")
    return json.loads(line)


def stop(senders: list[subprocess.Popen[str]]) -> None:
    for sender in senders:
        assert sender.stdin and sender.stdout
        sender.stdin.close()
    for sender in senders:
        try:
            sender.wait(15)
        except subprocess.TimeoutExpired:
            sender.kill()
            sender.wait()
        sender.stdout.close()  # type: ignore[union-attr]


# --- results ----------------------------------------------------------------------------------


def _summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {
        name: spread([r[name] for r in rounds])
        for name in ("logged", "committed", "projected", "ingest_per_cpu_s", "rules_per_cpu_s")
        if name in rounds[0]
    }
    last = rounds[-1]
    out["cpu_share"], out["memory"] = last["cpu_share"], last["memory"]
    out["resent_rows"] = max(r["resent"] for r in rounds)
    return out


def _table(out: dict[str, Any], disk: dict[str, Any]) -> None:
    say(f"\nthroughput, million points/s (fdatasync of 1 MiB: {disk['1MiB']['p50']} ms)")
    say("streams × rows/frame     committed   projected   cores: senders, ingest, rules   RSS, MB")
    for name, result in out.items():
        cpu, memory = result["cpu_share"], result["memory"]
        rates = [result[n]["median"] for n in ("committed", "projected")]
        cores = [cpu[n] for n in ("senders", "ingest", "rules")]
        sizes = [memory[n]["peak_mb"] for n in ("ingest", "rules")]
        say(f"{name:24}{rates[0]:10.2f}{rates[1]:12.2f}       {cores}   {sizes}")
