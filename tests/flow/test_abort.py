"""An abort in a backend's web page: every rank is asked to stop, nobody is killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.servers.clearml import ClearmlServer

from .job import Job, wait_until

LOSS = "train/loss"

#: logs so many steps unless it is asked to stop, which its exit code tells
RANK = """
import sys, time, rank_client
run = rank_client.init(project="flow", run="r1")
for step in range(int(sys.argv[1])):
    run.log({"train/loss": 1.0 / (step + 1)}, step=step)
    if run.should_stop():
        break
    time.sleep(0.05)
stopped = run.should_stop()
run.finish()
sys.exit(7 if stopped else 0)
"""


def launch(job: Job, number: int, steps: int) -> list[subprocess.Popen[str]]:
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "RANKGATE_LAUNCH": str(number)}
        size = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        job.start(sys.executable, "-c", RANK, str(steps), **place, **size)
    return job.processes[-2:]


def codes(ranks: list[subprocess.Popen[str]]) -> list[int]:
    for process in ranks:
        process.communicate(timeout=100)
    return [process.returncode for process in ranks]


def test_abort_in_clearml(tmp_path: Path) -> None:
    """A task aborted on the server makes `should_stop` true on every rank; what they logged is
    all there, and the task stays stopped. The next launch of the run is not asked to stop."""
    with ClearmlServer() as server, Job(tmp_path, **server.env) as job:
        job.serve("--sink", "clearml")
        ranks = launch(job, 1, steps=1800)
        wait_until(lambda: server.accepted_scalar_sends, 60, "it has begun")
        [task] = server.tasks
        server.abort(task)
        assert codes(ranks) == [7, 7], job.log()
        job.drain()
        assert server.tasks[task]["status"] == "stopped"
        assert "Stopped by u" in server.tasks[task]["status_message"]
        assert not (job.data / "runs/r1/requests/stop").exists()

        assert codes(launch(job, 2, steps=20)) == [0, 0]
        job.drain()
        assert list(server.tasks) == [task]
        assert server.tasks[task]["status"] == "completed"
        arrived = {step for title, _, step in server.scalars(task) if title == "train"}
        logged = {step for _, rank, key, step, _ in job.points() if (rank, key) == (0, LOSS)}
        assert arrived == logged
        job.assert_accounted()
