"""Which nodes a job has, by its launcher's words and environment: are there several, is this the
head, and by which of this machine's addresses do the others reach it."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rank_client import identity

from .errors import BadConfig

PORT = 5717
SPREADING = ("srun", "mpirun", "mpiexec")


@dataclass(frozen=True)
class Nodes:
    """`rendezvous` is the host where the job's nodes meet, `run` and `launch` what they already
    call it among themselves; each empty when nobody says. `spreads`: the command itself starts
    processes on the other nodes, and gives them its environment."""

    several: bool
    head: bool
    rendezvous: str
    run: str = ""
    launch: str = ""
    spreads: bool = False


def nodes_of(words: Sequence[str], environ: Mapping[str, str]) -> Nodes:
    """The command's own options > torchrun's PET_ variables > Slurm's."""

    def told(option: str, *variables: str) -> str:
        found = _option(words, option)
        return found or next((environ[v] for v in variables if environ.get(v)), "")

    count = told("nnodes", "PET_NNODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")
    number = told("node-rank", "PET_NODE_RANK", "SLURM_NODEID")
    endpoint = told("rdzv-endpoint", "PET_RDZV_ENDPOINT")
    host = told("master-addr", "PET_MASTER_ADDR") or _host(endpoint)
    for variable in ("MASTER_ADDR", "SLURM_LAUNCH_NODE_IPADDR", "SLURMD_NODENAME"):
        host = host or environ.get(variable, "")
    spreads = bool(words) and Path(words[0]).name in SPREADING
    several = _most(count) > 1 and "--standalone" not in words
    head = number == "0" if number else not several or not host or _is_ours(host)
    head = head or spreads
    run, launch = _ids(told("rdzv-id", "PET_RDZV_ID"), environ) if several else ("", "")
    return Nodes(several, head, host, run, launch, spreads)


def _option(words: Sequence[str], name: str) -> str:
    """`--nnodes 2`, `--nnodes=2`; with `-` or `_` inside, as torchrun takes both."""
    for at, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option.replace("_", "-") == f"--{name}":
            return value if equals else "".join(words[at + 1 : at + 2])
    return ""


def _most(count: str) -> int:
    """`2`, or `1:4` for one to four."""
    last = count.rpartition(":")[2]
    return int(last) if last.isdigit() else 1


def _host(endpoint: str) -> str:
    """Of `HOST:PORT`, `HOST` or `[IPV6]:PORT`."""
    if endpoint.startswith("["):
        return endpoint[1:].partition("]")[0]
    return endpoint.partition(":")[0]


def _ids(rendezvous_id: str, environ: Mapping[str, str]) -> tuple[str, str]:
    """(run, launch) that every node finds by itself."""
    job = environ.get("SLURM_JOB_ID")
    if job:
        step, restart = environ.get("SLURM_STEP_ID", ""), environ.get("SLURM_RESTART_COUNT", "0")
        run = identity.run_id(environ, identity.place(environ), None)
        return run, f"{job}.{step}.{restart}"
    if rendezvous_id not in ("", "none"):
        return identity.safe_run_id(rendezvous_id), rendezvous_id
    return "", ""


def own_address(host: str) -> str:
    """This machine's address on the way to a host. Raises BadConfig when there is no way."""
    try:
        family, _, _, _, where = socket.getaddrinfo(host, PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(where)  # sends nothing: it only chooses the way
            return str(probe.getsockname()[0])
    except OSError as error:
        raise BadConfig(
            f"cannot find the way to {host} ({error.strerror}); say where to listen: "
            f"--bind tcp://ADDRESS:{PORT} with this machine's address on the nodes' network"
        ) from None


def _is_ours(host: str) -> bool:
    """A way to one of our own addresses begins at that address."""
    try:
        found = socket.getaddrinfo(host, PORT, type=socket.SOCK_DGRAM)[0][4][0]
        return own_address(host) == found
    except (OSError, BadConfig):
        return False


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
