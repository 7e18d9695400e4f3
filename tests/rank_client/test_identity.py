"""Identity: which rank, which run, which launch, from what a launcher leaves in the environment."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rank_client import identity
from rank_client.identity import Place, attributes, launch, place, run_id, safe_run_id
from rank_client.wire.keys import valid_run_id

TORCH = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
SLURM = {
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "2",
    "SLURM_NTASKS": "8",
    "SLURM_NNODES": "2",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "77",
}
MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Place(-1, 0, 1, 1, "none")),
        (TORCH, Place(5, 1, 8, 4, "torch")),
        (SLURM, Place(6, 2, 8, 4, "slurm")),
        (MPI, Place(3, 1, 4, 2, "mpi")),
        (TORCH | SLURM | MPI, Place(5, 1, 8, 4, "torch")),
        (SLURM | MPI, Place(6, 2, 8, 4, "slurm")),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Place(-1, 0, 1, 1, "none")),
        (TORCH | {"RANK": "x"}, Place(-1, 0, 1, 1, "none")),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, Place(-1, 0, 1, 1, "none")),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, Place(0, 0, 2, 2, "torch")),
    ],
)
def test_the_place_of_a_process(environ: dict[str, str], expected: Place) -> None:
    """torchrun's variables win over Slurm's, Slurm's over MPI's; a RANK alone, a batch script's
    Slurm variables or nonsense make a process on its own."""
    assert place(environ) == expected


def test_an_explicit_rank_wins() -> None:
    """What `init` is told goes before what the environment says, which fills what is left out."""
    assert place(TORCH, rank=2) == Place(2, 1, 8, 4, "explicit")
    assert place({}, rank=3) == Place(3, 0, 4, 4, "explicit")
    assert place(TORCH, rank=9, local_rank=3, world_size=16) == Place(9, 3, 16, 4, "explicit")


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"RANKGATE_RUN": "mine", "SLURM_JOB_ID": "77"}, "mine"),
        (SLURM, "77.0"),
        ({"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0"}, "77"),
        (
            {"SLURM_JOB_ID": "79", "SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "2"},
            "77_2",
        ),
        ({"SLURM_JOB_ID": "77", "TORCHELASTIC_RUN_ID": "abc"}, "77"),
        ({"TORCHELASTIC_RUN_ID": "abc"}, "abc"),
    ],
)
def test_the_run_of_a_process(environ: dict[str, str], expected: str) -> None:
    """The environment's run wins, then Slurm's job and step, then torchrun's id."""
    assert run_id(environ, place(environ), None) == expected
    assert run_id(environ, place(environ), "said") == "said"


def test_a_process_on_its_own_shares_its_run_with_nobody() -> None:
    """Two scripts of one terminal are two runs."""
    alone = place({})
    assert run_id({}, alone, None) != run_id({}, alone, None)


@pytest.mark.parametrize("elastic", [{}, {"TORCHELASTIC_RUN_ID": "none"}])
def test_ranks_of_one_parent_share_a_run(elastic: dict[str, str]) -> None:
    """Without any id, processes of one parent find the same run, and it is a good run id."""
    code = (
        "import sys; from rank_client.identity import place, run_id; "
        "rank = {'RANK': '0', 'LOCAL_RANK': '0', 'WORLD_SIZE': '2'}; "
        "print(run_id(dict(a.split('=') for a in sys.argv[1:]), place(rank), None))"
    )
    arguments = [f"{k}={v}" for k, v in elastic.items()]
    found = {
        subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()
        for _ in range(2)
    }
    assert len(found) == 1
    assert valid_run_id(found.pop())


@given(st.text(max_size=100))
def test_any_launcher_id_becomes_a_run_id(text: str) -> None:
    """Whatever a launcher calls its run, the result is a valid run id, and a valid one stays."""
    made = safe_run_id(text)
    assert valid_run_id(made)
    assert made == text or not valid_run_id(text)


@pytest.mark.parametrize("text", ["..", ".", "/", "-/-", "ü"])
def test_a_run_id_is_no_option(text: str) -> None:
    """What is made of an id that is none does not begin as an option does."""
    assert safe_run_id(text)[0].isalnum()


@given(st.text(max_size=20), st.text(max_size=20))
def test_different_ids_stay_different(a: str, b: str) -> None:
    """Two different ids of launchers never become one run."""
    assert (safe_run_id(a) == safe_run_id(b)) == (a == b)


@pytest.mark.parametrize("text", ["", ".", "..", "a/b", "../x", "a\n", "a b", "x" * 65, "é", "a\0"])
def test_what_is_no_run_id(text: str) -> None:
    """A run id is a file name of safe characters, never a path."""
    assert not valid_run_id(text)


def test_a_launch_is_named_by_the_wrapper_first() -> None:
    """The wrapper's launch id wins, then the launcher's, then the parent process."""
    assert launch({"RANKGATE_LAUNCH": "w", "SLURM_JOB_ID": "7"}) == "w"
    assert launch({"SLURM_JOB_ID": "7"}) == "7"
    assert launch({}) == identity.agent()


def test_a_requeued_job_is_another_launch() -> None:
    """Slurm keeps a job's id over a requeue; its count tells the launches apart."""
    job = {"SLURM_JOB_ID": "7", "TORCHELASTIC_RUN_ID": "x"}
    assert launch(job) == launch(job | {"SLURM_RESTART_COUNT": "0"}) == "7x"
    assert launch(job | {"SLURM_RESTART_COUNT": "2"}) == "7+2x"


def test_the_agent_tells_parents_apart() -> None:
    """The parent process is named with its boot and its start, as numbers are used again."""
    boot, pid, start = identity.agent().split(":")
    assert boot == identity.boot_id()
    assert int(pid) == os.getppid()
    assert start == identity.process_start(os.getppid())
    assert identity.process_start(2**22 + 1) == ""


def test_attributes_name_the_restart() -> None:
    """torchrun's restart count, or Slurm's after a requeue, stands in the attributes."""
    where = place(TORCH)
    assert attributes(TORCH | {"TORCHELASTIC_RESTART_COUNT": "2"}, where)["restart"] == 2
    assert attributes(SLURM | {"SLURM_RESTART_COUNT": "1"}, place(SLURM))["restart"] == 1
    assert attributes({}, where)["restart"] == 0
    assert attributes(TORCH, where)["rank"] == 5


def in_child(queue: Any) -> None:
    queue.put(identity.in_worker_process())


def test_children_of_multiprocessing_are_workers() -> None:
    """A process that multiprocessing started is a worker, its parent is none."""
    assert not identity.in_worker_process()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=in_child, args=(queue,))
    child.start()
    assert queue.get() is True
    child.join()
