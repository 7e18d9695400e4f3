"""What the commands around a gateway share: having one, holding it, waiting until all is done."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw

from rank_client import orphans
from rank_client.rendezvous import LOCK_GATEWAY, ipc_address, locked, start_gateway

from .series.reader import Reader
from .sinks.process import fresh
from .sinks.store import read_view, store_name
from .supervise import STALE_SECONDS, read_json

START_SECONDS = 15.0
POLL_SECONDS = 0.1


def served(root: Path) -> bool:
    """Does a gateway answer for this directory right now?"""
    at_ns = read_json(root / "ingest.json").get("at_ns", 0)
    alive = locked(root / "gateway.lock", LOCK_GATEWAY)
    return alive and time.time_ns() - at_ns < STALE_SECONDS * 1e9


def ensure(
    root: Path,
    environ: Mapping[str, str],
    config: str = "",
    sinks: tuple[str, ...] = (),
    bind: str = "",
) -> None:
    """Start a gateway unless there is one; does not wait for it. Raises OSError."""
    if not locked(root / "gateway.lock", LOCK_GATEWAY):
        start_gateway(root, environ, config, sinks, bind)


def wait_served(root: Path, seconds: float = START_SECONDS) -> bool:
    deadline = time.monotonic() + seconds
    while not served(root):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def wait_fresh(root: Path, seconds: float = START_SECONDS) -> bool:
    """Until ingest has told its state anew: what was acknowledged before is then in it."""
    since, deadline = time.time_ns(), time.monotonic() + seconds
    while read_json(root / "ingest.json").get("at_ns", 0) <= since:
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS / 2)
    return True


def runs(root: Path) -> bool:
    """Does some process hold this directory, whether it answers yet or not?"""
    return locked(root / "gateway.lock", LOCK_GATEWAY)


def network_address(root: Path) -> str:
    """Where other nodes reach the directory's gateway, empty when they cannot."""
    where = read_json(root / "gateway.json").get("addresses", ())
    return next((a for a in where if a.startswith("tcp://")), "")


def wait_network_address(root: Path, seconds: float) -> str:
    """From another node that sees the directory: of a gateway that has given a sign of life
    since we look, as the clocks of two nodes differ."""
    path, deadline = root / "ingest.json", time.monotonic() + seconds
    before = read_json(path).get("at_ns")
    while time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        if read_json(path).get("at_ns") != before and (found := network_address(root)):
            return found
    return ""


@contextmanager
def hold(root: Path) -> Iterator[None]:
    """Keep a detached gateway from leaving while we still want something of it."""
    path = root / "holds" / str(os.getpid())
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)  # `parents` are made with any mode
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.touch()
    except OSError:
        pass  # then it may leave early, and is started again
    try:
        yield
    finally:
        try:
            path.unlink(missing_ok=True)
        except OSError:
            pass  # there was no directory to leave it in


def address(root: Path) -> str:
    return ipc_address(root)


def runs_of_launch(root: Path, launch: str) -> list[str]:
    """The runs that have a stream of this launch, by their series."""
    out = []
    for run_dir in sorted((root / "runs").glob("*")):
        try:
            with Reader(run_dir) as reader:
                if any(s.hello.get("launch") == launch for s in reader.streams()):
                    out.append(run_dir.name)
        except (apsw.Error, KeyError):
            continue  # no series yet
    return out


def spooled_runs(root: Path, launch: str, spool: Path) -> list[str]:
    """The runs of a data directory that have a stream of this launch in a spool, shipped or not."""
    out, here = set(), os.path.realpath(root)
    for directory in orphans.stream_directories(spool):
        hello = orphans.read_hello(directory) or {}
        if hello.get("launch") == launch and os.path.realpath(str(hello.get("dir"))) == here:
            out.add(directory.parent.name)
    return sorted(out)


@dataclass(frozen=True)
class Progress:
    """How far a run is from being dealt with."""

    run: str
    projected: bool
    waiting: tuple[str, ...]  #: names of the sinks that still have something to do

    @property
    def done(self) -> bool:
        return self.projected and not self.waiting


def sinks_of(root: Path) -> dict[str, str]:
    """name → mode of the sinks the gateway of this directory was started with."""
    return dict(read_json(root / "supervisor.json").get("sinks", {}))


def progress(root: Path, run: str) -> Progress:
    """Where a run stands with the gateway and each of its sinks."""
    run_dir = root / "runs" / run
    end = read_json(root / "ingest.json").get("journals", {}).get(run, 0)
    sinks = sinks_of(root)
    try:
        with Reader(run_dir) as reader:
            projected = reader.about().cursor >= end
            waiting = tuple(
                name
                for name, mode in sinks.items()
                if not _is_off(run_dir, name, mode)
                and not fresh(run_dir, name, reader, mode == "offline")
            )
    except (apsw.Error, KeyError):
        return Progress(run, False, tuple(sinks))
    return Progress(run, projected, waiting)


def delivered(run_dir: Path, name: str, mode: str) -> bool:
    """Is there nothing left to do for this sink, whoever did it?"""
    try:
        with Reader(run_dir) as reader:
            return fresh(run_dir, name, reader, mode == "offline")
    except (apsw.Error, KeyError):
        return False


def _is_off(run_dir: Path, name: str, mode: str) -> bool:
    path = run_dir / "sinks" / store_name(name, mode)
    try:
        return path.exists() and read_view(path).state == "off"
    except apsw.Error:
        return False  # being made at this moment


def wait_done(
    root: Path,
    runs: Callable[[], list[str]],
    seconds: float,
    tell: Callable[[list[Progress]], None],
) -> bool:
    """Until every run is projected and its sinks have nothing left; False when time was out."""
    deadline = time.monotonic() + seconds
    while True:
        states = [progress(root, run) for run in runs()]
        tell(states)
        if all(state.done for state in states):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)


def ask_delivery(root: Path) -> list[str]:
    """Ask the gateway to look after every run of the directory, ended ones too; their ids."""
    runs = []
    for journal in sorted(root.glob("runs/*/journal")):
        requests = journal.parent / "requests"
        requests.mkdir(mode=0o700, exist_ok=True)
        (requests / "deliver").touch()
        runs.append(journal.parent.name)
    return runs


def last_lines(path: Path, n: int = 3) -> str:
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-n:])
    except OSError:
        return ""


def journals(root: Path) -> dict[str, Any]:
    return dict(read_json(root / "ingest.json").get("journals", {}))
