"""`rankgate query`: points of keys as table, CSV, JSON or Parquet."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from ..errors import BadConfig, UnknownRun
from ..series.reader import Reader
from ..view import export
from ..view.finding import check_whole, find_run, reading
from ..view.points import REDUCTIONS, Answer, lives_of, matching_keys, query_key
from ..view.words import ranges
from .options import DEFAULT_DIR, Dir, Json, Ranks, RunName, ranks_of, steps_of, write


def command(
    run: RunName,
    keys: Annotated[
        list[str],
        typer.Argument(metavar="KEY...", help="Keys or globs; an exact match goes first."),
    ],
    rank: Ranks = "all",
    steps: Annotated[
        str,
        typer.Option("--steps", metavar="A:B", help="Steps A to B - 1; either may be left out."),
    ] = "",
    attempts: Annotated[
        str, typer.Option("--attempts", help="latest or all.", metavar="WHICH")
    ] = "latest",
    reduce: Annotated[
        str, typer.Option("--reduce", metavar="HOW", help="Over ranks: mean, min, max, sum, count.")
    ] = "",
    format_: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="table, csv, json or parquet.")
    ] = "table",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write to this file.")
    ] = None,
    directory: Dir = DEFAULT_DIR,
    as_json: Json = False,
) -> None:
    """Print the points of keys, of all ranks and the latest attempt.

    CSV has the columns key, rank, reduction, attempt, step, time_ns, value: rank empty for a
    reduced value, reduction for a raw one, time_ns by the rank's clock, and nan, inf and whole
    numbers exact. JSON (--json or --format json) is a list of objects with the same names. Rows
    are sorted by key, rank and step. In a reduction, time_ns and attempt are those of the last
    rank. Attempt 0 is a life of an unknown launch: it shows with --attempts all only.

    \b
    Examples:
      rankgate query 7f3a train/loss --rank 0,3
      rankgate query 7f3a 'train/*' --reduce mean --steps 1000:2000
      rankgate query 7f3a train/loss --attempts all --format csv > loss.csv
    """
    if as_json and format_ not in ("table", "json"):
        raise BadConfig(f"--json and --format {format_} cannot both be had; give one of them.")
    format_ = "json" if as_json else format_
    _check(format_, attempts, reduce, output)
    chosen, span = ranks_of(rank), steps_of(steps)
    run_dir = find_run(directory, run)
    with reading(run_dir) as reader:
        names = matching_keys(reader, keys)
        if not names:
            raise no_such_key(reader, run, keys)
        lives = lives_of(reader, reader.about(), reader.streams())
        _check_ranks(run, chosen, {s.rank for s in reader.streams() if s.kind != "tool"})

        def answers() -> Iterator[Answer]:
            for name in names:
                yield query_key(reader, lives, name, chosen, span, attempts == "all", reduce)

        _write(format_, answers(), output)
    check_whole(run_dir)


def _check(format_: str, attempts: str, reduce: str, output: Path | None) -> None:
    if format_ not in export.FORMATS:
        raise BadConfig(f"--format is one of {', '.join(export.FORMATS)}, not {format_!r}.")
    if attempts not in ("latest", "all"):
        raise BadConfig(f"--attempts is latest or all, not {attempts!r}.")
    if reduce and reduce not in REDUCTIONS:
        raise BadConfig(f"--reduce is one of {', '.join(REDUCTIONS)}, not {reduce!r}.")
    if format_ == "parquet" and output is None:
        raise BadConfig("Parquet is binary: say where it goes with --output FILE.")


def no_such_key(reader: Reader, run: str, globs: list[str]) -> UnknownRun:
    """What to say where no key matches: those there are."""
    known = sorted(reader.key_names())
    some = ", ".join(known[:8]) + (f" and {len(known) - 8:,} more" if len(known) > 8 else "")
    has = f"It has {some}." if known else "It has no values yet."
    return UnknownRun(f"Run {run} has no key that matches {' '.join(globs)!r}. {has}")


def _check_ranks(run: str, chosen: frozenset[int] | None, there: set[int]) -> None:
    """Raises UnknownRun where none of the ranks that were named took part."""
    if chosen is not None and not chosen & there:
        has = f"It has {ranges(there)}." if there - {-1} else "It has no ranks."
        raise UnknownRun(f"Run {run} has no rank {ranges(chosen)}. {has}")


def _write(format_: str, answers: Iterator[Answer], output: Path | None) -> None:
    if format_ == "parquet" and output is not None:
        export.write_parquet(answers, output)
        return
    writer = {"csv": export.write_csv, "json": export.write_json}.get(format_, export.write_table)
    if output is None:
        writer(answers, write)
        sys.stdout.flush()
        return
    try:
        with output.open("w", encoding="utf-8", newline="") as file:
            writer(answers, file.write)
    except OSError as error:
        raise BadConfig(f"Cannot write {output}: {error.strerror or error}.") from error
