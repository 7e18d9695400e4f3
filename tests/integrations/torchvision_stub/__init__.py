"""Stands in for torchvision where a test trains on a CPU: its version, and `ops.nms`."""

__version__ = "0.28.0"

from . import ops

__all__ = ["ops"]
