"""`init` and `Run`: what a training script touches. Nothing here raises into it, or waits for it.

A `Run` writes to its spool in the calling thread; a sender thread does the rest. In a forked
child every method does nothing: the parent's stream is the parent's alone.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

from . import exits, identity
from .arguments import check, fitting
from .capture.console import Console, begin
from .capture.machine import Machine
from .capture.source import Source, wanted
from .files import Files
from .images import figure_bytes, table_bytes
from .link import Link, connect
from .media import MediaSender
from .neighbours import Neighbours
from .redact import Redactor
from .rendezvous import data_dir, ipc_address
from .rows import Rows
from .sender import Sender, jitter, new_stream_id
from .spool import Spool
from .spool_place import older_streams, spool_dir, spool_root, spool_share
from .values import flatten, plain
from .wire.records import Kind
from .wire.session import ClientSession
from .wire.source import DIFF_FILE

FINISH_SECONDS = 10.0  #: the most that `finish` or an exit may take
SOURCE_SECONDS = 2.0  #: of them, at most, for what is still being found out about the code
LEAVE_SHARE = 0.02  #: of them, for threads to leave and files to be closed
MODES = ("live", "offline", "disabled")  #: of RANKGATE_MODE
ABSENT_SECONDS = 3.0  #: of these, while no gateway has ever answered
FAILURE_CHARACTERS = 4000  #: of a traceback, its end
TEXT_PIECE_CHARACTERS = 15_000  #: four bytes each at most: a record stays below 64 KiB

log = logging.getLogger("rankgate")


class Run:
    """One process's part of a run. Made by `init`; every method may be called from any thread.

    `id` is the run's id, `stream` the 32 hex digits of this life of this process.
    """

    def __init__(
        self,
        run_id: str,
        where: identity.Place,
        about: dict[str, Any],
        environ: Mapping[str, str],
        gateway: str | None,
        mode: str,
        redactor: Redactor,
    ) -> None:
        self.id = run_id
        self.rank = where.rank
        self.world_size = where.world_size
        stream = new_stream_id()
        self.stream = stream.hex()
        self._warned: set[str] = set()
        self._dead = False
        self._forked = False
        self._finished = False
        self._failure = ""
        self._late_calls = 0
        self._clean = redactor
        self._finish_lock = threading.Lock()
        self._environ = environ
        self._data_dir = data_dir(environ)
        self._address = gateway or environ.get("RANKGATE_ADDR")
        self._online = mode == "live"
        self._run_dir = run_dir = spool_dir(environ, run_id, self._warn)
        earlier = older_streams(run_dir)
        directory = f"{run_dir}/{self.stream}" if run_dir else None
        hello = {**self._own_hello(), "earlier": earlier, **about}
        root = spool_root(environ)
        share = spool_share(root, environ, where.local_world_size)
        self._spool = Spool(
            directory,
            {"stream": stream, **hello},
            keep_bytes=share.keep,
            cap_bytes=share.cap,
            nowhere=f"cannot write the spool in {root}",
        )
        self._rows = Rows(self._spool, self._warn)
        session = ClientSession(stream, lambda: {**hello, **self._progress()}, self._spool, jitter)
        session.on_ping(self._progress)
        place = Path(directory or f"{tempfile.gettempdir()}/rankgate-{self.stream}") / "media"
        self._media = MediaSender(
            place, run_id, stream, self._spool, self._connect, self._warn, redactor.text
        )
        self._files = Files(self._media, redactor)
        self._sender = Sender(
            session,
            self._spool,
            self._data_dir,
            self._address,
            environ,
            self._online,
            where.local_world_size >= where.world_size,
            self._warn,
            self._rows.settle,
        )
        self._source: Source | None = None
        self._console: Console | None = None
        self._machine: Machine | None = None
        self._neighbours = self._begin_neighbours(where, session)

    def _own_hello(self) -> dict[str, Any]:
        return {
            "kind": "live",
            "run": self.id,
            "dir": str(self._data_dir),
            "addr": self._address or "",
            "started": time.time_ns(),
        }

    def _begin_neighbours(self, where: identity.Place, session: ClientSession) -> Neighbours | None:
        """In one rank of a node, where the gateway may be on another."""
        if not (self._online and self._run_dir and where.local_rank == 0 and self._address):
            return None
        if not self._address.startswith("tcp://"):
            return None
        run_dir = Path(self._run_dir)
        neighbours = Neighbours(
            run_dir, self._data_dir, session, self._address, self._environ, self._warn
        )
        neighbours.start()
        return neighbours

    # --- logging -------------------------------------------------------------

    def log(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Log scalars: Python, numpy or torch numbers; nested dicts are flattened with `/`.

        On return they survive the death of this process. A tensor on a device is copied behind
        its event and logged when it is there; this never waits for it.
        """
        if self._dead:
            self._late()
            return
        try:
            self._rows.log(values, step)
        except Exception as error:  # promise 1: no exception into user code
            self._trouble("log", error)

    def log_text(self, text: str, level: str = "info", step: int | None = None) -> None:
        """Log a line of text; what looks like a secret in it is written as `[redacted]`."""
        if self._dead:
            self._late()
            return
        try:
            text, stamp = self._clean.text(str(text)), time.time_ns()
            level = self._clean.text(str(level))[:32]
            for at in range(0, max(len(text), 1), TEXT_PIECE_CHARACTERS):
                piece = text[at : at + TEXT_PIECE_CHARACTERS]
                body = {"t": piece, "l": level, "w": stamp, "s": step}
                self._spool.append_map(Kind.TEXT, body)
        except Exception as error:
            self._trouble("log_text", error)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log hyperparameters; logged again, a key's later value wins. Values of keys such as
        `api_key`, and texts that look like a secret, are written as `[redacted]`."""
        self._log_map("log_params", Kind.PARAMS, params)

    def log_summary(self, values: Mapping[str, Any]) -> None:
        """Log final values that have no step, such as the best accuracy."""
        self._log_map("log_summary", Kind.SUMMARY, values)

    def _log_map(self, name: str, kind: Kind, values: Mapping[str, Any]) -> None:
        if self._dead:
            self._late()
            return
        try:
            stamp = time.time_ns()
            part: dict[str, Any] = {}
            size = 0
            for key, value in self._plain(values):
                length = len(key) + (len(value) if isinstance(value, str) else 8)
                if part and size + length > TEXT_PIECE_CHARACTERS:
                    self._spool.append_map(kind, {"v": part, "w": stamp})
                    part, size = {}, 0
                part[key] = value
                size += length
            if part:
                self._spool.append_map(kind, {"v": part, "w": stamp})
        except Exception as error:
            self._trouble(name, error)

    def _plain(self, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """Keys and values as they are written: flat, plain, without secrets."""
        for key, value in flatten(values):
            yield self._clean.key(key), self._clean.value(key, plain(value))

    def log_image(self, key: str, image: Any, step: int | None = None) -> None:
        """Log a picture: an array, a tensor, a PIL image, or the path of a file."""
        self._guard("log_image", lambda: self._files.add_image(key, image, step))

    def log_figure(self, key: str, figure: Any, step: int | None = None) -> None:
        """Log a matplotlib figure (drawn now, as PNG), a plotly figure (as its JSON), or a picture
        of one by the path of its file."""

        def make() -> None:
            if isinstance(figure, str | os.PathLike):
                self._files.add_file("figure", Path(figure), key=key, step=step)
                return
            data, ending = figure_bytes(figure)
            self._files.add_bytes("figure", key, ending, data, step)

        self._guard("log_figure", make)

    def log_table(self, key: str, rows: Any, step: int | None = None) -> None:
        """Log a table: a list of dicts, a list of lists, or a DataFrame."""
        self._guard(
            "log_table",
            lambda: self._files.add_bytes("table", key, ".table.json", table_bytes(rows), step),
        )

    def log_file(self, path: str | os.PathLike[str], name: str | None = None) -> None:
        """Log a file as it is now; it may be rewritten or deleted afterwards."""
        self._guard("log_file", lambda: self._files.add_file("file", Path(path), name=name))

    def log_checkpoint(
        self,
        path: str | os.PathLike[str],
        best: bool = False,
        final: bool = False,
        metrics: Mapping[str, Any] | None = None,
        step: int | None = None,
        wait: bool = False,
    ) -> None:
        """Log a checkpoint as it is now: cloned in this call where the file system can, else
        copied by a background thread (`wait=True`: in this call)."""

        def make() -> None:
            values = dict(self._plain(metrics or {}))
            meta = {"best": bool(best), "final": bool(final), "metrics": values}
            self._files.add_file("checkpoint", Path(path), step=step, meta=meta, wait=wait)

        self._guard("log_checkpoint", make)

    def should_stop(self) -> bool:
        """True once a backend or a person has asked to stop; rankgate itself never stops you."""
        return not self._dead and self._sender.session.stop

    # --- the end -------------------------------------------------------------

    def finish(self, status: str = "completed", seconds: float = FINISH_SECONDS) -> bool:
        """End this process's part; waits at most `seconds` for the gateway to have it all.

        True when it has. False costs nothing: the spool stays, and the gateway or
        `rankgate drain` ships it. Called again, or in a forked child, it does nothing.
        """
        with self._finish_lock:
            if self._dead or self._finished:
                return True
            self._finished = True
        try:
            return self._finish(self._clean.text(str(status)), "", seconds)
        except Exception as error:
            self._trouble("finish", error)
            return False

    def _finish(self, status: str, text: str, seconds: float) -> bool:
        deadline = time.monotonic() + seconds * (1 - LEAVE_SHARE)
        if self._source:
            self._source.close(min(SOURCE_SECONDS, deadline - time.monotonic()))
        if self._machine:
            self._machine.stop(LEAVE_SHARE * seconds)
        if self._console:
            self._console.end(deadline)
        while self._rows.settle() and time.monotonic() < deadline:
            time.sleep(0.002)
        self._rows.abandon()
        self._media.wait(deadline, sent=False)
        end = {"status": status, "text": text.strip(), "w": time.time_ns()}
        with self._spool.lock:  # nothing that is logged from now on comes before the end
            self._spool.append_map(Kind.END, {**end, **self._spool.final_counts()})
            self._dead = True
        if not self._online:
            deadline = time.monotonic()
        # What is in memory only is lost when we leave: then no wait is too long but the promised.
        absent = seconds if self._spool.memory_records else ABSENT_SECONDS
        welcomed = self._sender.session.welcomed
        patience = deadline if welcomed else min(deadline, time.monotonic() + absent)
        files = self._media.wait(patience, sent=True)
        # BYE says that nothing more will come of this life, so not while a file is on its way.
        done = self._sender.finish(deadline, end if files else None, absent)
        self._media.close()
        if self._neighbours:
            self._neighbours.stop(min(0.2, deadline - time.monotonic()))
        done = done and self._sender.session.durable >= self._spool.last
        memory = self._spool.memory_records if not done else 0
        self._spool.close()
        if done and files:
            self._mark_shipped()
        self._tell_left(memory, done and files)
        return done and files

    def _tell_left(self, memory: int, shipped: bool) -> None:
        """What is lost with this process (`memory`, in records), and where the rest waits."""
        if memory:
            log.warning(
                "rankgate: rank %s: %d records were in memory only (%s) and are lost",
                self.rank,
                memory,
                self._spool.volatile,
            )
        if not shipped and self._online and self._spool.directory:
            log.warning(
                "rankgate: rank %s: not all is acknowledged yet; it is safe in %s%s",
                self.rank,
                self._spool.directory,
                f"; ship it from this node: rankgate sweep --address {self._address}"
                if self._address
                else f" and the gateway ships it (or: rankgate drain --dir {self._data_dir})",
            )

    def _mark_shipped(self) -> None:
        """Note what the gateway has on disk; the sweep removes the spool when it is old."""
        session = self._sender.session
        note = f"{(session.journal or b'').hex()} {session.durable}\n"
        try:
            (Path(self._spool.directory or "/") / "done").write_text(note)
        except OSError:
            pass  # it is shipped once more, and dropped as a duplicate

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
            self.finish()
            return
        self._fail(kind, error, trace)
        self._at_exit()

    def _fail(
        self,
        kind: type[BaseException],
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        text = "".join(traceback.format_exception(kind, error, trace))
        self._failure = self._clean.text(text[-5 * FAILURE_CHARACTERS :])[-FAILURE_CHARACTERS:]

    def _at_exit(self) -> None:
        with self._finish_lock:
            if self._dead or self._finished:
                self._tell_late()
                return
            self._finished = True
        status = "failed" if self._failure else "ended"
        try:
            self._finish(status, self._failure, FINISH_SECONDS)
        except Exception as error:
            self._trouble("exit", error)
        except KeyboardInterrupt:
            pass  # not waiting any longer; the spool has it all

    # --- inner ---------------------------------------------------------------

    def _capture_console(self) -> None:
        self._console = begin(self._spool, self._clean, self._warn)

    def _capture_machine(self, where: identity.Place) -> None:
        rows = Rows(self._spool, self._warn)  # its steps are its own

        def put(values: dict[str, float]) -> None:
            with self._spool.lock:  # nothing comes after the end
                if not self._dead:
                    rows.log(values, step=None)

        self._machine = Machine(self._run_dir, where, put)

    def _capture_source(self) -> None:
        """Begin to find out, behind the training, what code this is."""

        def log_diff(data: bytes) -> None:
            self._guard(
                "source", lambda: self._files.add_bytes("file", DIFF_FILE, "", data, step=None)
            )

        self._source = Source(self.log_params, log_diff, self._clean, self._environ)

    def _connect(self) -> Link | None:
        if not self._online:
            return None
        return connect(self._address or ipc_address(self._data_dir), self._environ)

    def _progress(self) -> dict[str, Any]:
        """What every ping tells: how far this process is, and what it had to refuse."""
        return {
            "last": self._spool.last,
            "step": self._rows.last_step,
            "logged": self._rows.last_log_ns,
            "refused": sum(self._spool.refused.values()),
            "bad": self._spool.bad_values,
            "spool": self._spool.kept_bytes,
            "volatile": self._spool.volatile,
            "wall": time.time_ns(),
        }

    def _guard(self, name: str, call: Callable[[], None]) -> None:
        if self._dead:
            self._late()
            return
        try:
            call()
        except Exception as error:
            self._trouble(name, error)

    def _trouble(self, name: str, error: Exception) -> None:
        try:
            self._spool.refuse(f"{name} failed")
        except Exception:  # noqa: S110 - the last resort must not fail either
            pass
        self._warn(name, f"{name}: {error}; the call is not logged, and counted as refused")

    def _warn(self, what: str, text: str) -> None:
        """One line per kind of trouble, never a second."""
        if what not in self._warned:
            self._warned.add(what)
            log.warning("rankgate: rank %s: %s", self.rank, self._clean.text(text))

    def _late(self) -> None:
        if self._finished and not self._forked:
            self._late_calls += 1
            self._spool.refuse("after finish")  # as long as it is sending, its pings tell
            self._warn("late", "log after finish does nothing")

    def _tell_late(self) -> None:
        if self._late_calls > 1 and not self._forked:
            self._warn("late calls", f"{self._late_calls} calls came after finish; none is logged")

    def _become_child(self) -> None:
        """After a fork: touch no lock, no socket, no thread of the parent's."""
        self._dead = self._forked = True
        if self._console:
            self._console.become_child()
        if self._machine:
            self._machine.become_child()
        self._finish_lock = threading.Lock()  # a thread of the parent's may have held it

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_run, (self.id,)


class NullRun(Run):
    """Does nothing: a DataLoader worker, a pickled copy, or RANKGATE_MODE=disabled."""

    def __init__(self, run_id: str) -> None:
        self.id, self.rank, self.world_size, self.stream = run_id, -1, 1, ""
        self._dead = self._forked = self._finished = True
        self._failure = ""
        self._late_calls = 0
        self._finish_lock = threading.Lock()


def _no_run(run_id: str) -> Run:
    return NullRun(run_id)


def init(
    project: str | None = None,
    name: str | None = None,
    run: str | None = None,
    config: Mapping[str, Any] | None = None,
    tags: Sequence[str] = (),
    gateway: str | None = None,
    rank: int | None = None,
    local_rank: int | None = None,
    world_size: int | None = None,
    capture_console: bool = True,
    _source: str = "",
) -> Run:
    """Begin logging from this process: the same call on every rank.

    Raises ValueError for wrongly typed arguments only, never for environment or network. In a
    multiprocessing child (a DataLoader worker) it gives a run that does nothing, unless `rank` is
    given. With `capture_console` what the process and its children print is logged too. See the
    README for the environment variables.
    """
    check(project, name, run, config, tags, gateway, rank, local_rank, world_size)
    if capture_console is not True and capture_console is not False:
        raise ValueError(f"capture_console must be True or False, not {capture_console!r}")
    environ = os.environ
    mode = _mode(environ)
    where = identity.place(environ, rank, local_rank, world_size)
    run_id = identity.run_id(environ, where, run)
    child = rank is None and identity.in_worker_process()
    if mode == "disabled" or child:
        if child and identity.could_be_rank(environ):
            _tell_child()
        return NullRun(run_id)
    try:
        redactor = Redactor(environ)
        attributes = identity.attributes(environ, where)
        argv0 = str(attributes["argv0"])
        about = {
            **attributes,
            "argv0": redactor.key(argv0) if argv0 else "",
            "project": redactor.key(project or environ.get("RANKGATE_PROJECT") or "default"),
            "name": redactor.key(name) if name else "",
            "tags": fitting([redactor.key(t) for t in tags]),
            "source": _source,  # an integration's name for itself
        }
        made = Run(run_id, where, about, environ, gateway, mode, redactor)
    except Exception as error:  # no thread, no descriptor: the training goes on without a log
        log.warning("rankgate: logging is off in this process: %r", error)
        return NullRun(run_id)
    exits.watch(made)
    if config:
        made.log_params(config)
    if wanted(environ, where.rank):
        made._capture_source()
    if capture_console:
        made._capture_console()
    made._capture_machine(where)
    return made


def _mode(environ: Mapping[str, str]) -> str:
    mode = environ.get("RANKGATE_MODE") or "live"
    if mode in MODES:
        return mode
    log.warning("rankgate: RANKGATE_MODE is one of %s, not %r; live is used", MODES, mode)
    return "live"


@cache
def _tell_child() -> None:
    """Once per process."""
    log.warning(
        "rankgate: init() does nothing in a child of multiprocessing, as that may be a worker of a "
        "rank; a child that is a rank itself says so: init(rank=RANK, world_size=SIZE)"
    )
