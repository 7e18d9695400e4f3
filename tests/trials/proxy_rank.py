"""A rank that lives one life after the other, as it is told on its standard input.

A line `{"run", "address", "calls", "pause_seconds"}` begins a life; when all calls have returned it
answers with what it logged and how long the slowest `log` took. The next line lets it finish; it
answers whether the gateway had it all.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import rank_client
from tests.trials.rank import call

KINDS, WEIGHTS = ("row", "odd", "text", "params", "file"), (90, 6, 2, 1, 0.5)


def answer(**values: Any) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def live(told: dict[str, Any], folder: Path) -> None:
    rng = random.Random(told["seed"])
    run = rank_client.init(
        project="trial",
        run=told["run"],
        gateway=told["address"],
        config={"seed": told["seed"]},
        rank=0,
        local_rank=0,
        world_size=1,
    )
    calls: list[tuple[str, int, str]] = []
    slowest = 0.0
    for n, kind in enumerate(rng.choices(KINDS, WEIGHTS, k=told["calls"]), 1):
        before = time.perf_counter()
        note = call(run, kind, n, folder / f"{run.stream}.file")
        if kind in ("row", "odd"):
            slowest = max(slowest, time.perf_counter() - before)
        calls.append((kind, n, note))
        if n % 20 == 0:
            time.sleep(told["pause_seconds"])
    answer(stream=run.stream, calls=calls, slowest_seconds=slowest)
    sys.stdin.readline()
    answer(finished=run.finish(seconds=told["finish_seconds"]))


def main() -> None:
    for line in sys.stdin:
        live(json.loads(line), Path(sys.argv[1]))


if __name__ == "__main__":
    main()
