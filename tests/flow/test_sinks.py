"""Sinks as processes: killed, off line, added later; read back through the servers' own record."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.sinks.store import read_views
from tests.servers.clearml import ClearmlServer
from tests.servers.neptune import NeptuneServer, token

from .job import ENDLESS, Job, wait_until


@pytest.fixture
def clearml() -> Iterator[ClearmlServer]:
    with ClearmlServer() as server:
        yield server


@pytest.fixture
def neptune() -> Iterator[NeptuneServer]:
    with NeptuneServer() as server:
        yield server


def environment(clearml: ClearmlServer, neptune: NeptuneServer) -> dict[str, str]:
    return {
        **clearml.env,
        "NEPTUNE_API_TOKEN": token(neptune.url),
        "NEPTUNE_PROJECT": "team/digits",
        "OAUTHLIB_INSECURE_TRANSPORT": "1",
    }


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


def assert_in_neptune(server: NeptuneServer, job: Job) -> None:
    [run] = server.runs
    have = [(step, value) for step, value, _ in server.series(run)["train/loss"]]
    assert have == sorted(truth_losses(job).items())


def test_sinks_killed_again_and_again(
    tmp_path: Path, clearml: ClearmlServer, neptune: NeptuneServer
) -> None:
    """SIGKILL of sink processes in mid-delivery: every point once in ClearML and in Neptune."""
    with Job(tmp_path, **environment(clearml, neptune)) as job:
        job.serve("--sink", "clearml", "--sink", "neptune")
        rank = job.rank(0, 1, ENDLESS, "until", 0.02)  # as long as there is something to kill
        wait_until(lambda: clearml.tasks and neptune.runs, 60, "both sinks have begun")
        for _ in range(3):
            killed = {job.child("clearml"), job.child("neptune")}
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
            wait_until(
                lambda killed=killed: not killed & {job.child("clearml"), job.child("neptune")},
                what="other sink processes",
            )
        job.ask_stop()
        rank.communicate(timeout=90)
        job.drain()
        states = {v.name: v.state for v in read_views(job.data / "runs/r1")}
        assert states == {"clearml": "drained", "neptune": "drained"}
        assert_in_clearml(clearml, job)
        assert_in_neptune(neptune, job)
        job.assert_all_there()


def test_a_backend_away_for_the_whole_run_then_replayed(
    tmp_path: Path, clearml: ClearmlServer, neptune: NeptuneServer
) -> None:
    """A sink added after the run gets all of it; a second replay changes nothing."""
    with Job(tmp_path, **environment(clearml, neptune)) as job:
        job.rank(0, 2, 60, "finish")
        job.rank(1, 2, 60, "finish")
        for process in job.processes:
            process.communicate(timeout=60)
        job.drain()
        job.stop_gateway(signal.SIGTERM)
        for name in ("clearml", "neptune"):
            code, out, err = job.cli("replay", "r1", "--to", name)
            assert code == 0, (out, err)
        assert_in_clearml(clearml, job)
        assert_in_neptune(neptune, job)
        sends = clearml.accepted_scalar_sends
        code, out, _ = job.cli("replay", "r1", "--to", "clearml")
        assert (code, clearml.accepted_scalar_sends) == (0, sends)
        assert "delivered" in out
        job.assert_all_there()


def test_a_server_that_fails_for_a_while(tmp_path: Path, clearml: ClearmlServer) -> None:
    """503s in mid-run: the sink waits, says why, and then delivers all of it once."""
    with Job(tmp_path, **clearml.env) as job:
        job.serve("--sink", "clearml")
        rank = job.rank(0, 1, ENDLESS, "until", 0.01)
        wait_until(lambda: clearml.tasks, 60, "the sink has begun")
        clearml.fail("events.add_batch", status=503, times=3)
        sends = clearml.accepted_scalar_sends
        wait_until(lambda: clearml.accepted_scalar_sends > sends, 60, "it goes on")
        job.ask_stop()
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
