"""A rank that logs 20 rows each 20 ms, now with a checkpoint on its way and now without:
`python -m bench.file_client JSON`. Prints how long rows took to be acknowledged, in ms."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from pathlib import Path

from .measure import rss_mb

STEP_SECONDS = 0.02
ROWS = 20  #: of a step: with fewer the sender looks less often, and its pause is what one sees
LOOK_SECONDS = 0.001


def main() -> None:
    config = json.loads(sys.argv[1])
    os.environ |= {"RANKGATE_DIR": config["directory"], "RANKGATE_SPOOL": config["spool"]}
    import rank_client

    run = rank_client.init(run="bench", gateway=config["address"], rank=0, capture_console=False)
    found: dict[str, list[float]] = {"alone": [], "beside": []}
    file_seconds: list[float] = []
    waiting: deque[tuple[int, float]] = deque()  # (number of a row, when it was logged)
    rows = 0

    def step(times: list[float]) -> None:
        nonlocal rows
        end = time.perf_counter() + STEP_SECONDS
        for _ in range(ROWS):
            run.log({"loss": 1.0 / (rows + 1)}, rows)
            rows += 1
        waiting.append((run._spool.last, time.perf_counter()))
        while time.perf_counter() < end:
            durable, now = run._sender.session.durable, time.perf_counter()
            while waiting and waiting[0][0] <= durable:
                times.append((now - waiting.popleft()[1]) * 1e3)
            time.sleep(LOOK_SECONDS)

    for path in map(Path, config["files"]):
        for _ in range(config["steps"]):
            step(found["alone"])
        began = time.monotonic()
        run.log_checkpoint(str(path))
        while not run._media.wait(time.monotonic(), sent=True):
            step(found["beside"])
        file_seconds.append(time.monotonic() - began)
    print(
        json.dumps({"ack_ms": found, "file_seconds": file_seconds, "memory": rss_mb()}), flush=True
    )
    run.finish(seconds=5)


if __name__ == "__main__":
    main()
