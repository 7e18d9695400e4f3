"""Whether a sink has work, as its own file tells."""

from __future__ import annotations

from pathlib import Path

import apsw

from gateway.series.reader import Reader
from gateway.sinks.process import fresh
from tests.build import RunBuilder


def test_a_sink_killed_while_its_file_was_made_has_work(tmp_path: Path) -> None:
    """A file without tables says nothing of a delivery: the sink is started again."""
    run = RunBuilder(tmp_path, "r1")
    for rank in run.ranks(1):
        rank.log({"x": 1.0}, step=0).end()
    run_dir = run.close()
    (run_dir / "sinks").mkdir(exist_ok=True)
    apsw.Connection(str(run_dir / "sinks/clearml.db")).execute("PRAGMA journal_mode = wal")
    with Reader(run_dir) as reader:
        assert not fresh(run_dir, "clearml", reader, offline=False)
