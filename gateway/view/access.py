"""Reading a run from Python: `run = gateway.view.open("digits-7f3a"); run.points("train/loss")`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from .finding import find_run, reading
from .points import Ints, lives_of, query_key
from .queries import RunView, run_view
from .shown import final_values


@dataclass(frozen=True, slots=True, eq=False)
class Values:
    """Points of one key: columns of one length, sorted by rank and step. `rank` is None for a
    reduction over ranks."""

    rank: Ints | None
    attempt: Ints
    step: Ints
    time_ns: Ints
    value: npt.NDArray[Any]

    def __len__(self) -> int:
        return len(self.step)


@dataclass(frozen=True, slots=True)
class Run:
    """A run on disk, opened anew by each call: what is asked later may tell more."""

    path: Path

    def state(self) -> RunView:
        """How it stands: state, ranks, problems, accounting, sinks."""
        return run_view(self.path, time.time_ns())

    def keys(self) -> list[str]:
        with reading(self.path) as reader:
            return sorted(reader.key_names())

    def points(
        self,
        key: str,
        ranks: Iterable[int] | None = None,
        steps: tuple[int | None, int | None] = (None, None),
        attempts: str = "latest",
        reduce: str = "",
    ) -> Values:
        """One key by its exact name, as `rankgate query` gives it. `steps` is half-open,
        `attempts` latest or all, `reduce` empty or mean, min, max, sum, count."""
        with reading(self.path) as reader:
            lives = lives_of(reader, reader.about(), reader.streams())
            chosen = None if ranks is None else frozenset(ranks)
            found = query_key(reader, lives, key, chosen, steps, attempts == "all", reduce)
        return Values(found.rank, found.attempt, found.step, found.time_ns, found.value)

    def params(self) -> dict[str, dict[int, Any]]:
        """key → rank → value, as last logged."""
        return self._maps("params")

    def summary(self) -> dict[str, dict[int, Any]]:
        """key → rank → final value, as last logged."""
        return self._maps("summary")

    def _maps(self, kind: str) -> dict[str, dict[int, Any]]:
        with reading(self.path) as reader:
            return final_values(reader, reader.streams(), kind)

    def texts(self) -> list[tuple[int, int, int | None, str, str]]:
        """(wall_ns, rank, step, level, text) of every line, by time."""
        with reading(self.path) as reader:
            ranks = [s.rank for s in reader.streams()]
            rows = reader.texts()
        return [(wall, ranks[stream], step, level, t) for stream, _, wall, step, level, t in rows]


def open(  # noqa: A001 - read as gateway.view.open
    run_or_path: str | Path, data_dir: str | Path | None = None
) -> Run:
    """A run by id, unique prefix, name, or the path of its folder. Raises UnknownRun,
    AmbiguousRun."""
    root = Path(data_dir or os.environ.get("RANKGATE_DIR") or ".rankgate")
    return Run(find_run(root, str(run_or_path)))
