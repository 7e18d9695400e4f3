"""What a call of `run.log` costs the training, beside what other loggers cost.

All in one run on one machine: every round starts each logger once, in a process of its own, one
after the other; the figure is the median of the rounds.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import competitors
from .gateway import Gateway
from .measure import ROOT, say

BASE = "rankgate"
KEYS = (1, 20, 100)
#: name → (module in rivals/, installed apart?, what the call's return means)
LOGGERS: dict[str, tuple[str, bool, str]] = {
    "nothing": ("nothing", False, "nothing was called: the cost of the loop itself"),
    BASE: ("rankgate", False, "the record is in the page cache of the node, in the spool"),
    "rankgate, no gateway": ("rankgate", False, "the same; it is sent when a gateway is there"),
    "wandb offline": ("wandb", True, "the row is on its way to another process, wandb-core"),
    "trackio local": ("trackio", True, "the row is in a list of the training process"),
}


def run(directory: Path, quick: bool) -> dict[str, Any]:
    subjects, missing = _subjects(quick)
    calls = (
        {"tight": 2_000, "beside_work": 40} if quick else {"tight": 20_000, "beside_work": 2_000}
    )
    plan = {"do": "measure", "keys": KEYS, "calls": calls, "seconds": 0.5 if quick else 12}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in subjects}
    with Gateway(directory / "gateway") as gateway:
        for round_ in range(1 if quick else 5):
            for name in list(found):
                try:
                    found[name].append(_once(name, directory / f"{name}-{round_}", plan, gateway))
                except Exception as error:  # of someone else's program; ours would raise here too
                    if name.startswith(BASE):
                        raise
                    missing[name] = str(error)
                    del found[name]
    kept = {name: _kept(name, directory / f"{name}-kill", missing) for name in found}
    out = {name: _medians(rounds) for name, rounds in found.items()}
    for name, result in out.items():
        result |= {"returned_means": LOGGERS[name][2], "kept_after_sigkill": kept[name]}
        result["ratio_to_rankgate"] = _ratios(result, out[BASE])
    _table(out, missing)
    rounds = len(found[BASE])
    return {"unit": "µs", "rounds": rounds, "loggers": out, "not_measured": missing}


def _subjects(quick: bool) -> tuple[list[str], dict[str, str]]:
    """Who takes part; the others with the reason. A quick run installs nothing."""
    ours = [name for name, (_, apart, _) in LOGGERS.items() if not apart]
    reason = "not installed: python -m bench.competitors"
    if not competitors.ready() and not quick:
        try:
            competitors.create()
        except (OSError, subprocess.CalledProcessError) as error:
            reason = f"cannot be installed: {error}"
    if competitors.ready():
        return list(LOGGERS), {}
    return ours, {name: reason for name in LOGGERS if name not in ours}


def _once(name: str, directory: Path, plan: dict[str, Any], gateway: Gateway) -> dict[str, Any]:
    """One round of one logger. Raises RuntimeError with the end of what it printed."""
    live = name == BASE
    address = gateway.address if live else f"ipc://{directory}/nobody"
    where = gateway.directory if live else directory
    result: dict[str, Any] = json.loads(_start(name, where, {**plan, "address": address}))
    return result


def _start(name: str, directory: Path, config: dict[str, Any], code: int = 0) -> str:
    """Run a module of rivals/ to its end; the last line it printed."""
    module, apart, _ = LOGGERS[name]
    directory.mkdir(parents=True, exist_ok=True)
    python = str(competitors.python()) if apart else sys.executable
    config = {**config, "directory": str(directory)}
    process = subprocess.Popen(
        [python, "-m", f"bench.rivals.{module}", json.dumps(config)],
        cwd=ROOT,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise RuntimeError("did not end within 300 s") from None
    if process.returncode != code:
        raise RuntimeError(f"exit code {process.returncode}: {err.strip()[-300:]}")
    return out.strip().rpartition("\n")[2]


def _kept(name: str, directory: Path, missing: dict[str, str]) -> dict[str, int] | None:
    """Calls that are on disk after a SIGKILL right behind the last call's return."""
    if name == "nothing":
        return None
    calls = 1000
    config = {"address": f"ipc://{directory}/nobody", "calls": calls}
    try:
        _start(name, directory, {**config, "do": "die"}, code=-signal.SIGKILL)
        return {"returned": calls, "found": int(_start(name, directory, {"do": "count"}))}
    except (RuntimeError, ValueError) as error:
        missing[f"{name}: kept_after_sigkill"] = str(error)
        return None


# --- medians of rounds ------------------------------------------------------------------------


def _medians(rounds: list[Any]) -> Any:
    """The same shape with each number replaced by the median over the rounds."""
    first = rounds[0]
    if isinstance(first, dict):
        keys = [k for k in first if all(k in r for r in rounds)]
        return {k: _medians([r[k] for r in rounds]) for k in keys}
    return round(statistics.median(rounds), 3)


def _ratios(result: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    def ratio(part: str, keys: str) -> float:
        return round(result[part][keys]["p50"] / base[part][keys]["p50"], 2)

    return {part: {k: ratio(part, k) for k in base[part]} for part in ("tight", "beside_work")}


def _table(out: dict[str, Any], missing: dict[str, str]) -> None:
    say("\nlog(), µs: p50 / p99 / max                1 scalar            20 scalars          100")
    for name, result in out.items():
        for part in ("tight", "beside_work"):
            cells = [f"{_cell(result[part][str(k)]):>20}" for k in KEYS]
            say(f"{name:22}{part:12}{''.join(cells)}")
    for name, reason in missing.items():
        say(f"{name}: not measured, {reason}")


def _cell(figures: dict[str, float]) -> str:
    p99 = f"{figures['p99']:.0f}" if "p99" in figures else "–"
    return f"{figures['p50']:.1f} / {p99} / {figures['max']:.0f}"
