"""DataLoader workers by every start method, then two DDP ranks by `mp.spawn`.

Usage: python spawned.py TRUTH_DIR
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.data import DataLoader, Dataset

import rank_client


class Samples(Dataset[int]):
    """Logs from wherever it runs, through the run it carries along and through one of its own."""

    def __init__(self, run: rank_client.Run) -> None:
        self.run = run

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        self.run.log({"worker": index})
        rank_client.init(run="loader").log({"worker": index})
        return index


def logged(run: rank_client.Run, truth_dir: Path, key: str, values: list[int]) -> None:
    with (truth_dir / f"{run.stream}.jsonl").open("a") as truth:
        truth.write(json.dumps({"run": run.id, "rank": run.rank, "stream": run.stream}) + "\n")
        for step, value in enumerate(values):
            run.log({key: value}, step=step)
            truth.write(json.dumps({"step": step, key: value}) + "\n")


def ddp(rank: int, truth_dir: Path) -> None:
    store = f"file://{truth_dir}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    run = rank_client.init(run="spawned", rank=rank, local_rank=rank, world_size=2)
    total = torch.tensor([rank + 1])
    dist.all_reduce(total)
    logged(run, truth_dir, "total", [int(total), rank])
    run.finish()
    dist.destroy_process_group()


def main() -> None:
    truth_dir = Path(sys.argv[1])
    run = rank_client.init(run="loader")
    seen = []
    for method in ("fork", "spawn", "forkserver"):
        loader = DataLoader(Samples(run), num_workers=1, multiprocessing_context=method)
        seen += [int(batch) for batch in loader]
    logged(run, truth_dir, "sample", seen)
    run.finish()
    mp.spawn(ddp, (truth_dir,), nprocs=2)


if __name__ == "__main__":
    main()
