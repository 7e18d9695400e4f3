"""A small real DDP training: what a user would write, plus a truth file.

Usage: torchrun … train.py TRUTH_DIR
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import rank_client


def main() -> None:
    dist.init_process_group("gloo")
    truth_dir = Path(sys.argv[1])
    run = rank_client.init(project="flow", name="ddp", tags=["ci"], config={"lr": 0.1, "depth": 2})
    torch.manual_seed(dist.get_rank())
    model = DistributedDataParallel(torch.nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with (truth_dir / f"{run.stream}.jsonl").open("a", buffering=1) as truth:
        truth.write(json.dumps({"run": run.id, "rank": run.rank, "stream": run.stream}) + "\n")
        for step in range(40):
            batch = torch.randn(16, 8)
            loss = ((model(batch) - batch.sum(1, keepdim=True)) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values = {"train/loss": loss.detach(), "lr": 0.01, "half": loss.detach().bfloat16()}
            if step % 10 == 9:
                values["epoch"] = step // 10
            run.log(values, step=step)
            plain = {k: v.item() if hasattr(v, "item") else v for k, v in values.items()}
            truth.write(json.dumps({"step": step, **plain}) + "\n")
    run.log_text(f"rank {run.rank} is done")
    if run.rank == 0:
        path = truth_dir / "best.pt"
        torch.save(model.module.state_dict(), path)
        run.log_checkpoint(path, best=True, step=39)
    run.log_image("val/noise", torch.rand(3, 8, 8), step=39)
    run.finish()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
