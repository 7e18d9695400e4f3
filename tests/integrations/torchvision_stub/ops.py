"""Non-maximum suppression in plain torch."""

from __future__ import annotations

import torch


def nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Indices of the boxes that stay, best score first. `boxes` is (n, 4) of x1, y1, x2, y2."""
    order = scores.argsort(descending=True)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept = []
    while order.numel():
        best, rest = order[0], order[1:]
        kept.append(best)
        corner = torch.minimum(boxes[rest, 2:], boxes[best, 2:])
        sides = (corner - torch.maximum(boxes[rest, :2], boxes[best, :2])).clamp(min=0)
        shared = sides[:, 0] * sides[:, 1]
        order = rest[shared / (areas[rest] + areas[best] - shared) <= iou_threshold]
    return torch.stack(kept) if kept else order
