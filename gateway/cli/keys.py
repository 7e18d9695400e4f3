"""`rankgate keys`: the secrets that encrypted connections are made from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from rank_client.wire.keys import (
    ANY_RUN,
    SECRET_BYTES,
    BadKey,
    Key,
    read_keyfile,
    valid_run_id,
    write_keyfile,
)

from ..app import KEYFILE, make_data_dir
from ..attach import served
from ..errors import BadConfig
from ..ingest.admission import KEYS_DIR, server_public
from ..supervise import read_json
from .options import DEFAULT_DIR, Dir

group = typer.Typer(
    help="Keys for encrypted connections between nodes.",
    rich_markup_mode=None,
)


@group.callback()
def _keys() -> None:
    """Keys for encrypted connections between nodes."""


@group.command()
def new(
    path: Annotated[
        Path | None, typer.Argument(help="Where to write it; in the data directory by default.")
    ] = None,
    run: Annotated[str | None, typer.Option(metavar="RUN", help="Bind the key to one run.")] = None,
    directory: Dir = DEFAULT_DIR,
) -> None:
    """Make a keyfile: 32 random bytes, mode 0600.

    Without --run it is a gateway's own key, which its ranks share: DIR/gateway.key. With --run it
    is one more key for ranks of that run alone, which the gateway of DIR knows at once
    (DIR/keys/RUN.key); removing that file takes it back for new connections.

    \b
    Examples:
      rankgate keys new
      rankgate keys new --run digits-7 --dir /data/logs
      rankgate keys new ~/job.key
    """
    root = directory.absolute()
    if path and path.is_dir():
        raise BadConfig(
            f"{path} is a directory; name the keyfile itself, as in {path / KEYFILE}, or the data "
            f"directory it is for: --dir {path}"
        )
    try:
        if run is None:
            made = (path or root / KEYFILE).absolute()
            write_keyfile(made, Key(os.urandom(SECRET_BYTES)))
        else:
            made = (path or root / KEYS_DIR / f"{run}.key").absolute()
            write_keyfile(made, _for_run(root, run, made))
    except BadKey as error:
        raise BadConfig(str(error)) from None
    typer.echo(f"wrote {made}\n\nCopy it to where the ranks run (mode 0600), and there:")
    typer.echo(f"  export RANKGATE_KEYFILE={made}")
    if run is not None:
        typer.echo(f"  export RANKGATE_RUN={run}")
    elif made != root / KEYFILE:
        typer.echo(f"The gateway takes it with: rankgate serve --bind tcp --keyfile {made}")


def _for_run(root: Path, run: str, made: Path) -> Key:
    """A key that the gateway of a data directory takes for one run. Raises BadKey."""
    if run == ANY_RUN or not valid_run_id(run):
        raise BadKey(f"a run id must match [A-Za-z0-9._-]{{1,64}}, and {run!r} does not")
    if made.parent != root / KEYS_DIR or made.suffix != ".key":
        raise BadKey(
            f"a run's key must be where its gateway finds it, {root / KEYS_DIR}/*.key; leave PATH "
            "out, and copy the file from there"
        )
    make_data_dir(root)
    return Key(os.urandom(SECRET_BYTES), run, _gateway_public(root))


def _gateway_public(root: Path) -> str:
    """Of the gateway that serves the directory, else of the one that will. Raises BadKey."""
    told = read_json(root / "gateway.json").get("public_key")
    if told and served(root):
        return str(told)
    own = root / KEYFILE
    if not own.exists() and not os.environ.get("RANKGATE_KEYFILE"):
        write_keyfile(own, Key(os.urandom(SECRET_BYTES)))
    return server_public(read_keyfile(Path(os.environ.get("RANKGATE_KEYFILE") or own)))
