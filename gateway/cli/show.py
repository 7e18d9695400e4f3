"""`rankgate show`: one run, its problems and its values."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from ..view.export import json_text
from ..view.finding import check_whole, find_run, reading
from ..view.lines import console, width_of
from ..view.shown import shown
from ..view.terminal import show_lines
from .options import DEFAULT_DIR, Dir, Json, RunName, spool, write
from .query import no_such_key


def command(
    run: RunName,
    keys: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY]...", help="Keys or globs; left out: all, losses first."),
    ] = None,
    directory: Dir = DEFAULT_DIR,
    as_json: Json = False,
) -> None:
    """Show one run: state, problems, and every key at the last step that all ranks have.

    Ranks stand side by side as mean, min and max, each with its rank. NaN and Inf are named with
    rank and steps.

    \b
    Examples:
      rankgate show 7f3a
      rankgate show digits-7f3a 'train/*'
      rankgate show /archive/runs/7f3a9c21d04e --json

    --json gives an object: view (the run as `status --json` tells it, with its ranks, problems,
    accounting and sinks), attempt, step, keys (key, step, ranks, expected, mean, min, min_rank,
    max, max_rank, same, values, spark, not_finite), all_keys, summary, files (rank, step, what,
    key, name, size_bytes, sha256, lost).
    """
    run_dir = find_run(directory, run)
    found = shown(run_dir, time.time_ns(), spool(), keys or ["*"])
    if keys and not found.keys:
        with reading(run_dir) as reader:
            raise no_such_key(reader, found.view.name, keys)
    if as_json:
        write(json_text(found) + "\n")
    else:
        out = console()
        for line in show_lines(found, width_of(out)):
            out.print(line)
    check_whole(run_dir)
