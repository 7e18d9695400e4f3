"""A late older attempt of a rank, delivered by the real process of each sink."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from gateway.sinks.attempts import OLDER
from gateway.sinks.store import read_view
from tests.build import RunBuilder

from .backends import Backend, Clearml, Neptune, Platform, standing
from .deaths import LIVE, life


def late(root: Path) -> Path:
    """A run whose second attempt (steps 2 to 5) arrived before what was left of the first (0 to
    3)."""
    made = RunBuilder(root, "r1")
    old = made.rank(0)
    new = made.rank(0, restart=1, earlier=[old.stream])
    for step in range(2, 6):
        new.log({"train/loss": 100.0 + step}, step=step)
    new.flush()
    for step in range(4):
        old.log({"train/loss": float(step)}, step=step)
    old.flush().end()
    new.end()
    return made.close()


@pytest.mark.parametrize(("made", "older"), [(Clearml, 2), (Platform, 2), (Neptune, 0)])
def test_what_is_left_of_an_older_attempt(made: type[Backend], older: int, tmp_path: Path) -> None:
    """It replaces nothing where a backend has one value of a name and step; others get it too."""
    run_dir = late(tmp_path)
    with standing(made, tmp_path / "backend") as backend:
        assert life(backend, run_dir, LIVE, random.Random(0), tmp_path / "mark") == 0
        have = {(key, step): value for key, step, value in backend.have().points}
    view = read_view(run_dir / "sinks" / f"{backend.kind}.db")
    assert view.skipped.get(OLDER, 0) == older
    assert view.delivered + sum(view.skipped.values()) == 8
    if made is not Platform:  # which keeps epochs alone
        assert [have["train/loss", step] for step in range(2, 6)] == [102.0, 103.0, 104.0, 105.0]
