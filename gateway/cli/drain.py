"""`rankgate drain`: finish what a job left: ship orphan spools, project, deliver."""

from __future__ import annotations

import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from rank_client import sweep
from rank_client.spool_place import spool_root

from .. import attach
from ..errors import NotServed
from .options import DEFAULT_DIR, ConfigFile, Dir, Json, Sinks, replay_lines, settings_of

FRESH_SECONDS = 5.0


def command(
    directory: Dir = DEFAULT_DIR,
    config: ConfigFile = None,
    sink: Sinks = None,
    seconds: Annotated[float, typer.Option(help="Wait at most this long.")] = 600.0,
    as_json: Json = False,
) -> None:
    """Ship what dead processes left in this node's spool, and deliver everything.

    Starts a gateway if none runs. Exit code 0 when all is delivered, 1 when time was out.

    \b
    Examples:
      rankgate drain
      rankgate drain --dir /data/logs --sink clearml
    """
    root = directory.absolute()
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    settings = settings_of(root, config, tuple(sink or ()))
    config_path = str(config.absolute()) if config else ""
    deadline = time.monotonic() + seconds
    served = partial(_serve, root, config_path, tuple(sink or ()))
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
        typer.echo(json.dumps({"done": done, "runs": each, "replay": lacking}))
    else:
        for state in states:
            what = "delivered" if state.done else f"waiting for {', '.join(state.waiting)}"
            typer.echo(f"run {state.run}: {what}")
        for line in lacking:
            typer.echo(f"the gateway that was here does not have this sink. To deliver: {line}")
        left = "" if lacking else "; run it again"
        typer.echo("all is delivered" if done else f"not all is delivered{left}")
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


def wait_shipped(root: Path, deadline: float) -> bool:
    """Until no orphan of this directory is left; the gateway ships them."""
    spool = spool_root(os.environ)
    has_run = lambda run: (root / "runs" / run).is_dir()  # noqa: E731
    while sweep.find(spool, root, has_run):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
