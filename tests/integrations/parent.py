"""What a process does that trains on several devices: it writes the file its workers run.

`python -m … WORK attach|class|hook` prints that file's path. Ultralytics itself would start
torchrun with it, but finds no second device on a CPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rank_client.integrations.ultralytics import attach
from tests.integrations.train import settings


def main() -> None:
    from ultralytics import YOLO
    from ultralytics.utils import dist

    from tests.integrations import gloo

    work, way = sys.argv[1:]
    model = YOLO("yolov8n.yaml")
    if way == "attach":
        attach(model)
    by_class = way == "class"
    chosen = gloo.LoggedGlooDetectionTrainer if by_class else gloo.GlooDetectionTrainer
    overrides = {**model.overrides, **settings(Path(work), epochs=1), "mode": "train"}
    trainer = chosen(overrides=overrides, _callbacks=model.callbacks)
    trainer.hub_session = None  # older versions look whether HUB leads the training
    sys.stdout.write(f"{dist.generate_ddp_file(trainer)}\n")


if __name__ == "__main__":
    main()
