"""Items as ClearML's events: scalars, lines, images and plots; and where files go.

Pure functions, shared by the online sink and the offline export. Every line they give is ASCII
JSON, so its length in characters is its length in bytes.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gateway.sinks import naming
from gateway.sinks.base import Media, Refused, Rows, RunInfo, Sent, Summary, Text, Value

MAX_EVENTS = 500  #: of one request; the server indexes in chunks of this size
MAX_BYTES = 1_000_000  #: of one request, unless a single event is longer
MAX_PLOT_BYTES = 4_000_000  #: a longer table or figure is kept as an artifact instead
NOT_FINITE = "not finite"  #: why a value is skipped; also: beyond a 32-bit float
SUMMARY_TITLE = "Summary"  #: with this iteration the web page shows a single value
SUMMARY_ITERATION = -(2**31)
#: the server's index holds values as 32-bit floats; a larger one fails the whole request
MAX_VALUE = float(np.finfo(np.float32).max)
LEVELS = {"notset", "debug", "verbose", "info", "warn", "warning", "error", "critical", "fatal"}
#: of lines a rank printed: stderr as the vendor's own capture calls it
CONSOLE_LEVELS = {"stdout": "info", "stderr": "error"}
PICTURES = {".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".svg"}
TABLES = {".csv": ",", ".tsv": "\t"}
NAME_MIN = 3  #: server: project, task and model names are StrippedStringField(min_length=3)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run goes: the task's id and name, the folder of its files on the file server, and
    what made the run (`RunInfo.source`), on which names depend."""

    task: str
    name: str
    root: str
    source: str


def long_enough(name: str) -> str:
    """The name, padded to what the server accepts ("v1" becomes "v1_")."""
    return name.strip().ljust(NAME_MIN, "_")


def run_tag(run: RunInfo) -> str:
    """The tag by which the run's task is found again."""
    return f"rankgate:{run.run_id}"


def path_part(name: str) -> str:
    """A name as one folder of a path: safe everywhere, and two names never become one."""
    safe = re.sub(r"[^A-Za-z0-9._()=+-]", "_", name).strip(".")[:80]
    if safe == name:
        return safe
    return f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def root_path(project: str, name: str, task: str) -> str:
    """Where a task's files go; the vendor's tools look for the `.<task>/` in it."""
    return f"{path_part(project)}/{path_part(name)}.{task}"


def public(address: str) -> str:
    """An address as others may read it: without the user and password that may stand in it."""
    scheme, mark, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{mark}{host.rpartition('@')[2]}{slash}{path}"


def ending(name: str) -> str:
    """The ending of a file's name, where it is one that may stand in a path."""
    suffix = Path(name).suffix
    return suffix if re.fullmatch(r"\.[A-Za-z0-9_]{1,16}", suffix) else ""


def media_path(item: Media, place: Place) -> str:
    """Pictures lie under their content; files and models under their key, so a new one replaces."""
    if item.what in ("image", "figure"):
        title, series, _ = naming.clearml_picture(item.key, item.step, item.rank, place.source)
        name = f"{item.sha256[:32]}{ending(item.name).lower()}"
        return f"{place.root}/metrics/{path_part(title)}/{path_part(series)}/{name}"
    kind = "models" if item.what == "checkpoint" else "artifacts"
    return f"{place.root}/{kind}/{path_part(artifact_key(item))}/{path_part(item.name)}"


def artifact_key(item: Media) -> str:
    return naming.clearml_series(item.key, item.rank)


def dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def batches(lines: Sequence[str]) -> Iterator[list[str]]:
    """The lines in order, cut to what one request may hold."""
    batch: list[str] = []
    size = 0
    for line in lines:
        if batch and (len(batch) == MAX_EVENTS or size + len(line) + 1 > MAX_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(line)
        size += len(line) + 1
    if batch:
        yield batch


def scalar_lines(rows: Rows, place: Place) -> tuple[list[str], Sent]:
    """One event per finite value, and what becomes of all values by them.

    Text is put together by hand: a dict and a json.dumps per point is five times slower.
    """
    steps = rows.step.tolist()
    times = (rows.wall_ns // 1_000_000).tolist()
    lines: list[str] = []
    sent = Sent()
    for key, column in rows.columns.items():
        named = naming.clearml_scalar(key, rows.rank, place.source)
        if named is None:
            sent.skip(naming.NOT_IN_ORIGINAL, len(steps))
            continue
        head = _scalar_head(place.task, *named)
        values = column.astype(np.float64)
        good = np.abs(values) <= MAX_VALUE  # False for nan
        points = zip(steps, values.tolist(), times, strict=True)
        if good.all():
            lines += [f'{head}{s},"value":{v!r},"timestamp":{t}}}' for s, v, t in points]
        else:
            sent.skip(NOT_FINITE, int((~good).sum()))
            lines += [
                f'{head}{s},"value":{v!r},"timestamp":{t}}}'
                for (s, v, t), fine in zip(points, good.tolist(), strict=True)
                if fine
            ]
    sent.delivered = len(lines)
    return lines, sent


def _scalar_head(task: str, title: str, series: str) -> str:
    return (
        f'{{"type":"training_stats_scalar","task":{json.dumps(task)},'
        f'"metric":{json.dumps(title)},"variant":{json.dumps(series)},"iter":'
    )


def summary_parts(item: Summary, place: Place) -> tuple[list[str], dict[str, Value]]:
    """Numbers as single values; and what else there is: text, None, non-finite numbers."""
    lines: list[str] = []
    others: dict[str, Value] = {}
    for name, value in item.values.items():
        series = naming.clearml_single_value(name, item.rank, place.source)
        if isinstance(value, int | float) and _fits(value):
            head = _scalar_head(place.task, SUMMARY_TITLE, series)
            at = item.wall_ns // 1_000_000
            lines.append(f'{head}{SUMMARY_ITERATION},"value":{float(value)!r},"timestamp":{at}}}')
        else:
            others[series] = value
    return lines, others


def _fits(value: float) -> bool:
    try:
        number = float(value)
    except OverflowError:  # an int beyond any float
        return False
    return math.isfinite(number) and abs(number) <= MAX_VALUE


def text_identity(item: Text) -> str:
    """What tells one log line from all others, for ever; it travels in the event's `worker`.

    The server gives log lines a random id (event_bll.py, add_events), so a line sent twice is
    there twice. `worker` comes back from events.get_task_log; the web page does not show it, only
    a log downloaded as text does, where it begins with the rank.
    """
    return f"rank{max(item.rank, 0)}/{item.stream.hex()[:16]}/{item.seq}"


def text_line(item: Text, place: Place) -> str:
    level = item.level.lower()
    return dumps(
        {
            "type": "log",
            "task": place.task,
            "timestamp": item.wall_ns // 1_000_000,
            "level": level if level in LEVELS else CONSOLE_LEVELS.get(level, "info"),
            "worker": text_identity(item),
            "msg": naming.rank_prefix(item.rank) + item.text,
        }
    )


def media_line(item: Media, place: Place, key: str, url: str) -> str | None:
    """The event that shows an image, figure or table; None if it can only be kept as a file."""
    if item.what == "image":
        return _event(item, place, "training_debug_image", key=key, url=url)
    plot = None
    if item.what == "figure":
        plot = figure_plot(item, url)
    elif item.what == "table":
        plot = table_plot(item)
    if plot is None or len(plot) > MAX_PLOT_BYTES:
        return None
    return _event(item, place, "plot", plot_str=plot)


def _event(item: Media, place: Place, kind: str, **fields: str) -> str:
    title, series, iteration = naming.clearml_picture(item.key, item.step, item.rank, place.source)
    event = {"type": kind, "task": place.task, "metric": title, "variant": series}
    at = item.wall_ns // 1_000_000
    return dumps({**event, "iter": iteration, "timestamp": at, **fields})


def figure_plot(item: Media, url: str) -> str | None:
    """A plotly figure as it is; a picture as an empty plot with the picture laid over it."""
    suffix = Path(item.name).suffix.lower()
    if suffix == ".json":
        value = _json_of(item)
        if not isinstance(value, dict) or "data" not in value:
            raise Refused(f"{item.name}: a figure in JSON needs plotly's data and layout")
        return dumps(value)
    if suffix not in PICTURES:
        return None
    over = {"xref": "paper", "yref": "paper", "x": 0, "y": 1, "sizex": 1, "sizey": 1}
    image = {**over, "source": url, "sizing": "contain", "layer": "above", "visible": True}
    hidden = {"visible": False}
    layout = {"title": item.key, "xaxis": hidden, "yaxis": hidden, "images": [image]}
    return dumps({"data": [], "layout": layout})


def table_plot(item: Media) -> str | None:
    """A table as plotly shows one; None if the file is too long or in no form we know."""
    if item.size_bytes > MAX_PLOT_BYTES:
        return None
    table = _table_of(item)
    if table is None:
        return None
    header, rows = table
    columns = [[row[i] if i < len(row) else "" for row in rows] for i in range(len(header))]
    trace = {"type": "table", "header": {"values": header}, "cells": {"values": columns}}
    return dumps({"data": [trace], "layout": {"title": item.key}})


def _table_of(item: Media) -> tuple[list[Any], list[list[Any]]] | None:
    """Header and rows of a CSV, or of JSON: {columns, rows | data}, list of maps, list of lists."""
    suffix = Path(item.name).suffix.lower()
    if suffix in TABLES:
        with item.path.open(newline="", encoding="utf-8", errors="replace") as file:
            rows: list[list[Any]] = list(csv.reader(file, delimiter=TABLES[suffix]))
        return (rows[0], rows[1:]) if rows else None
    value = _json_of(item) if suffix == ".json" else None
    if isinstance(value, dict) and isinstance(value.get("columns"), list):
        found = value.get("rows", value.get("data"))
        return (value["columns"], found or []) if _is_rows(found) else None
    if not isinstance(value, list) or not value:
        return None
    if all(isinstance(row, dict) for row in value):
        names = list(dict.fromkeys(name for row in value for name in row))
        return names, [[row.get(name, "") for name in names] for row in value]
    return (value[0], value[1:]) if _is_rows(value) else None


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, list) for row in value)


def _json_of(item: Media) -> Any:
    """The file's JSON with nan and infinities as null, which the web page can draw."""
    try:
        return json.loads(item.path.read_bytes(), parse_constant=lambda _: None)
    except ValueError as error:
        raise Refused(f"{item.name}: not JSON ({error})") from None
