"""A sink's process: one run, one sink, until the run has ended and all is dealt with.

Exit codes tell the supervisor what to do: 0 all done, OFF cannot work here, BUSY another process
holds this sink of this run.
"""

from __future__ import annotations

import faulthandler
import fcntl
import logging
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import apsw
import msgspec

from .. import parent
from ..series.db import fetch, open_reader
from ..series.reader import Reader
from . import registry, requests
from .attempts import NewestSink
from .base import Item, Media, Memory, RunInfo, Sent, Sink, SinkConfig
from .loop import Loop
from .retry import Backoff
from .since import Since, SinceSink
from .store import Store, read_view, store_name

OFF, BUSY = 4, 5
STOP = "requests/stop"  #: below a run's directory: the wish that its ranks stop, and why
CALL_SECONDS = 3600.0  #: a call of a sink that takes longer is taken to hang
SLOWEST_BYTES_PER_SECOND = 128 * 1024  #: files may take so much longer

log = logging.getLogger("rankgate.sinks")


class Limited:
    """A sink whose calls come back or end this process: a vendor's package may hang for ever.

    The supervisor starts it again, and it goes on from its cursor. `faulthandler` needs nothing of
    the interpreter to end it, and leaves in the log where each thread stood.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    @property
    def stop_asked(self) -> str:
        return self._sink.stop_asked

    def open(self, run: RunInfo, memory: Memory) -> None:
        with _limit(CALL_SECONDS):
            self._sink.open(run, memory)

    def send(self, batch: Sequence[Item], again: bool) -> Sent:
        size = sum(item.size_bytes for item in batch if isinstance(item, Media))
        with _limit(CALL_SECONDS + size / SLOWEST_BYTES_PER_SECOND):
            return self._sink.send(batch, again)

    def close(self, state: str, reason: str) -> Sent:
        with _limit(CALL_SECONDS):
            return self._sink.close(state, reason)


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def run_info(reader: Reader) -> RunInfo:
    """What a backend's run is made from: the first rank's words."""
    streams = [s for s in reader.streams() if s.kind != "tool"] or reader.streams()
    run_id = reader.run_dir.name
    if not streams:
        return RunInfo(run_id, "default", run_id, (), time.time_ns())
    first = min(streams, key=lambda s: (max(s.rank, 0), s.index))
    hello = first.hello
    project = str(hello.get("project") or "default")
    return RunInfo(
        run_id=run_id,
        project=project,
        name=str(hello.get("name") or f"{project}-{run_id[:8]}"),
        tags=tuple(str(t) for t in hello.get("tags") or ()),
        started_ns=int(hello.get("started") or 0),
        node=first.node,
        source=str(hello.get("source") or ""),
    )


def lock(path: Path) -> int | None:
    """This sink of this run is ours alone, until we die. None when somebody else has it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd


def carry(run_dir: Path, name: str, config: SinkConfig, since: str = "") -> int:
    """Deliver until the run has ended and all is dealt with. Returns the exit code.

    `since` (a `Since` as JSON) holds until then: who goes on where this is killed keeps to it.
    """
    if lock(run_dir / "sinks" / f"{name}.lock") is None:
        return BUSY
    store = Store(run_dir / "sinks" / store_name(name, "online"))
    scratch = run_dir / "sinks" / f"{name}.scratch"
    scratch.mkdir(mode=0o700, exist_ok=True)
    with Reader(run_dir) as reader:
        since = since or store.about("since", "")
        store.note(since=since)
        limited = Limited(registry.online(name, config, scratch))
        sink = _wanted(limited, name, reader, since)
        consume = partial(requests.consume, run_dir, name, store.quarantine)
        code = _drive(reader, store, sink, run_dir, wait_for_end=True, consume=consume)
    if code == 0:
        store.note(since="")
    store.close()
    if code == 0:
        shutil.rmtree(scratch, ignore_errors=True)
        (run_dir / STOP).unlink(missing_ok=True)  # it has ended: no wish for its next launch
    return code


def export(run_dir: Path, name: str, config: SinkConfig, since: str = "") -> int:
    """Write the whole run into `exports/NAME`: a replay from zero into a new folder, which takes
    its name when it is whole."""
    if lock(run_dir / "sinks" / f"{name}.lock") is None:
        return BUSY
    database = run_dir / "sinks" / store_name(name, "offline")
    for suffix in ("", "-wal", "-shm"):
        Path(f"{database}{suffix}").unlink(missing_ok=True)
    exports = run_dir / "exports"
    final, part = exports / name, exports / f".{name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(mode=0o700, parents=True)
    store = Store(database)
    store.note(state="exporting", reason="")
    with Reader(run_dir) as reader:
        feed = reader.feed_end()
        limited = Limited(registry.export(name, config, part, final))
        sink = _wanted(limited, name, reader, since)
        code = _drive(reader, store, sink, run_dir, wait_for_end=False)
    if code == 0:
        old = exports / f".{name}.old"
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        part.rename(final)
        shutil.rmtree(old, ignore_errors=True)
        store.note(state="exported", reason="", export=str(final), feed=feed)
    store.close()
    return code


def _wanted(sink: Sink, name: str, reader: Reader, since: str) -> Sink:
    """The sink behind what keeps from it the items it is not to have."""
    if registry.kind(name).newest_wins:
        sink = NewestSink(sink, reader)
    return SinceSink(sink, msgspec.json.decode(since, type=Since)) if since else sink


def _drive(
    reader: Reader,
    store: Store,
    sink: Sink,
    run_dir: Path,
    wait_for_end: bool,
    consume: Callable[[], None] = lambda: None,
) -> int:
    """`consume` does what people ask for in requests/; often, as a wait may be long."""
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda s, _f: stopping.append(s))
    backoff = Backoff(random.random)
    loop = Loop(reader, store, sink, run_info(reader), backoff, wait_for_end)
    while not stopping and not parent.gone():
        consume()
        wait = loop.step()
        if loop.off:
            log.warning("%s", loop.off)
            return OFF
        if loop.done:
            return 0
        if reader.replaced():
            return 1  # started again, it reads the new series
        if sink.stop_asked:
            _ask_to_stop(run_dir, sink.stop_asked)
        deadline = time.monotonic() + wait
        while time.monotonic() < deadline and not stopping and not parent.gone():
            time.sleep(min(0.1, max(0.0, deadline - time.monotonic())))
            consume()
    return 1


def _ask_to_stop(run_dir: Path, reason: str) -> None:
    """Leave a request for ingest, which tells every rank; training decides for itself."""
    wish = run_dir / STOP
    if wish.exists():
        return
    wish.parent.mkdir(mode=0o700, exist_ok=True)
    part = wish.with_name(".stop")
    part.write_text(reason)
    part.rename(wish)


def fresh(run_dir: Path, name: str, reader: Reader, offline: bool) -> bool:
    """Is there nothing (more) for this sink to do, as its own file tells?"""
    path = run_dir / "sinks" / store_name(name, "offline" if offline else "online")
    if not path.exists():
        return False
    about = reader.about()
    try:
        view = read_view(path)
        closed, feed, build = _marks(path)
    except apsw.Error:
        return False  # killed while its file was being made: started again, it makes it whole
    if not offline and (requests.waiting(run_dir, name) or view.asked):
        return False
    if offline:
        return view.state == "exported" and feed >= reader.feed_end() and closed == about.state
    caught_up = build == about.build and feed >= reader.feed_end()
    return view.state == "drained" and caught_up and (closed == about.state)


def _marks(path: Path) -> tuple[str, int, bytes]:
    db = open_reader(path)
    try:
        about: dict[str, Any] = dict(fetch(db, "SELECT name, value FROM about"))
    finally:
        db.close()
    return str(about.get("closed", "")), int(about.get("feed", 0)), bytes(about.get("build", b""))


def main(arguments: list[str]) -> int:
    """`RUN_DIR NAME CONFIG_JSON online|export [SINCE]`: what supervisor and `replay` start."""
    run_dir, name, config_json, how, *since = arguments
    config = msgspec.json.decode(config_json, type=registry.kind(name).config)
    work = Path(run_dir)
    if how == "export":
        return export(work, name, config, *since)
    return carry(work, name, config, *since)
