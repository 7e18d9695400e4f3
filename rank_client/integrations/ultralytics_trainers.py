"""Ultralytics' trainers that log: for versions whose own DDP drops `attach`'s callbacks.

    from rank_client.integrations.ultralytics_trainers import LoggedDetectionTrainer
    model.train(trainer=LoggedDetectionTrainer, ...)

Up to 8.4.139 the workers of Ultralytics' DDP import a trainer's class by module and name, and have
the default callbacks only. So the class must stand in a module; these are made when asked for.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from .ultralytics import with_callbacks

#: name → the Ultralytics class it is made from
TRAINERS = {
    "LoggedDetectionTrainer": ("ultralytics.models.yolo.detect", "DetectionTrainer"),
    "LoggedSegmentationTrainer": ("ultralytics.models.yolo.segment", "SegmentationTrainer"),
    "LoggedClassificationTrainer": ("ultralytics.models.yolo.classify", "ClassificationTrainer"),
    "LoggedPoseTrainer": ("ultralytics.models.yolo.pose", "PoseTrainer"),
    "LoggedOBBTrainer": ("ultralytics.models.yolo.obb", "OBBTrainer"),
}


def logged(trainer: type) -> type:
    """A trainer's class, logging, by the name `Logged` + its name. For one of your own, at the top
    of a module that workers can import: `LoggedMyTrainer = logged(MyTrainer)`. Ultralytics asks
    that the name contains "Trainer"."""
    from ultralytics.utils import DEFAULT_CFG
    from ultralytics.utils.callbacks import get_default_callbacks

    class Logged(trainer):  # type: ignore[misc]
        def __init__(
            self, cfg: Any = DEFAULT_CFG, overrides: Any = None, _callbacks: Any = None
        ) -> None:
            # given to the base, as its constructor calls the first of them
            super().__init__(cfg, overrides, with_callbacks(_callbacks or get_default_callbacks()))

    Logged.__name__ = Logged.__qualname__ = f"Logged{trainer.__name__}"
    Logged.__module__ = str(sys._getframe(1).f_globals.get("__name__", __name__))  # as namedtuple
    return Logged


def __getattr__(name: str) -> Any:
    if name not in TRAINERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, base = TRAINERS[name]
    made = globals()[name] = logged(getattr(importlib.import_module(module), base))
    return made
