"""`rankgate replay`: deliver a run again, or to a backend that was added later."""

from __future__ import annotations

import json
import os
import time
from datetime import datetime
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from rank_client.rendezvous import LOCK_RULES, locked

from .. import app, attach
from ..errors import BadConfig, Busy, RankgateError
from ..rules.follow import rebuild
from ..series.reader import Reader
from ..sinks.loop import ENDED
from ..sinks.process import BUSY, OFF
from ..sinks.since import Since
from ..sinks.store import read_view, store_name
from ..view.finding import check_whole, find_run
from ..view.typed import typed
from .deliver import deliver
from .options import DEFAULT_DIR, ConfigFile, Dir, Json, RunName, settings_of

PROJECTED_SECONDS = 10.0


def command(
    run: RunName,
    to: Annotated[str, typer.Option(help="Sink: NAME, or NAME=offline for an export.")],
    since: Annotated[
        str,
        typer.Option(
            metavar="STEP|TIME", help="Only from this step, or moment (2026-01-31T12:00), on."
        ),
    ] = "",
    directory: Dir = DEFAULT_DIR,
    config: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Deliver a run to a sink: what is there already is not sent twice.

    Stopped or killed, the same command goes on where it was. A run that goes on is followed to its
    end, where its gateway has no such sink. With --since, what is older is skipped for good;
    params and the summary always go, and lines and files without a step where a step is given.

    \b
    Examples:
      rankgate replay 7f3a --to clearml
      rankgate replay 7f3a --to neptune=offline
      rankgate replay 7f3a --to hub --since 10000

    Progress goes to stderr. --json gives the sink's account: state, reason, delivered, skipped,
    quarantined, maybe_duplicate, export.
    """
    os.umask(app.PRIVATE)
    root = directory.absolute()
    run_dir = find_run(root, run)
    settings = settings_of(root, config, (to,))
    name = to.partition("=")[0]
    sink = settings.sinks[name]
    wanted = msgspec.json.encode(since_of(since)).decode() if since else ""
    served = bring_up_to_date(run_dir)
    with Reader(run_dir) as reader:
        state = reader.about().state
    if state not in ENDED and sink.mode == "online" and not served:
        raise Busy(
            f"run {run_dir.name} has not ended, as far as its journal tells, and no gateway serves "
            f"it. First: {typed(root, 'drain')}"
        )
    code = deliver(run_dir, name, sink, wanted)
    _tell(run_dir, name, sink.mode, code, as_json)
    check_whole(run_dir)
    raise typer.Exit(0 if code == 0 else 1)


def since_of(text: str) -> Since:
    """A step, or a moment in ISO 8601, local where it names no zone. Raises BadConfig."""
    digits = text.replace(",", "").replace("_", "")
    if digits.isascii() and digits.lstrip("-").isdecimal():
        return Since(step=int(digits))
    try:
        return Since(wall_ns=int(datetime.fromisoformat(text).timestamp() * 1e9))
    except ValueError:
        raise BadConfig(
            f"--since takes a step, as in 10000, or a moment, as in 2026-01-31T12:00, not {text!r}"
        ) from None


def bring_up_to_date(run_dir: Path) -> bool:
    """Where a gateway follows the journal, wait for it (True); else project it here."""
    root = run_dir.parents[1]
    if run_dir.parent.name != "runs" or not locked(root / "gateway.lock", LOCK_RULES):
        lock = app.take_lock(root, LOCK_RULES, 1.0) if run_dir.parent.name == "runs" else None
        rebuild(run_dir)
        if lock is not None:
            os.close(lock)  # a gateway may start while we deliver
        return False
    deadline = time.monotonic() + PROJECTED_SECONDS
    while not attach.progress(root, run_dir.name).projected and time.monotonic() < deadline:
        time.sleep(0.1)
    return True


def _tell(run_dir: Path, name: str, mode: str, code: int, as_json: bool) -> None:
    if code == BUSY:
        raise Busy(
            f"another process delivers run {run_dir.name} to {name} right now: a gateway that has "
            f"this sink, or another replay. Look: {typed(run_dir.parent.parent, 'status')}"
        )
    view = read_view(run_dir / "sinks" / store_name(name, mode))
    if code == OFF:
        raise RankgateError(f"{name} is off: {view.reason.removeprefix(f'{name}: ')}")
    if as_json:
        typer.echo(json.dumps(msgspec.to_builtins(view)))
        return
    skipped = ", ".join(f"{n:,} {reason}" for reason, n in view.skipped.items()) or "0"
    typer.echo(
        f"{name}: {view.state}  delivered {view.delivered:,}  skipped {skipped}  "
        f"quarantined {view.quarantined:,}"
    )
    if view.export:
        typer.echo(view.export)
    if view.quarantined and mode == "online":
        look = typed(run_dir.parent.parent, "sinks", "status", run_dir.name)
        typer.echo(f"to see what is in quarantine: {look}")
