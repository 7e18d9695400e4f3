"""`rankgate sinks`: how each sink stands, and what to do with what a backend would not take."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import RankgateError
from ..sinks import requests
from ..sinks.quarantine import Row, read_quarantine
from ..sinks.store import store_name
from ..view.export import json_text
from ..view.finding import find_run, is_closed, run_dirs
from ..view.lines import console, width_of, wrapped
from ..view.queries import run_view
from ..view.sinks import SinkRow
from ..view.terminal import sink_lines
from ..view.typed import typed
from ..view.words import clean, plural
from .options import DEFAULT_DIR, ConfigFile, Dir, Json, spool, write
from .release import Outcome, chosen, have_retried, have_skipped

SHOWN_ITEMS = 20  #: of a sink's quarantine, in text

group = typer.Typer(
    help="Sinks: how they stand; try again, or give up, what a backend would not take.",
    rich_markup_mode=None,
)

Ids = Annotated[
    list[str] | None,
    typer.Argument(metavar="[RUN/SINK/ID]…", help="As `sinks status` shows them; or RUN/SINK."),
]
All = Annotated[
    bool, typer.Option("--all", help="All that RUN/SINK has, or without one all there is.")
]


@group.callback()
def _sinks() -> None:
    """Sinks: how they stand; try again, or give up, what a backend would not take."""


@group.command()
def status(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="One run; left out: every run.")
    ] = None,
    directory: Dir = DEFAULT_DIR,
    as_json: Json = False,
) -> None:
    """Per run and sink: delivered, skipped (why), waiting, and each item in quarantine.

    FEED = delivered + skipped + quarantined + waiting, in items.

    \b
    Examples:
      rankgate sinks status
      rankgate sinks status 7f3a --json

    --json gives a list, one object per run and sink: run, sink, state, reason, feed, delivered,
    skipped, skipped_reasons, quarantined, waiting, maybe_duplicate, export, and items (id, what,
    reason, items, kind, stream, seq, key, at_ns, asked). Of every run, one that cannot be read
    has run and error.
    """
    told, unreadable = _told_of(directory.absolute(), run)
    if as_json:
        objects = [_as_json(path, s) for path, sinks in told for s in sinks]
        errors = [{"run": name, "error": text} for name, text in unreadable.items()]
        write(json_text([*objects, *errors]) + "\n")
        return
    out = console()
    width = width_of(out)
    for path, sinks in told:
        out.print(f"RUN      {path.name}")
        for line in sink_lines(sinks):
            out.print(line)
        for sink in sinks:
            for text in _quarantine_lines(path, sink):
                for line in wrapped(text, "  ", "    ", width):
                    out.print(line)
    for text in unreadable.values():
        for line in wrapped(text, "! ", "  ", width, "red"):
            out.print(line)
    if not told and not unreadable:
        out.print("no run has a sink yet")


@group.command()
def retry(
    ids: Ids = None,
    every: All = False,
    directory: Dir = DEFAULT_DIR,
    config: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Send items in quarantine once more, each at most once.

    A gateway that has the sink does it; else it is done here, with the config's sink. What is
    refused again stays, with the new reason. Exit code 0 when nothing of it is left, 1 otherwise.

    \b
    Examples:
      rankgate sinks retry 7f3a/clearml/3 7f3a/clearml/4
      rankgate sinks retry 7f3a/clearml --all
      rankgate sinks retry --all
    """
    root = directory.absolute()
    outcomes = []
    for place, picked in chosen(root, ids, every):
        before = place.rows(picked)
        asked = requests.ask(place.run_dir, place.sink, requests.RETRY, picked)
        have_retried(root, place, asked, config)
        outcomes.append(Outcome(place, before, place.rows([row.id for row in before])))
    _tell("retry", outcomes, as_json)


@group.command()
def skip(
    ids: Ids = None, every: All = False, directory: Dir = DEFAULT_DIR, as_json: Json = False
) -> None:
    """Give items in quarantine up: they count as skipped by hand.

    The run itself keeps them; only this sink goes without.

    \b
    Examples:
      rankgate sinks skip 7f3a/clearml/3
      rankgate sinks skip 7f3a/clearml --all
    """
    outcomes = []
    for place, picked in chosen(directory.absolute(), ids, every):
        before = place.rows(picked)
        asked = requests.ask(place.run_dir, place.sink, requests.SKIP, picked)
        have_skipped(place, asked)
        outcomes.append(Outcome(place, before, place.rows([row.id for row in before])))
    _tell("skip", outcomes, as_json)


# --- telling -----------------------------------------------------------------


def _told_of(
    root: Path, run: str | None
) -> tuple[list[tuple[Path, list[SinkRow]]], dict[str, str]]:
    """(run, its sinks) of one run or of all that have sinks; and of all, why some cannot be read.
    Raises RankgateError where the one that was asked for cannot."""
    if run is not None:
        path = find_run(root, run)
        return [(path, _told(path))], {}
    told, unreadable = [], {}
    for path in run_dirs(root):
        if not is_closed(path) and not any((path / "sinks").glob("*.db")):
            continue
        try:
            told.append((path, _told(path)))
        except RankgateError as error:
            unreadable[path.name] = error.text
    return told, unreadable


def _told(run_dir: Path) -> list[SinkRow]:
    view = run_view(run_dir, time.time_ns(), spool())
    return [s for s in view.sinks if "not in the config" not in s.reason]


def _rows(run_dir: Path, sink: SinkRow) -> list[Row]:
    mode = "offline" if sink.export or sink.state == "exporting" else "online"
    return read_quarantine(run_dir / "sinks" / store_name(sink.sink, mode))


def _quarantine_lines(run_dir: Path, sink: SinkRow) -> list[str]:
    if not sink.quarantined:
        return []
    rows = _rows(run_dir, sink)
    lines = [
        f"{run_dir.name}/{sink.sink}/{row.id}  {clean(row.what)}: {clean(row.reason)}"
        + (" (to be tried again)" if row.asked else "")
        for row in rows[:SHOWN_ITEMS]
    ]
    if len(rows) > SHOWN_ITEMS:
        lines.append(f"and {plural(len(rows) - SHOWN_ITEMS, 'item')} more; all with --json")
    if sink.export:
        words = ("replay", run_dir.name, "--to", f"{sink.sink}=offline")
        lines.append(f"write it anew: {typed(run_dir.parent.parent, *words)}")
    return lines


def _as_json(run_dir: Path, sink: SinkRow) -> dict[str, Any]:
    items = [
        {
            "id": f"{run_dir.name}/{sink.sink}/{row.id}", "what": row.what, "reason": row.reason,
            "items": row.items, "kind": row.kind, "stream": row.stream.hex(), "seq": row.seq,
            "key": row.key, "at_ns": row.at_ns, "asked": bool(row.asked),
        }
        for row in _rows(run_dir, sink)
    ]  # fmt: skip
    names = ("sink", "state", "reason", "feed", "delivered", "skipped", "skipped_reasons",
             "quarantined", "waiting", "maybe_duplicate", "export")  # fmt: skip
    return {"run": run_dir.name, **{n: getattr(sink, n) for n in names}, "items": items}


def _tell(action: str, outcomes: list[Outcome], as_json: bool) -> None:
    left = sum(row.items for o in outcomes for row in o.left)
    if as_json:
        told = [
            {
                "run": o.place.run_dir.name,
                "sink": o.place.sink,
                "items": sum(row.items for row in o.before),
                "left": sum(row.items for row in o.left),
            }
            for o in outcomes
        ]
        write(json_text({"action": action, "left": left, "sinks": told}) + "\n")
        raise typer.Exit(1 if left else 0)
    out = console()
    for o in outcomes:
        items, stay = sum(r.items for r in o.before), sum(r.items for r in o.left)
        done = {"retry": "taken", "skip": "given up"}[action]
        out.print(f"{o.place.name}: {plural(items - stay, 'item')} {done}, {stay:,} left")
        for row in o.left[:SHOWN_ITEMS]:
            text = f"{o.place.name}/{row.id}  {clean(row.what)}: {clean(row.reason)}"
            for line in wrapped(text, "  ", "    ", width_of(out)):
                out.print(line)
    if not outcomes:
        out.print("nothing is in quarantine")
    raise typer.Exit(1 if left else 0)
