"""Does a gateway serve a data directory, and what do its small files tell?"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rank_client.rendezvous import LOCK_GATEWAY, locked
from rank_client.wire.disk import tree_bytes

ANSWER_NS = 3 * 10**9  #: ingest says each second that it is there


@dataclass(frozen=True, slots=True)
class Gateway:
    """The gateway of a data directory: serving | not answering | not running."""

    state: str
    dir: str
    addresses: tuple[str, ...]
    pid: int
    up_seconds: float
    answered_ns: int  #: when ingest last said that it is there, 0 for never
    full: bool  #: the disk takes no more
    bytes: int  #: what the data directory holds
    alarms: tuple[str, ...] = ()  #: what has run out, in words


def read_json(path: Path) -> dict[str, Any]:
    """A small file that is replaced by rename; empty when it is not there or no map."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def gateway_of(data_dir: Path, now_ns: int, measure: bool = False) -> Gateway:
    """How the gateway of a data directory stands; `measure` also sums up the files."""
    ingest, started = read_json(data_dir / "ingest.json"), read_json(data_dir / "gateway.json")
    at_ns, pid = whole(ingest.get("at_ns")), whole(ingest.get("pid"))
    here = started.get("host") in (None, socket.gethostname())
    serving = 0 < now_ns - at_ns < ANSWER_NS and not (here and not _alive(pid))
    if serving:
        state = "serving"
    elif locked(data_dir / "gateway.lock", LOCK_GATEWAY):
        state = "not answering"
    else:
        state = "not running"
    return Gateway(
        state,
        str(data_dir),
        tuple(str(a) for a in started.get("addresses") or ()),
        pid,
        max(0.0, (now_ns - mtime_ns(data_dir / "gateway.json")) / 1e9) if serving else 0.0,
        at_ns,
        bool(ingest.get("full")),
        tree_bytes(data_dir) if measure else 0,
        tuple(str(a) for a in ingest.get("alarms") or ()),
    )


def whole(value: Any) -> int:
    """A number out of such a file; 0 for what is none."""
    return value if isinstance(value, int) else 0


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return pid > 0


def mtime_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
