"""What Platform shows of a finished run besides numbers: class names, and what stands in tables."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

CLASS_NAMES = "model/names"  #: summary: a JSON list of texts
PLOTS = "Curves/"  #: tables below it are curves: the first column is x, each other one a y
#: a row for each predicted class, a column for each true one after the class's name
CONFUSION_MATRIX = "Results/confusion_matrix"
#: of each class its number and name, then its precision at each threshold
AVERAGE_PRECISION = "Results/average_precision"
IMAGES = "Results/images"  #: of each picture of the validation: image, f1, tp, fp, fn
RESULTS = (CONFUSION_MATRIX, AVERAGE_PRECISION, IMAGES)
PRECISION_OF = "pr_curve"  #: the curve that tells each class's average precision
CURVE_POINTS = 101  #: as many as Platform takes
SAMPLE_IMAGES = 5000  #: of as many pictures as Platform takes
EXTREME_IMAGES = 100  #: of the worst, and of the best

Rows = list[list[Any]]


class Results:
    """Collects tables for the message of the end. Tables are taken in the order of their keys:
    what belongs to a curve comes after it."""

    def __init__(self, class_names: list[str]) -> None:
        self._classes = len(class_names)
        self.plots: list[dict[str, Any]] = []
        self.validation: dict[str, Any] | None = None

    def take(self, key: str, path: Path) -> bool:
        """Has this table a place? Raises OSError, ValueError, KeyError, IndexError, TypeError for
        what is no table."""
        if key == AVERAGE_PRECISION:
            return self._precision(_rows(path))
        if key == IMAGES:
            self.validation = validation(_rows(path))
            return True
        found = matrix(path) if key == CONFUSION_MATRIX else curve(path, key.removeprefix(PLOTS))
        if found is not None:
            self.plots.append(found)
        return found is not None

    def _precision(self, rows: Rows) -> bool:
        curves = [plot for plot in self.plots if plot["type"] == PRECISION_OF]
        for plot in curves:
            plot["ap"] = [[_number(value) for value in row[2:]] for row in rows]
            if len(rows) < self._classes:  # which ones, as the validation had no labels of others
                plot["classes"] = [int(row[0]) for row in rows]
        return bool(curves)


def has_place(key: str) -> bool:
    """Is a table of this key shown?"""
    return key.startswith(PLOTS) or key in RESULTS


def class_names(text: Any) -> list[str]:
    """The names in the order of their classes; empty when it is no JSON list."""
    try:
        names = json.loads(text)
    except (TypeError, ValueError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []


def curve(path: Path, name: str) -> dict[str, Any] | None:
    """`type`, `x`, and `y` with a list for each further column of a logged table. None when it
    holds more than numbers. Raises OSError, ValueError, KeyError, IndexError, TypeError for what
    is no table."""
    table = json.loads(path.read_bytes())
    rows = table["rows"]
    columns = [[_number(row[i]) for row in rows] for i in range(len(table["columns"]))]
    if not rows or len(columns) < 2 or any(None in column for column in columns):
        return None
    x, *ys = thinned(columns)
    return {"type": name, "x": x, "y": ys}


def thinned(columns: list[list[Any]]) -> list[list[Any]]:
    """At most `CURVE_POINTS` rows, between the first x and the last at equal distances; values in
    between are on the line from one row to the next."""
    x = columns[0]
    if len(x) <= CURVE_POINTS:
        return columns
    grid = np.linspace(x[0], x[-1], CURVE_POINTS)
    return [grid.tolist(), *(np.interp(grid, x, y).tolist() for y in columns[1:])]


def matrix(path: Path) -> dict[str, Any] | None:
    """`type` and `matrix` of a table whose first column is names. None when it is not square, or
    holds more than numbers beside the names. Raises as `curve` does."""
    cells = [[_number(value) for value in row[1:]] for row in _rows(path)]
    if not cells or any(len(row) != len(cells) or None in row for row in cells):
        return None
    return {"type": "confusion_matrix", "matrix": cells}


def validation(rows: Rows) -> dict[str, Any]:
    """How many pictures there were, and hits, false alarms and misses of a sample of them, of the
    worst and of the best, by F1 from the lowest to the highest. Raises ValueError, TypeError."""
    ranked = sorted(((float(f1), str(image)), counts) for image, f1, *counts in rows)
    shown = [[_label(image), *map(int, counts)] for (_, image), counts in ranked]
    return {
        "population": len(shown),
        "sampling": "f1_rank",
        "rows": evenly(shown),
        "extremes": {
            "worst": shown[:EXTREME_IMAGES],
            "best": shown[: -EXTREME_IMAGES - 1 : -1],
        },
    }


def evenly(rows: Rows) -> Rows:
    """At most `SAMPLE_IMAGES` of them, the first, the last, and those at equal distances between
    them."""
    if len(rows) <= SAMPLE_IMAGES:
        return rows
    last = len(rows) - 1
    return [rows[round(place * last / (SAMPLE_IMAGES - 1))] for place in range(SAMPLE_IMAGES)]


def _label(image: str) -> str:
    """A picture is known there by what its file's name begins with, up to an underscore."""
    return Path(image).stem.partition("_")[0]


def _rows(path: Path) -> Rows:
    rows = json.loads(path.read_bytes())["rows"]
    return [list(row) for row in rows]


def _number(value: Any) -> float | int | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return value
    return None
