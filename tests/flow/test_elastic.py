"""Launches that restart, grow, shrink and are resumed: each life is a stream in its generation."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gateway import view

from .job import Job, wait_until

RANK = str(Path(__file__).with_name("elastic.py"))
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_NNODES": "1",
}


def life(job: Job, rank: int, number: int, **environ: str) -> subprocess.Popen[str]:
    """One rank of two as a launcher without torch would start it; it logs 20 steps and ends."""
    place = {} if "SLURM_PROCID" in environ else {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    words = (sys.executable, RANK, str(job.truth_dir), "20")
    return job.start(*words, **{"WORLD_SIZE": "2", **place, "LIFE": str(number), **environ})


def end(*processes: subprocess.Popen[str], code: int = 0) -> None:
    for process in processes:
        _, err = process.communicate(timeout=60)
        assert process.returncode == code, err


def by_generation(job: Job, run: str) -> list[list[Any]]:
    """The values of `life` of each generation, the oldest first."""
    job.assert_all_there(run)
    with job.reader(run) as reader:
        order, streams = reader.about().generations, {s.index: s for s in reader.streams()}
        points = reader.points("life")
    out: list[set[Any]] = [set() for _ in order]
    for index, value in zip(points.stream.tolist(), points.value.tolist(), strict=True):
        out[order.index(streams[index].generation)].add(value)
    return [sorted(values) for values in out]


def latest(job: Job, run: str) -> set[int]:
    return set(view.open(job.data / "runs" / run).points("life").value.tolist())


def test_a_requeued_slurm_job_is_the_next_generation(tmp_path: Path) -> None:
    """The job keeps its id, so it is the same run; its restart count opens a generation."""
    with Job(tmp_path) as job:
        for number in (0, 1):
            count = {"SLURM_RESTART_COUNT": "1"} if number else {}
            ranks = [
                life(job, r, number, **SLURM, **count, SLURM_PROCID=str(r), SLURM_LOCALID=str(r))
                for r in range(2)
            ]
            end(*ranks)
        job.drain()
        assert by_generation(job, "77.0") == [[0], [1]]
        assert latest(job, "77.0") == {1}


def test_lives_without_a_gateway_take_their_true_place(tmp_path: Path) -> None:
    """Four lives of one run: the second and third never met a gateway and are adopted while the
    fourth is there. They stand where they were lived, and what is shown is the fourth."""
    run = {"RANKGATE_RUN": "r1"}
    with Job(tmp_path) as job:
        for number in range(4):
            mode = {"RANKGATE_MODE": "offline"} if number in (1, 2) else {}
            launch = {"RANKGATE_LAUNCH": f"launch-{number}"}
            end(*(life(job, r, number, **run, **mode, **launch) for r in range(2)))
            if number == 0:
                job.stop_gateway(signal.SIGKILL)
        job.drain()
        assert by_generation(job, "r1") == [[0], [1], [2], [3]]
        assert latest(job, "r1") == {3}
        with job.reader() as reader:
            assert reader.about().state == "completed"


# --- torchrun ------------------------------------------------------------------------------------


class Agents:
    """torchrun agents on one host, each a node of one elastic job of one or two."""

    def __init__(self, job: Job) -> None:
        self.job = job
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self.port = free.getsockname()[1]

    def start(self, name: str) -> subprocess.Popen[str]:
        patience = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3"
        return self.job.start(
            "torchrun", "--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "5",
            "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{self.port}",
            "--rdzv-id", "elastic", "--rdzv-conf", patience, "--monitor-interval", "0.2",
            RANK, str(self.job.truth_dir),
            AGENT=name, OMP_NUM_THREADS="1",
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",  # with it, the second round hangs on one host
        )  # fmt: skip

    def lives(self) -> list[dict[str, Any]]:
        """What each worker that has logged something says of itself, in order of appearance."""
        found = []
        for path in self.job.truth_dir.glob("*.jsonl"):
            lines = path.read_text().splitlines()
            if len(lines) > 3:
                found.append(json.loads(lines[0]))
        return sorted(found, key=lambda life: life["began"])

    def wait_round(self, lives: int) -> None:
        """Until so many workers have lived and logged."""
        wait_until(lambda: len(self.lives()) >= lives, 60, f"{lives} lives, not {self.lives()}")


@pytest.mark.torch
@pytest.mark.timeout(240)
def test_an_elastic_job_through_its_rounds(tmp_path: Path) -> None:
    """One agent; a second joins; its worker fails and both restart, of which only its agent
    counts a restart; it is killed and leaves its worker behind; the first goes on alone. Four
    rounds are four generations, every life is whole, and the last one is what is shown."""
    with Job(tmp_path) as job:
        job.serve()
        agents = Agents(job)
        first = agents.start("A")
        agents.wait_round(1)
        second = agents.start("B")
        agents.wait_round(3)
        (job.truth_dir / "fail-B").touch()
        agents.wait_round(5)
        second.kill()
        (job.truth_dir / "fail-A").touch()
        agents.wait_round(6)
        (job.truth_dir / "finish").touch()
        assert first.wait(60) == 0
        counts = [(life["agent"], life["restart"]) for life in agents.lives()]
        assert ("A", 0) in counts[3:5] and ("B", 1) in counts[3:5], counts
        wait_until(lambda: all(s.status for s in job.streams("elastic")[-2:]), 30, "all have ended")
        job.drain()
        job.assert_all_there("elastic")
        told = {life["stream"]: life for life in agents.lives()}
        with job.reader("elastic") as reader:
            about, streams = reader.about(), reader.streams()
        rounds = [
            sorted((told[s.id.hex()]["agent"], told[s.id.hex()]["world"])
                   for s in streams if s.generation == id_)
            for id_ in about.generations
        ]  # fmt: skip
        assert rounds == [[("A", 1)], [("A", 2), ("B", 2)], [("A", 2), ("B", 2)], [("A", 1)]]
        assert about.state == "completed"
        shown = view.open(job.data / "runs/elastic").points("world")
        assert set(shown.value[shown.attempt == shown.attempt.max()].tolist()) == {1}
