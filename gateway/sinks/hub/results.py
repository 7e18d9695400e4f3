"""What Platform shows of a finished run besides numbers: class names and curves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

CLASS_NAMES = "model/names"  #: summary: a JSON list of texts
PLOTS = "Curves/"  #: tables below it are curves: the first column is x, each other one a y
CURVE_POINTS = 101  #: as many as Platform takes


def class_names(text: Any) -> list[str]:
    """The names in the order of their classes; empty when it is no JSON list."""
    try:
        names = json.loads(text)
    except (TypeError, ValueError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []


def curve(path: Path, name: str) -> dict[str, Any] | None:
    """`type`, `x` and `y` of a logged table: of several columns one y for each. None when it holds
    more than numbers. Raises OSError, ValueError, KeyError, IndexError, TypeError for what is no
    table."""
    table = json.loads(path.read_bytes())
    rows = table["rows"]
    columns = [[_number(row[i]) for row in rows] for i in range(len(table["columns"]))]
    if not rows or len(columns) < 2 or any(None in column for column in columns):
        return None
    x, *ys = thinned(columns)
    return {"type": name, "x": x, "y": ys[0] if len(ys) == 1 else ys}


def thinned(columns: list[list[Any]]) -> list[list[Any]]:
    """At most `CURVE_POINTS` rows, between the first x and the last at equal distances; values in
    between are on the line from one row to the next."""
    x = columns[0]
    if len(x) <= CURVE_POINTS:
        return columns
    grid = np.linspace(x[0], x[-1], CURVE_POINTS)
    return [grid.tolist(), *(np.interp(grid, x, y).tolist() for y in columns[1:])]


def _number(value: Any) -> float | int | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return value
    return None
