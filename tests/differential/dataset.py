"""Eight pictures with one rectangle each, on which even an untrained detector has hits.

A new YOLOv8 head predicts boxes of 15 strides, 120 of 128 pixels at the finest: near enough to
these rectangles for a mean average precision above zero that changes from epoch to epoch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

PICTURES = 8
PIXELS = 128
MARGIN = 18  #: a rectangle's sides lie at most so far from the picture's


def write(folder: Path) -> Path:
    """Make the data set in `folder`, the same bytes each time; the path of its YAML file."""
    chance = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    for number in range(PICTURES):
        picture = chance.integers(0, 80, (PIXELS, PIXELS, 3), dtype=np.uint8)
        left, top = chance.integers(2, MARGIN, 2)
        right, bottom = chance.integers(PIXELS - MARGIN, PIXELS - 2, 2)
        picture[top:bottom, left:right, number % 3] = 230
        Image.fromarray(picture).save(folder / f"images/{number}.png")
        box = [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
        text = " ".join(f"{value / PIXELS:.6f}" for value in box)
        (folder / f"labels/{number}.txt").write_text(f"{number % 2} {text}\n")
    path = folder / "data.yaml"
    path.write_text(f"path: {folder}\ntrain: images\nval: images\nnames: {{0: even, 1: odd}}\n")
    return path
