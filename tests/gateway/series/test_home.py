"""A copy of series.db made while it was written to is not believed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from gateway import view
from gateway.rules.follow import Follower, rebuild
from gateway.series.home import torn_copy
from tests.build import RunBuilder


def a_run(tmp_path: Path) -> Path:
    run = RunBuilder(tmp_path, "r1")
    for rank in run.ranks(1):
        for step in range(50):
            rank.log({"x": float(step)}, step=step)
        rank.end()
    return run.close()


def tear(series: Path) -> None:
    """Pages of another moment: what a copy under load may hold."""
    data = bytearray(series.read_bytes())
    data[16 << 10 :] = bytes(len(data) - (16 << 10))
    series.write_bytes(data)


@pytest.mark.parametrize("how", ["read", "written"])
def test_a_copy_made_under_load_is_read_from_its_journal(tmp_path: Path, how: str) -> None:
    """People see all that the copy's journal holds, and a gateway on it builds it anew."""
    run_dir, copy = a_run(tmp_path), tmp_path / "copy" / "r1"
    follower = Follower(run_dir)  # as the rules have it open
    shutil.copytree(run_dir, copy)
    follower.close()
    tear(copy / "series.db")
    assert torn_copy(copy / "series.db")
    if how == "written":
        rebuild(copy)
        assert not torn_copy(copy / "series.db")
    assert view.open(copy).points("x").value.tolist() == [float(s) for s in range(50)]


def test_a_copy_made_at_rest_is_read_as_it_is(tmp_path: Path) -> None:
    """Without a log of writes beside it, nobody wrote; and the run itself is no copy."""
    run_dir, copy = a_run(tmp_path), tmp_path / "copy" / "r1"
    assert not torn_copy(run_dir / "series.db")
    shutil.copytree(run_dir, copy)
    assert not torn_copy(copy / "series.db")
    view.open(copy).points("x")
    assert not torn_copy(copy / "series.db")  # reading it leaves it so
