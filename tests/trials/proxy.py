"""A bad network between ranks and gateway: nothing lost, nothing doubled, `log` never waits.

Each schedule is a life of a rank behind a door of its own (door.py); several ranks are at it at
once, one gateway serves all.

Run: python -m tests.trials.proxy [--schedules N] [--ranks N] [--seed S] [--seconds MAX]
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gateway.attach import served
from rank_client.wire.keys import SECRET_BYTES, Key, write_keyfile
from tests.flow.job import Job, wait_until

from . import trial
from .books import Books, Truth
from .door import Door, schedule

RANK = Path(__file__).with_name("proxy_rank.py")
LINE_BYTES = 1 << 22  #: an answer tells of every call
FINISH_SECONDS = 50.0  #: a dead connection nobody is told of is noticed after 30 s
ANSWER_SECONDS = 90.0
FAULTS_SECONDS = 60.0  #: at most five of 3 s, and the waits between them
LEFT_SHARE = 0.5  #: of the lives: `finish` waits 3 s only for a gateway that never answered
LOG_SECONDS = 0.5  #: a `log` that waits for the network takes longer
SILENT_SHARE = 0.15  #: of the schedules: nobody is told that a connection is dead


@dataclass
class Tally:
    """What all schedules together came to."""

    truth: dict[str, Truth] = field(default_factory=dict)  #: by run
    faults: Counter[str] = field(default_factory=Counter)
    slowest_log_seconds: float = 0.0
    healed_seconds: list[float] = field(default_factory=list)  #: from healing to acknowledgement
    left: int = 0  #: lives whose end was left to the gateway's sweep
    done: int = 0
    broken: list[str] = field(default_factory=list)


class Worker:
    """One rank process, its door, and the schedules it takes."""

    def __init__(self, job: Job, number: int, target: int, seed: str, tally: Tally) -> None:
        self.run = f"proxy-{number}"
        self._job = job
        self._door = Door(target)
        self._seed = seed
        self._tally = tally

    async def work(self, numbers: list[int], until: float) -> None:
        with (self._job.truth_dir / f"{self.run}.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                str(RANK),
                str(self._job.truth_dir),
                env=self._job.environ,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                limit=LINE_BYTES,
            )
        try:
            await self._door.open()
            while numbers and time.monotonic() < until:
                await self._schedule(process, numbers.pop(0))
        finally:
            process.kill()
            await process.wait()
            await self._door.close()

    async def _schedule(self, process: asyncio.subprocess.Process, number: int) -> None:
        rng = random.Random(f"{self._seed} {number}")
        steps, tally = schedule(rng), self._tally
        tally.faults.update(step.fault for step in steps)
        notice, early = rng.random() >= SILENT_SHARE, rng.random() < 0.5
        told = {
            "run": self.run,
            "address": f"tcp://127.0.0.1:{self._door.port}",
            "seed": number,
            "calls": rng.randint(1, 1500),
            "pause_seconds": rng.uniform(0, 0.04),
            "finish_seconds": FINISH_SECONDS,
        }
        faults = asyncio.ensure_future(self._door.play(steps))
        try:
            logged = await self._ask(process, told)
            if not early:
                await asyncio.wait_for(faults, FAULTS_SECONDS)
                await self._door.heal(notice)
            end = asyncio.ensure_future(self._ask(process, {}))
            await asyncio.wait_for(faults, FAULTS_SECONDS)
            await self._door.heal(notice)
            healed_at = time.monotonic()
            finished = (await end)["finished"]
        except Exception as error:
            raise RuntimeError(f"schedule {number} {steps}: {error!r}") from error
        self._note(logged, finished, time.monotonic() - healed_at)

    def _note(self, logged: dict[str, Any], finished: bool, seconds: float) -> None:
        tally = self._tally
        calls = [(kind, n, note) for kind, n, note in logged["calls"]]
        tally.truth.setdefault(self.run, {})[logged["stream"]] = calls
        tally.slowest_log_seconds = max(tally.slowest_log_seconds, logged["slowest_seconds"])
        tally.done += 1
        if finished:
            tally.healed_seconds.append(seconds)
        else:
            tally.left += 1

    @staticmethod
    async def _ask(process: asyncio.subprocess.Process, told: dict[str, Any]) -> dict[str, Any]:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(told).encode() + b"\n")
        line = await asyncio.wait_for(process.stdout.readline(), ANSWER_SECONDS)
        if not line:
            raise EOFError("the rank has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve(job: Job, port: int) -> None:
    with (job.truth_dir / "gateway.out").open("wb") as log:
        words = [sys.executable, "-m", "gateway", "serve", "--bind", f"tcp://127.0.0.1:{port}"]
        if "RANKGATE_KEYFILE" not in job.environ:
            words.append("--insecure")
        process = subprocess.Popen(words, env=job.environ, stdout=log, stderr=log, text=True)
    job.processes.append(process)
    wait_until(lambda: served(job.data), what="the gateway answers")


async def all_schedules(
    job: Job, target: int, seed: str, schedules: int, ranks: int, seconds: float
) -> Tally:
    tally, numbers = Tally(), list(range(schedules))
    until = time.monotonic() + seconds
    workers = [Worker(job, i, target, seed, tally) for i in range(ranks)]
    ends = await asyncio.gather(*(w.work(numbers, until) for w in workers), return_exceptions=True)
    tally.broken += [repr(end) for end in ends if end is not None]
    return tally


def attempt(folder: Path, seed: int, schedules: int, ranks: int, seconds: float) -> trial.Figures:
    """Half of the schedules in plain, half of them encrypted; the figures, with `broken`."""
    keyfile = folder / "job.key"
    write_keyfile(keyfile, Key(os.urandom(SECRET_BYTES)))
    found, broken = {}, []
    for name, environ in (("plain", {}), ("encrypted", {"RANKGATE_KEYFILE": str(keyfile)})):
        (folder / name).mkdir()
        with Job(folder / name, **environ) as job:
            part = half(job, f"{seed} {name}", schedules // 2, ranks, seconds / 2)
        broken += [f"{name}: {text}" for text in part.pop("broken")]
        found[name] = part
    return {**found, "broken": broken}


def half(job: Job, seed: str, schedules: int, ranks: int, seconds: float) -> trial.Figures:
    """One life of a gateway, with so many schedules at its doors."""
    port = free_port()
    serve(job, port)
    tally = asyncio.run(all_schedules(job, port, seed, schedules, ranks, seconds * 0.8))
    began = time.monotonic()
    broken = tally.broken[:]
    # By name, as what was meant for the address of a door stays for the gateway there.
    for command in (("sweep", "--spool", str(job.spool)), ("drain", "--seconds", "60")):
        code, out, err = job.cli(*command)
        if code:
            broken.append(f"{command[0]} ended with {code}: {out}{err}")
    drained = round(time.monotonic() - began, 1)
    job.stop_gateway(signal.SIGTERM)
    totals: Counter[str] = Counter()
    for run, truth in tally.truth.items():
        books = Books(job.data / "runs" / run, truth).check()
        totals.update(books.figures)
        broken += books.broken
    if tally.slowest_log_seconds > LOG_SECONDS:
        broken.append(f"a log took {tally.slowest_log_seconds:.3f} s")
    if tally.done < schedules and not broken:
        broken.append(f"only {tally.done} of {schedules} schedules fitted into the time")
    if tally.left > max(1, LEFT_SHARE * tally.done):
        broken.append(f"{tally.left} of {tally.done} lives were not acknowledged after the healing")
    healed = sorted(tally.healed_seconds) or [0.0]
    return {
        "schedules": tally.done,
        "faults": dict(sorted(tally.faults.items())),
        **totals,
        "slowest_log_ms": round(1000 * tally.slowest_log_seconds, 2),
        "healed_seconds": {
            "median": round(healed[len(healed) // 2], 2),
            "longest": round(healed[-1], 2),
        },
        "left_to_the_sweep": tally.left,
        "drain_seconds": drained,
        "broken": broken,
    }


def main() -> int:
    parser = trial.parser(__doc__.split("\n")[0], 900.0)
    parser.add_argument("--schedules", type=int, default=500)
    parser.add_argument("--ranks", type=int, default=12, help="so many schedules at once")
    given = parser.parse_args()
    body = lambda f: attempt(  # noqa: E731
        f, given.seed, given.schedules, given.ranks, given.seconds
    )
    return trial.run("proxy", given.seed, body)


if __name__ == "__main__":
    sys.exit(main())
