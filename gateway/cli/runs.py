"""`rankgate runs`: one row per run, the newest first."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from ..errors import RankgateError
from ..view.export import json_text
from ..view.finding import newest_first
from ..view.lines import console
from ..view.queries import RunView, run_view
from ..view.terminal import runs_lines
from .options import DEFAULT_DIR, Dir, Json, spool, write


def command(
    directory: Dir = DEFAULT_DIR,
    limit: Annotated[int, typer.Option("--limit", help="So many at most.", min=1)] = 50,
    as_json: Json = False,
) -> None:
    """List the runs of a data directory: one row per run, never one per rank.

    \b
    Examples:
      rankgate runs
      rankgate runs --dir /scratch/team/.rankgate --limit 10
      rankgate runs --json | jq '.[] | select(.state == "failed") | .run'

    --json gives a list of runs, each as in `status --json`; one that cannot be read has run and
    error.
    """
    now_ns = time.time_ns()
    paths = newest_first(directory)
    views: list[RunView | tuple[str, str]] = []
    for path in paths[:limit]:
        try:
            views.append(run_view(path, now_ns, spool()))
        except RankgateError as error:
            views.append((path.name, error.text))
    if as_json:
        told = [v if isinstance(v, RunView) else {"run": v[0], "error": v[1]} for v in views]
        write(json_text(told) + "\n")
        return
    out = console()
    if not views:
        out.print(f"No runs in {directory}; a rank's rank_client.init() makes one")
        return
    for line in runs_lines(views, now_ns):
        out.print(line)
    if len(paths) > limit:
        out.print(f"and {len(paths) - limit:,} older: --limit {len(paths)}")
