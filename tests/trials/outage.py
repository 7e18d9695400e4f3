"""An hour of events while the gateway, the disk or a backend is away, and then it comes back.

Nothing is lost, nothing doubled, memory stays bounded, and all is caught up in time.

Run: python -m tests.trials.outage [--events N] [--seed S] [--seconds MAX]
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from gateway.attach import served
from gateway.series.reader import Reader
from rank_client.rendezvous import ipc_address
from tests.flow.job import Job, wait_until
from tests.servers.clearml import ClearmlServer

from . import outage_rank, trial
from .books import Books
from .kill import gateway_processes

RANKS = 3
EVENTS_PER_SECOND = 20_000  #: of all ranks: an hour of 333 each second, in one minute
STEADY_EVENTS = 20_000  #: of all ranks, before the outage
RANK_GROWTH_MIB = 16
GATEWAY_GROWTH_MIB = 64
CATCH_UP_SECONDS = 120.0
EVENT_BYTES = 80  #: in the journal, at most
TMPFS_MIB = 64
LOG_SECONDS = 0.5  #: a `log` that waits for somebody takes longer


class Watch(threading.Thread):
    """Resident memory of processes, looked at ten times a second; `growth_mib` by name, since the
    block was entered. Of several processes with one name the one that grew most counts."""

    def __init__(self, found: dict[str, list[int]]) -> None:
        super().__init__(daemon=True)
        self._names = {pid: name for name, pids in found.items() for pid in pids}
        self._marked: dict[int, int] = {}
        self._highest: dict[int, int] = {}
        self._over = threading.Event()

    def __enter__(self) -> Watch:
        self._marked = {pid: resident(pid) for pid in self._names}
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        while not self._over.wait(0.1):
            for pid in self._marked:
                self._highest[pid] = max(self._highest.get(pid, 0), resident(pid))

    @property
    def growth_mib(self) -> dict[str, float]:
        grown: dict[str, float] = {}
        for pid, name in self._names.items():
            mib = (self._highest.get(pid, 0) - self._marked[pid]) / (1 << 20)
            grown[name] = max(grown.get(name, 0.0), round(mib, 1))
        return grown


def resident(pid: int) -> int:
    """Bytes; 0 for a process that is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


class Hour:
    """Ranks that log an hour's worth between `away` and `back`, and the books afterwards."""

    def __init__(self, job: Job, events: int, ranks: int) -> None:
        self.job = job
        self.events = events
        self._ranks = [self._start(rank, ranks) for rank in range(ranks)]
        self._said("steady", 60)

    def _start(self, rank: int, ranks: int) -> subprocess.Popen[str]:
        counts = (STEADY_EVENTS // ranks, self.events // ranks, EVENTS_PER_SECOND / ranks)
        words = (self.job.truth_dir, rank, *counts)
        return self.job.start(
            sys.executable,
            str(Path(outage_rank.__file__)),
            *map(str, words),
            RANKGATE_RUN="r1",
            RANKGATE_ADDR=ipc_address(self.job.data),  # so no rank starts a gateway
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(ranks),
            LOCAL_WORLD_SIZE=str(ranks),
        )

    def _said(self, word: str, seconds: float) -> None:
        names = [self.job.truth_dir / f"{rank}.{word}" for rank in range(len(self._ranks))]
        wait_until(lambda: all(p.exists() for p in names), seconds, f"every rank is {word}")

    def pids(self) -> list[int]:
        return [rank.pid for rank in self._ranks]

    def away(self) -> None:
        """Log the hour; on return it is logged."""
        (self.job.truth_dir / "away").touch()
        self._said("logged", 60 + 4 * self.events / EVENTS_PER_SECOND)

    def back(self) -> None:
        (self.job.truth_dir / "back").touch()

    def caught_up(self) -> bool:
        """Is every event of every rank in the series?"""
        want = (STEADY_EVENTS // len(self._ranks) + self.events // len(self._ranks)) * len(
            self._ranks
        )
        with Reader(self.job.data / "runs/r1") as reader:
            return sum(s.projected for s in reader.streams()) >= want

    def settle(self) -> trial.Figures:
        """Let the ranks finish, drain, and do the books."""
        told = [json.loads(rank.communicate(timeout=300)[0]) for rank in self._ranks]
        code, out, err = self.job.cli("drain", "--seconds", "240", seconds=300)
        self.job.stop_gateway(signal.SIGTERM)
        books = Books(self.job.data / "runs/r1", {})
        books.journal()
        with Reader(self.job.data / "runs/r1") as reader:
            self._points(reader, books, {t["stream"]: t["calls"] for t in told})
            books.accounts(reader)
        slowest = max(t["slowest_log_seconds"] for t in told)
        if slowest > LOG_SECONDS:
            books.broken.append(f"a log took {slowest:.3f} s")
        if code:
            books.broken.append(f"drain ended with {code}: {out}{err}")
        return {
            "events": sum(t["calls"] for t in told),
            "lost": books.figures["lost"],
            "doubled": books.figures["doubled"],
            "slowest_log_ms": round(1000 * slowest, 2),
            "broken": books.broken,
        }

    @staticmethod
    def _points(reader: Reader, books: Books, calls: dict[str, int]) -> None:
        """Of each stream the steps 1, 2, … once."""
        points = reader.points("x")
        names = {s.index: s.id.hex() for s in reader.streams()}
        for index, name in names.items():
            steps = np.sort(points.step[points.stream == index])
            want = np.arange(1, calls[name] + 1)
            if not np.array_equal(steps, want):
                lost = np.setdiff1d(want, steps).tolist()
                books.fault("lost", "events not in the series", lost)
                books.fault("doubled", "events too many", range(len(steps) - len(np.unique(steps))))


def too_much(what: str, figure: float, limit: float) -> list[str]:
    return [f"{what}: {figure:g}, more than {limit:g}"] if figure > limit else []


def serve(job: Job, *options: str) -> None:
    with (job.truth_dir / "gateway.out").open("ab") as log:
        words = [sys.executable, "-m", "gateway", "serve", *options]
        process = subprocess.Popen(words, env=job.environ, stdout=log, stderr=log, text=True)
    job.processes.append(process)
    wait_until(lambda: served(job.data), 60, "the gateway answers")


def gateway_away(folder: Path, events: int) -> trial.Figures:
    """The gateway is killed, comes back after an hour, and has it all within two minutes."""
    with Job(folder) as job:
        serve(job)
        hour = Hour(job, events, RANKS)
        with Watch({"rank": hour.pids()}) as ranks:
            job.stop_gateway(signal.SIGKILL)
            hour.away()
            began = time.monotonic()
            serve(job)
            wait_until(hour.caught_up, CATCH_UP_SECONDS + 120, "all is in the series")
            took = round(time.monotonic() - began, 1)
        hour.back()
        found = hour.settle()
    grown = ranks.growth_mib["rank"]
    broken = too_much("a rank's memory grew by MiB", grown, RANK_GROWTH_MIB)
    broken += too_much("caught up after seconds", took, CATCH_UP_SECONDS) + found["broken"]
    return {**found, "rank_mib": grown, "caught_up_seconds": took, "broken": broken}


@contextmanager
def small_disk(path: Path, mib: int) -> Iterator[None]:
    """A file system of its own for the data directory. Raises PermissionError where we may not."""
    path.mkdir(mode=0o700)
    words = ["mount", "-t", "tmpfs", "-o", f"size={mib}m,mode=0700", "tmpfs", str(path)]
    mounted = subprocess.run(words, capture_output=True, text=True, check=False)
    if mounted.returncode:
        raise PermissionError(f"no tmpfs can be mounted: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def disk_full(folder: Path, events: int) -> trial.Figures:
    """The data directory's disk fills up; ranks keep all, and it goes on by itself once freed."""
    job = Job(folder)
    mib = max(24, 3 * events * EVENT_BYTES >> 20)
    config = folder / "gateway.toml"
    config.write_text("[gateway]\nreserve_mib = 0\n")  # to the very last block
    with small_disk(job.data, mib), job:
        serve(job, "--config", str(config))
        hour = Hour(job, events, RANKS)
        ballast = job.data / "ballast"
        free = os.statvfs(job.data)
        leave = events * EVENT_BYTES // 3
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, free.f_bavail * free.f_frsize - leave))
        hour.away()
        status = lambda: json.loads(job.cli("status", "--json")[1])["gateway"]["full"]  # noqa: E731
        wait_until(status, 60, "status says that the disk is full")
        _, words, _ = job.cli("status")
        ballast.unlink()
        began = time.monotonic()
        wait_until(hour.caught_up, CATCH_UP_SECONDS + 120, "all is in the series")
        took = round(time.monotonic() - began, 1)
        hour.back()
        found = hour.settle()
    broken = [] if "full" in words or "space" in words else [f"status is silent: {words}"]
    broken += too_much("caught up after seconds", took, CATCH_UP_SECONDS) + found["broken"]
    return {**found, "caught_up_seconds": took, "broken": broken}


def backend_away(folder: Path, events: int) -> trial.Figures:
    """ClearML answers nothing but 503 for an hour; the gateway's processes do not grow with it."""
    with ClearmlServer() as clearml, Job(folder, **clearml.env) as job:
        serve(job, "--sink", "clearml")
        hour = Hour(job, events, 1)
        wait_until(lambda: clearml.accepted_scalar_sends >= STEADY_EVENTS, 60, "ClearML has some")
        with Watch(gateway_processes(job)) as gateway:
            clearml.fail(".", status=503, for_seconds=1e6)
            hour.away()
            clearml.heal()
            began = time.monotonic()
            hour.back()
            found = hour.settle()
            took = round(time.monotonic() - began, 1)
        [task] = clearml.tasks
        have = sorted(s for t, _, s in clearml.scalars(task) if t == "x")
    broken = []
    for name, mib in gateway.growth_mib.items():
        broken += too_much(f"{name}: memory grew by MiB", mib, GATEWAY_GROWTH_MIB)
    if have != list(range(1, found["events"] + 1)):
        broken.append(f"ClearML has {len(have)} of {found['events']} points")
    broken += found["broken"]
    return {**found, "gateway_mib": gateway.growth_mib, "drained_seconds": took, "broken": broken}


PARTS = {"gateway": gateway_away, "disk": disk_full, "backend": backend_away}


def attempt(folder: Path, events: int) -> trial.Figures:
    """All parts, one after the other; a part this machine does not allow is named as skipped."""
    found: trial.Figures = {}
    for name, part in PARTS.items():
        (folder / name).mkdir()
        try:
            found[name] = part(folder / name, events)
        except PermissionError as error:
            found[name] = {"skipped": str(error), "broken": []}
    broken = [f"{name}: {text}" for name, part in found.items() for text in part.pop("broken")]
    return {**found, "broken": broken}


def main() -> int:
    parser = trial.parser(__doc__.split("\n")[0], 900.0)
    parser.add_argument("--events", type=int, default=1_200_000)
    given = parser.parse_args()
    random.seed(given.seed)
    return trial.run("outage", given.seed, lambda folder: attempt(folder, given.events))


if __name__ == "__main__":
    sys.exit(main())
