"""`rankgate sweep`: ship by hand what dead processes left in a spool."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from rank_client import orphans, sweep
from rank_client.rendezvous import address_trouble
from rank_client.spool_place import spool_root
from rank_client.wire.keys import BadKey, key_of

from .. import app, attach
from ..errors import BadConfig, NotServed
from ..view.typed import typed
from ..view.words import clean, plural
from .drain import elsewhere, make_dir
from .options import DEFAULT_DIR, Dir, Json, finite_seconds


def command(
    directory: Dir = DEFAULT_DIR,
    spool: Annotated[
        Path | None, typer.Option(help="The spool to ship, whole, instead of this node's.")
    ] = None,
    address: Annotated[
        str, typer.Option(help="Address of the gateway, as tcp://HOST:PORT; else that of --dir.")
    ] = "",
    accept_gap: Annotated[
        bool,
        typer.Option("--accept-gap", help="Give up numbers that cannot be read, ship the rest."),
    ] = False,
    seconds: Annotated[
        float, typer.Option(callback=finite_seconds, help="Wait at most this long for each.")
    ] = 60.0,
    as_json: Json = False,
) -> None:
    """Ship what dead processes left in a spool, under their own streams, to a gateway.

    A gateway does so by itself for the spool of its own node; this is for a spool on another
    node, or copied from one, and for a spool with a hole: without --accept-gap it is shipped up
    to the hole. Exit code 0 when all of it is shipped, 1 when something is left.

    \b
    Examples:
      rankgate sweep
      rankgate sweep --accept-gap
      rankgate sweep --spool /mnt/node7/rankgate-1000 --address tcp://head:7777
    """
    os.umask(app.PRIVATE)
    root = directory.absolute()
    if address and (trouble := address_trouble(address)):
        raise BadConfig(f"--address {address}: {trouble}; an address is tcp://HOST:PORT")
    ours = not address and spool is None
    others = elsewhere(root) if ours else []
    if ours:
        make_dir(root, others)
    elif not address:
        app.make_data_dir(root)
    with nullcontext() if address else attach.hold(root):
        there = address or _own(root)
        words = ("--address", address) if address else ()
        giving_up = typed(root, "sweep", "--accept-gap", *words)
        orphans = _find(root, spool, address)
        left = 0
        told = []
        for orphan in orphans:
            shipped = _ship(orphan, there, seconds, accept_gap)
            left += not shipped.whole
            told.append(_told(orphan, shipped))
            if not as_json:
                typer.echo(clean(_line(orphan, shipped, giving_up)))
                for text in shipped.damage:
                    typer.echo(f"  {clean(text)}")
    if as_json:
        typer.echo(json.dumps({"shipped": len(orphans) - left, "left": left, "streams": told}))
    elif not orphans:
        typer.echo("\n".join(["nothing is left to ship", *others]))
    raise typer.Exit(1 if left else 0)


def _own(root: Path) -> str:
    """The address of the directory's gateway, which is started if there is none."""
    attach.ensure(root, os.environ)
    if not attach.wait_served(root):
        words = attach.last_lines(root / "gateway.log")
        raise NotServed(f"the gateway for {root} did not come up. Its last words:\n{words}")
    return attach.address(root)


def _find(root: Path, spool: Path | None, address: str) -> list[orphans.Orphan]:
    """Of a spool that was named all orphans; of this node's those that belong there."""
    if spool is not None:
        if not spool.is_dir():
            raise BadConfig(f"--spool {spool} is not a directory")
        return orphans.find(spool.absolute(), None, lambda _: True, holes=True)
    own = spool_root(os.environ)
    if address:
        found = orphans.find(own, None, lambda _: True, holes=True)
        return [o for o in found if o.hello.get("addr") == address]
    has_run = lambda run: (root / "runs" / run / "journal").is_dir()  # noqa: E731
    return orphans.find(own, root, has_run, holes=True)


def _ship(orphan: orphans.Orphan, address: str, seconds: float, accept_gap: bool) -> sweep.Shipped:
    try:
        key = key_of(os.environ) if address.startswith("tcp://") else None
    except BadKey as error:
        raise BadConfig(str(error)) from None
    return sweep.ship(orphan, address, seconds, key, accept_gap)


def _told(orphan: orphans.Orphan, shipped: sweep.Shipped) -> dict[str, object]:
    return {
        "run": orphan.run,
        "stream": orphan.stream.hex(),
        "records": shipped.records,
        "files": shipped.files,
        "whole": shipped.whole,
        "unreachable": shipped.unreachable,
        "damage": shipped.damage,
    }


def _line(orphan: orphans.Orphan, shipped: sweep.Shipped, giving_up: str) -> str:
    rank = orphan.hello.get("rank")
    who = f"run {orphan.run}, rank {rank}" if rank != -1 else f"run {orphan.run}"
    text = f"{who}: {plural(shipped.records, 'record')}, {plural(shipped.files, 'file')}"
    if shipped.unreachable:
        text += (
            f"; {plural(shipped.unreachable, 'record')} cannot be read, and those behind wait: "
            f"{giving_up} gives them up"
        )
    elif not shipped.whole:
        text += "; not all of it: run it again"
    return text
