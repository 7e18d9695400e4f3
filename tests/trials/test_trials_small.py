"""Every trial at a small size: what `make kill`, `make proxy` and the others do for longer."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ..flow.job import ROOT, wait_until
from . import copies, kill, kill_sinks, outage, proxy

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def seed() -> int:
    """Printed with the output of a test that fails."""
    chosen = int(os.environ.get("SEED") or random.SystemRandom().randrange(1 << 31))
    print(f"seed {chosen}")
    return chosen


def test_kills(tmp_path: Path, seed: int) -> None:
    """Ranks, ingest, rules and supervisor die at random instants: nothing lost, nothing doubled."""
    found = kill.attempt(tmp_path, seed, kills=12, seconds=60)
    assert found["broken"] == []
    assert sum(found["kills"].values()) >= 5
    assert found["calls"] > 0


def test_kills_of_sinks(tmp_path: Path, seed: int) -> None:
    """Sinks die while they deliver: every item is in its backend once."""
    found = kill_sinks.attempt(tmp_path, seed, kills=6, seconds=60, runs=2, steps=80)
    assert found["broken"] == []
    assert sum(found["kills"].values()) > 0


def test_a_bad_network(tmp_path: Path, seed: int) -> None:
    """Cuts, stalls, black holes and resets between rank and gateway, plain and encrypted."""
    found = proxy.attempt(tmp_path, seed, schedules=6, ranks=3, seconds=120)
    assert found["broken"] == []
    assert found["plain"]["calls"] > 0 < found["encrypted"]["calls"]


@pytest.mark.parametrize("part", list(outage.PARTS))
def test_an_outage(tmp_path: Path, part: str) -> None:
    """Gateway, disk or backend is away, and comes back: all is caught up, memory is bounded."""
    try:
        found = outage.PARTS[part](tmp_path, 20_000)
    except PermissionError as error:
        pytest.skip(str(error))
    assert found["broken"] == []


def test_copies(tmp_path: Path, seed: int) -> None:
    """A run copied while it is written opens, and holds the beginning of the journal."""
    found = copies.attempt(tmp_path, seed, copies=4, seconds=60)
    assert found["broken"] == []
    assert found["copies"] == 4


def started_by(folder: Path) -> list[int]:
    """Processes that have a path below the folder in their environment."""
    found = []
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            environ = (proc / "environ").read_bytes()
        except OSError:
            continue
        if os.fsencode(folder) in environ:
            found.append(int(proc.name))
    return found


@pytest.mark.parametrize("name", ["kill", "kill_sinks"])
def test_a_trial_that_is_ended_leaves_nothing(tmp_path: Path, name: str) -> None:
    """By SIGTERM, as a job's time limit ends it: no rank, no gateway and no folder stays."""
    words = [sys.executable, "-m", f"tests.trials.{name}", "--seconds", "120"]
    environ = {**os.environ, "TMPDIR": str(tmp_path)}
    trial = subprocess.Popen(words, cwd=ROOT, env=environ, stderr=subprocess.DEVNULL)
    try:
        gateway = lambda: any(tmp_path.glob("*/**/supervisor.json"))  # noqa: E731
        wait_until(gateway, 60, "a gateway is up")
        trial.send_signal(signal.SIGTERM)
        assert trial.wait(60) == 128 + signal.SIGTERM
        wait_until(lambda: not started_by(tmp_path), 10, "a killed rank's copier has left")
        assert list(tmp_path.iterdir()) == []
    finally:
        for pid in started_by(tmp_path):
            os.kill(pid, signal.SIGKILL)
        trial.wait()
