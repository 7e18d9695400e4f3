"""`rankgate serve`: the gateway in the foreground."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import app, telemetry
from ..config import with_gateway
from .options import DEFAULT_DIR, ConfigFile, Dir, Sinks, settings_of


def command(
    directory: Dir = DEFAULT_DIR,
    bind: Annotated[
        str | None,
        typer.Option(
            help='Also listen here: "tcp://ADDRESS:PORT", or "tcp" for the way to MASTER_ADDR.'
        ),
    ] = None,
    keyfile: Annotated[
        Path | None,
        typer.Option(
            envvar="RANKGATE_KEYFILE",
            show_envvar=True,
            help="The key for tcp; one is made in the data directory when none is named.",
        ),
    ] = None,
    config: ConfigFile = None,
    sink: Sinks = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen on tcp without encryption, for everybody.")
    ] = False,
) -> None:
    """Run the gateway in the foreground, until Ctrl-C or SIGTERM.

    \b
    Examples:
      rankgate serve
      rankgate serve --dir /data/logs --bind tcp://10.0.0.1:5717 --sink clearml
    """
    root = directory.absolute()
    settings = settings_of(root, config, tuple(sink or ()))
    if bind:
        settings = with_gateway(settings, bind=bind)
    if keyfile:
        settings = with_gateway(settings, keyfile=str(keyfile.absolute()))
    telemetry.configure()
    code = app.serve(
        root,
        settings,
        insecure,
        forever=True,
        ready=lambda where, guard: tell(root, where, guard),
    )
    raise typer.Exit(code)


def tell(root: Path, where: list[str], guard: str) -> None:
    """What to paste on this node, and on others."""
    typer.echo(f"rankgate gateway for {root}\nlistening on {', '.join(where)}\n")
    typer.echo(f"In the training's shell on this node:\n  export RANKGATE_DIR={root}")
    for address in where[1:]:
        typer.echo(f"elsewhere:\n  export RANKGATE_ADDR={address}")
        if guard not in (app.INSECURE, app.ENVIRONMENT):
            typer.echo(f"  export RANKGATE_KEYFILE={guard}   # a copy of it, mode 0600")
    typer.echo("\nWaiting for the first rank. Look: rankgate status   Stop: Ctrl-C")
