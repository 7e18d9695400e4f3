"""Machine metrics: rows whose keys start with `system/`, and the form Platform shows them in. Pure.

Platform shows one machine and stamps what it gets with the time of its arrival, so only the newest
sample of the first node that logged one is sent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gateway.sinks.base import Rows

PREFIX = "system/"
NOT_NEWEST = "machine metrics: only the newest are shown"
OTHER_NODE = "machine metrics: one node is shown"

#: Our key → the field, and its part, in Platform's `system`.
_FIELDS = {
    "cpu_percent": ("cpu",),
    "memory_percent": ("ram",),
    "disk_read_mbs": ("disk_io", "read_mbs"),
    "disk_written_mbs": ("disk_io", "write_mbs"),
    "network_received_mbs": ("network", "recv_mbs"),
    "network_sent_mbs": ("network", "sent_mbs"),
}
_GPU_FIELDS = {
    "percent": "usage",
    "memory_percent": "memory",
    "temperature_celsius": "temp",
    "power_watts": "power",
}
_GPU = re.compile(r"gpu/(\d+)/(\w+)")


def apart(rows: Sequence[Rows]) -> tuple[list[Rows], list[Rows]]:
    """(rows of all other keys, rows of the machine's keys)."""
    others, machine = [], []
    for part in rows:
        names = {name for name in part.columns if name.startswith(PREFIX)}
        if not names:
            others.append(part)
            continue
        machine.append(_only(part, names))
        if names != part.columns.keys():
            others.append(_only(part, part.columns.keys() - names))
    return others, machine


def sample(part: Rows) -> dict[str, float | None]:
    """The last row's values by our names; None where one is not finite."""
    values = {name: float(column[-1]) for name, column in part.columns.items()}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def as_shown(values: dict[str, float | None]) -> dict[str, Any]:
    """In Platform's form; what it has no field for is left out."""
    shown: dict[str, Any] = {}
    for name, value in values.items():
        key = name.removeprefix(PREFIX)
        if match := _GPU.fullmatch(key):
            field = _GPU_FIELDS.get(match[2])
            if field:
                shown.setdefault("gpus", {}).setdefault(match[1], {})[field] = value
        elif key in _FIELDS:
            *parents, field = _FIELDS[key]
            place = shown.setdefault(parents[0], {}) if parents else shown
            place[field] = value
    return shown


def _only(part: Rows, names: Any) -> Rows:
    return replace(part, columns={k: v for k, v in part.columns.items() if k in names})
