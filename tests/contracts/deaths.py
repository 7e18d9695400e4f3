"""Deaths of a sink's real process: it is killed, or its vendor's package hangs or ends it.

Life follows life, as the supervisor would have it, until the run is delivered; what counts is the
backend's own record.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from gateway.sinks.store import read_view
from tests.flow.job import ROOT

from .backends import Backend, Jsonl, build_run, standing
from .child import EXIT_CODE
from .faults import Outcome

EXAMPLE = ROOT / "examples/jsonl_sink"
LIFE_SECONDS = 60.0
LATENCY_SECONDS = 0.02  #: of every answer, so that a kill finds a request on its way
LAST_REQUEST = 14  #: a death comes at one of the first so many
HUNG = 1  #: the exit code of a process ended by its own time limit


@dataclass(frozen=True)
class Death:
    name: str
    how: str  #: of tests/contracts/child.py; `kill`: SIGKILL from here
    code: int


DEATHS = (
    Death("SIGKILL", "kill", -9),
    Death("vendor package hangs for ever", "hang", HUNG),
    Death("vendor package ends the process", "exit", EXIT_CODE),
)
LIVE = Death("none", "live", 0)


def entry_point(folder: Path, name: str, module: str) -> None:
    """What pip writes about a package that brings the sink `name`."""
    about = folder / f"{module}-1.0.dist-info"
    about.mkdir(parents=True)
    head = f"Metadata-Version: 2.1\nName: {module}-package\nVersion: 1.0\n"
    (about / "METADATA").write_text(head)
    (about / "entry_points.txt").write_text(f"[rankgate.sinks]\n{name} = {module}:KIND\n")


def play(made: type[Backend], death: Death, folder: Path, seed: int, deaths: int = 1) -> Outcome:
    """A run, delivered by processes of which the first `deaths` die."""
    rng = random.Random(seed)
    run_dir = build_run(folder)
    entry_point(folder / "site", "jsonl", "rankgate_jsonl")
    with standing(made, folder / "backend") as backend:
        if backend.server:
            backend.server.latency_seconds = LATENCY_SECONDS
        for number in range(deaths):
            mark = folder / f"mark-{number}"
            code = life(backend, run_dir, death, rng, mark)
            assert code in (0, death.code), code  # 0: done before its time had come
        code = life(backend, run_dir, LIVE, rng, folder / "mark")
        assert code == 0, code
        have, want = backend.have(), backend.want()
        view = read_view(run_dir / "sinks" / f"{backend.kind}.db")
        lost, doubled = have.lost(want), have.doubled(want)
        return Outcome(lost, doubled, view.maybe_duplicate, view.quarantined, 0.0)


def life(backend: Backend, run_dir: Path, death: Death, rng: random.Random, mark: Path) -> int:
    """One process from its start to its end; the exit code."""
    at = rng.randint(1, 3 if isinstance(backend, Jsonl) else LAST_REQUEST)
    config = msgspec.json.encode(backend.config).decode()
    how = "live" if death.how == "kill" else death.how
    command = [sys.executable, "-m", "tests.contracts.child", how, str(at), str(mark)]
    path = f"{ROOT}:{mark.parent}/site:{EXAMPLE}"
    process = subprocess.Popen(
        [*command, str(run_dir), backend.kind, config, "online"],
        env={**os.environ, "PYTHONPATH": path},
        cwd=ROOT,
    )
    try:
        if death.how == "kill":
            _wait_for_moment(backend, process, at)
            time.sleep(rng.uniform(0, 2 * LATENCY_SECONDS))
            process.kill()
        return process.wait(LIFE_SECONDS)
    finally:
        process.kill()
        process.wait()


def _wait_for_moment(backend: Backend, process: subprocess.Popen[bytes], at: int) -> None:
    """Until the server has had so many more requests, or the folder is there."""
    before = len(backend.server.requests) if backend.server else 0
    lines = backend.folder / "lines"
    while process.poll() is None:
        if backend.server and len(backend.server.requests) >= before + at - 1:
            return
        if not backend.server and lines.exists():
            return
        time.sleep(0.002)
