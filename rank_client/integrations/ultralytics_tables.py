"""The numbers behind the plots of an Ultralytics training, as tables.

Newer versions note them with each plot (8.3.253 does, 8.2.50 does not) and keep the hits of each
picture (8.4.190); of what a version does not note there is no table. All are of the last
validation, that of the best weights.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

log = logging.getLogger("rankgate")

Table = tuple[str, list[dict[str, Any]]]  #: key and rows

CURVES = "Curves/"
CONFUSION_MATRIX = "Results/confusion_matrix"
AVERAGE_PRECISION = "Results/average_precision"
IMAGES = "Results/images"
IOU_THRESHOLDS = tuple(f"{percent / 100:.2f}" for percent in range(50, 100, 5))


def tables(trainer: Any) -> list[Table]:
    """All that there are. One that cannot be made, in a version or a validator of somebody's own,
    is left out."""
    plots = _plots(trainer)
    makers: tuple[Callable[[], Iterator[Table]], ...] = (
        lambda: _curves(trainer.validator, plots),
        lambda: _confusion_matrix(trainer.validator, plots),
        lambda: _average_precision(trainer.validator, plots),
        lambda: _images(trainer),
    )
    made: list[Table] = []
    for make in makers:
        try:
            made += make()
        except Exception as error:
            log.warning("rankgate: ultralytics has no numbers of a plot: %r", error)
    return made


def noted(trainer: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """(file, what is noted of it) of each plot of trainer and validator."""
    for owner in (trainer, getattr(trainer, "validator", None)):
        yield from list(getattr(owner, "plots", {}).items())


def _plots(trainer: Any) -> dict[str, dict[str, Any]]:
    """The numbers of each type of plot; of several of a type (boxes, masks) the last one's."""
    found = (about.get("data") or {} for _, about in noted(trainer))
    return {str(data["type"]): data for data in found if data.get("type")}


def _curves(validator: Any, plots: dict[str, dict[str, Any]]) -> Iterator[Table]:
    """`x`, and a column for each class that the validation saw."""
    names = [name for _, name in _seen(validator)]
    columns = _columns("x", names)
    for name, data in plots.items():
        ys = data.get("y") or ()
        if data.get("x") and len(ys) == len(names):
            points = zip(data["x"], *ys, strict=True)
            yield CURVES + name, [dict(zip(columns, point, strict=True)) for point in points]


def _confusion_matrix(validator: Any, plots: dict[str, dict[str, Any]]) -> Iterator[Table]:
    """A row for each class that was predicted, a column for each that was true, the last of both
    the background where the task has one."""
    matrix = plots.get("confusion_matrix", {}).get("matrix")
    if not matrix:
        return
    names = [*_names(validator), "background"][: len(matrix)]
    columns = _columns("predicted", names)
    rows = ((name, *counts) for name, counts in zip(names, matrix, strict=True))
    yield CONFUSION_MATRIX, [dict(zip(columns, row, strict=True)) for row in rows]


def _average_precision(validator: Any, plots: dict[str, dict[str, Any]]) -> Iterator[Table]:
    """Of each class that the validation saw its number, name, and a column for each threshold."""
    precisions = plots.get("pr_curve", {}).get("ap") or ()
    seen = _seen(validator)
    columns = ("class", "name", *IOU_THRESHOLDS)
    if precisions and len(precisions) == len(seen):
        rows = ((*about, *values) for about, values in zip(seen, precisions, strict=True))
        yield AVERAGE_PRECISION, [dict(zip(columns, row, strict=True)) for row in rows]


def _images(trainer: Any) -> Iterator[Table]:
    """F1, hits, false alarms and misses of each picture, at an overlap of a half."""
    if trainer.args.task != "detect":
        return
    box = getattr(trainer.validator.metrics, "box", None)
    pictures = getattr(box, "image_metrics", None) or {}
    rows = [
        {"image": str(image), **{name: found[name] for name in ("f1", "tp", "fp", "fn")}}
        for image, found in pictures.items()
    ]
    if rows:
        yield IMAGES, rows


def _seen(validator: Any) -> list[tuple[int, str]]:
    """(number, name) of the classes that the validation had labels of."""
    numbers = [int(index) for index in getattr(validator.metrics, "ap_class_index", ())]
    return [(number, str(validator.names[number])) for number in numbers]


def _names(validator: Any) -> list[str]:
    return [str(validator.names[number]) for number in range(len(validator.names))]


def _columns(first: str, names: Sequence[str]) -> list[str]:
    """Names of columns, no two of which are the same."""
    columns = [first]
    for name in names:
        columns.append(name if name not in columns else f"{name} ({len(columns)})")
    return columns
