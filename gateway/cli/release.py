"""Items in quarantine that a person named: found, and released by whoever holds the sink's lock."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import apsw

from .. import attach
from ..errors import BadConfig, Busy, NotServed, RankgateError
from ..series.reader import Reader
from ..sinks import requests
from ..sinks.loop import ENDED
from ..sinks.process import OFF, lock
from ..sinks.quarantine import Row, read_quarantine
from ..sinks.store import SinkView, Store, read_view, store_name
from ..view.finding import find_run, is_closed, run_dirs
from ..view.typed import typed
from .deliver import deliver
from .options import settings_of
from .replay import bring_up_to_date

WAIT_SECONDS = 30.0  #: for the gateway, or a sink's process, to do what it is asked


class Place(NamedTuple):
    """One sink of one run."""

    run_dir: Path
    sink: str

    @property
    def name(self) -> str:
        return f"{self.run_dir.name}/{self.sink}"

    @property
    def store(self) -> Path:
        return self.run_dir / "sinks" / store_name(self.sink, "online")

    def rows(self, ids: Sequence[int] | None) -> list[Row]:
        """What is in quarantine of these ids (None: all)."""
        return [r for r in read_quarantine(self.store) if ids is None or r.id in ids]


@dataclass(frozen=True)
class Outcome:
    place: Place
    before: list[Row]
    left: list[Row]


def chosen(
    root: Path, words: list[str] | None, every: bool
) -> list[tuple[Place, list[int] | None]]:
    """(place, ids or None for all). Raises BadConfig, UnknownRun."""
    if not words:
        if not every:
            raise BadConfig("which? Give RUN/SINK/ID as `rankgate sinks status` shows, or --all")
        places = [Place(run, v.name) for run in run_dirs(root) for v in _online(run)]
        return [(place, None) for place in places if place.rows(None)]
    found: dict[Place, list[int] | None] = {}
    for word in words:
        run, _, rest = word.partition("/")
        sink, _, number = rest.partition("/")
        if not sink or (number and not number.isdecimal()) or bool(number) == every:
            raise BadConfig(
                f"{word!r}: items are named RUN/SINK/ID, as in 7f3a/clearml/3; all of a sink are "
                "RUN/SINK --all"
            )
        place = Place(find_run(root, run), sink)
        if sink not in [v.name for v in _online(place.run_dir)]:
            raise BadConfig(f"run {place.run_dir.name} has nothing in quarantine of {sink}")
        before = found.setdefault(place, None if every else [])
        if before is not None:
            before.append(int(number))
    for place, ids in found.items():
        _check_there(place, ids)
    return list(found.items())


def _check_there(place: Place, ids: list[int] | None) -> None:
    there = {row.id for row in place.rows(ids)}
    missing = sorted(set(ids or ()) - there)
    if missing:
        named = ", ".join(f"{place.name}/{id_}" for id_ in missing)
        root = place.run_dir.parent.parent
        raise BadConfig(f"not in quarantine: {named}. See: {typed(root, 'sinks', 'status')}")


def _online(run_dir: Path) -> list[SinkView]:
    """The sinks that have a quarantine to work on; an export is written anew instead."""
    if is_closed(run_dir):
        return []
    found = []
    for path in sorted((run_dir / "sinks").glob("*.db")):
        try:
            view = read_view(path)
        except apsw.Error:
            continue  # being made at this moment
        if path.name == store_name(view.name, "online"):
            found.append(view)
    return found


def have_skipped(place: Place, asked: Path) -> None:
    """By the process that delivers, else here: whoever has the lock owns the file. Raises Busy."""
    deadline = time.monotonic() + WAIT_SECONDS
    while asked.exists():
        held = lock(place.run_dir / "sinks" / f"{place.sink}.lock")
        if held is not None:
            store = Store(place.store)
            requests.consume(place.run_dir, place.sink, store.quarantine)
            store.close()
            os.close(held)
            return
        if time.monotonic() > deadline:
            raise Busy(
                f"the process that delivers {place.name} is in the middle of a call; it does what "
                "you asked for when that is over. Look: "
                + typed(place.run_dir.parent.parent, "sinks", "status")
            )
        time.sleep(attach.POLL_SECONDS)


def have_retried(root: Path, place: Place, asked: Path, config: Path | None) -> None:
    """By the gateway that has this sink, else by a process of ours. Raises RankgateError."""
    mode = attach.sinks_of(root).get(place.sink) if attach.served(root) else None
    if mode == "online":
        (asked.parent / "deliver").touch()  # the gateway looks after this run again
        with attach.hold(root):
            _wait(place, asked)
        return
    given = str(config.absolute()) if config else ""
    served = bring_up_to_date(place.run_dir)
    with Reader(place.run_dir) as reader:
        if reader.about().state not in ENDED and not served:
            raise NotServed(
                f"run {place.run_dir.name} has not ended and no gateway serves it. What you asked "
                f"for is noted: {typed(root, 'drain', config=given, sinks=[place.sink])}"
            )
    settings = settings_of(root, config, (f"{place.sink}=online",))
    code = deliver(place.run_dir, place.sink, settings.sinks[place.sink])
    if code == OFF:
        raise RankgateError(f"{place.sink} is off: {_reason(read_view(place.store))}")


def _reason(view: SinkView) -> str:
    """Without the sink's own name, which stands before it."""
    return view.reason.removeprefix(f"{view.name}: ")


def _wait(place: Place, asked: Path) -> None:
    """Until the gateway's process has tried what it was asked for. Raises RankgateError."""
    since_ns, deadline = time.time_ns(), time.monotonic() + WAIT_SECONDS
    while asked.exists() or any(row.asked for row in place.rows(None)):
        view = read_view(place.store)
        if view.state == "off" and view.updated_ns > since_ns:
            raise RankgateError(
                f"{place.sink} is off: {_reason(view)}. What you asked for is noted, and done when "
                "it works again"
            )
        if time.monotonic() > deadline:
            why = f" ({view.state}: {_reason(view)})" if view.reason else ""
            raise Busy(
                f"{place.name} has not come to it yet{why}. What you asked for is noted, and done "
                f"in its time. Look: {typed(place.run_dir.parent.parent, 'sinks', 'status')}"
            )
        time.sleep(attach.POLL_SECONDS)
