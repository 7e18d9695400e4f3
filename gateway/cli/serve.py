"""`rankgate serve`: the gateway in the foreground."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import app, telemetry
from ..config import Config, GatewayConfig
from .options import DEFAULT_DIR, ConfigFile, Dir, Sinks, settings_of


def command(
    directory: Dir = DEFAULT_DIR,
    bind: Annotated[
        str | None, typer.Option(help='Also listen here: "tcp://ADDRESS:PORT".')
    ] = None,
    config: ConfigFile = None,
    sink: Sinks = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow an unencrypted tcp bind beyond this machine.")
    ] = False,
) -> None:
    """Run the gateway in the foreground, until Ctrl-C or SIGTERM.

    \b
    Examples:
      rankgate serve
      rankgate serve --dir /data/logs --bind tcp://127.0.0.1:5717 --sink clearml
    """
    root = directory.absolute()
    settings = settings_of(root, config, tuple(sink or ()))
    if bind:
        settings = with_bind(settings, bind)
    telemetry.configure()
    code = app.serve(root, settings, insecure, forever=True, ready=lambda where: tell(root, where))
    raise typer.Exit(code)


def with_bind(settings: Config, bind: str) -> Config:
    gateway = {f: getattr(settings.gateway, f) for f in GatewayConfig.__struct_fields__}
    return Config(GatewayConfig(**{**gateway, "bind": bind}), settings.sinks, settings.source)


def tell(root: Path, where: list[str]) -> None:
    """What to paste on this node; other nodes need the address."""
    typer.echo(f"rankgate gateway for {root}\nlistening on {', '.join(where)}\n")
    typer.echo(f"In the training's shell on this node:\n  export RANKGATE_DIR={root}")
    for address in where[1:]:
        typer.echo(f"elsewhere:\n  export RANKGATE_ADDR={address}")
    typer.echo("\nWaiting for the first rank. Look: rankgate status   Stop: Ctrl-C")
