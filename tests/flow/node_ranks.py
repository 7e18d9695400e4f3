"""A rank under torchrun on several nodes: logs whether or not the other nodes can be reached.

Usage: torchrun … node_ranks.py TRUTH_DIR STEPS PAUSE_SECONDS
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import rank_client


def main() -> None:
    truth_dir, steps, pause = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    dist.init_process_group("gloo")
    run = rank_client.init(project="nodes")
    total = torch.ones(1)
    dist.all_reduce(total)
    with (truth_dir / f"{run.stream}.jsonl").open("a", buffering=1) as truth:
        truth.write(json.dumps({"run": run.id, "rank": run.rank, "stream": run.stream}) + "\n")
        for step in range(steps):
            values = {"loss": 1.0 / (step + 1) + run.rank, "world": total.item()}
            run.log(values, step=step)
            truth.write(json.dumps({"step": step, **values}) + "\n")
            time.sleep(pause)
    path = truth_dir / f"rank{run.rank}.bin"
    path.write_bytes(bytes([run.rank]) * 300_000)
    run.log_file(path)
    dist.barrier()
    run.finish()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
