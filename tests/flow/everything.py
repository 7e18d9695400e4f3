"""A rank that logs one of everything, the same in every life: what a sink gets of it can be
compared with what it gets of another run.

Usage: python everything.py FOLDER STEPS [GATE]
GATE: a file; half of the steps wait until it is there.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

import rank_client

STEPS_PER_EPOCH = 10


def main() -> None:
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    gate = Path(sys.argv[3]) if len(sys.argv) > 3 else None
    run = rank_client.init(
        project="team/flow", name="all of it", tags=["one", "two"],
        config={"steps": steps, "optimizer": {"lr": 0.1, "name": "sgd"}},
    )  # fmt: skip
    for step in range(steps):
        values = {"train/loss": 1.0 / (step + 1) + run.rank, "lr": 0.1, "n": step}
        if step % STEPS_PER_EPOCH == STEPS_PER_EPOCH - 1:
            values |= {"epoch": step // STEPS_PER_EPOCH, "fitness": step / steps}
        run.log(values, step=step)
        if step % 5 == 0:
            run.log_text(f"rank {run.rank} is at step {step}")
        while step == steps // 2 and gate is not None and not gate.exists():
            time.sleep(0.01)
    run.log_params({"late": True})
    run.log_image("samples/first", np.full((8, 8), 16 * (run.rank + 1), np.uint8), step=1)
    run.log_table("confusion", [{"a": 1, "b": run.rank}], step=steps)
    path = folder / f"rank{run.rank}.pt"
    path.write_bytes(bytes(range(256)) * 1000)
    run.log_file(path, name="notes.bin")
    if run.rank <= 0:
        run.log_checkpoint(path, best=True, final=True, metrics={"fitness": 0.5}, step=steps)
    run.log_summary({"final/fitness": 0.5, "model/parameters": 1234})
    run.finish(seconds=60)


if __name__ == "__main__":
    main()
