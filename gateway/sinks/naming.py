"""How a key is called in each backend: the one place for it, as data in and text out.

Rank -1 and 0 keep the user's names; other ranks are told apart. `source` is the run's
(`RunInfo.source`): an integration keeps the names that its users know, and None says that they
know none there, so the item is skipped as `NOT_IN_ORIGINAL`. The tables in docs/sinks.md and
docs/ultralytics.md are held to these functions by tests.
"""

from __future__ import annotations

from gateway.sinks import naming_ultralytics as ultralytics
from rank_client.wire.source import DIFF_FILE, SOURCE_KEYS

NOT_IN_ORIGINAL = "not in the original"  #: of an integration; it is kept and shown all the same
SYSTEM = "system/"  #: how keys of machine metrics begin

#: names of ClearML's own resource monitor, by ours; the others stay as they are
CLEARML_MACHINE = {
    "cpu_percent": "cpu_usage",
    "disk_read_mbs": "io_read_mbs",
    "disk_written_mbs": "io_write_mbs",
    "network_received_mbs": "network_rx_mbs",
    "network_sent_mbs": "network_tx_mbs",
}
CLEARML_GPU = {
    "percent": "utilization",
    "memory_percent": "mem_usage",
    "temperature_celsius": "temperature",
    "power_watts": "power_draw",
}


def neptune_path(key: str, rank: int) -> str:
    """`a/b/c` as it is; of rank 3 `ranks/3/a/b/c`."""
    return key if rank <= 0 else f"ranks/{rank}/{key}"


def clearml_title_series(key: str, rank: int) -> tuple[str, str]:
    """Title `a`, series `b/c`; without a slash both are the key.

    The server joins task, iteration, title and series with `-` into an event's id, so a `-` in a
    title could make two series one: it becomes `_`.
    """
    title, slash, series = key.partition("/")
    if not slash or not series or not title:
        title = series = key
    return title.replace("-", "_"), clearml_series(series, rank)


def clearml_series(series: str, rank: int) -> str:
    return series if rank <= 0 else f"{series} (rank {rank})"


def clearml_section(rank: int) -> str:
    """The hyperparameter section of a rank's params."""
    return "General" if rank <= 0 else f"Rank {rank}"


def rank_prefix(rank: int) -> str:
    """What stands before a text line of a rank that shares one console with others."""
    return "" if rank <= 0 else f"[rank {rank}] "


# --- names that depend on where a run comes from: ClearML --------------------------------------


def clearml_scalar(key: str, rank: int, source: str = "") -> tuple[str, str] | None:
    """(title, series) of a scalar."""
    if key.startswith(SYSTEM):
        return _clearml_monitor(key.removeprefix(SYSTEM), rank)
    if source != ultralytics.SOURCE:
        return clearml_title_series(key, rank)
    named = ultralytics.clearml_scalar(key)
    return None if named is None else (named[0].replace("-", "_"), clearml_series(named[1], rank))


def _clearml_monitor(name: str, rank: int) -> tuple[str, str]:
    """A machine's metric under the names the vendor's own monitor uses; points of these two
    titles do not count as iterations of the task (server: ignore_iteration)."""
    parts = name.split("/")
    if len(parts) == 3 and parts[0] == "gpu":
        series = f"gpu_{parts[1]}_{CLEARML_GPU.get(parts[2], parts[2])}"
        return ":monitor:gpu", clearml_series(series, rank)
    return ":monitor:machine", clearml_series(CLEARML_MACHINE.get(name, name), rank)


def clearml_picture(
    key: str, step: int | None, rank: int, source: str = ""
) -> tuple[str, str, int]:
    """(title, series, iteration) of an image or a figure."""
    if source != ultralytics.SOURCE:
        return (*clearml_title_series(key, rank), step or 0)
    title, series, iteration = ultralytics.clearml_picture(key, step)
    return title.replace("-", "_"), clearml_series(series, rank), iteration


def clearml_single_value(key: str, rank: int, source: str = "") -> str:
    """The name of a value without a step."""
    named = ultralytics.clearml_single_value(key) if source == ultralytics.SOURCE else key
    return clearml_series(named, rank)


def clearml_model(key: str, task_name: str, rank: int, source: str = "") -> tuple[str, str]:
    """(name of the model's document, its name in the task) of a checkpoint."""
    if source != ultralytics.SOURCE:
        return f"{task_name} - {clearml_series(key, rank)}", clearml_series(key, rank)
    document, entry = ultralytics.clearml_model(key, task_name)
    return clearml_series(document, rank), clearml_series(entry, rank)


# --- Neptune ------------------------------------------------------------------------------------


def neptune_step_offset(source: str = "") -> int:
    """What is added to a scalar's step: Ultralytics counts its epochs from 1 there."""
    return 1 if source == ultralytics.SOURCE else 0


def neptune_scalar(key: str, rank: int, source: str = "") -> str | None:
    """The path of a float series."""
    named = ultralytics.neptune_scalar(key) if source == ultralytics.SOURCE else key
    if named is not None and named.startswith("system/"):  # where Neptune's own client puts them
        named = "monitoring/" + named.removeprefix("system/")
    return None if named is None else neptune_path(named, rank)


def neptune_lines(level: str, rank: int) -> str:
    """The path of a string series: what was printed stands apart from what was logged as text."""
    printed = {"console": "monitoring/stdout", "console-err": "monitoring/stderr"}
    return neptune_path(printed.get(level, "logs"), rank)


def neptune_param(key: str, rank: int, source: str = "") -> str:
    """The path of one parameter."""
    if key in SOURCE_KEYS:
        return neptune_path(key, rank)
    mine = source == ultralytics.SOURCE
    return neptune_path(ultralytics.neptune_param(key) if mine else f"parameters/{key}", rank)


def neptune_none(source: str = "") -> str:
    """What stands where a value is None: Neptune has no field for it."""
    return "" if source == ultralytics.SOURCE else "None"


def neptune_summary(key: str, rank: int, source: str = "") -> str:
    """The path of a value without a step."""
    mine = source == ultralytics.SOURCE
    return neptune_path(ultralytics.neptune_summary(key) if mine else f"summary/{key}", rank)


def neptune_picture_is_file(source: str = "") -> bool:
    """Is an image one file at its path, a newer one in its place, instead of a series?"""
    return source == ultralytics.SOURCE


def neptune_file(name: str, rank: int) -> str:
    """The path of a file that was logged as such."""
    return neptune_path("source/diff" if name == DIFF_FILE else f"files/{name}", rank)


def neptune_checkpoint(name: str, run_name: str, rank: int, source: str = "") -> str:
    """The path of a checkpoint's file of this name."""
    mine = source == ultralytics.SOURCE
    path = ultralytics.neptune_checkpoint(run_name, name) if mine else f"checkpoints/{name}"
    return neptune_path(path, rank)


# --- HUB ----------------------------------------------------------------------------------------


def hub_key(key: str, rank: int, source: str = "", protocol: str = "platform") -> str | None:
    """An epoch's value; of rank 3 `rank3/KEY`. `epoch` closes an epoch whatever this says."""
    named: str | None = key
    if source == ultralytics.SOURCE:
        legacy = protocol == "legacy"
        named = ultralytics.hub_legacy(key) if legacy else ultralytics.hub_platform(key)
    return named if named is None or rank <= 0 else f"rank{rank}/{named}"
