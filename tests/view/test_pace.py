"""How long a rank may log nothing: from the rows that the series has, whatever their key sets."""

from __future__ import annotations

from pathlib import Path

from gateway.series.reader import Reader
from gateway.view.pace import RECENT_ROWS, STUCK_SECONDS, patience

from ..build import RunBuilder


def test_a_rare_key_set_does_not_slow_the_pace(tmp_path: Path) -> None:
    """Where the old rows of one key set are left out, so are those of all others."""
    run = RunBuilder(tmp_path)
    rank = run.rank(0)
    for step in range(9000):
        run.wait(0.1)
        rank.log({"epoch": step // 900} if step % 900 == 0 else {"loss": 1.0}, step)
    with Reader(run.close()) as reader:
        rows = reader.recent_rows([0], RECENT_ROWS)
    seqs = rows[:, 1].tolist()
    assert seqs == list(range(seqs[0], rank.last + 1))
    assert RECENT_ROWS <= len(seqs) < 9000
    assert patience(rows) == {0: STUCK_SECONDS}


def test_rows_of_each_stream_in_order(tmp_path: Path) -> None:
    """Streams are told apart, and each row has its step and time."""
    run = RunBuilder(tmp_path)
    for rank in run.ranks(2):
        for step in range(5):
            run.wait(1 + 9 * rank.rank)
            rank.log({"loss": 1.0}, step).text("between")
    with Reader(run.close()) as reader:
        rows = reader.recent_rows([0, 1], RECENT_ROWS)
    assert rows[:, 0].tolist() == [0] * 5 + [1] * 5
    assert rows[:, 2].tolist() == [*range(5), *range(5)]
    assert {s: round(seconds) for s, seconds in patience(rows).items()} == {0: 10, 1: 40}


def test_nothing_logged(tmp_path: Path) -> None:
    """A run without a row has no pace."""
    run = RunBuilder(tmp_path)
    run.rank(0)
    with Reader(run.close()) as reader:
        assert patience(reader.recent_rows([0], RECENT_ROWS)) == {}


def test_a_rank_that_stopped_long_ago_keeps_its_pace(tmp_path: Path) -> None:
    """However many rows the others have logged since, in however many segments."""
    run = RunBuilder(tmp_path)
    slow, other = run.ranks(2)
    for step in range(10):
        run.wait(5)
        slow.log({"loss": 1.0}, step)
    slow.flush()
    for step in range(10_000):
        other.log({"loss": 1.0}, step)
    with Reader(run.close()) as reader:
        rows = reader.recent_rows([0], RECENT_ROWS)
    assert rows[:, 2].tolist() == list(range(10))
    assert round(patience(rows)[0]) == 20
