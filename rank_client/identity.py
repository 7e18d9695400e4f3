"""Who this process is: its rank, its run, its launch, the life it leads.

Rank, node and world size are attributes of a stream, never part of its identity: torchrun may
give a node another rank after a restart.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .wire.keys import valid_run_id


@dataclass(frozen=True)
class Place:
    """Where a process stands in its job; rank -1 and world size 1 for a process on its own."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    launcher: str  #: torch | slurm | mpi | explicit | none


def safe_run_id(text: str) -> str:
    """A launcher's id as a run id: itself where it is one, else a readable hash of it."""
    if valid_run_id(text):
        return text
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:40] or "run"
    return f"{stem}-{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:12]}"


def _number(environ: Mapping[str, str], name: str) -> int | None:
    try:
        return int(environ[name])
    except (KeyError, ValueError):
        return None


def place(
    environ: Mapping[str, str],
    rank: int | None = None,
    local_rank: int | None = None,
    world_size: int | None = None,
) -> Place:
    """Explicit > RANK, LOCAL_RANK and WORLD_SIZE all set > Slurm > MPI > a single process.

    A RANK without LOCAL_RANK is a pod's or a leftover, not a process's rank.
    """
    found = _torch(environ) or _slurm(environ) or _mpi(environ) or Place(-1, 0, 1, 1, "none")
    if rank is None:
        return found
    size = world_size if world_size is not None else max(found.world_size, rank + 1, 1)
    local = local_rank if local_rank is not None else max(found.local_rank, 0)
    here = found.local_world_size if found.launcher != "none" else size
    return Place(rank, local, size, here, "explicit")


def _torch(environ: Mapping[str, str]) -> Place | None:
    rank, local = _number(environ, "RANK"), _number(environ, "LOCAL_RANK")
    size = _number(environ, "WORLD_SIZE")
    if rank is None or local is None or size is None:
        return None
    return Place(rank, local, size, _number(environ, "LOCAL_WORLD_SIZE") or size, "torch")


def _slurm(environ: Mapping[str, str]) -> Place | None:
    rank, size = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_NTASKS")
    if rank is None or size is None or "SLURM_STEP_ID" not in environ:
        return None
    nodes = _number(environ, "SLURM_NNODES") or 1
    return Place(rank, _number(environ, "SLURM_LOCALID") or 0, size, max(1, size // nodes), "slurm")


def _mpi(environ: Mapping[str, str]) -> Place | None:
    rank = _number(environ, "OMPI_COMM_WORLD_RANK")
    size = _number(environ, "OMPI_COMM_WORLD_SIZE")
    if rank is None or size is None:
        return None
    local = _number(environ, "OMPI_COMM_WORLD_LOCAL_RANK") or 0
    return Place(rank, local, size, _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE") or size, "mpi")


def boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def process_start(pid: int) -> str:
    """When a process started, in clock ticks since boot; empty where /proc does not tell."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()  # a command's name may be cut anywhere
    except OSError:
        return ""
    return stat.rpartition(b")")[2].split()[19].decode()


def agent() -> str:
    """The process that started us, told apart from every other process of every boot."""
    parent = os.getppid()
    return f"{boot_id()}:{parent}:{process_start(parent)}"


def run_id(environ: Mapping[str, str], where: Place, explicit: str | None) -> str:
    """Explicit > RANKGATE_RUN > Slurm > TORCHELASTIC_RUN_ID > one node's parent process.

    A process without any launcher gets a new one each time.
    """
    if explicit:
        return explicit
    if environ.get("RANKGATE_RUN"):
        return safe_run_id(environ["RANKGATE_RUN"])
    job = environ.get("SLURM_JOB_ID")
    if job:
        array = environ.get("SLURM_ARRAY_TASK_ID")
        job = f"{environ.get('SLURM_ARRAY_JOB_ID', job)}_{array}" if array else job
        step = environ.get("SLURM_STEP_ID")
        return safe_run_id(f"{job}.{step}" if where.launcher == "slurm" and step else job)
    elastic = environ.get("TORCHELASTIC_RUN_ID", "none")
    if elastic not in ("none", ""):
        return safe_run_id(elastic)
    if where.launcher == "none":
        return os.urandom(6).hex()  # a process on its own shares its run with nobody
    return hashlib.sha256(agent().encode()).hexdigest()[:12]


def launch(environ: Mapping[str, str]) -> str:
    """One launch of the whole group: from the wrapper, else the launcher's own id. A requeued
    job of Slurm's keeps its id and is another launch."""
    requeued = _number(environ, "SLURM_RESTART_COUNT")
    job = environ.get("SLURM_JOB_ID", "") + (f"+{requeued}" if requeued else "")
    return environ.get("RANKGATE_LAUNCH") or job + environ.get("TORCHELASTIC_RUN_ID", "") or agent()


def in_worker_process() -> bool:
    """A child of multiprocessing (a DataLoader worker, a spawned main re-executed): no rank."""
    process = sys.modules.get("multiprocessing.process")
    if process is not None and process.parent_process() is not None:
        return True
    return _in_data_loader()


def _in_data_loader() -> bool:
    data = sys.modules.get("torch.utils.data")
    info = getattr(data, "get_worker_info", None)
    return info is not None and info() is not None


def could_be_rank(environ: Mapping[str, str]) -> bool:
    """A child of multiprocessing that may be meant as a rank, as under `torch.multiprocessing`:
    a rank's variables are set, and it is no DataLoader worker."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")
    return any(name in environ for name in names) and not _in_data_loader()


def attributes(environ: Mapping[str, str], where: Place) -> dict[str, object]:
    """What HELLO tells of a stream, besides its id and run."""
    return {
        "rank": where.rank,
        "local_rank": where.local_rank,
        "world_size": where.world_size,
        "launcher": where.launcher,
        "launch": launch(environ),
        "restart": _number(environ, "TORCHELASTIC_RESTART_COUNT")
        or _number(environ, "SLURM_RESTART_COUNT")
        or 0,
        "agent": agent(),
        "group": _number(environ, "GROUP_RANK") or 0,
        "node": socket.gethostname(),
        "boot": boot_id(),
        "pid": os.getpid(),
        "argv0": Path(sys.argv[0]).name if sys.argv else "",
    }
