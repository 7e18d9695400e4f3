"""A run with its keys, final values and files: what `show` and the summary at the end tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..rules.changes import SYSTEM
from ..series.reader import Reader
from ..series.tables import StreamRow
from .finding import reading
from .media import FileRow, files_of
from .points import KeyRow, key_row, lives_of, matching_keys
from .queries import RunView, view_of

LOOKED_AT_KEYS = 200  #: by `show`, for values that are no numbers


@dataclass(frozen=True, slots=True)
class Shown:
    """What `show` tells beside the run: keys, at the step that most of them share."""

    view: RunView
    attempt: int  #: the newest
    step: int
    keys: tuple[KeyRow, ...]
    all_keys: int
    summary: dict[str, dict[int, Any]]  #: key → rank → final value
    files: tuple[FileRow, ...] = ()


def key_order(name: str) -> tuple[int, str]:
    """Losses first, then compute and step times, then the rest; how the machine is comes last."""
    if name.startswith(SYSTEM):
        return 3, name
    last = name.rpartition("/")[2].lower()
    if last.endswith("loss"):
        return 0, name
    return (1 if "compute" in last or "step_time" in last or "step_seconds" in last else 2), name


def shown(
    run_dir: Path,
    now_ns: int,
    spool: Path | None = None,
    globs: Sequence[str] = ("*",),
    limit: int = LOOKED_AT_KEYS,
) -> Shown:
    """A run with its keys at the last step that all ranks have."""
    with reading(run_dir) as reader:
        about, streams = reader.about(), reader.streams()
        lives = lives_of(reader, about, streams)
        view = view_of(reader, about, streams, now_ns, spool)
        names = sorted(matching_keys(reader, globs), key=key_order)
        ranks = frozenset(r.rank for r in view.ranks)
        newest = len(about.generations) - 1
        found = [key_row(reader, lives, name, newest, ranks) for name in names[:limit]]
        summary = final_values(reader, streams)
        files = files_of(reader, streams)
    rows = tuple(row for row in found if row is not None)
    return Shown(view, lives.attempts, _shared_step(rows), rows, len(names), summary, files)


def _shared_step(rows: Sequence[KeyRow]) -> int:
    """The step most keys of the training stand at; the later one of two."""
    steps = [row.step for row in rows if not row.key.startswith(SYSTEM)]
    return max(steps, key=lambda s: (steps.count(s), s), default=-1)


def final_values(
    reader: Reader, streams: Sequence[StreamRow], kind: str = "summary"
) -> dict[str, dict[int, Any]]:
    """key → rank → the last value given to `log_summary` (or, with `params`, `log_params`)."""
    out: dict[str, dict[int, Any]] = {}
    rows = reader.maps(kind)
    rows.sort(key=lambda row: (row[0], row[1]))  # a later life of a rank has a higher index
    for stream, _, _, values in rows:
        for key, value in values.items():
            out.setdefault(key, {})[streams[stream].rank] = value
    return out
