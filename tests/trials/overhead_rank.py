"""A rank that trains for a fixed number of equal steps, with or without a log, and measures itself.

Usage: python overhead_rank.py CORE WORK AMOUNT STEPS LOGS END
WORK: numpy | ddp, of which AMOUNT makes a step; LOGS: nothing | log; END: finish | exit | raise |
code. `python overhead_rank.py CORE WORK` prints how much work takes a step's time.

Says `ready` on stdout after its first steps, waits there for a line that is `limit` when its disk
is to be full from now on, and at the end of its steps prints one JSON line; last of all the time
when everything was done that happens at an exit.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

if __name__ == "__main__":  # before the client registers its own: the first one runs last
    atexit.register(lambda: sys.stdout.write(f"{time.monotonic()}\n"))

import rank_client

STEP_SECONDS = 0.05
WARM_STEPS = 5
TEXT_EVERY = 10
LOOP_CALLS = 2000
LINES = 20
SLOW_NS = 100_000
WELCOME_SECONDS = 5.0
MATRIX = 192
KEYS = tuple(f"train/value{i}" for i in range(20))
FAILURE_CODE = 7

Work = Callable[[], None]


def numpy_work(amount: int) -> Work:
    import numpy as np

    a = np.random.default_rng(1).random((MATRIX, MATRIX))
    out = np.empty_like(a)

    def work() -> None:
        for _ in range(amount):
            np.matmul(a, a, out=out)

    return work


def ddp_work(amount: int) -> Work:
    """Forward and backward of a small model, gradients averaged over the ranks by gloo."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    model: Any = torch.nn.Sequential(*(torch.nn.Linear(MATRIX, MATRIX) for _ in range(4)))
    if dist.is_initialized():
        model = torch.nn.parallel.DistributedDataParallel(model)
    batch = torch.randn(64, MATRIX)

    def work() -> None:
        for _ in range(amount):
            model(batch).square().mean().backward()

    return work


WORKS = {"numpy": numpy_work, "ddp": ddp_work}


def amount_of_a_step(kind: str) -> int:
    """So much work takes STEP_SECONDS of one core's time."""
    work = WORKS[kind](1)
    best = float("inf")
    for _ in range(5):
        began = time.process_time()
        for _ in range(10):
            work()
        best = min(best, (time.process_time() - began) / 10)
    return max(1, round(STEP_SECONDS / best))


def thread_ns(thread: int) -> int:
    """The processor time of a thread of ours, by its kernel id, as Linux numbers its clocks."""
    return time.clock_gettime_ns((~thread << 3) | 6)


def client_threads() -> Iterator[int]:
    """Those that exist for the log alone: the client's own, and ZeroMQ's."""
    yield from (t.native_id for t in threading.enumerate() if t.name.startswith("rankgate"))
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/comm") as name:
            if name.read().startswith("ZMQ"):
                yield int(task)


class Calls:
    """The logging of one rank, each row timed; what a slow one met is noted. `cpu_ns` is this
    thread's processor time in all calls."""

    def __init__(self, run: rank_client.Run | None) -> None:
        self.run = run
        self.rows = self.texts = self.cpu_ns = 0
        self.row_ns: list[int] = []
        self.slow: list[tuple[int, str]] = []
        self.line_ns: list[int] = []
        self._lines = os.memfd_create("lines")

    def step(self, step: int, values: Mapping[str, float]) -> None:
        cpu = time.thread_time_ns()
        self.row(step, values)
        if self.run and step % TEXT_EVERY == 0:
            self.run.log_text(f"step {step} of a training", step=step)
            self.texts += 1
        self.cpu_ns += time.thread_time_ns() - cpu

    def line(self, step: int, values: Mapping[str, float]) -> None:
        """What a log made by hand takes in the same place: the row as a line of JSON in a file."""
        began = time.perf_counter_ns()
        os.write(self._lines, json.dumps({"step": step, **values}).encode() + b"\n")
        self.line_ns.append(time.perf_counter_ns() - began)

    def row(self, step: int, values: Mapping[str, float]) -> None:
        before = self._surroundings()
        began = time.perf_counter_ns()
        if self.run:
            self.run.log(values, step=step)
            self.rows += 1
        took = time.perf_counter_ns() - began
        self.row_ns.append(took)
        if took > SLOW_NS and self.rows > 1:
            self.slow.append((took, self._met(before)))

    def _surroundings(self) -> tuple[int, ...]:
        """(segments, preempted, waited, page faults), to be compared after a call."""
        segment = self.run._spool._log.index if self.run else 0
        used = resource.getrusage(resource.RUSAGE_THREAD)
        return segment, used.ru_nivcsw, used.ru_nvcsw, used.ru_minflt + used.ru_majflt

    def _met(self, before: tuple[int, ...]) -> str:
        pairs = zip(self._surroundings(), before, strict=True)
        segment, preempted, waited, faults = (now - then for now, then in pairs)
        if segment:
            return "a new segment"
        if preempted:
            return "preempted"
        if waited:
            return "waited for the interpreter's lock or the disk"
        return "page faults" if faults else "in the call, or the machine's other guests"


def measure(calls: Calls, work: Work, steps: int) -> dict[str, Any]:
    """The steps whose cost counts. Times in ns, of all steps together."""
    values = {key: 0.5 + i for i, key in enumerate(KEYS)}
    threads = list(client_threads())
    of_threads, of_calls = sum(map(thread_ns, threads)), calls.cpu_ns
    cpu, wall = time.process_time_ns(), time.perf_counter_ns()
    for step in range(WARM_STEPS, WARM_STEPS + steps):
        work()
        calls.step(step, values)
    told = {
        "cpu_ns": time.process_time_ns() - cpu,
        "wall_ns": time.perf_counter_ns() - wall,
        "threads_ns": sum(map(thread_ns, threads)) - of_threads,
        "calls_ns": calls.cpu_ns - of_calls,
        "first_ns": calls.row_ns[0],
        "row_ns": calls.row_ns[1:],
        "slow": calls.slow,
    }
    calls.row_ns, calls.slow = [], []
    if calls.run:
        for step in range(WARM_STEPS + steps, WARM_STEPS + steps + LOOP_CALLS):
            calls.row(step, values)
    else:
        for step in range(LINES):
            work()
            calls.line(step, values)
    return {
        **told,
        "line_ns": calls.line_ns[1:],
        "loop_ns": calls.row_ns,
        "loop_slow": calls.slow,
    }


def end_as_told(how: str, run: rank_client.Run | None) -> None:
    if how == "finish" and run:
        run.finish()
    elif how == "raise":
        raise RuntimeError("the loss exploded")
    elif how == "code":
        sys.exit(FAILURE_CODE)


def main() -> None:
    core, kind = int(sys.argv[1]), sys.argv[2]
    os.sched_setaffinity(0, {core})
    if len(sys.argv) == 3:
        sys.stdout.write(f"{amount_of_a_step(kind)}\n")
        sys.stdout.flush()
        return
    amount, steps, logs, how = int(sys.argv[3]), int(sys.argv[4]), sys.argv[5], sys.argv[6]
    work = WORKS[kind](amount)
    run = rank_client.init(project="overhead") if logs == "log" else None
    calls = Calls(run)
    for step in range(WARM_STEPS):
        work()
        calls.step(step, {key: float(i) for i, key in enumerate(KEYS)})
    deadline = time.monotonic() + (WELCOME_SECONDS if "RANKGATE_ADDR" not in os.environ else 0)
    while run and not run._sender.session.welcomed and time.monotonic() < deadline:
        time.sleep(0.02)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    if sys.stdin.readline().strip() == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    told = measure(calls, work, steps)
    told |= {"stream": run.stream if run else "", "rows": calls.rows, "texts": calls.texts}
    told |= {"refused": sum(run._spool.refused.values()) if run else 0}
    sys.stdout.write(json.dumps({**told, "ended_at": time.monotonic()}) + "\n")
    sys.stdout.flush()
    end_as_told(how, run)


if __name__ == "__main__":
    main()
