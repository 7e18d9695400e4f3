"""A rank that logs a steady stream, then an hour's worth while somebody is away.

Usage: python outage_rank.py FOLDER NAME STEADY EVENTS PER_SECOND
It waits for FOLDER/away before the second part and for FOLDER/back before it finishes, says how far
it is by FOLDER/NAME.steady and NAME.logged, and prints what it did as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import rank_client

BURST = 100


def log_some(run: rank_client.Run, first: int, count: int, per_second: float) -> float:
    """Log the numbers from `first` on; the longest call, in seconds."""
    slowest, began = 0.0, time.monotonic()
    for n in range(first, first + count):
        before = time.perf_counter()
        run.log({"x": n / 7}, step=n)
        slowest = max(slowest, time.perf_counter() - before)
        if n % BURST == 0:
            time.sleep(max(0.0, began + (n - first) / per_second - time.monotonic()))
    return slowest


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.05)


def main() -> None:
    folder, name = Path(sys.argv[1]), sys.argv[2]
    steady, events, per_second = int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])
    run = rank_client.init(project="trial")
    log_some(run, 1, steady, per_second)
    (folder / f"{name}.steady").touch()
    wait_for(folder / "away")
    slowest = log_some(run, steady + 1, events, per_second)
    (folder / f"{name}.logged").touch()
    wait_for(folder / "back")
    finished = run.finish(seconds=240)
    told = {"stream": run.stream, "calls": steady + events, "finished": finished}
    sys.stdout.write(json.dumps({**told, "slowest_log_seconds": slowest}) + "\n")


if __name__ == "__main__":
    main()
