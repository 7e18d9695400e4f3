"""Ultralytics' trainer with real DDP on a CPU: gloo, as its own takes a GPU for granted."""

from __future__ import annotations

import os

import torch
from torch import distributed
from torch.nn import parallel
from ultralytics.models.yolo.detect import DetectionTrainer

from rank_client.integrations.ultralytics_trainers import logged


class OnCpu(parallel.DistributedDataParallel):
    """Without the devices that the trainer names."""

    def __init__(self, module: torch.nn.Module, device_ids: object = None, **options: bool) -> None:
        super().__init__(module, **options)


class GlooDetectionTrainer(DetectionTrainer):
    """World size from torchrun; no final evaluation, which asks the workers for a GPU."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)
        self.world_size = int(os.environ.get("WORLD_SIZE", "0"))
        parallel.DistributedDataParallel = OnCpu

    def train(self) -> None:
        """8.2.50 takes the world size as an argument, and finds none on a CPU."""
        if "world_size" in DetectionTrainer._do_train.__code__.co_varnames[:2]:
            self._do_train(self.world_size)
        else:
            super().train()

    def _setup_ddp(self, world_size: int = 0) -> None:
        self.device = torch.device("cpu")
        distributed.init_process_group("gloo")

    def final_eval(self) -> None:
        pass


LoggedGlooDetectionTrainer = logged(GlooDetectionTrainer)
