"""One real Ultralytics training on the CPU, the same each time; runs in an environment of its own.

Usage: python train.py '{"how": "original", "settings": {…}, "data": PATH, "epochs": 3, "pause": 0}'
`how` says who logs: `original` (Ultralytics' own callbacks) or `rankgate`. After each epoch's
validation the training waits `pause` seconds.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from ultralytics import YOLO, settings
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils.torch_utils import init_seeds

ARGUMENTS: dict[str, Any] = {
    "project": "team/digits",
    "name": "exp",
    "imgsz": 128,
    "batch": 4,
    "nbs": 4,  # an optimizer step for each batch: two batches an epoch would make none
    "optimizer": "AdamW",
    "lr0": 0.002,
    "warmup_epochs": 0,
    "conf": 0.0001,
    "workers": 0,
    "device": "cpu",
    "amp": False,
    "plots": True,
    "seed": 0,
    "deterministic": True,
    # no augmentation: a vendor's threads draw from the same random numbers at any moment
    **dict.fromkeys(("mosaic", "hsv_h", "hsv_s", "hsv_v", "fliplr", "scale", "translate"), 0.0),
}


class SeededTrainer(DetectionTrainer):  # type: ignore[misc]
    """Starts from the same weights whoever logs: a vendor's init draws random numbers."""

    def get_model(self, *args: Any, **kwargs: Any) -> Any:
        init_seeds(0, deterministic=True)
        return super().get_model(*args, **kwargs)


def main(order: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    # an integration's callbacks look at the settings when they are imported, with the first model
    services = {"clearml": False, "neptune": False, "hub": False, **order["settings"]}
    settings.update({name: value for name, value in services.items() if name in settings})
    settings.update({"runs_dir": str(Path.cwd() / "runs")})
    model = YOLO("yolov8n.yaml")
    if order["how"] == "rankgate":
        from rank_client.integrations import ultralytics as rankgate

        rankgate.attach(model)
    model.add_callback("on_fit_epoch_end", lambda _: time.sleep(order["pause"]))
    model.train(trainer=SeededTrainer, data=order["data"], epochs=order["epochs"], **ARGUMENTS)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
