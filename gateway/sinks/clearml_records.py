"""What a ClearML task holds besides events: parameters, configuration, script, artifacts, models.

Pure functions, shared by the online sink and the offline export.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gateway.sinks import naming
from gateway.sinks.base import Media, Params, Value
from gateway.sinks.clearml_events import Place, artifact_key, long_enough
from rank_client.wire import source as names

PROPERTIES = "properties"  #: the section the web page calls user properties
CLASS_NAMES = "model/names"  #: a summary: a JSON list of texts, in the order of their numbers
CONFIGURATION = "config"  #: the configuration object that can be read back exactly
MAX_DIFF_BYTES = 1_000_000  #: of uncommitted changes in the task itself; more is an artifact
PREVIEW_BYTES = 2048  #: of a text file's beginning, shown with its artifact
TEXT_ENDINGS = {".csv", ".tsv", ".txt", ".log", ".md", ".json", ".yaml", ".yml", ".toml", ".diff"}

#: script fields of a task, by the parameters that hold them
SCRIPT_FIELDS = {
    names.REPOSITORY: "repository",
    names.BRANCH: "branch",
    names.COMMIT: "version_num",
    names.ENTRY_POINT: "entry_point",
    names.WORKING_DIR: "working_dir",
}
#: runtime fields of a task, likewise
RUNTIME_FIELDS = {
    names.PYTHON: "python_version",
    names.PYTHON_EXECUTABLE: "python_exec",
    names.OS: "OS",
    names.CPU_COUNT: "cpu_cores",
    names.MEMORY_GIB: "memory_gb",
    names.GPU: "gpu_type",
    names.GPU_COUNT: "gpu_count",
    names.COMMAND: "CLI",
    names.DIRTY: "uncommitted_changes",
}


def own_values(item: Params) -> dict[str, Value]:
    """The user's parameters: all but what rankgate itself found out about the code."""
    return {k: v for k, v in item.values.items() if k not in names.SOURCE_KEYS}


def source_values(item: Params) -> dict[str, Value]:
    """What rank 0 found out about the code; of other ranks it would be the same."""
    if item.rank > 0:
        return {}
    return {k: v for k, v in item.values.items() if k in names.SOURCE_KEYS}


def param_items(item: Params) -> list[dict[str, str]]:
    return hyperparams(own_values(item), naming.clearml_section(item.rank))


def hyperparams(values: Mapping[str, Value], section: str) -> list[dict[str, str]]:
    """As the server stores them: every value is text, None is the empty one."""
    return [
        {
            "section": section,
            "name": name,
            "value": "" if value is None else str(value),
            "type": "" if value is None else type(value).__name__,
        }
        for name, value in values.items()
    ]


def configuration_name(rank: int) -> str:
    return naming.clearml_series(CONFIGURATION, rank)


def configuration_item(
    there: Mapping[str, Any], rank: int, values: Mapping[str, Value]
) -> dict[str, str]:
    """The configuration object of a rank, `there` being the task's configuration as it is."""
    name = configuration_name(rank)
    old = str((there.get(name) or {}).get("value") or "")
    return {"name": name, "value": configuration(old, values), "type": "json"}


def configuration(old: str, values: Mapping[str, Value]) -> str:
    """The configuration's text with these parameters added or replaced; `old` is what it was.

    JSON, nested at `/`: None, numbers and texts come back as they were, which hyperparameters,
    being text, do not tell.
    """
    flat = dict(_flat(json.loads(old))) if old else {}
    return json.dumps(_nested({**flat, **values}), indent=1)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield (prefix + key).removesuffix("/"), value


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Where both `a` and `a/b` are there, the later one is called `a/` or `a/b/` at the top."""
    out: dict[str, Any] = {}
    for key, value in flat.items():
        *folders, last = key.split("/")
        at: Any = out
        for folder in folders:
            at = at.setdefault(folder, {}) if isinstance(at, dict) else at
        if not isinstance(at, dict) or isinstance(at.get(last), dict):
            out[f"{key}/"] = value
        else:
            at[last] = value
    return out


def runtime(values: Mapping[str, Value]) -> dict[str, Value]:
    """Runtime fields of a task, as the vendor's own monitor calls them."""
    return {field: values[name] for name, field in RUNTIME_FIELDS.items() if name in values}


def script(values: Mapping[str, Value]) -> dict[str, Any]:
    """Fields of a task's script: where its code is, and what is installed."""
    found: dict[str, Any] = {
        field: str(values[name]) for name, field in SCRIPT_FIELDS.items() if name in values
    }
    if names.PYTHON in values:
        found["binary"] = "python" + ".".join(str(values[names.PYTHON]).split(".")[:2])
    if names.PACKAGES in values:
        found["requirements"] = {"pip": str(values[names.PACKAGES])}
    if values.get(names.DIRTY) is False:
        found["diff"] = ""  # a launch before this one may have had changes
    return found


def uncommitted(item: Media) -> str | None:
    """The text of the file of uncommitted changes, None if this is another one."""
    is_diff = item.what == "file" and item.key == names.DIFF_FILE and item.rank <= 0
    if not is_diff or item.size_bytes > MAX_DIFF_BYTES:
        return None
    return item.path.read_text(errors="replace")


def artifact(item: Media, uri: str) -> dict[str, Any]:
    return {
        "key": artifact_key(item),
        "type": "custom",
        "mode": "output",
        "uri": uri,
        "hash": item.sha256,
        "content_size": item.size_bytes,
        "timestamp": item.wall_ns // 1_000_000_000,
        "type_data": {"preview": preview(item)},
    }


def preview(item: Media) -> str:
    """Name and size; of a text file its beginning, which the web page shows."""
    about = f"{item.name} - {item.size_bytes} bytes"
    if Path(item.name).suffix.lower() not in TEXT_ENDINGS:
        return about
    try:
        with item.path.open("rb") as file:
            text = file.read(PREVIEW_BYTES).decode(errors="replace")
    except FileNotFoundError:  # told where it is uploaded
        return about
    return f"{about}\n{text}{'…' if item.size_bytes > PREVIEW_BYTES else ''}"


def model_names(item: Media, place: Place) -> tuple[str, str]:
    """(the model document's name, its name in the task)."""
    document, entry = naming.clearml_model(item.key, place.name, item.rank, place.source)
    return long_enough(document), entry


def model_fields(item: Media) -> dict[str, Any]:
    """What an output model tells of a checkpoint, whichever way it is made."""
    words = [f"{name} = {value}" for name, value in (item.meta.get("metrics") or {}).items()]
    if item.meta.get("epoch") is not None:
        words.insert(0, f"epoch {item.meta['epoch']}")
    return {
        "tags": [word for word in ("best", "final") if item.meta.get(word)],
        "comment": ", ".join(words),
        "framework": "PyTorch" if Path(item.name).suffix in (".pt", ".pth") else None,
    }


def labels(hyperparams: Mapping[str, Any]) -> dict[str, int]:
    """A model's labels, of the class names that the task's properties have, if any."""
    told = (hyperparams.get(PROPERTIES) or {}).get(CLASS_NAMES) or {}
    try:
        found = json.loads(told.get("value") or "[]")
    except ValueError:  # cut, or something else by that name
        return {}
    return {str(name): i for i, name in enumerate(found)} if isinstance(found, list) else {}


def model_metadata(item: Media) -> list[dict[str, str]]:
    """A checkpoint's numbers, step and checksum, as the model's own table of values."""
    values = {**(item.meta.get("metrics") or {}), "step": item.step, "sha256": item.sha256}
    return [
        {"key": name, "value": str(value), "type": type(value).__name__}
        for name, value in values.items()
        if value is not None
    ]
