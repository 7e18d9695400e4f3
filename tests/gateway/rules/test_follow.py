"""Following a journal on disk, whatever is done to the files meanwhile."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from gateway.rules.follow import rebuild
from gateway.series.reader import Reader
from tests.build import RunBuilder


def steps_of(run_dir: Path) -> list[int]:
    with Reader(run_dir) as reader:
        return sorted(reader.points("loss").step.tolist())


def run_with(root: Path, *steps: int) -> RunBuilder:
    """A run of one rank; each step is an entry of its journal. Runs of the same steps are alike."""
    made = RunBuilder(root, "r1")
    [rank] = made.ranks(1)
    for step in steps:
        rank.log({"loss": float(step)}, step=step).flush()
    return made


@pytest.mark.parametrize("more", [(10,), (10, 11), (10, 11, 12)])
def test_a_journal_that_was_put_back_is_projected_anew(tmp_path: Path, more: tuple[int]) -> None:
    """An older copy of the journal has gone on under the same name, with other entries: once it is
    as long as the series knew it, the series holds what the journal holds now."""
    run_dir = run_with(tmp_path / "a", 0, 1, 20).close()
    other = run_with(tmp_path / "b", 0, 1, *more).close()
    assert steps_of(run_dir) == [0, 1, 20]
    shutil.rmtree(run_dir / "journal")
    shutil.copytree(other / "journal", run_dir / "journal")
    rebuild(run_dir)
    assert steps_of(run_dir) == [0, 1, *more]


def test_a_restart_goes_on_where_it_was(tmp_path: Path) -> None:
    """A follower that is opened again makes nothing anew."""
    made = run_with(tmp_path, 0, 1)
    run_dir = made.close()
    with Reader(run_dir) as reader:
        build = reader.about().build
    made.lives[0].log({"loss": 2.0}, step=2)
    made.close()
    with Reader(run_dir) as reader:
        assert reader.about().build == build
        assert not reader.replaced()
    assert steps_of(run_dir) == [0, 1, 2]


def test_a_reader_knows_that_the_series_was_made_anew(tmp_path: Path) -> None:
    """Who holds the old file open is told that there is another."""
    run_dir = run_with(tmp_path, 0).close()
    with Reader(run_dir) as reader:
        for path in run_dir.glob("series.db*"):
            path.unlink()
        rebuild(run_dir)
        assert reader.replaced()
