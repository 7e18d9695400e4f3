"""What ingest tells each second in small files: who is alive, how it stands itself."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import msgspec

from .journals import RunStore
from .peers import Peers
from .presence import superseded
from .streams import Stream

log = logging.getLogger("rankgate.ingest")


def tell_live(store: RunStore, peers: Peers, now_ns: int, runs: set[str]) -> None:
    """live.json of each run that has a stream, or had one until now."""
    streams: dict[str, list[Stream]] = {run: [] for run in runs}
    for stream in peers.streams.values():
        if not stream.file:
            streams.setdefault(stream.run, []).append(stream)
    for run, own in streams.items():
        write_json(store.directory(run) / "live.json", _live(peers, run, own, now_ns))


def _live(peers: Peers, run: str, streams: list[Stream], now_ns: int) -> dict[str, Any]:
    newer = superseded(peers.streams.values(), run)
    told = [{**_about(s), **_superseded(s, newer.get(s.id))} for s in streams]
    duplicates = peers.duplicates.get(run, 0)
    return {"at_ns": now_ns, "pid": os.getpid(), "duplicates": duplicates, "streams": told}


def _about(s: Stream) -> dict[str, Any]:
    """A stream in live.json; with what its HELLO (`ABOUT`) and PING (`PROGRESS`) told."""
    return {
        "stream": s.id.hex(),
        "kind": s.kind,
        "heard_ns": s.heard_ns,
        "silent": s.silent,
        "link": s.link,
        "ended": s.ended,
        "durable": s.durable,
        **s.about,
        **s.progress,
    }


def _superseded(s: Stream, newer: Stream | None) -> dict[str, Any]:
    """By whom, and for how many seconds both have been heard."""
    if newer is None:
        return {}
    seconds = (min(s.heard_ns, newer.heard_ns) - newer.opened_ns) / 1e9
    return {"superseded": newer.id.hex(), "both_seconds": max(0.0, seconds)}


def tell_ingest(store: RunStore, peers: Peers, alarms: list[str], now_ns: int) -> None:
    """ingest.json: that this process is there, what it holds, what has run out."""
    told = {
        "at_ns": now_ns,
        "pid": os.getpid(),
        "full": peers.room.full,
        "alarms": alarms,
        "streams": sum(not s.file and not s.ended for s in peers.streams.values()),
        "blobs": sum(s.file is not None and not s.ended for s in peers.streams.values()),
        "counts": peers.counts,
        "journals": {**store.ends, **{run: j.durable_seq for run, j in store.open.items()}},
    }
    write_json(store.root / "ingest.json", told)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """For display only, by rename; a full disk must not stop the loop."""
    text = msgspec.json.encode(value)  # ten times as fast as json, for thousands of streams
    part = path.with_suffix(".part")
    try:
        part.write_bytes(text)
        part.rename(path)
    except OSError as error:
        log.debug("cannot write %s: %s", path, error)
        part.unlink(missing_ok=True)
        _write_over(path, text)


def _write_over(path: Path, text: bytes) -> None:
    """On a full disk: into the blocks that the file has. Whoever reads it at this very moment may
    find it torn, and looks again; without it they would be told that the gateway is gone."""
    try:
        with path.open("r+b") as file:
            file.write(text.ljust(path.stat().st_size))
    except OSError as error:
        log.debug("cannot write over %s: %s", path, error)
