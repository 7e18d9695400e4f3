"""`rankgate tail`: the lines that ranks logged, by time, and those to come."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.text import Text

from ..series.reader import Reader
from ..series.tables import StreamRow
from ..view.finding import find_run, reading
from ..view.lines import console, rank_style
from ..view.words import clean, clock
from .options import DEFAULT_DIR, Dir, Json, Ranks, RunName, ranks_of, write

FOLLOW_SECONDS = 0.25
OVER = ("completed", "failed")
_UNSAID = ("", "info", "stdout")
_LEVEL_STYLES = {"stderr": "dim", "warning": "yellow", "error": "red", "critical": "bold red"}

Row = tuple[int, int, int, int | None, str, str]


class Line(NamedTuple):
    rank: int
    node: str
    wall_ns: int
    step: int | None
    level: str
    text: str


def command(
    run: RunName,
    rank: Ranks = "all",
    lines: Annotated[
        int, typer.Option("--lines", "-n", min=0, help="So many of the newest lines.")
    ] = 20,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the run is over or Ctrl-C.")
    ] = False,
    directory: Dir = DEFAULT_DIR,
    as_json: Json = False,
) -> None:
    """Print the newest lines of text that ranks logged or printed, oldest first.

    \b
    Examples:
      rankgate tail 7f3a --rank 37
      rankgate tail 7f3a --follow --lines 0

    --json gives one object per line: rank, node, time_ns, step, level (of a printed line stdout or
    stderr), text.
    """
    run_dir, chosen = find_run(directory, run), ranks_of(rank)
    out = console()
    width = 0
    for line, ranks in _lines(run_dir, chosen, lines, follow):
        if as_json:
            write(_json_line(line) + "\n")
        else:
            width = max(width, len(str(max(ranks - 1, line.rank))))
            _print(out, line, ranks, width)


def _lines(
    run_dir: Path, chosen: frozenset[int] | None, n: int, follow: bool
) -> Iterator[tuple[Line, int]]:
    """(line, how many ranks the run has), first what is there, then what comes."""
    with reading(run_dir) as reader:
        streams = reader.streams()
        ranks = len({s.rank for s in streams if s.kind != "tool"})
        seen = {s.index: s.last_seq for s in streams}
        rows = reader.last_texts(n, _indexes(streams, chosen)) if n else []
        for row in rows:
            yield _line(streams, row), ranks
        while follow:
            fresh, streams = _fresh(reader, seen, chosen)
            for row in fresh:
                yield _line(streams, row), max(ranks, len({s.rank for s in streams}))
            if not fresh and reader.about().state in OVER:
                return
            time.sleep(FOLLOW_SECONDS)


def _indexes(streams: Sequence[StreamRow], chosen: frozenset[int] | None) -> list[int] | None:
    return None if chosen is None else [s.index for s in streams if s.rank in chosen]


def _fresh(
    reader: Reader, seen: dict[int, int], chosen: frozenset[int] | None
) -> tuple[list[Row], list[StreamRow]]:
    """The lines since the last look, by time; each stream has its own cursor, as clocks differ."""
    streams = reader.streams()
    rows: list[Row] = []
    for stream in streams:
        before = seen.get(stream.index, 0)
        if stream.last_seq > before:
            seen[stream.index] = stream.last_seq
            if chosen is None or stream.rank in chosen:
                rows += (
                    r for r in reader.texts_of(stream.index, before) if r[1] <= stream.last_seq
                )
    return sorted(rows, key=lambda row: (row[2], row[0], row[1])), streams


def _line(streams: Sequence[StreamRow], row: Row) -> Line:
    stream, _, wall_ns, step, level, text = row
    its = streams[stream]
    return Line(its.rank, its.node, wall_ns, step, level, text)


def _json_line(line: Line) -> str:
    names = {"rank": line.rank, "node": line.node, "time_ns": line.wall_ns}
    return json.dumps({**names, "step": line.step, "level": line.level, "text": line.text})


def _print(out: Console, line: Line, ranks: int, width: int) -> None:
    level = "" if line.level in _UNSAID else f"{clean(line.level).upper()} "
    # The lines of one text stay together; each is safe on its own.
    for i, part in enumerate(line.text.splitlines() or [""]):
        head = Text().append(clock(line.wall_ns), "dim")
        head.append(f" {line.rank:>{width}} ", rank_style(line.rank, ranks))
        head.append(level if i == 0 else "", _LEVEL_STYLES.get(line.level.lower(), ""))
        out.print(head.append(clean(part), ""))
