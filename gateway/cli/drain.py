"""`rankgate drain`: finish what a job left: ship orphan spools, project, deliver."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from rank_client import orphans
from rank_client.spool_place import spool_root

from .. import app, attach
from ..errors import BadConfig, NotServed
from ..view.finding import check_whole
from ..view.typed import typed
from ..view.words import clean, plural
from .options import (
    DEFAULT_DIR,
    ConfigFile,
    Dir,
    Json,
    Sinks,
    finite_seconds,
    replay_lines,
    settings_of,
)

FRESH_SECONDS = 5.0


def command(
    directory: Dir = DEFAULT_DIR,
    config: ConfigFile = None,
    sink: Sinks = None,
    seconds: Annotated[
        float, typer.Option(callback=finite_seconds, help="Wait at most this long.")
    ] = 600.0,
    as_json: Json = False,
) -> None:
    """Ship what dead processes left in this node's spool, and deliver everything.

    Starts a gateway if none runs. Exit code 0 when all is delivered, 1 when time was out, 65
    when a journal is damaged.

    \b
    Examples:
      rankgate drain
      rankgate drain --dir /data/logs --sink clearml
    """
    os.umask(app.PRIVATE)
    root, sinks = directory.absolute(), tuple(sink or ())
    others = elsewhere(root)
    make_dir(root, others)
    settings = settings_of(root, config, sinks)
    config_path = str(config.absolute()) if config else ""
    deadline = time.monotonic() + seconds
    served = partial(_serve, root, config_path, sinks)
    with attach.hold(root):
        served(deadline)
        waited = wait_shipped(root, deadline) and served(deadline)
        runs = attach.ask_delivery(root)
        done = attach.wait_done(root, lambda: runs, max(1.0, deadline - time.monotonic()), _quiet)
        states = [attach.progress(root, run) for run in runs]
        lacking = replay_lines(root, settings, config_path, runs)
    done = done and waited and not lacking
    if as_json:
        each = {s.run: {"done": s.done, "waiting": list(s.waiting)} for s in states}
        told = {"done": done, "runs": each, "replay": lacking, "elsewhere": others}
        typer.echo(json.dumps(told))
    else:
        for state in states:
            what = "delivered" if state.done else f"waiting for {', '.join(state.waiting)}"
            typer.echo(f"run {state.run}: {what}")
        for line in lacking:
            typer.echo(f"the gateway that was here does not have this sink. To deliver: {line}")
        again = typed(root, "drain", config=config_path, sinks=sinks)
        left = "" if lacking else f"; again: {again}"
        what = f"all of {root}" if others else "all"
        typer.echo(f"{what} is delivered" if done else f"not all is delivered{left}")
        for line in others:
            typer.echo(line)
    if done:
        for run in runs:
            check_whole(root / "runs" / run)
    raise typer.Exit(0 if done else 1)


def _serve(root: Path, config: str, sinks: tuple[str, ...], deadline: float) -> bool:
    """Until a gateway has told its state anew; one that was just leaving when we came is followed
    by another. Raises NotServed."""
    while True:
        attach.ensure(root, os.environ, config, sinks)
        if not attach.wait_served(root):
            words = attach.last_lines(root / "gateway.log")
            raise NotServed(f"the gateway for {root} did not come up. Its last words:\n{words}")
        if attach.wait_fresh(root, FRESH_SECONDS):
            return True
        if time.monotonic() > deadline:
            return False


def _quiet(_states: list[attach.Progress]) -> None:
    pass


def _orphans(root: Path) -> list[orphans.Orphan]:
    has_run = lambda run: (root / "runs" / run).is_dir()  # noqa: E731
    return orphans.find(spool_root(os.environ), root, has_run)


def wait_shipped(root: Path, deadline: float) -> bool:
    """Until no orphan of this directory is left; the gateway ships them."""
    while _orphans(root):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def make_dir(root: Path, others: list[str]) -> None:
    """The data directory, unless it is neither there nor does anything wait for it: somebody is
    in the wrong place. Raises BadConfig."""
    if not root.exists() and not _orphans(root):
        text = f"there is no data directory {root}; give the one meant with --dir or RANKGATE_DIR"
        raise BadConfig(". ".join([text, *others]))
    app.make_data_dir(root)


def elsewhere(root: Path) -> list[str]:
    """A line per other place that streams of dead processes in this node's spool wait for."""
    spool, ours = spool_root(os.environ), {o.directory for o in _orphans(root)}
    places = Counter(
        _place(orphan)
        for orphan in orphans.find(spool, None, lambda _: True)
        if orphan.directory not in ours
    )
    return [
        f"{plural(n, 'stream')} in the spool {spool} {'belongs' if n == 1 else 'belong'} to "
        f"{clean(where)}: {clean(line)}"
        for (where, line), n in sorted(places.items())
    ]


def _place(orphan: orphans.Orphan) -> tuple[str, str]:
    """Where a stream wants to go, and what to type for it."""
    address, there = str(orphan.hello.get("addr") or ""), str(orphan.hello.get("dir"))
    if address.startswith("tcp://"):
        words = ["rankgate", "sweep", "--address", address]
        return f"the gateway at {address}", shlex.join(words)
    return f"the data directory {there}", shlex.join(["rankgate", "drain", "--dir", there])
