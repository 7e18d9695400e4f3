"""Handwritten digits with DDP on the CPU: what a user's training script looks like.

torchrun --standalone --nproc-per-node 4 examples/digits.py
"""

import tempfile
import time

import numpy as np
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import rank_client

CONFIG = {"epochs": 15, "batch_size": 16, "lr": 0.05, "momentum": 0.9, "seed": 0}


def load() -> tuple[TensorDataset, TensorDataset]:
    """1,797 pictures of 8 x 8 pixels, a fifth of them for validation."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, val = order[360:], order[:360]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[val], labels[val])


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


@torch.no_grad()
def confusion(model: nn.Module, data: TensorDataset) -> torch.Tensor:
    """Counts of (true, predicted) class, shape (10, 10)."""
    images, labels = data.tensors
    return torch.bincount(labels * 10 + model(images).argmax(1), minlength=100).reshape(10, 10)


def picture(matrix: torch.Tensor) -> np.ndarray:
    """The matrix as a picture of 200 x 200 pixels, dark where there are many."""
    shade = 1 - matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    return np.kron(shade.numpy(), np.ones((20, 20)))


def main() -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    run = rank_client.init(project="digits", config={**CONFIG, "world_size": size})
    torch.manual_seed(CONFIG["seed"])
    train, val = load()
    sampler = DistributedSampler(train, size, rank, seed=CONFIG["seed"])
    loader = DataLoader(train, CONFIG["batch_size"], sampler=sampler, drop_last=True)
    model = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), CONFIG["lr"], CONFIG["momentum"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.1, epochs=CONFIG["epochs"], steps_per_epoch=len(loader)
    )
    best, step, folder = 0.0, 0, tempfile.TemporaryDirectory()
    for epoch in range(CONFIG["epochs"]):
        sampler.set_epoch(epoch)
        for batch, (images, labels) in enumerate(loader):
            start = time.perf_counter()
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            seconds = time.perf_counter() - start
            metrics = {"train/loss": loss.detach(), "lr": schedule.get_last_lr()[0]}
            metrics["perf"] = {"step_seconds": seconds, "samples_per_second": len(labels) / seconds}
            if batch == len(loader) - 1:
                matrix = confusion(model.module, val)
                hits = matrix.diagonal() / matrix.sum(1)
                accuracy = (matrix.trace() / matrix.sum()).item()
                metrics |= {"epoch": epoch, "val": {"accuracy": accuracy}}
                metrics["val"]["class_accuracy"] = {str(c): hits[c] for c in range(10)}
            run.log(metrics, step=step)
            step += 1
        run.log_text(f"epoch {epoch}: accuracy {accuracy:.3f} on {len(val)} pictures", step=step)
        if accuracy > best:
            best = accuracy
            torch.save(model.module.state_dict(), f"{folder.name}/best.pt")
            run.log_checkpoint(f"{folder.name}/best.pt", best=True, step=step)
    run.log_image("val/confusion", picture(matrix), step=step)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
