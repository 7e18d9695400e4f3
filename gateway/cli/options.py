"""Options and arguments that several commands share, each worded once."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from rank_client.spool_place import spool_root

from .. import attach
from ..config import Config, load
from ..errors import BadConfig
from ..view.typed import DEFAULT_DIR as DEFAULT_DIR
from ..view.typed import typed


def _utf8(path: Path) -> Path:
    """A directory whose name can stand in JSON, messages and addresses. Raises BadConfig."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise BadConfig(
            f"the data directory {str(path)!a} has a name that is not UTF-8; give another "
            "with --dir or RANKGATE_DIR"
        ) from None
    return path


def _dir(readable: bool) -> Any:
    return typer.Option(
        "--dir",
        envvar="RANKGATE_DIR",
        help="The data directory.",
        show_envvar=True,
        readable=readable,
        callback=_utf8,
    )


Dir = Annotated[Path, _dir(readable=True)]
AnyDir = Annotated[Path, _dir(readable=False)]  #: also one that we may not read
Json = Annotated[bool, typer.Option("--json", help="Print JSON; its names are stable.")]
RunName = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="A run's id, the start of one, its name (digits-7f3a), or its folder."
    ),
]
Ranks = Annotated[
    str,
    typer.Option("--rank", help="Ranks: 0,3 or 0:8 (0 to 7) or all.", metavar="RANKS"),
]

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", envvar="RANKGATE_CONFIG", help="Gateway config (TOML).", show_envvar=True
    ),
]
Sinks = Annotated[
    list[str] | None,
    typer.Option("--sink", help="Turn a sink on: NAME, or NAME=offline. Repeatable."),
]


def settings_of(root: Path, config: Path | None, sinks: tuple[str, ...]) -> Config:
    """The config a gateway of this directory would have. Raises BadConfig."""
    path = config or root / "gateway.toml"
    return load(path if config or path.exists() else None, sinks)


def replay_lines(root: Path, settings: Config, config: str, runs: Iterable[str]) -> list[str]:
    """For each sink that the directory's gateway was not started with, and each run: the command
    that delivers it all the same, as it is typed here."""
    there = attach.sinks_of(root)
    lines = []
    for name, sink in settings.sinks.items():
        for run in runs:
            if there.get(name) == sink.mode or attach.delivered(
                root / "runs" / run, name, sink.mode
            ):
                continue
            to = f"{name}=offline" if sink.mode == "offline" else name
            lines.append(typed(root, "replay", run, "--to", to, config=config))
    return lines


def finite_seconds(value: float) -> float:
    """What `--seconds` may be: nan is never over, and never waited for. Raises BadConfig."""
    if not 0 <= value < float("inf"):
        raise BadConfig(f"--seconds takes 0 or more seconds, not {value:g}.")
    return value


def ranks_of(text: str) -> frozenset[int] | None:
    """`all`, `3`, `0,3`, `0:8`; None for all. Raises BadConfig."""
    if text == "all":
        return None
    out: set[int] = set()
    try:
        for part in text.split(","):
            first, colon, end = part.partition(":")
            out |= set(range(int(first), int(end))) if colon else {int(part)}
    except ValueError:
        raise BadConfig(f"--rank takes 0,3 or 0:8 or all, not {text!r}.") from None
    return frozenset(out)


def steps_of(text: str) -> tuple[int | None, int | None]:
    """`A:B`, either end left out; half-open. Raises BadConfig."""
    first, colon, end = text.partition(":")
    try:
        low, high = (int(part.replace(",", "")) if part.strip() else None for part in (first, end))
    except ValueError:
        raise BadConfig(f"--steps takes A:B, as in 100:200, not {text!r}.") from None
    if not colon and low is not None:
        return low, low + 1
    return low, high


def spool() -> Path:
    """This node's spool root."""
    return spool_root(os.environ)


def write(text: str) -> None:
    """To stdout as it is."""
    sys.stdout.write(text)
