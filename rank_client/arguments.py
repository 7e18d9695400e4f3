"""What `init` is given: checked, and cut to what a HELLO has room for."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from .wire.frames import MAX_HELLO_BYTES
from .wire.keys import valid_run_id

log = logging.getLogger("rankgate")


def fitting(tags: list[str]) -> list[str]:
    """The first ones that HELLO has room for: a HELLO that is too long would be refused."""
    room = MAX_HELLO_BYTES // 2
    out: list[str] = []
    for tag in tags:
        room -= len(tag.encode())
        if room < 0:
            log.warning("rankgate: only the first %d of %d tags are kept", len(out), len(tags))
            break
        out.append(tag)
    return out


def check(
    project: Any, name: Any, run: Any, config: Any, tags: Any, gateway: Any, *numbers: Any
) -> None:
    for label, value in (("project", project), ("name", name), ("run", run), ("gateway", gateway)):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{label} must be a string, not {type(value).__name__}")
    if run is not None and not valid_run_id(run):
        raise ValueError(f"run must match [A-Za-z0-9._-]{{1,64}}, and {run!r} does not")
    if config is not None and not isinstance(config, Mapping):
        raise ValueError(f"config must be a dict, not {type(config).__name__}")
    listed = isinstance(tags, Collection) and not isinstance(tags, str)
    if not listed or not all(isinstance(t, str) for t in tags):
        raise ValueError("tags must be a list of strings")
    for label, value in zip(("rank", "local_rank", "world_size"), numbers, strict=True):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"{label} must be an integer, not {type(value).__name__}")
