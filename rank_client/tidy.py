"""Removing spools that were shipped, once they are old or too many."""

from __future__ import annotations

import shutil
from pathlib import Path

from .orphans import alive, held, stream_directories
from .spool_place import SPOOL_KEEP_BYTES
from .wire.disk import OsDisk, tree_bytes
from .wire.segments import segment_indexes, segment_path

KEEP_DONE_SECONDS = 7 * 86400.0


def tidy(root: Path, now: float, keep_bytes: int = SPOOL_KEEP_BYTES) -> int:
    """Of the spools that were shipped, remove those of long ago, and the oldest beyond what a
    node keeps, which its living processes have a part of; how many."""
    shipped: list[tuple[float, Path]] = []
    room = keep_bytes
    for directory in stream_directories(root):
        if alive(directory):
            room -= tree_bytes(directory)
            continue
        try:
            shipped.append(((directory / "done").stat().st_mtime, directory))
        except OSError:
            continue  # it waits for a gateway, and is never removed
    removed = 0
    for when, directory in sorted(shipped, reverse=True):
        size = tree_bytes(directory)
        with held(directory) as ours:
            if ours and (room <= 0 or now - when > KEEP_DONE_SECONDS):
                shutil.rmtree(directory, ignore_errors=True)
                removed += 1
            elif ours and size > room:
                _cut(directory, size - room)
        room -= size
    return removed


def _cut(directory: Path, excess: int) -> None:
    """Remove the oldest segments, but never the last: it tells whose they were."""
    for index in segment_indexes(OsDisk(), str(directory))[:-1]:
        if excess <= 0:
            return
        path = Path(segment_path(str(directory), index))
        excess -= path.stat().st_size
        path.unlink()
