"""Ranks without torch, a real gateway: whatever dies, what `log` returned for is there once."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from .job import ENDLESS, Job, wait_until


def finish(job: Job, count: int, expected: int = 0) -> None:
    for process in job.processes[-count:]:
        out, err = process.communicate(timeout=60)
        assert process.returncode == expected, (out, err)


@pytest.mark.parametrize("size", [2, 4])
def test_every_point_of_every_rank_arrives_once(tmp_path: Path, size: int) -> None:
    """Without a wrapper, the ranks start a gateway and every point is in the series once."""
    with Job(tmp_path) as job:
        for rank in range(size):
            job.rank(rank, size, 200, "finish")
        finish(job, size)
        job.drain()
        job.assert_all_there()
        with job.reader() as reader:
            assert reader.about().state == "completed"
            assert sorted(s.rank for s in reader.streams()) == list(range(size))
            assert {g.generation for g in reader.streams()} == {0}


def test_without_a_gateway_nothing_is_lost(tmp_path: Path) -> None:
    """In offline mode the spool keeps all, and a later drain ships it."""
    with Job(tmp_path) as job:
        for rank in range(2):
            job.rank(rank, 2, 100, "finish", RANKGATE_MODE="offline")
        finish(job, 2)
        assert not (job.data / "runs").exists()
        job.drain()
        job.assert_all_there()
        with job.reader() as reader:
            assert reader.about().state == "completed"


def test_a_gateway_killed_and_started_again(tmp_path: Path) -> None:
    """SIGKILL of the whole gateway in mid-run loses and doubles nothing."""
    with Job(tmp_path) as job:
        ranks = [job.rank(r, 2, ENDLESS, "until", 0.01) for r in range(2)]
        wait_until(lambda: (job.data / "runs/r1/series.db").exists(), what="a first projection")
        job.stop_gateway(signal.SIGKILL)
        assert all(r.poll() is None for r in ranks)
        wait_until(job.gateway_pids, what="a rank has started another")
        job.ask_stop()
        finish(job, 2)
        job.drain()
        job.assert_all_there()


@pytest.mark.parametrize("child", ["ingest", "rules"])
def test_a_part_killed_goes_on_from_disk(tmp_path: Path, child: str) -> None:
    """SIGKILL of ingest or of the rules, several times: the supervisor starts it again."""
    with Job(tmp_path) as job:
        for rank in range(2):
            job.rank(rank, 2, ENDLESS, "until", 0.01)
        wait_until(lambda: (job.data / "runs/r1/series.db").exists(), what="a first projection")
        for _ in range(3):
            pid = job.child(child)
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda pid=pid: job.child(child) != pid, what=f"another {child}")
        job.ask_stop()
        finish(job, 2)
        job.drain()
        job.assert_all_there()


def test_a_killed_ranks_last_milliseconds_arrive(tmp_path: Path) -> None:
    """SIGKILL of a rank: what its calls returned for is shipped from its spool."""
    with Job(tmp_path) as job:
        other = job.rank(0, 2, 100, "finish", 0.005)
        killed = job.rank(1, 2, 2000, "kill")
        assert other.wait(60) == 0
        assert killed.wait(60) == -signal.SIGKILL
        job.drain()
        job.assert_all_there(extra_allowed=4)  # the row it died in
        assert job.orphans() == []
        with job.reader() as reader:
            assert reader.about().state == "lost"


@pytest.mark.parametrize(
    ("end", "code", "state"),
    [("exit", 0, "completed"), ("os_exit", 7, "lost"), ("raise", 1, "failed")],
)
def test_how_a_process_ends(tmp_path: Path, end: str, code: int, state: str) -> None:
    """Exit without finish, os._exit and an exception: all arrives, the code is the script's."""
    with Job(tmp_path) as job:
        process = job.rank(0, 1, 50, end)
        _, err = process.communicate(timeout=60)
        assert process.returncode == code
        job.drain()
        job.assert_all_there()
        with job.reader() as reader:
            about = reader.about()
            assert about.state == state
        if end == "raise":
            assert "the loss exploded" in err
            assert "RuntimeError: the loss exploded" in about.reason


def test_ctrl_c(tmp_path: Path) -> None:
    """SIGINT ends the script as it would without rankgate, and nothing is lost."""
    with Job(tmp_path) as job:
        process = job.rank(0, 1, 50, "hang")
        wait_until(lambda: (job.truth_dir / "0.ready").exists(), what="the rank hangs")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert process.returncode == -signal.SIGINT
        assert "KeyboardInterrupt" in err
        job.drain()
        job.assert_all_there()


def test_two_runs_share_a_gateway_and_stay_apart(tmp_path: Path) -> None:
    """Two jobs with one directory use one gateway; neither sees the other's points."""
    with Job(tmp_path) as job:
        for run in ("r1", "r2"):
            for rank in range(2):
                job.rank(rank, 2, 100, "stop", 0.002, RANKGATE_RUN=run)
        for run in ("r1", "r2"):
            wait_until(lambda run=run: len(job.truth(run)) == 2, what=f"both ranks of {run}")
            wait_until((job.data / f"runs/{run}/journal").is_dir, what=f"{run} is there")
        for run in ("r1", "r2"):
            job.ask_stop(run)
        finish(job, 4)
        job.drain()
        for run in ("r1", "r2"):
            job.assert_all_there(run)
            assert len(job.streams(run)) == 2
        assert job.log().count("serving ipc") == 1


def test_a_resumed_run_is_a_second_generation(tmp_path: Path) -> None:
    """A run continued under the same id keeps both lives, told apart by generation."""
    with Job(tmp_path) as job:
        for launch in ("first", "second"):
            for rank in range(2):
                job.rank(rank, 2, 50, "finish", RANKGATE_LAUNCH=launch)
            finish(job, 2)
        job.drain()
        job.assert_all_there()
        assert sorted(s.generation for s in job.streams()) == [0, 0, 1, 1]
        with job.reader() as reader:
            assert reader.about().state == "completed"


def test_a_wish_to_stop_reaches_every_rank(tmp_path: Path) -> None:
    """A request left in the run's folder makes `should_stop` true on all ranks."""
    with Job(tmp_path) as job:
        for rank in range(2):
            job.rank(rank, 2, 5, "stop")
        wait_until(lambda: all((job.truth_dir / f"{r}.ready").exists() for r in range(2)))
        wait_until(lambda: (job.data / "runs/r1/journal").is_dir(), what="the run is there")
        job.ask_stop()
        finish(job, 2)
        job.drain()
        job.assert_all_there()


def test_a_rank_leaves_no_child_behind(tmp_path: Path) -> None:
    """The gateway a rank starts is not its child: nobody has to wait for it."""
    with Job(tmp_path) as job:
        process = job.rank(0, 1, 5, "hang")
        wait_until(lambda: job.gateway_pids(), what="a gateway")
        wait_until(lambda: (job.truth_dir / "0.ready").exists(), what="the rank hangs")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        wait_until(lambda: not children.read_text().strip(), what="no child")


def test_a_100_mb_checkpoint(tmp_path: Path) -> None:
    """A checkpoint of 100 MB arrives whole, under its checksum, and delays no metric."""
    import hashlib

    with Job(tmp_path) as job:
        job.rank(0, 1, 20, "checkpoint")
        finish(job, 1)
        job.drain()
        job.assert_all_there()
        [source] = job.truth_dir.glob("*.pt")
        with job.reader() as reader:
            [media] = reader.media()
        want = hashlib.sha256(source.read_bytes()).hexdigest()
        assert media.sha256 == want
        stored = job.data / "runs/r1/media" / want[:2] / want
        assert hashlib.sha256(stored.read_bytes()).hexdigest() == want


def test_rebuilding_gives_the_same_series(tmp_path: Path) -> None:
    """Deleting series.db after kills of the rules gives the same ordered dump again."""
    from gateway.rules.follow import rebuild

    with Job(tmp_path) as job:
        for rank in range(2):
            job.rank(rank, 2, ENDLESS, "until", 0.01)
        wait_until(lambda: (job.data / "runs/r1/series.db").exists(), what="a first projection")
        for _ in range(3):
            pid = job.child("rules")
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda pid=pid: job.child("rules") != pid, what="other rules")
        job.ask_stop()
        finish(job, 2)
        job.drain()
        job.stop_gateway(signal.SIGTERM)
        run_dir = job.data / "runs/r1"
        rebuild(run_dir)
        with job.reader() as reader:
            before = reader.dump()
        for path in run_dir.glob("series.db*"):
            path.unlink()
        rebuild(run_dir)
        with job.reader() as reader:
            assert reader.dump() == before
