"""The loop that every logger is measured with, and the process around it.

A logger is a class: `Logger(config)`, `log(values, step)`, `finish()`, and `count(config)`, which
tells how many calls of an earlier process are on disk. `config` is the JSON of the command line.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

WORK_SIZE = 384  #: of the matrices: a few ms of BLAS, without the GIL
WORK_LOOP = 6000  #: turns of plain Python: about 0.3 ms, with the GIL
WARM_UP = 50

Log = Callable[[dict[str, float], int], Any]


class Logger(Protocol):
    def __init__(self, config: dict[str, Any]) -> None: ...
    def log(self, values: dict[str, float], step: int) -> Any: ...
    def finish(self) -> Any: ...
    @staticmethod
    def count(config: dict[str, Any]) -> int: ...


class Work:
    """What a training step does between two calls: releases the GIL, holds it, cools the caches."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._a, self._b = rng.normal(size=(2, WORK_SIZE, WORK_SIZE))
        self._out = np.empty((WORK_SIZE, WORK_SIZE))

    def milliseconds(self) -> float:
        """Of one step without any logging; the longer it is, the colder a call finds the caches."""
        taken = []
        for _ in range(20):
            start = time.perf_counter()
            self()
            taken.append(time.perf_counter() - start)
        return round(sorted(taken)[10] * 1e3, 2)

    def __call__(self) -> int:
        np.matmul(self._a, self._b, out=self._out)
        total = 0
        for i in range(WORK_LOOP):
            total += i ^ total
        return total


def timed(log: Log, keys: int, calls: int, seconds: float, step: int, work: Any) -> list[int]:
    """Nanoseconds of each call, until `calls` were made or the time is over."""
    values = {f"k{keys}/m{i:03}": i * 0.37 for i in range(keys)}
    names, clock, taken = list(values), time.perf_counter_ns, list[int]()
    end = clock() + int(seconds * 1e9)
    while len(taken) < calls:
        if work is not None:
            work()
        values[names[step % keys]] = step * 0.001
        before = clock()
        log(values, step)
        after = clock()
        taken.append(after - before)
        step += 1
        if after > end:
            break
    return taken


def figures(taken: list[int]) -> dict[str, float]:
    """Microseconds. A percentile is given where two calls lie beyond it."""
    ordered = sorted(taken)
    n = len(ordered)
    out: dict[str, float] = {"calls": n}
    for name, share in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999)):
        if n * (1 - share) > 1.99:
            out[name] = round(ordered[int(n * share)] / 1e3, 2)
    return out | {"max": round(ordered[-1] / 1e3, 1), "mean": round(sum(ordered) / n / 1e3, 2)}


def measure(logger: Logger, config: dict[str, Any]) -> dict[str, Any]:
    """Every size, in a tight loop and beside work."""
    step, work = 0, Work()
    out: dict[str, Any] = {"work_ms": work.milliseconds(), "tight": {}, "beside_work": {}}
    for keys in config["keys"]:
        timed(logger.log, keys, WARM_UP, 5, step, work)
        step += WARM_UP
        for name, load in (("beside_work", work), ("tight", None)):
            calls = config["calls"][name]
            taken = timed(logger.log, keys, calls, config["seconds"], step, load)
            step += len(taken)
            out[name][str(keys)] = figures(taken)
    start = time.perf_counter()
    logger.finish()
    return out | {"finish_s": round(time.perf_counter() - start, 3)}


def die(logger: Logger, config: dict[str, Any]) -> None:
    """Log, then be killed in the very moment the last call returned."""
    for step in range(config["calls"]):
        logger.log({"loss": 1.0 / (step + 1), "lr": 0.1}, step)
    os.kill(os.getpid(), signal.SIGKILL)


def main(kind: type[Logger]) -> None:
    config = json.loads(sys.argv[1])
    if config["do"] == "count":
        result: Any = kind.count(config)
    elif config["do"] == "die":
        die(kind(config), config)
    else:
        start = time.perf_counter()
        logger = kind(config)
        started = time.perf_counter() - start
        result = {"init_s": round(started, 3), **measure(logger, config)}
    print(json.dumps(result), flush=True)
