"""Starting, watching and ending the gateway's processes: ingest, rules, one per (run, sink).

Every child may die at any instruction; it is started again with a growing pause and goes on from
disk. A thread ships what dead ranks of this node left behind (`sweeper.py`).
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw
import msgspec

from rank_client.rendezvous import clean_environment, gateway_command

from . import parent
from .config import Config
from .series.reader import Reader
from .sinks import keep, requests
from .sinks.loop import ENDED
from .sinks.process import BUSY, OFF, fresh
from .sinks.store import store_name
from .sweeper import Sweeper

TICK_SECONDS = 0.2
STOP_SECONDS = 15.0
LINGER_SECONDS = 3.0  #: with nothing to do, before a detached gateway leaves
UNUSED_SECONDS = 60.0  #: the same when nobody ever came
STALE_SECONDS = 3.0
LOOK_SECONDS = 1.0
KEEP_SECONDS = 2.0  #: between two looks for checkpoints that policy drops
BIND_FAILED = 69  #: exit code of ingest; the message is in its log

log = logging.getLogger("rankgate")


def read_json(path: Path) -> dict[str, Any]:
    """A small file another process writes by rename; empty when it is not there."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, value: dict[str, Any]) -> None:
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(value))
    part.rename(path)


def _marks(run_dir: Path, store: str) -> tuple[int, ...]:
    """When the files that decide whether a sink has work were written."""
    out = [_mtime_ns(run_dir / "requests")]
    for path in (run_dir / "series.db", run_dir / "sinks" / store):
        out += [_mtime_ns(Path(f"{path}{suffix}")) for suffix in ("", "-wal")]
    return tuple(out)


def _mtime_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


@dataclass
class Child:
    """A process that should be running, and when to start it (again)."""

    command: list[str]
    process: subprocess.Popen[bytes] | None = None
    start_at: float = 0.0
    pause_seconds: float = 0.2
    started_at: float = 0.0

    def start(self, environ: dict[str, str], now: float) -> None:
        self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, env=environ)
        self.started_at = now

    def ended(self, now: float) -> int | None:
        """The exit code once the process is gone, and when it may start again."""
        if self.process is None or (code := self.process.poll()) is None:
            return None
        self.process = None
        if now - self.started_at > 30:
            self.pause_seconds = 0.2
        self.start_at = now + self.pause_seconds
        self.pause_seconds = min(self.pause_seconds * 2, 30.0)
        return code


class Supervisor:
    """All processes of one gateway. The caller holds the data directory's lock."""

    def __init__(
        self, root: Path, config: Config, addresses: list[str], guard: str, forever: bool
    ) -> None:
        self.root = root
        self.config = config
        self.addresses = addresses
        self.exit_code = 0
        self._forever = forever
        self._environ = parent.child_environment(clean_environment(os.environ))
        # A vendor's package may record its environment.
        self._sink_environ = {k: v for k, v in self._environ.items() if k != "RANKGATE_SECRET"}
        budget = str(config.gateway.budget_mib << 20)
        where = json.dumps(addresses)
        reserve = str(config.gateway.reserve_mib << 20)
        quota = str(int(config.gateway.run_quota_gib * (1 << 30)))
        self._ingest = Child(
            gateway_command("ingest", str(root), where, budget, guard, reserve, quota)
        )
        self._rules = Child(gateway_command("rules", str(root)))
        self._sinks: dict[tuple[str, str], Child] = {}
        self._off: set[tuple[str, str]] = set()
        self._sweeper = Sweeper(root, addresses[0])
        self._quiet_since: float | None = None
        self._used = False
        self._begun = time.monotonic()
        self._stopping = False
        self._look_at = 0.0
        self._keep_at = 0.0
        cap_bytes = int(config.gateway.checkpoints_gib * (1 << 30))
        self._policy = keep.Policy(config.gateway.checkpoints, cap_bytes)
        self._asked: set[str] = set()
        self._no_work: dict[tuple[str, str], tuple[int, ...]] = {}
        self._unfinished = self._find_unfinished()

    def run(self, ready: Callable[[], None]) -> int:
        """Until SIGTERM or SIGINT, or until there is nothing left to do; the exit code."""
        modes = {name: sink.mode for name, sink in self.config.sinks.items()}
        write_json(self.root / "supervisor.json", {"pid": os.getpid(), "sinks": modes})
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        while not self._stopping:
            now = time.monotonic()
            if not (self.root / "gateway.lock").exists():
                log.error("%s was deleted; leaving", self.root)
                break
            if not self._keep_alive(now):
                break
            if not self._sweeper.is_alive() and self._serving():
                self._sweeper.start()
                ready()
            if self._sweeper.is_alive():
                self._look_after_sinks(now)
                if not self._forever and self._may_leave(now):
                    log.info("nothing left to do; leaving")
                    break
            time.sleep(TICK_SECONDS)
        self._shut_down()
        return self.exit_code

    def _on_signal(self, number: int, _frame: object) -> None:
        self._stopping = True

    # --- ingest and rules ----------------------------------------------------

    def _keep_alive(self, now: float) -> bool:
        """False when ingest cannot work here at all."""
        for child in (self._ingest, self._rules):
            code = child.ended(now)
            if code is not None:
                log.error("%s ended with %s; it goes on from disk", child.command[3], code)
                if child is self._ingest and code == BIND_FAILED:
                    self.exit_code = BIND_FAILED
                    return False
            if child.process is None and now >= child.start_at:
                child.start(self._environ, now)
        return True

    def _serving(self) -> bool:
        process = self._ingest.process
        return (
            process is not None and read_json(self.root / "ingest.json").get("pid") == process.pid
        )

    def _status(self) -> dict[str, Any]:
        """What ingest said last, empty when that is old."""
        found = read_json(self.root / "ingest.json")
        if time.time_ns() - found.get("at_ns", 0) > STALE_SECONDS * 1e9:
            return {}
        return found

    # --- sinks ---------------------------------------------------------------

    def _look_after_sinks(self, now: float) -> None:
        for (run, name), child in list(self._sinks.items()):
            code = child.ended(now)
            if code == OFF:
                self._off.add((run, name))
            elif code and code != BUSY:
                log.warning("sink %s of run %s ended with %s; started again", name, run, code)
        for run in self._runs():
            for name in self.config.sinks:
                self._look_after_sink(now, run, name)
        if now >= self._keep_at and not self._policy.keeps_all:
            self._keep_at = now + KEEP_SECONDS
            self._drop_checkpoints()

    def _drop_checkpoints(self) -> None:
        """Of the runs looked after, what policy does not keep and no sink waits for."""
        for run in self._runs():
            run_dir = self.root / "runs" / run
            stores = [
                run_dir / "sinks" / store_name(name, sink.mode)
                for name, sink in self.config.sinks.items()
            ]
            try:
                keep.drop_surplus(run_dir, self._policy, stores)
            except (apsw.Error, KeyError, OSError) as error:
                log.debug("checkpoints of run %s stay for now: %s", run, error)

    def _runs(self) -> list[str]:
        """The runs this gateway looks after: those it serves, those it left unfinished, and those
        `rankgate drain` asks for."""
        served = set(self._status().get("journals", {}))
        if time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + LOOK_SECONDS
            self._asked = {p.parent.parent.name for p in self.root.glob("runs/*/requests/deliver")}
        return sorted(served | self._asked | self._unfinished)

    def _find_unfinished(self) -> set[str]:
        """Runs whose delivery to one of our sinks began and did not end."""
        found = set()
        for name, sink in self.config.sinks.items():
            for path in self.root.glob(f"runs/*/sinks/{store_name(name, sink.mode)}"):
                run = path.parent.parent.name
                if self._has_work(run, name):
                    found.add(run)
        return found

    def _look_after_sink(self, now: float, run: str, name: str) -> None:
        child = self._sinks.get((run, name))
        running = sum(c.process is not None for c in self._sinks.values())
        if (
            (child and (child.process or now < child.start_at))
            or self._is_off(run, name)
            or running >= self.config.gateway.max_sink_processes
            or not self._has_work(run, name)
        ):
            return
        config = self.config.sinks[name]
        how = "export" if config.mode == "offline" else "online"
        if child is None:
            packed = msgspec.json.encode(config).decode()
            run_dir = str(self.root / "runs" / run)
            child = Child(gateway_command("sink", run_dir, name, packed, how))
            self._sinks[run, name] = child
        child.start(self._sink_environ, now)

    def _is_off(self, run: str, name: str) -> bool:
        """A sink that said so is let be, until a person asks it for something."""
        off = (run, name) in self._off
        if off and requests.waiting(self.root / "runs" / run, name):
            self._off.discard((run, name))
            return False
        return off

    def _has_work(self, run: str, name: str) -> bool:
        """Asked several times a second, so answered from memory while no file has changed."""
        mode = self.config.sinks[name].mode
        marks = _marks(self.root / "runs" / run, store_name(name, mode))
        if self._no_work.get((run, name)) == marks:
            return False
        found = self._find_work(run, name, mode == "offline")
        if found or (mode == "offline" and not self._exported(run, name)):
            self._no_work.pop((run, name), None)
        else:
            self._no_work[run, name] = marks
        return found

    def _exported(self, run: str, name: str) -> bool:
        """An export waits for more than its own files: for the run to have settled."""
        return (self.root / "runs" / run / "exports" / name).is_dir()

    def _find_work(self, run: str, name: str, offline: bool) -> bool:
        run_dir = self.root / "runs" / run
        try:
            with Reader(run_dir) as reader:
                about = reader.about()
                if offline and (about.state not in ENDED or not self._settled(run, about.cursor)):
                    return False
                return not fresh(run_dir, name, reader, offline)
        except (apsw.Error, KeyError):
            return False  # no series yet

    def _settled(self, run: str, cursor: int) -> bool:
        """All that ranks sent is projected, and no dead rank's spool waits."""
        journal = self._status().get("journals", {}).get(run, 0)
        return bool(self._status()) and cursor >= journal and not self._sweeper.busy

    # --- leaving -------------------------------------------------------------

    def _may_leave(self, now: float) -> bool:
        status = self._status()
        if not status:
            return False
        if status["streams"] or status["blobs"] or self._sweeper.busy or self._held():
            self._used = self._used or bool(status["streams"])
            self._quiet_since = None
            return False
        if self._quiet_since is None:
            self._quiet_since = now
        quiet = now - self._quiet_since
        if not self._used and not status["journals"]:
            return quiet > UNUSED_SECONDS
        if quiet > self.config.gateway.drain_seconds:
            return True
        return quiet > LINGER_SECONDS and self._drained(status)

    def _held(self) -> bool:
        """Does a `rankgate run` or `drain` still want us? Each leaves a file named by its pid."""
        holds = self.root / "holds"
        held = False
        for path in holds.glob("*") if holds.is_dir() else ():
            if Path(f"/proc/{path.name}").exists():
                held = True
            else:
                path.unlink(missing_ok=True)
        return held

    def _drained(self, status: dict[str, Any]) -> bool:
        if any(child.process for child in self._sinks.values()):
            return False
        for run in self._runs():
            end = status["journals"].get(run, 0)
            try:
                with Reader(self.root / "runs" / run) as reader:
                    if reader.about().cursor < end:
                        return False
            except (apsw.Error, KeyError):
                return False
            for name in self.config.sinks:
                if (run, name) not in self._off and self._has_work(run, name):
                    return False
            (self.root / "runs" / run / "requests" / "deliver").unlink(missing_ok=True)
        return True

    def _shut_down(self) -> None:
        """Ingest first, so that rules and sinks see all there is; one deadline for all."""
        deadline = time.monotonic() + STOP_SECONDS
        self._sweeper.stop()
        for child in (*self._sinks.values(), self._ingest, self._rules):
            if child.process is not None:
                child.process.terminate()
        for child in (*self._sinks.values(), self._ingest, self._rules):
            if child.process is not None:
                try:
                    child.process.wait(max(0.1, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    child.process.kill()
