"""A rank whose calls all mean something to some sink, and follow from the step alone.

Usage: python sinks_rank.py FOLDER STEPS PAUSE_SECONDS
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import rank_client

EPOCH_STEPS = 10
TEXT_STEPS = 2
PARAM_STEPS = 40
FILE_STEPS = 60


def loss(step: int) -> float:
    return 1.0 / (step + 1)


def accuracy(epoch: int) -> float:
    return epoch / 8


def file_bytes(step: int) -> bytes:
    return f"file of step {step}\n".encode() * 200


def main() -> None:
    folder, steps, pause = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    run = rank_client.init(project="trial", name=None)
    for step in range(steps):
        run.log({"train/loss": loss(step), "lr": step}, step=step)
        if step % EPOCH_STEPS == EPOCH_STEPS - 1:
            epoch = step // EPOCH_STEPS
            run.log({"epoch": epoch, "val/accuracy": accuracy(epoch)}, step=step)
        if step % TEXT_STEPS == 0:
            run.log_text(f"line {step} of {run.id}")
        if step % PARAM_STEPS == 0:
            run.log_params({f"p{step}": step})
            run.log_summary({f"s{step}": step})
        if step % FILE_STEPS == 0:
            path = folder / f"{run.id}-{step}.pt"
            path.write_bytes(file_bytes(step))
            run.log_file(path, name=f"file-{step}.bin")
            run.log_checkpoint(path, best=True, step=step)
        time.sleep(pause)
    run.finish(seconds=60)


if __name__ == "__main__":
    main()
