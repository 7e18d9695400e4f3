"""Ranks, ingest, rules and supervisor killed at random instants, and stopped for a while.

The ranks find or start the gateway by themselves, as on one node. At the end everything heals,
`rankgate drain` runs, and the books of every run must balance.

Run: python -m tests.trials.kill [--kills N] [--seed S] [--seconds MAX]
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from tests.flow.job import Job

from . import trial
from .books import Books, read_truth

RANK = Path(__file__).with_name("rank.py")
RUNS, RANKS = ("r1", "r2"), 2  #: ranks of each run
BURST, PAUSE_SECONDS = 40.0, 0.15  #: of a rank's calls
PACE_SECONDS = 0.3  #: between two kills, on average
STOPS_SECONDS = 2.0  #: the longest a process stands still
WEIGHTS = {"rank": 60, "ingest": 16, "rules": 14, "detached": 5, "stop": 8}
DRAIN_SHARE = 0.3  #: of the time, kept for the end


class Slot:
    """The place of one rank; `life` its newest incarnation."""

    def __init__(
        self, job: Job, run: str, rank: int, rng: random.Random, burst: float = BURST
    ) -> None:
        self._job = job
        self._environ = {
            "RANKGATE_RUN": run,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(RANKS),
            "LOCAL_WORLD_SIZE": str(RANKS),
        }
        self._rng = rng
        self._burst = burst
        self.lives = 0
        self.life: subprocess.Popen[bytes] | None = None

    def revive(self) -> None:
        """Start the next incarnation, unless there is one."""
        if self.life is not None and self.life.poll() is None:
            return
        words = (self._rng.randrange(1 << 20), self._burst, PAUSE_SECONDS)
        with (self._job.truth_dir / "ranks.log").open("ab") as log:
            self.life = subprocess.Popen(
                [sys.executable, str(RANK), str(self._job.truth_dir), *map(str, words)],
                env={**self._job.environ, **self._environ},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.lives += 1

    def end(self) -> None:
        """Wait until a life of this place has ended by itself, as it was told to."""
        self.revive()
        while self.life is None or (code := self.life.wait(90)) == -signal.SIGKILL:
            self.revive()
        assert code == 0, f"a rank ended with {code}"

    def kill(self) -> None:
        """Leave no process behind."""
        if self.life is not None and self.life.poll() is None:
            self.life.kill()
            self.life.wait()


def gateway_processes(job: Job) -> dict[str, list[int]]:
    """What the gateway consists of at this moment: detached, ingest, rules … → pids."""
    found: dict[str, list[int]] = {}
    for pid in job.gateway_pids():
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        for name in ("detached", "serve", "ingest", "rules", "sink"):
            if name.encode() in words:
                found.setdefault(name, []).append(pid)
    return found


class Killer:
    """Chooses who is killed, who stands still, and wakes those that stood long enough."""

    def __init__(self, job: Job, slots: list[Slot], rng: random.Random) -> None:
        self.kills: Counter[str] = Counter()
        self._job = job
        self._slots = slots
        self._rng = rng
        self._stopped: list[tuple[float, int]] = []  # (when it wakes, pid)

    def strike(self) -> None:
        """One kill or stop, of whatever there is just now."""
        [what] = self._rng.choices(list(WEIGHTS), list(WEIGHTS.values()))
        if what == "rank":
            pids = self._ranks()
        elif what == "stop":
            found = gateway_processes(self._job).values()
            pids = self._ranks() + [pid for group in found for pid in group]
        else:
            pids = gateway_processes(self._job).get(what, [])
        if not pids:
            return
        pid = self._rng.choice(sorted(pids))
        if what == "stop":
            until = time.monotonic() + self._rng.uniform(0.05, STOPS_SECONDS)
            if _signal(pid, signal.SIGSTOP):
                self._stopped.append((until, pid))
                self.kills["stop"] += 1
        elif _signal(pid, signal.SIGKILL):
            self.kills[what] += 1

    def _ranks(self) -> list[int]:
        return [s.life.pid for s in self._slots if s.life and s.life.poll() is None]

    def wake(self, everyone: bool = False) -> None:
        now = time.monotonic()
        for until, pid in self._stopped[:]:
            if everyone or now >= until:
                _signal(pid, signal.SIGCONT)
                self._stopped.remove((until, pid))

    @property
    def total(self) -> int:
        return sum(n for what, n in self.kills.items() if what != "stop")


def _signal(pid: int, number: int) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def kill_all_along(job: Job, rng: random.Random, kills: int, seconds: float) -> trial.Figures:
    """Kill so often, or until the time is over; then let every rank finish, and drain."""
    slots = [Slot(job, run, rank, rng) for run in RUNS for rank in range(RANKS)]
    killer = Killer(job, slots, rng)
    until = time.monotonic() + seconds * (1 - DRAIN_SHARE)
    try:
        while killer.total < kills and time.monotonic() < until:
            for slot in slots:
                slot.revive()
            time.sleep(min(2.0, rng.expovariate(1 / PACE_SECONDS)))
            killer.wake()
            killer.strike()
        killer.wake(everyone=True)
        (job.truth_dir / "end").touch()
        for slot in slots:
            slot.end()
    finally:
        killer.wake(everyone=True)
        for slot in slots:
            slot.kill()
    began = time.monotonic()
    code, out, err = job.cli("drain", "--seconds", "240", seconds=300)
    return {
        "kills": {name: n for name, n in sorted(killer.kills.items()) if name != "stop"},
        "stops": killer.kills["stop"],
        "lives": sum(slot.lives for slot in slots),
        "drain_seconds": round(time.monotonic() - began, 1),
        "broken": [] if code == 0 else [f"drain ended with {code}: {out}{err}"],
    }


def attempt(folder: Path, seed: int, kills: int, seconds: float) -> trial.Figures:
    """The whole trial in `folder`; its figures, with `broken`."""
    with Job(folder) as job:
        figures = kill_all_along(job, random.Random(seed), kills, seconds)
        job.stop_gateway(signal.SIGTERM)
        totals: Counter[str] = Counter()
        states = {}
        for run in RUNS:
            books = Books(job.data / "runs" / run, read_truth(job.truth_dir, run)).check()
            totals.update(books.figures)
            states[run] = books.state
            figures["broken"] += books.broken
        return {**figures, **totals, "states": states}


def main() -> int:
    parser = trial.parser(__doc__.split("\n")[0], 600.0)
    parser.add_argument("--kills", type=int, default=900)
    given = parser.parse_args()
    return trial.run(
        "kill", given.seed, lambda f: attempt(f, given.seed, given.kills, given.seconds)
    )


if __name__ == "__main__":
    sys.exit(main())
