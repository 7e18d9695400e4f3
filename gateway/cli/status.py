"""`rankgate status`: the gateway, the runs it serves, the books and the sinks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from ..errors import RankgateError
from ..view.export import json_text
from ..view.finding import find_run, newest_first
from ..view.lines import console, width_of, wrapped
from ..view.queries import RunView, run_view
from ..view.serving import Gateway, gateway_of
from ..view.terminal import gateway_lines, run_status_lines
from .options import DEFAULT_DIR, Dir, Json, spool, write

LOOKED_AT_RUNS = 50
ALL_DONE = ("drained", "exported", "off")


def command(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="One run; left out: those with news.")
    ] = None,
    directory: Dir = DEFAULT_DIR,
    as_json: Json = False,
) -> None:
    """Say whether the gateway answers, what its runs do, and where every event is.

    LOGGED = stored + on the way + lost. FEED is what the rules let through to the sinks, in items;
    FEED = delivered + skipped + quarantined + waiting. Shown are the runs that go on or whose
    sinks have something to do, else the newest.

    \b
    Examples:
      rankgate status
      rankgate status 7f3a --json

    --json gives an object: gateway (state, dir, addresses, pid, up_seconds, answered_ns, full,
    bytes) and runs (run, name, state, live, step, live_ranks, world_size, ranks, problems,
    accounting, duplicates, passed, held, sinks and more).
    """
    now_ns = time.time_ns()
    gateway = gateway_of(directory, now_ns, measure=True)
    views, problems = _views(directory, run, now_ns)
    if as_json:
        write(json_text({"gateway": gateway, "runs": views, "unreadable": problems}) + "\n")
        return
    _print(gateway, views, problems)


def _views(directory: Path, run: str | None, now_ns: int) -> tuple[list[RunView], list[str]]:
    """The runs to tell of, and what could not be read."""
    if run is not None:
        return [run_view(find_run(directory, run), now_ns, spool())], []
    views, problems = [], []
    for path in newest_first(directory)[:LOOKED_AT_RUNS]:
        try:
            views.append(run_view(path, now_ns, spool()))
        except RankgateError as error:
            problems.append(error.text)
    busy = [v for v in views if _has_news(v)]
    return busy or views[:1], problems


def _has_news(view: RunView) -> bool:
    return view.state == "running" or any(s.waiting and s.state not in ALL_DONE for s in view.sinks)


def _print(gateway: Gateway, views: list[RunView], problems: list[str]) -> None:
    out = console()
    width = width_of(out)
    for line in gateway_lines(gateway):
        out.print(line)
    for i, view in enumerate(views):
        if i:
            out.print()
        for line in run_status_lines(view, width):
            out.print(line)
    for text in problems:
        for line in wrapped(text, "! ", "  ", width, "red"):
            out.print(line)
    if not views and not problems:
        out.print("RUN      none yet; a rank's rank_client.init() makes one")
