"""Children, threads, handlers: the parent's log is whole and its own, and no child ever hangs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gateway.series.tables import StreamRow

from .job import Job, wait_until

FAMILY = str(Path(__file__).with_name("family.py"))
SPAWNED = str(Path(__file__).with_name("spawned.py"))
PLACE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
WAYS = ["forks", "threads", "forkserver", "spawn", "fork", "forked_rank", "outlived", "notebook",
        "two_runs", "refused"]  # fmt: skip
AT_ONCE = 4  #: processes at a time


@dataclass(frozen=True)
class Family:
    """All ways, each in a run of its own, at one gateway. `err`: what each wrote to stderr."""

    job: Job
    code: dict[str, int]
    err: dict[str, str]
    worker: int  #: outlived its parent

    def check(self, how: str, expected: int = 0) -> list[StreamRow]:
        """It ended as it should, all it logged is there; its streams."""
        assert self.code[how] == expected, self.err[how]
        self.job.assert_all_there(how)
        return self.job.streams(how)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    with Job(tmp_path_factory.mktemp("forks")) as job:
        job.serve()
        code, err = {}, {}
        for at in range(0, len(WAYS), AT_ONCE):
            started = {how: start(job, how) for how in WAYS[at : at + AT_ONCE]}
            for how, process in started.items():
                err[how] = process.communicate(timeout=100)[1]
                code[how] = process.returncode
        worker = int((job.truth_dir / "worker").read_text())
        job.drain()
        yield Family(job, code, err, worker)
        (job.truth_dir / "go").touch()
        wait_until(lambda: not Path(f"/proc/{worker}").exists(), what="the worker ends")


def start(job: Job, how: str) -> subprocess.Popen[str]:
    words = (sys.executable, FAMILY, str(job.truth_dir), how)
    return job.start(*words, **{"RANKGATE_RUN": how, **PLACE})


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_childs_calls_do_nothing(family: Family, method: str) -> None:
    """By whatever method a child is started, the run it was given does nothing in it; the
    parent's stream is whole, and the only one."""
    assert len(family.check(method)) == 1


def test_threads_handlers_and_finalizers_log_at_once(family: Family) -> None:
    """Sixteen threads, a signal handler and `__del__` in the midst of `log`: every call is there
    once, under numbers without a hole."""
    [stream] = family.check("threads")
    assert stream.gaps == 0, family.err["threads"]
    calls = sum(map(len, family.job.truth("threads").values()))
    with family.job.reader("threads") as reader:
        printed = len(reader.texts_of(stream.index, 0))
    assert stream.last_seq == calls + printed + 1, family.err["threads"]  # and its END


def test_fifty_forks_of_a_busy_process(family: Family) -> None:
    """No child hangs on a lock that a thread of its parent's held; the parent loses nothing."""
    [stream] = family.check("forks")
    with family.job.reader("forks") as reader:
        assert stream.status == "ended"
        assert len(reader.media()) > 5
        assert all(m.sha256 for m in reader.media())


def test_a_forked_child_that_is_a_rank(family: Family) -> None:
    """`init(rank=…)` in a forked child makes a stream of its own, delivered while it lives."""
    assert sorted(s.rank for s in family.check("forked_rank")) == [0, 1]
    assert (family.job.truth_dir / "delivered").read_text() == "True"


def test_a_killed_rank_whose_worker_lives_on(family: Family) -> None:
    """A forked worker that outlives its rank does not keep the rank's spool from being shipped."""
    os.kill(family.worker, 0)  # raises if it is gone
    family.check("outlived", expected=-9)
    assert family.job.orphans() == []


def test_a_cell_run_twice(family: Family) -> None:
    """At a prompt, init twice makes two lives that both are stored, and a typo fails neither."""
    streams = family.check("notebook")
    assert "ZeroDivisionError" in family.err["notebook"]
    assert [(s.generation, s.status) for s in streams] == [(0, "ended"), (1, "ended")]
    with family.job.reader("notebook") as reader:
        assert reader.about().state == "completed"


def test_two_runs_in_one_process(family: Family) -> None:
    """Each run gets its own points."""
    assert len(family.check("two_runs")) == 1
    family.job.assert_all_there("the_other")
    assert {key for _, _, key, _, _ in family.job.points("the_other")} == {"y"}


def test_a_child_that_may_be_meant_as_a_rank_is_told(family: Family) -> None:
    """init() without a rank in a child of multiprocessing does nothing, and says so once, where
    a rank's variables are set."""
    assert len(family.check("refused")) == 1
    assert family.err["refused"].count("init() does nothing in a child of multiprocessing") == 1


@pytest.mark.torch
@pytest.mark.timeout(180)
def test_data_loader_workers_and_spawned_ranks(tmp_path: Path) -> None:
    """Workers of all three start methods log nothing and are no ranks; processes of `mp.spawn`
    that say their rank are."""
    with Job(tmp_path) as job:
        job.serve()
        process = job.start(
            sys.executable, SPAWNED, str(job.truth_dir), RANK="0", OMP_NUM_THREADS="1"
        )
        _, err = process.communicate(timeout=150)
        assert process.returncode == 0, err
        assert "does nothing in a child" not in err  # a worker of a DataLoader is never meant
        job.drain()
        for run, ranks in (("loader", [-1]), ("spawned", [0, 1])):
            job.assert_all_there(run)
            assert sorted(s.rank for s in job.streams(run)) == ranks
            with job.reader(run) as reader:
                assert reader.about().state == "completed"
                assert len(reader.about().generations) == 1
