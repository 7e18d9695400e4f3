"""However a process ends: all it logged is there once, its exit code is its own, and it goes soon.

One gateway takes every row of the matrix; what died hard is shipped from its spool by one drain.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from rank_client.run import ABSENT_SECONDS, FINISH_SECONDS

from .job import Job, wait_until
from .leave import EVENTS

LEAVE = str(Path(__file__).with_name("leave.py"))
AT_ONCE = 4  #: processes at a time
SLACK_SECONDS = 3.0  #: of a busy machine


@dataclass(frozen=True)
class Row:
    """`code` is the exit code that it would be without rankgate; `says` what END tells."""

    how: str
    code: int
    state: str
    says: str


ROWS = [
    Row("normal", 0, "completed", "ended"),
    Row("finish", 0, "completed", "completed"),
    Row("exit_0", 0, "completed", "ended"),
    Row("exit_3", 3, "completed", "ended"),  # only a launcher knows the code: `rankgate run`
    Row("raise", 1, "failed", "failed"),
    Row("raise_with_another_hook", 1, "failed", "failed"),
    Row("with", 1, "failed", "failed"),
    Row("os_exit", 7, "lost", ""),
    Row("SIGTERM", -signal.SIGTERM, "lost", ""),
    Row("SIGINT", -signal.SIGINT, "failed", "failed"),
    Row("SIGKILL", -signal.SIGKILL, "lost", ""),
    Row("abort", -signal.SIGABRT, "lost", ""),
    Row("segfault", -signal.SIGSEGV, "lost", ""),
    Row("exec", 5, "lost", ""),
    Row("daemon", 0, "completed", "ended"),
    Row("atexit_before", 0, "completed", "ended"),
    Row("atexit_after", 0, "completed", "ended"),
    Row("killed_in_finish", -signal.SIGKILL, "completed", "completed"),  # its END was written
]


@dataclass(frozen=True)
class Outcome:
    code: int
    delay_seconds: float  #: from the last event to the end of the process
    err: str


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Job, dict[str, Outcome]]]:
    """Every row has run, in a run of its own, and all is shipped."""
    before = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, before[1]))  # abort and segfault leave no core
    with Job(tmp_path_factory.mktemp("exits")) as job:
        job.serve()
        outcomes: dict[str, Outcome] = {}
        for at in range(0, len(ROWS), AT_ONCE):
            started = {row.how: leave(job, row.how) for row in ROWS[at : at + AT_ONCE]}
            outcomes |= wait_ended(job, started)
        job.drain()
        yield job, outcomes
    resource.setrlimit(resource.RLIMIT_CORE, before)


def wait_ended(job: Job, started: dict[str, subprocess.Popen[str]]) -> dict[str, Outcome]:
    ended: dict[str, float] = {}
    while len(ended) < len(started):
        for how, process in started.items():
            if how not in ended and process.poll() is not None:
                ended[how] = time.time()
        time.sleep(0.01)
    out = {}
    for how, process in started.items():
        began = float((job.truth_dir / f"{how}.ends").read_text())
        _, err = process.communicate()
        out[how] = Outcome(process.returncode, ended[how] - began, err)
    return out


def leave(job: Job, how: str, **environ: str) -> subprocess.Popen[str]:
    if how == "killed_in_finish":
        environ["RANKGATE_ADDR"] = f"ipc://{job.data}/nobody"
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    words = (sys.executable, LEAVE, str(job.truth_dir), how)
    return job.start(*words, **{"RANKGATE_RUN": how, **place, **environ})


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.how)
def test_all_arrives_and_the_exit_is_the_processs_own(
    matrix: tuple[Job, dict[str, Outcome]], row: Row
) -> None:
    """1000 of 1000 once, in order, accounted for; the code, the state and the END as they are."""
    job, outcomes = matrix
    outcome = outcomes[row.how]
    assert outcome.code == row.code, outcome.err
    if row.how != "daemon":
        job.assert_all_there(row.how)
    with job.reader(row.how) as reader:
        steps = reader.points("loss").step.tolist()
        [stream] = reader.streams()
        about = reader.about()
    assert len(steps) == EVENTS or (row.how == "daemon" and len(steps) > EVENTS)
    assert steps == list(range(len(steps)))
    assert (about.state, stream.status) == (row.state, row.says), about.reason
    assert ("the loss exploded" in about.reason) == ("raise" in row.how or row.how == "with")


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.how)
def test_the_end_is_not_held_up(matrix: tuple[Job, dict[str, Outcome]], row: Row) -> None:
    """With a gateway that answers, no way to end takes long."""
    _, outcomes = matrix
    assert outcomes[row.how].delay_seconds < FINISH_SECONDS / 2


def test_what_a_daemon_thread_logs_too_late_is_said(
    matrix: tuple[Job, dict[str, Outcome]],
) -> None:
    """What was logged while the process ended is there up to some call, without a hole; that no
    more is taken is said once."""
    job, outcomes = matrix
    assert outcomes["daemon"].err.count("log after finish does nothing") == 1
    job.assert_accounted("daemon")
    with job.reader("daemon") as reader:
        reasons = {loss[4] for loss in reader.losses()}
    assert reasons <= {"after finish", "refused at its end"}


def test_without_an_answer_the_exit_waits_for_its_limit_only(tmp_path: Path) -> None:
    """A gateway that stopped answering holds an exit up for FINISH_SECONDS, one that never was
    for ABSENT_SECONDS; then the code is the script's, and nothing is lost."""
    with Job(tmp_path) as job:
        job.serve()
        stuck = leave(job, "stuck")
        wait_until(lambda: (job.data / "runs/stuck/journal").is_dir(), what="it is welcomed")
        ingest = job.child("ingest")
        os.kill(ingest, signal.SIGSTOP)
        (job.truth_dir / "go").touch()
        nobody = leave(job, "normal", RANKGATE_ADDR=f"ipc://{tmp_path}/nobody")
        outcomes = wait_ended(job, {"stuck": stuck, "normal": nobody})
        os.kill(ingest, signal.SIGCONT)
        job.drain()
        job.assert_all_there("stuck")
        job.assert_all_there("normal")
    assert (outcomes["stuck"].code, outcomes["normal"].code) == (1, 0)
    assert outcomes["stuck"].delay_seconds < FINISH_SECONDS + SLACK_SECONDS
    assert outcomes["normal"].delay_seconds < ABSENT_SECONDS + SLACK_SECONDS
    for outcome in outcomes.values():
        assert "not all is acknowledged yet; it is safe in" in outcome.err
