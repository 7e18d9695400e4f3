"""What is recorded without being logged passes by rules of its own, from every rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.series.reader import Reader
from rank_client.wire.records import Kind
from tests.gateway.rules.made import Run, check_sums, project


@pytest.mark.parametrize("k", ["console", "console-err"])
def test_printed_lines_are_no_texts(tmp_path: Path, k: str) -> None:
    """Of rank 1 a line that was printed passes, and one that was logged is held."""
    run = Run()
    life = run.life(1, world_size=2)
    body = {"t": "hello", "l": "stdout", "w": run.now, "s": None, "k": k, "n": 1}
    life.map(Kind.TEXT, body).text("logged").flush()
    project(tmp_path, run.entries())
    with Reader(tmp_path) as reader:
        counters = reader.about().counters
        assert counters["passed console"] == 1
        assert "passed text" not in counters
        assert [entry.kind for entry in reader.feed(0, 10)] == ["console"]
        assert [row[4:] for row in reader.texts()] == [("stdout", "hello"), ("info", "logged")]
        check_sums(reader)


def test_machine_metrics_pass_from_every_rank(tmp_path: Path) -> None:
    """A row of `system/` keys passes by its own rule and moves no step; one of others does not
    pass, and neither does a row that has both."""
    run = Run()
    life = run.life(1, world_size=2)
    life.row({"loss": 1.0}, step=7).flush()
    life.row({"system/cpu_percent": 5.0, "system/memory_percent": 6.0}, step=900).flush()
    life.row({"system/cpu_percent": 5.0, "loss": 6.0}, step=8).flush()
    project(tmp_path, run.entries())
    with Reader(tmp_path) as reader:
        counters = reader.about().counters
        assert counters["passed system"] == 2
        assert sum(n for name, n in counters.items() if name.startswith("held metric")) == 3
        assert [stream.last_step for stream in reader.streams()] == [8]
        check_sums(reader)
