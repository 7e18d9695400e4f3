"""Sinks as processes, on line and off; read back through the server's own record."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.sinks.store import read_views
from tests.servers.clearml import ClearmlServer

from .job import Job, wait_until


@pytest.fixture
def clearml() -> Iterator[ClearmlServer]:
    with ClearmlServer() as server:
        yield server


def truth_losses(job: Job) -> dict[int, float]:
    ranks = {s.id.hex(): s.rank for s in job.streams()}
    [lines] = [lines for stream, lines in job.truth().items() if ranks[stream] == 0]
    return {line["step"]: line["train/loss"] for line in lines if "step" in line}


def assert_in_clearml(server: ClearmlServer, job: Job) -> None:
    [task] = server.tasks
    have = {
        step: v for (t, s, step), v in server.scalars(task).items() if (t, s) == ("train", "loss")
    }
    want = truth_losses(job)
    assert have.keys() == want.keys()
    assert all(abs(have[s] - want[s]) < 1e-6 for s in want)
    texts = [line for line in map(str, server.log_lines(task)) if "rank 0 did" in line]
    assert len(texts) == 1


def test_a_server_that_fails_for_a_while(tmp_path: Path, clearml: ClearmlServer) -> None:
    """503s in mid-run: the sink waits, says why, and then delivers all of it once."""
    with Job(tmp_path, **clearml.env) as job:
        job.serve("--sink", "clearml")
        rank = job.rank(0, 1, 300, "finish", 0.01)
        wait_until(lambda: clearml.tasks, 60, "the sink has begun")
        clearml.fail("events.add_batch", status=503, times=3)
        rank.communicate(timeout=60)
        job.drain()
        assert_in_clearml(clearml, job)
        job.assert_all_there()


def test_offline_exports_are_whole(tmp_path: Path) -> None:
    """At drain each offline sink has one folder, with every item accounted for."""
    config = tmp_path / "gateway.toml"
    config.write_text(
        "[sinks.clearml]\nmode = 'offline'\n[sinks.neptune]\nmode = 'offline'\n"
        "[sinks.hub]\nmode = 'offline'\nproject = 'team/digits'\n"
    )
    with Job(tmp_path) as job:
        for rank in range(2):
            job.rank(rank, 2, 50, "finish", RANKGATE_CONFIG=str(config))
        for process in job.processes:
            process.communicate(timeout=60)
        code, out, err = job.cli("drain", "--config", str(config))
        assert code == 0, (out, err, job.log())
        for view in read_views(job.data / "runs/r1"):
            assert view.state == "exported"
            assert Path(view.export).is_dir()
        assert sorted(p.name for p in (job.data / "runs/r1/exports").iterdir()) == [
            "clearml", "hub", "neptune",
        ]  # fmt: skip
        job.assert_all_there()
