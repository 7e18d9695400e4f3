"""A real training of Ultralytics, in a process of its own: see `python -m … --help`.

Under torchrun the ranks meet over gloo (`gloo.py`). Each process notes what its trainer has at the
end of an epoch in `witness-RANK.jsonl`, by a callback of its own.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from tests.integrations import dataset


def settings(work: Path, epochs: int = 2, plots: bool = False) -> dict[str, Any]:
    """What makes a training small, and the same each time on a CPU."""
    return {
        "data": str(work / "data" / "data.yaml"),
        "epochs": epochs,
        "imgsz": dataset.SIDE_PIXELS,
        "batch": 4,
        "device": "cpu",
        "workers": 0,
        "amp": False,
        "plots": plots,
        "project": str(work / "runs"),
        "name": "exp",
        "exist_ok": True,
        "optimizer": "SGD",
        "seed": 0,
        "verbose": False,
    }


class Witness:
    """Notes what a rank's trainer has, apart from rankgate."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, trainer: Any) -> None:
        means = trainer.tloss
        if not isinstance(means, dict):
            means = dict(zip(("box_loss", "cls_loss", "dfl_loss"), means, strict=True))
        losses = {f"train/{name}": round(float(value), 5) for name, value in means.items()}
        rates = {key: float(value) for key, value in trainer.lr.items()}
        with self.path.open("a") as file:
            file.write(json.dumps({"step": trainer.epoch, **losses, **rates}) + "\n")


class FailAt:
    """The data ends the training in an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def __call__(self, trainer: Any) -> None:
        if trainer.epoch == self.epoch:
            raise RuntimeError("no more pictures")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path, help="where data set and results are")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--plots", action="store_true")
    parser.add_argument("--trainings", type=int, default=1)
    parser.add_argument("--fail-at", type=int)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--checkpoint-seconds", type=float, help="between those while training")
    parser.add_argument("--own-run", action="store_true", help="the script has a run already")
    options = parser.parse_args()

    import torch
    from ultralytics import YOLO

    import rank_client
    from rank_client.integrations import ultralytics_training
    from rank_client.integrations.ultralytics import attach

    torch.set_num_threads(1)
    trainer = None
    if "LOCAL_RANK" in os.environ:
        from tests.integrations import gloo

        trainer = gloo.GlooDetectionTrainer
    if options.checkpoint_seconds is not None:
        ultralytics_training.CHECKPOINT_SECONDS = options.checkpoint_seconds
    given = settings(options.work, options.epochs, options.plots)
    weights = options.work / "runs" / "exp" / "weights" / "last.pt"
    run = rank_client.init(project="mine") if options.own_run else None
    witness = Witness(options.work / f"witness-{os.environ.get('RANK', '-1')}.jsonl")
    for _ in range(options.trainings):
        model = YOLO(str(weights) if options.resume else "yolov8n.yaml")
        attach(model)
        attach(model)
        model.add_callback("on_train_epoch_end", witness)
        if options.fail_at is not None:
            model.add_callback("on_train_epoch_start", FailAt(options.fail_at))
        model.train(trainer=trainer, **({"resume": True} if options.resume else given))
    if run is not None:
        run.log_text("still mine")


if __name__ == "__main__":
    main()
