"""The tables behind an Ultralytics training's plots, whatever its classes and its task are."""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import Any

import pytest

from rank_client.integrations.ultralytics_tables import tables
from rank_client.integrations.ultralytics_training import surroundings


def trainer(task: str, names: list[str], seen: list[int], *plots: dict[str, Any]) -> Any:
    """One whose validator has noted these plots."""
    noted = {f"{number}.png": {"data": data} for number, data in enumerate(plots)}
    pictures = {"a.jpg": {"precision": 1.0, "recall": 0.5, "f1": 0.6, "tp": 1, "fp": 0, "fn": 1}}
    metrics = Namespace(ap_class_index=seen, box=Namespace(image_metrics=pictures))
    validator = Namespace(plots=noted, metrics=metrics, names=dict(enumerate(names)))
    return Namespace(plots={}, validator=validator, args=Namespace(task=task))


def test_classes_are_called_as_they_are_and_no_two_columns_the_same() -> None:
    """A class may be called `x`, or as another one; one without labels has no column."""
    curve = {"type": "f1_curve", "x": [0.0, 1.0], "y": [[1, 2], [3, 4], [5, 6]]}
    made = dict(tables(trainer("segment", ["x", "dog", "cat", "cat"], [0, 2, 3], curve)))
    assert made == {
        "Curves/f1_curve": [
            {"x": 0.0, "x (1)": 1, "cat": 3, "cat (3)": 5},
            {"x": 1.0, "x (1)": 2, "cat": 4, "cat (3)": 6},
        ]
    }


def test_of_boxes_and_masks_the_masks_are_told() -> None:
    """The last plot of a type, as in the original; precisions are of the same."""
    box = {"type": "pr_curve", "x": [0.0], "y": [[1.0]], "ap": [[0.1] * 10]}
    mask = {"type": "pr_curve", "x": [0.0], "y": [[0.5]], "ap": [[0.2] * 10]}
    made = dict(tables(trainer("segment", ["cat", "dog"], [1], box, mask)))
    assert made["Curves/pr_curve"] == [{"x": 0.0, "dog": 0.5}]
    [row] = made["Results/average_precision"]
    assert (row["class"], row["name"], row["0.50"], row["0.95"]) == (1, "dog", 0.2, 0.2)


@pytest.mark.parametrize(
    ("counts", "last"), [([[1.0, 2.0], [3.0, 4.0]], "dog"), ([[1.0] * 3] * 3, "background")]
)
def test_a_matrix_has_a_background_where_the_task_has(counts: list[list[float]], last: str) -> None:
    """Detection has one more row and column than classes, classification has not."""
    plot = {"type": "confusion_matrix", "matrix": counts}
    made = dict(tables(trainer("classify", ["cat", "dog"], [], plot)))
    rows = made["Results/confusion_matrix"]
    columns = list(rows[0])
    assert (columns[0], columns[-1]) == ("predicted", last)
    assert [row["predicted"] for row in rows][-1] == last
    assert [list(row.values())[1:] for row in rows] == counts


def test_hits_of_pictures_are_told_of_detection() -> None:
    """Of other tasks the original tells none."""
    made = dict(tables(trainer("detect", ["cat"], [])))
    assert made["Results/images"] == [{"image": "a.jpg", "f1": 0.6, "tp": 1, "fp": 0, "fn": 1}]
    assert tables(trainer("pose", ["cat"], [])) == []


def test_what_a_version_notes_otherwise_hides_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A table that cannot be made is left out, the others are there."""
    strange = {"type": "confusion_matrix", "matrix": [[1], [2], [3], [4]]}
    curve = {"type": "f1_curve", "x": [0.0], "y": [[1]]}
    made = dict(tables(trainer("detect", ["cat"], [0], strange, curve, {"type": None}, {})))
    assert set(made) == {"Curves/f1_curve", "Results/images"}
    assert "no numbers of a plot" in caplog.text


def test_versions_without_numbers_have_no_tables() -> None:
    """There a plot is noted without data, and pictures have no hits of their own."""
    old = Namespace(
        plots={},
        validator=Namespace(plots={"a.png": {"data": None}}, metrics=Namespace(), names=["cat"]),
        args=Namespace(task="detect"),
    )
    assert tables(old) == []


def modules(monkeypatch: pytest.MonkeyPatch, ready: bool) -> None:
    cuda = Namespace(
        is_initialized=lambda: ready,
        device_count=lambda: 2,
        get_device_properties=lambda _: Namespace(name="NVIDIA H200", total_memory=150_110_011_392),
    )
    monkeypatch.setitem(sys.modules, "torch", Namespace(cuda=cuda))
    monkeypatch.setitem(sys.modules, "ultralytics", Namespace(__version__="8.4.190"))
    monkeypatch.setitem(sys.modules, "ultralytics.utils", Namespace(ENVIRONMENT="Docker"))


def test_gpus_are_told_of_where_cuda_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training on the CPU does not have it made ready by us."""
    alone = {"source/ultralytics": "8.4.190", "source/environment": "Docker"}
    modules(monkeypatch, ready=False)
    assert surroundings() == alone
    modules(monkeypatch, ready=True)
    gpus = {"source/gpu_count": 2, "source/gpu": "NVIDIA H200, 143156MiB"}
    assert surroundings() == alone | gpus


def test_without_ultralytics_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not loaded is not imported."""
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "ultralytics", raising=False)
    assert surroundings() == {}
