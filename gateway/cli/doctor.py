"""`rankgate doctor`: is this machine fit, and is anything left undone?"""

from __future__ import annotations

import time

import typer
from rich.text import Text

from ..view.export import json_text
from ..view.health import Check, look
from ..view.lines import console, width_of, wrapped
from ..view.words import clean
from .options import DEFAULT_DIR, Dir, Json, spool, write

_MARKS = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "fail": ("✕", "bold red")}


def command(directory: Dir = DEFAULT_DIR, as_json: Json = False) -> None:
    """Check the data directory, the gateway, the spool, this machine and what is installed.

    Says what each disk takes to sync, whether anything lies in the spool that nobody shipped, and
    what to do about what it finds. Exits with 1 when something cannot work.

    \b
    Examples:
      rankgate doctor
      rankgate doctor --dir /scratch/team/.rankgate --json

    --json gives a list of objects: name, state (ok, warn or fail), text, advice.
    """
    checks = look(directory, spool(), time.time_ns())
    if as_json:
        write(json_text(checks) + "\n")
    else:
        _print(checks)
    if any(check.state == "fail" for check in checks):
        raise typer.Exit(1)


def _print(checks: list[Check]) -> None:
    out = console()
    name_width = max(len(check.name) for check in checks)
    for check in checks:
        mark, style = _MARKS[check.state]
        lead = f"{mark} {check.name:<{name_width}}  "
        text = clean(f"{check.text}; {check.advice}" if check.advice else check.text)
        lines = wrapped(text, lead, " " * len(lead), width_of(out))
        lines[0].stylize(style, 0, 1)
        for line in lines:
            out.print(line)
    bad = sum(check.state != "ok" for check in checks)
    out.print(Text("All is well" if not bad else f"{bad} of {len(checks)} need a look"))
