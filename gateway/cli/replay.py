"""`rankgate replay`: deliver a run again, or to a backend that was added later."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from rank_client.rendezvous import LOCK_RULES, clean_environment, gateway_command, locked

from .. import app, attach
from ..errors import Busy, RankgateError
from ..rules.follow import rebuild
from ..series.reader import Reader
from ..sinks.loop import ENDED
from ..sinks.process import BUSY, OFF
from ..sinks.store import read_view, store_name
from ..view.finding import check_whole, find_run
from .options import DEFAULT_DIR, ConfigFile, Dir, Json, settings_of


def command(
    run: Annotated[str, typer.Argument(help="Run id.")],
    to: Annotated[str, typer.Option(help="Sink: NAME, or NAME=offline for an export.")],
    directory: Dir = DEFAULT_DIR,
    config: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Deliver a run that has ended to a sink: what is there already is not sent twice.

    \b
    Examples:
      rankgate replay 7f3a --to clearml
      rankgate replay 7f3a --to neptune=offline
    """
    root = directory.absolute()
    run_dir = find_run(root, run)
    settings = settings_of(root, config, (to,))
    name = to.partition("=")[0]
    sink = settings.sinks[name]
    _bring_up_to_date(root, run_dir)
    with Reader(run_dir) as reader:
        if reader.about().state not in ENDED and sink.mode == "online":
            raise Busy(
                f"run {run} is still running; a gateway with [sinks.{name}] delivers it live"
            )
    packed = msgspec.json.encode(sink).decode()
    how = "export" if sink.mode == "offline" else "online"
    process = subprocess.Popen(
        gateway_command("sink", str(run_dir), name, packed, how),
        env=clean_environment(os.environ),
    )
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    _tell(run_dir, name, sink.mode, code, as_json)
    check_whole(run_dir)
    raise typer.Exit(0 if code == 0 else 1)


def _bring_up_to_date(root: Path, run_dir: Path) -> None:
    """Where a gateway follows the journal, wait for it; else project it here."""
    if not locked(root / "gateway.lock", LOCK_RULES):
        lock = app.take_lock(root, LOCK_RULES, 1.0)
        rebuild(run_dir)
        os.close(lock)  # a gateway may start while we deliver
        return
    deadline = time.monotonic() + 10
    while not attach.progress(root, run_dir.name).projected and time.monotonic() < deadline:
        time.sleep(0.1)


def _tell(run_dir: Path, name: str, mode: str, code: int, as_json: bool) -> None:
    if code == BUSY:
        raise Busy(f"another process delivers run {run_dir.name} to {name} right now")
    view = read_view(run_dir / "sinks" / store_name(name, mode))
    if code == OFF:
        raise RankgateError(f"{name} is off: {view.reason}")
    if as_json:
        typer.echo(json.dumps(msgspec.to_builtins(view)))
    else:
        skipped = ", ".join(f"{n:,} {reason}" for reason, n in view.skipped.items()) or "0"
        typer.echo(
            f"{name}: {view.state}  delivered {view.delivered:,}  skipped {skipped}  "
            f"quarantined {view.quarantined:,}"
        )
        if view.export:
            typer.echo(view.export)
