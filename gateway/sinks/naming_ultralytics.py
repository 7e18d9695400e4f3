"""What a run that the Ultralytics integration made is called: as Ultralytics' own callbacks do.

`naming.py` asks here for runs whose `source` is `SOURCE`. None says: not sent to this backend, as
the original does not either. Where versions of the original differ, the newest one's names are
used. What is named here is in the table of docs/ultralytics.md.
"""

from __future__ import annotations

import re

SOURCE = "ultralytics"
EPOCH_SECONDS = "time/epoch_seconds"
FINAL = "final/"  #: stands before the results of the final evaluation, a summary
MODEL = "model/"  #: stands before parameters, GFLOPs and speed, a summary
OURS = ("epoch", "fitness")  #: scalars that close an epoch and that HUB alone has a place for

_LR = re.compile(r"lr/pg\d+")


def is_scalar_of_original(key: str) -> bool:
    """Is this a training loss or the result of a validation, as HUB's metrics hold them?"""
    return key not in OURS and key != EPOCH_SECONDS and not _LR.fullmatch(key)


# --- ClearML ----------------------------------------------------------------


def clearml_scalar(key: str) -> tuple[str, str] | None:
    """Title: the key's first part; series: the whole key."""
    if key in OURS:
        return None
    if key == EPOCH_SECONDS:
        return "Epoch Time", "Epoch Time"
    return key.partition("/")[0], key


def clearml_picture(key: str, step: int | None) -> tuple[str, str, int]:
    """A plot has its own title, as the only series of it; a picture of a batch goes by epoch.

    The original gives the batch's number as iteration, so that each epoch takes the last one's
    place; here it stays in the series' name.
    """
    group, _, stem = key.partition("/")
    if group == "Plots" and stem:
        return stem, "plot image", 0
    return group, stem or group, step or 0


def clearml_single_value(key: str) -> str:
    return key.removeprefix(FINAL)


def clearml_model(file_name: str, run_name: str) -> tuple[str, str]:
    """The document of the result has the run's name, the task's entry the file's (`best`)."""
    stem = file_name.removesuffix(".pt")
    return (f"{run_name} - last" if stem == "last" else run_name), stem


# --- Neptune ----------------------------------------------------------------


def neptune_scalar(key: str) -> str | None:
    return None if key in OURS or key == EPOCH_SECONDS else key


def neptune_param(key: str) -> str:
    return f"Configuration/Hyperparameters/{key}"


def neptune_summary(key: str) -> str:
    """The final results have a place of their own: the original appends them to the series of the
    last epoch, which Neptune refuses."""
    return f"Configuration/Model/{key}" if key.startswith(MODEL) else key


def neptune_checkpoint(run_name: str, file_name: str) -> str:
    return f"weights/{run_name}/{file_name}"


# --- HUB --------------------------------------------------------------------


def hub_legacy(key: str) -> str | None:
    """Losses and results of an epoch; `model/…` stands beside those of the first epoch."""
    return key if is_scalar_of_original(key) else None


def hub_platform(key: str) -> str | None:
    """As legacy, and the first group's learning rate as `lr`."""
    if key == "lr/pg0":
        return "lr"
    return hub_legacy(key)
