"""Every trial at a small size: what `make kill`, `make proxy` and the others do for longer."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

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
