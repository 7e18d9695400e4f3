"""`rankgate doctor`: is this machine fit, and is anything left undone?"""

from __future__ import annotations

import os
import time
from pathlib import Path

import typer
from rich.text import Text

from ..config import GatewayConfig
from ..errors import BadConfig
from ..view.check import Check
from ..view.export import json_text
from ..view.health import look
from ..view.lines import console, width_of, wrapped
from ..view.words import clean
from .options import DEFAULT_DIR, AnyDir, ConfigFile, Json, settings_of, spool, write

REST = " " * 5  #: before what stands under a line's first

_STYLES = {"ok": "green", "warn": "yellow", "bad": "bold red"}


def command(
    directory: AnyDir = DEFAULT_DIR, config: ConfigFile = None, as_json: Json = False
) -> None:
    """Check the data directory, the gateway, the spool, this machine and what is installed.

    Says what each disk takes to sync, whether the gateway of --dir and that of RANKGATE_ADDR
    answer and know our key, what lies in the spool that nobody shipped, and what to do about it.
    A line begins with ok, warn (it works, but) or bad (it cannot). Exits with 1 when one is bad.

    \b
    Examples:
      rankgate doctor
      rankgate doctor --dir /scratch/team/.rankgate --json

    --json gives a list of objects: name, state (ok, warn or bad), text, advice.
    """
    found, reserve_mib = _settings(directory, config)
    found += look(directory, spool(), os.environ, reserve_mib << 20, time.time_ns())
    if as_json:
        write(json_text(found) + "\n")
    else:
        _print(found)
    if any(check.state == "bad" for check in found):
        raise typer.Exit(1)


def _settings(directory: Path, config: Path | None) -> tuple[list[Check], int]:
    """The config a gateway here would have: what is wrong with it, and the MiB it keeps free."""
    try:
        gateway = settings_of(directory.absolute(), config, ()).gateway
    except (BadConfig, OSError) as error:
        text = str(error)
        if isinstance(error, OSError):
            text = f"cannot look at {error.filename}: {error.strerror}"
        check = Check("config", "bad", text, "no gateway starts with it")
        return [check], GatewayConfig().reserve_mib
    return [], gateway.reserve_mib


def _print(checks: list[Check]) -> None:
    out = console()
    width, names = width_of(out), max(len(check.name) for check in checks)
    for check in checks:
        lines = wrapped(clean(check.text), f"{check.state:<4} {check.name:<{names}}  ", REST, width)
        lines[0].stylize(_STYLES[check.state], 0, len(check.state))
        if check.advice:
            lines += wrapped(clean(check.advice), f"{REST}→ ", f"{REST}  ", width)
        for line in lines:
            out.print(line)
    troubled = sum(check.state != "ok" for check in checks)
    out.print(Text(f"{troubled} of {len(checks)} need a look" if troubled else "All is well"))
