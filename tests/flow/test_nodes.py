"""Several nodes: one run, one gateway on the head, encrypted, whatever the network does."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.errors import BadConfig
from gateway.nodes import own_address
from gateway.supervise import read_json

from .job import RANKS, Job, free_port, wait_until
from .nodes import DEVICE, TwoNodes, lines_of

SCRIPT = str(Path(__file__).with_name("node_ranks.py"))
STEPS, PAUSE = 500, "0.02"

pytestmark = [pytest.mark.torch, pytest.mark.timeout(240)]


@pytest.fixture
def nodes() -> Iterator[TwoNodes]:
    TwoNodes.skip_unless_possible()
    with TwoNodes() as nodes:
        yield nodes


def start(
    job: Job, nodes: TwoNodes, node: int, steps: int, **environ: str
) -> subprocess.Popen[str]:
    """`rankgate run` with torchrun on a node, with a spool that is that node's alone."""
    torchrun = (
        "torchrun", "--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "2",
        "--master-addr", nodes.hosts[0], "--master-port", "29531", "--rdzv-id", "r1",
        SCRIPT, str(job.truth_dir), str(steps), PAUSE,
    )  # fmt: skip
    words = (sys.executable, "-m", "gateway", "run", "--", *torchrun)
    place = {
        "RANKGATE_SPOOL": str(job.spool.with_name(f"spool{node}")),
        "GLOO_SOCKET_IFNAME": DEVICE,
        "OMP_NUM_THREADS": "1",
    }
    return job.start(*nodes.on(node, *words), **place, **environ)


def the_line_for_others(process: subprocess.Popen[str]) -> dict[str, str]:
    """What the head prints for the other nodes, as variables."""
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if line.lstrip().startswith("RANKGATE_ADDR="):
            return dict(re.findall(r"(RANKGATE_\w+)=(\S+)", line))
    raise AssertionError("".join(seen))


def steps_of(job: Job) -> list[int]:
    """How far each rank is, by what it wrote down."""
    return [lines_of(path) for path in job.truth_dir.glob("*.jsonl")]


def stored(job: Job) -> dict[int, int]:
    """rank → records on the gateway's disk."""
    live = read_json(job.data / "runs/r1/live.json").get("streams", ())
    return {s["rank"]: s["durable"] for s in live if s["kind"] == "live"}


def test_two_nodes_are_one_run_through_an_outage_of_the_network(
    tmp_path: Path, nodes: TwoNodes
) -> None:
    """Both nodes log on while the cable is out; once it is back all points of all four ranks are
    there once, over an encrypted connection that the head's printed line was enough for."""
    with Job(tmp_path) as job:
        head = start(job, nodes, 0, STEPS)
        line = the_line_for_others(head)
        assert line["RANKGATE_ADDR"] == f"tcp://{nodes.hosts[0]}:5717"
        elsewhere = {**line, "RANKGATE_DIR": str(tmp_path / "data1")}
        other = start(job, nodes, 1, STEPS, **elsewhere)
        wait_until(lambda: len(stored(job)) == 4 and min(stored(job).values()) > 20, 90,
                   "four ranks are stored")  # fmt: skip
        nodes.cable("down")
        cut = max(steps_of(job))
        wait_until(lambda: min(stored(job)[r] for r in (0, 1)) > cut, 60,
                   "what was told of the ranks is from after the cut")  # fmt: skip
        before = stored(job)
        at = max(steps_of(job))
        wait_until(lambda: min(steps_of(job)) > at + 100, 60, "all ranks train on without network")
        cut_off = stored(job)
        nodes.cable("up")
        assert min(cut_off[r] - before[r] for r in (0, 1)) > 50, "the head's ranks were held up"
        assert max(cut_off[r] - before[r] for r in (2, 3)) < 20, "there was a way round the cable"
        for process in (other, head):
            _, err = process.communicate(timeout=150)
            assert process.returncode == 0, (err, job.log())
        job.assert_all_there()
        rows = [s for s in job.streams() if s.kind == "live"]
        assert sorted((s.rank, s.node) for s in rows) == [
            (0, "node0"), (1, "node0"), (2, "node1"), (3, "node1")
        ]  # fmt: skip
        assert len({s.generation for s in rows}) == 1
        assert not (tmp_path / "data1" / "runs").exists(), "node 1 has a gateway of its own"
        spooled = [{p.name for p in (tmp_path / f"spool{n}/r1").iterdir()} for n in (0, 1)]
        assert not spooled[0] & spooled[1]
        with job.reader() as reader:
            assert reader.about().state == "completed"


def test_nodes_that_share_a_directory_need_nothing_typed(tmp_path: Path, nodes: TwoNodes) -> None:
    """Where both see the data directory, the other node finds address and key in it, and the run
    by torchrun's own id: the same command on each is enough."""
    with Job(tmp_path) as job:
        other = start(job, nodes, 1, 30)
        head = start(job, nodes, 0, 30)
        for process in (other, head):
            _, err = process.communicate(timeout=150)
            assert process.returncode == 0, (err, job.log())
        job.assert_all_there()
        rows = [s for s in job.streams() if s.kind == "live"]
        address = f"tcp://{nodes.hosts[0]}:5717"
        assert {s.rank: s.hello["addr"] for s in rows} == {0: "", 1: "", 2: address, 3: address}
        assert len({s.generation for s in rows}) == 1


def test_a_dead_rank_of_another_node_is_shipped_by_its_own(tmp_path: Path) -> None:
    """The gateway cannot see that node's disk: `rankgate run` there ships what is left, and passes
    the command's exit code on."""
    with Job(tmp_path) as job:
        address = f"tcp://127.0.0.1:{free_port()}"
        job.serve("--bind", address)
        place = {
            "RANKGATE_ADDR": address,
            "RANKGATE_KEYFILE": str(job.data / "gateway.key"),
            "RANKGATE_SPOOL": str(tmp_path / "spool1"),
            "RANKGATE_DIR": str(tmp_path / "data1"),
            "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1",
        }  # fmt: skip
        words = [sys.executable, str(RANKS), str(job.truth_dir), "200", "kill"]
        code, _, err = job.cli("run", "--run", "r1", "--", *words, **place)
        assert code == 137, err
        job.drain()
        job.assert_all_there(extra_allowed=3)
        [stream] = [s for s in job.streams() if s.kind != "tool"]
        assert (stream.kind, stream.rank) == ("replay", 0) or stream.bye
        assert not (tmp_path / "data1" / "runs").exists()


def test_a_gateway_for_this_node_only_is_said_to_be_no_use_to_others(tmp_path: Path) -> None:
    """When one that listens by ipc alone serves the directory already, the head says so, with what
    to do, and the command runs."""
    with Job(tmp_path) as job:
        job.serve()
        words = ["torchrun", "--nnodes", "2", "--node-rank", "0", "--help"]
        code, _, err = job.cli("run", "--", *words)
        assert code == 0
        assert "OTHER NODES CANNOT REACH" in err
        assert "--dir" in err


def test_a_launcher_that_goes_to_the_nodes_takes_address_and_key_along(tmp_path: Path) -> None:
    """With `rankgate run -- srun …` nobody is there to type on the other nodes: the command's
    environment has what their ranks need."""
    try:
        own = own_address("192.0.2.77")
    except BadConfig:
        pytest.skip("this machine has no network")
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text('#!/bin/sh\nexport SLURM_PROCID=0 SLURM_STEP_ID=0\nexec "$@"\n')
    srun.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "17", "SLURM_NNODES": "2", "SLURM_NTASKS": "1", "MASTER_ADDR": own}
    with Job(tmp_path, **slurm) as job:
        words = [str(srun), sys.executable, str(RANKS), str(job.truth_dir), "50", "finish"]
        code, _, err = job.cli(
            "run", "--bind", f"tcp://{own}:{free_port()}", "--", *words, RANK="0"
        )
        assert code == 0, err
        job.assert_all_there("17")
        [row] = [s for s in job.streams("17") if s.kind != "tool"]
        assert row.hello["addr"].startswith(f"tcp://{own}:")
