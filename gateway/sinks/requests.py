"""Small files by which a person asks a sink's process for something.

`requests/SINK.N.json` is renamed in by a command, and consumed by whoever holds the sink's lock:
its process while it runs, else the command itself. One that is consumed twice (a death in between)
finds nothing more to do.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

from .quarantine import Quarantine

RETRY, SKIP = "retry", "skip"

log = logging.getLogger("rankgate.sinks")


def ask(run_dir: Path, sink: str, action: str, ids: Sequence[int] | None) -> Path:
    """Ask to `retry` or `skip` what is in quarantine under these ids (None: all). Returns the
    file, which is gone once that is done. Raises OSError."""
    folder = run_dir / "requests"
    folder.mkdir(mode=0o700, exist_ok=True)
    name = f"{sink}.{time.time_ns()}-{os.getpid()}.json"
    part = folder / f".{name}"
    part.write_text(json.dumps({"action": action, "ids": None if ids is None else list(ids)}))
    return part.rename(folder / name)


def waiting(run_dir: Path, sink: str) -> list[Path]:
    """What was asked of this sink and not consumed yet, oldest first."""
    try:
        names = os.listdir(run_dir / "requests")
    except OSError:
        return []
    ours = (n for n in names if n.startswith(f"{sink}.") and n.endswith(".json"))
    return [run_dir / "requests" / name for name in sorted(ours)]


def consume(run_dir: Path, sink: str, quarantine: Quarantine) -> None:
    """Do what was asked. The caller holds the sink's lock."""
    for path in waiting(run_dir, sink):
        with contextlib.suppress(FileNotFoundError):
            _consume(path, quarantine)


def _consume(path: Path, quarantine: Quarantine) -> None:
    try:
        asked = json.loads(path.read_text())
        action, ids = asked["action"], asked["ids"]
        if ids is not None:
            ids = [int(id_) for id_ in ids]
        if action == RETRY:
            quarantine.retry(ids)
        elif action == SKIP:
            quarantine.skip(ids)
        else:
            log.error("nobody knows how to %r, which %s asks for", action, path)
    except (ValueError, KeyError, TypeError):
        log.error("%s is no request that can be read; it is left out", path)
    path.unlink()
