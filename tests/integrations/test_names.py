"""What a run of Ultralytics is called in each backend: the table of docs/ultralytics.md."""

from __future__ import annotations

from pathlib import Path

from gateway.sinks import naming

TEXT = (Path(__file__).parents[2] / "docs" / "ultralytics.md").read_text()
OURS = "ultralytics"


def test_clearml_scalars_have_the_first_part_as_title() -> None:
    """Series are whole keys; epoch time has a name of its own; what HUB alone knows is left out."""
    assert naming.clearml_scalar("train/box_loss", 0, OURS) == ("train", "train/box_loss")
    assert naming.clearml_scalar("metrics/mAP50(B)", -1, OURS) == ("metrics", "metrics/mAP50(B)")
    assert naming.clearml_scalar("lr/pg0", 3, OURS) == ("lr", "lr/pg0 (rank 3)")
    assert naming.clearml_scalar("time/epoch_seconds", 0, OURS) == ("Epoch Time", "Epoch Time")
    assert naming.clearml_scalar("epoch", 0, OURS) is None
    assert naming.clearml_scalar("fitness", 0, OURS) is None


def test_clearml_pictures_go_by_epoch_and_plots_have_their_own_title() -> None:
    """A plot's title is its file's stem, its series what the original's empty one is stored as."""
    mosaic = naming.clearml_picture("Mosaic/train_batch0", 4, 0, OURS)
    assert mosaic == ("Mosaic", "train_batch0", 4)
    assert naming.clearml_picture("Plots/results", 9, 0, OURS) == ("results", "plot image", 0)


def test_clearml_values_and_models_have_the_originals_names() -> None:
    """Final results lose their prefix; the result's document is called as the run."""
    assert naming.clearml_single_value("final/metrics/mAP50(B)", 0, OURS) == "metrics/mAP50(B)"
    assert naming.clearml_model("best.pt", "exp", 0, OURS) == ("exp", "best")
    assert naming.clearml_model("last.pt", "exp", 0, OURS) == ("exp - last", "last")


def test_neptune_paths_are_the_originals() -> None:
    """Keys are paths, steps begin with 1, arguments and model have their namespaces."""
    assert naming.neptune_step_offset(OURS) == 1
    assert naming.neptune_scalar("lr/pg0", 0, OURS) == "lr/pg0"
    assert naming.neptune_scalar("lr/pg0", 2, OURS) == "ranks/2/lr/pg0"
    assert naming.neptune_scalar("time/epoch_seconds", 0, OURS) is None
    assert naming.neptune_param("lr0", 0, OURS) == "Configuration/Hyperparameters/lr0"
    model = naming.neptune_summary("model/parameters", 0, OURS)
    assert model == "Configuration/Model/model/parameters"
    assert naming.neptune_summary("final/fitness", 0, OURS) == "final/fitness"
    assert naming.neptune_checkpoint("best.pt", "exp", 0, OURS) == "weights/exp/best.pt"
    assert naming.neptune_picture_is_file(OURS)


def test_hub_gets_what_the_originals_post() -> None:
    """Losses and results; Platform the first learning rate as `lr`; ranks are told apart."""
    for protocol in ("legacy", "platform"):
        assert naming.hub_key("train/box_loss", 0, OURS, protocol) == "train/box_loss"
        assert naming.hub_key("val/box_loss", 1, OURS, protocol) == "rank1/val/box_loss"
        assert naming.hub_key("lr/pg1", 0, OURS, protocol) is None
        assert naming.hub_key("time/epoch_seconds", 0, OURS, protocol) is None
    assert naming.hub_key("lr/pg0", 0, OURS, "legacy") is None
    assert naming.hub_key("lr/pg0", 0, OURS, "platform") == "lr"


def test_other_runs_keep_their_users_names() -> None:
    """Without a source nothing is left out or renamed."""
    assert naming.clearml_scalar("epoch", 0) == ("epoch", "epoch")
    assert naming.clearml_picture("a/b", None, 2) == ("a", "b (rank 2)", 0)
    assert naming.clearml_single_value("final/x", 0) == "final/x"
    assert naming.clearml_model("best.pt", "exp", 0) == ("exp - best.pt", "best.pt")
    assert naming.neptune_step_offset() == 0
    assert naming.neptune_scalar("fitness", 1) == "ranks/1/fitness"
    assert naming.neptune_param("a", 0) == "parameters/a"
    assert naming.neptune_summary("a", 0) == "summary/a"
    assert naming.neptune_checkpoint("a.pt", "exp", 0) == "checkpoints/a.pt"
    assert naming.hub_key("lr/pg1", 0) == "lr/pg1"


def test_the_table_shows_these_names() -> None:
    """docs/ultralytics.md shows what naming.py does."""
    title, series = naming.clearml_scalar("metrics/mAP50(B)", 0, OURS) or ("", "")
    for name in (
        f"title `{title}`, series `{series}`",
        f"`{naming.neptune_param('KEY', 0, OURS)}`",
        f"`{naming.neptune_summary('model/parameters', 0, OURS)}`",
        f"`{naming.neptune_summary('final/metrics/mAP50(B)', 0, OURS)}`",
        f"`{naming.neptune_checkpoint('best.pt', 'NAME', 0, OURS)}`",
        f"`{naming.clearml_model('last.pt', 'NAME', 0, OURS)[0]}`",
        f"`{naming.hub_key('lr/pg0', 0, OURS)}` (of `pg0`)",
    ):
        assert name in TEXT, name
