"""Nodes: what a launcher's words and environment say of them."""

from __future__ import annotations

import socket

import pytest

from gateway.errors import BadConfig
from gateway.nodes import is_loopback, nodes_of, own_address

ELSEWHERE = "192.0.2.77"  # for documentation only: no machine has it


@pytest.mark.parametrize(
    ("words", "environ", "several"),
    [
        ("torchrun train.py", {}, False),
        ("torchrun --nnodes 1 train.py", {}, False),
        ("torchrun --nnodes 2 train.py", {}, True),
        ("torchrun --nnodes=1:4 train.py", {}, True),
        ("torchrun --nnodes 1:1 train.py", {}, False),
        ("python train.py", {"PET_NNODES": "2"}, True),
        ("python train.py", {"PET_NNODES": "1", "SLURM_NNODES": "4"}, False),
        ("python train.py", {"SLURM_NNODES": "4"}, True),
        ("python train.py", {"SLURM_JOB_NUM_NODES": "4"}, True),
        ("torchrun --nnodes 1 train.py", {"SLURM_NNODES": "4"}, False),
        ("torchrun --standalone train.py", {"SLURM_NNODES": "4"}, False),
        ("torchrun --nnodes", {}, False),
        ("torchrun --nnodes many", {}, False),
    ],
)
def test_how_many_nodes_are_asked_for(words: str, environ: dict[str, str], several: bool) -> None:
    """The command's words go first, then PET_, then Slurm; nonsense means one."""
    assert nodes_of(words.split(), environ).several is several


@pytest.mark.parametrize(
    ("words", "environ", "head"),
    [
        ("torchrun --nnodes 2 --node-rank 0", {}, True),
        ("torchrun --nnodes 2 --node_rank=1", {}, False),
        ("torchrun --nnodes 2", {"PET_NODE_RANK": "1"}, False),
        ("torchrun --nnodes 2", {"SLURM_NODEID": "0", "MASTER_ADDR": ELSEWHERE}, True),
        ("torchrun --nnodes 2", {"SLURM_NODEID": "3"}, False),
        (f"torchrun --nnodes 2 --rdzv-endpoint {ELSEWHERE}:29500", {}, False),
        ("torchrun --nnodes 2 --rdzv-endpoint=127.0.0.1:29500", {}, True),
        (f"torchrun --nnodes 2 --master-addr {ELSEWHERE}", {}, False),
        ("torchrun --nnodes 2", {}, True),
        (f"torchrun --nnodes 1 --master-addr {ELSEWHERE}", {}, True),
    ],
)
def test_which_node_is_the_head(words: str, environ: dict[str, str], head: bool) -> None:
    """Node rank 0; where nobody counts them, the one at whose address they meet."""
    assert nodes_of(words.split(), environ).head is head


@pytest.mark.parametrize(
    ("words", "environ", "host"),
    [
        ("x --master-addr a --rdzv-endpoint b:1", {"MASTER_ADDR": "c"}, "a"),
        ("x --rdzv_endpoint b:1", {"MASTER_ADDR": "c"}, "b"),
        ("x --rdzv-endpoint=[fd00::1]:29500", {}, "fd00::1"),
        ("x", {"PET_RDZV_ENDPOINT": "p:1", "MASTER_ADDR": "c"}, "p"),
        ("x", {"MASTER_ADDR": "c", "SLURM_LAUNCH_NODE_IPADDR": "d"}, "c"),
        ("x", {"SLURM_LAUNCH_NODE_IPADDR": "d"}, "d"),
        ("x", {}, ""),
    ],
)
def test_where_the_nodes_meet(words: str, environ: dict[str, str], host: str) -> None:
    """The command's options, PET_, MASTER_ADDR, then the node srun was called on."""
    assert nodes_of(words.split(), environ).rendezvous == host


@pytest.mark.parametrize("launcher", ["srun", "/usr/bin/srun", "mpirun"])
def test_a_launcher_that_goes_to_the_nodes_is_started_on_the_head(launcher: str) -> None:
    """`rankgate run -- srun …` is the one wrapper of all nodes, wherever they meet."""
    found = nodes_of([launcher, "train"], {"SLURM_NNODES": "2", "MASTER_ADDR": ELSEWHERE})
    assert (found.several, found.head, found.spreads) == (True, True, True)
    assert not nodes_of(["torchrun", "srun"], {"SLURM_NNODES": "2"}).spreads


def test_nodes_of_slurm_share_ids_and_a_restart_is_another_launch() -> None:
    """Run and launch follow from the job, the same on each node; a requeue keeps the run only."""
    job = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "17", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0",
           "SLURM_NTASKS": "2"}  # fmt: skip
    one = nodes_of(["x"], {**job, "SLURM_NODEID": "0"})
    two = nodes_of(["x"], {**job, "SLURM_NODEID": "1", "SLURM_PROCID": "1"})
    again = nodes_of(["x"], {**job, "SLURM_RESTART_COUNT": "1"})
    assert (one.run, one.launch) == (two.run, two.launch)
    assert one.run == again.run == "17.0"
    assert one.launch != again.launch


def test_a_rendezvous_id_names_the_run() -> None:
    """torchrun's --rdzv-id is the same on each node; `none` is nobody's."""
    assert nodes_of("x --nnodes 2 --rdzv-id my/job".split(), {}).run.startswith("my-job-")
    assert nodes_of("x --nnodes 2 --rdzv-id none".split(), {}).run == ""
    assert nodes_of("x --nnodes 1 --rdzv-id my".split(), {}).run == ""


def test_the_way_to_oneself_begins_at_oneself() -> None:
    """Towards an address of this machine the way begins there; to no known name there is none."""
    assert own_address("127.0.0.1") == "127.0.0.1"
    with pytest.raises(BadConfig, match="--bind tcp://ADDRESS:5717"):
        own_address("no-such-host.invalid")


def test_the_way_out_is_an_address_one_can_listen_on() -> None:
    """The address towards another network is one of this machine's own."""
    try:
        own = own_address(ELSEWHERE)
    except BadConfig:
        pytest.skip("this machine has no way out")
    assert not is_loopback(own)
    with socket.socket() as probe:
        probe.bind((own, 0))
