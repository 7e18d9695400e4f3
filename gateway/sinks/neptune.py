"""Carries a run to a Neptune 2.x server through the `neptune` package, or its fork `minfx`.

The package queues, sends from a thread of its own and reports almost nothing, so each `send` ends
with `run.wait()`, and what it tells only its logger is listened to. To be run in a process of its
own: the package changes hooks of the whole process.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib
import logging
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import msgspec

from gateway.sinks.base import Item, Media, Memory, Off, Refused, RunInfo, Sent, Unavailable
from gateway.sinks.neptune_plan import (
    CONFLICT,
    IMAGE_BYTES,
    Kind,
    Planner,
    Tail,
    Write,
    WriteAtoms,
    WriteFile,
    WriteFloats,
    WriteImage,
    WriteLines,
    extension,
)

CUSTOM_ID_CHARACTERS = 36  #: the package ignores a longer id and makes a new run each time
UPLOAD_BYTES_PER_SECOND = 256 * 1024  #: a file may take as long as a slow line needs
STUCK_SECONDS = 300.0  #: then a connection that confirms nothing is given up for a new one
LIMIT_PAUSE_SECONDS = 60.0  #: how long to wait when a workspace's limit is reached
PAGE_POINTS = 1000  #: what the package itself asks for at once
MAX_PAGES = 100  #: of a series read back; older points than that are taken to be there
TRIES = 2  #: of a batch of which points are refused, the second after reading back

#: The package's own is 5 s. Its `wait()` wakes the sync thread by a signal that gets lost when the
#: thread is just about to sleep, and then takes this long.
FLUSH_SECONDS = 0.25

SYNC_THREAD = "NeptuneAsyncOpProcessor"

#: Read by the package when imported; the user's own values win. In brackets its own defaults.
PACKAGE_SETTINGS = {
    "NEPTUNE_RETRIES_TIMEOUT": "20",  # (60 s) how long a call, `init_run` too, blocks in an outage
    "NEPTUNE_REQUEST_TIMEOUT": "120",  # (600 s)
}
#: With this off, a full disk makes the package drop what it is given, with a warning only.
RAISE_ON_FULL_DISK = {"NEPTUNE_RAISE_ERROR_ON_DISK_USAGE_EXCEEDED": "True"}

#: Answers to `init_run` that no later try will change.
HOPELESS = {
    "NeptuneInvalidApiTokenException",
    "NeptuneMissingApiTokenException",
    "NeptuneMissingProjectNameException",
    "NeptuneClientUpgradeRequiredError",
    "NeptuneLegacyProjectException",
    "ProjectNotFound",
    "ProjectNotFoundWithSuggestions",
    "Unauthorized",
}

#: Ends of the sync thread that say nothing about the batch it was sending.
NOT_THE_BATCH = {
    "Unauthorized",
    "Forbidden",
    "NeptuneInvalidApiTokenException",
    "NeptuneConnectionLostException",
    "ContainerUUIDNotFound",
    "MetadataContainerNotFound",
    "ObjectNotFound",
}
LIMITS = {"NeptuneLimitExceedException", "NeptuneStorageLimitException"}

log = logging.getLogger(__name__)


class NeptuneConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`[sinks.neptune]`; the API token comes from NEPTUNE_API_TOKEN only."""

    #: `offline`: an export that `neptune sync` can send later, see `neptune_export.py`
    mode: Literal["online", "offline"] = "online"
    package: Literal["neptune", "minfx"] = "neptune"
    #: `workspace/project`; left out = NEPTUNE_PROJECT
    project: str | None = None
    #: how long a batch may go unconfirmed before it counts as an outage; more for large files
    confirm_seconds: float = 60.0
    #: how long the end of a run may take
    stop_seconds: float = 10.0


@dataclass(frozen=True)
class Package:
    """What is used of the vendor's package."""

    name: str
    root: ModuleType
    file: Any
    inconsistency: type[Exception]
    not_found: type[Exception]

    @classmethod
    def load(cls, name: str) -> Package:
        try:
            settings = {k: os.environ.get(k, v) for k, v in PACKAGE_SETTINGS.items()}
            with environment(settings | RAISE_ON_FULL_DISK), warnings.catch_warnings():
                # Its dependencies use what jsonschema deprecates: under -W error no import works.
                warnings.simplefilter("ignore", DeprecationWarning)
                root = importlib.import_module(name)
                base = root.__name__ if name == "neptune" else "minfx.neptune_v2"
                types = importlib.import_module(base + ".types")
                errors = importlib.import_module(base + ".exceptions")
        except ImportError as problem:
            what = "rankgate[neptune]" if name == "neptune" else "minfx"
            text = f"cannot import {name} ({problem}): pip install '{what}'"
            raise Off(text) from problem
        inconsistency, not_found = (
            errors.MetadataInconsistency,
            errors.FetchAttributeNotFoundException,
        )
        return cls(name, root, types.File, inconsistency, not_found)

    def start(self, info: RunInfo, folder: Path, **arguments: Any) -> Any:
        """`init_run` with all that it captures by default switched off, and no hooks left."""
        settings = {"NEPTUNE_DATA_DIRECTORY": str(folder.absolute())}
        hook = sys.excepthook
        with environment(settings):
            run = self.root.init_run(
                custom_run_id=custom_run_id(info.run_id),
                name=info.name or info.run_id,
                tags=list(info.tags) or None,
                source_files=[],
                git_ref=False,
                dependencies=None,
                capture_stdout=False,
                capture_stderr=False,
                capture_hardware_metrics=False,
                capture_traceback=False,
                fail_on_exception=False,
                flush_period=FLUSH_SECONDS,
                **arguments,
            )
        sys.excepthook = hook
        # At exit the package would wait without a limit; whoever wants a clean end calls `close`.
        atexit.unregister(getattr(run, "_shutdown_hook", print))
        return run


def custom_run_id(run_id: str) -> str:
    """The run id, or what fits of it and a hash."""
    if len(run_id) <= CUSTOM_ID_CHARACTERS:
        return run_id
    return f"{run_id[:19]}-{hashlib.sha256(run_id.encode()).hexdigest()[:16]}"


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """The package takes some settings from variables only; they are put back."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def one_line(problem: BaseException) -> str:
    """The package's messages are coloured banners of many lines."""
    text = re.sub(r"\x1b\[[0-9;]*m|-{4,}", " ", str(problem))
    return f"{type(problem).__name__}: {' '.join(text.split())}"[:400]


class Hand:
    """Writes to one run object of the package, offline or online."""

    def __init__(self, package: Package, run: Any, keep_files: bool) -> None:
        self.package = package
        self.run = run
        self._keep_files = keep_files  #: copy uploads into the run's own directory at once

    def begin(self, info: RunInfo) -> None:
        """What tells people, and a later search, where the run comes from."""
        self.put({"rankgate/run_id": info.run_id, "rankgate/project": info.project})
        self.put({"rankgate/state": "running", "rankgate/reason": ""})

    def end(self, state: str, reason: str) -> None:
        self.put({"rankgate/state": state, "rankgate/reason": reason})
        self.put({"sys/failed": state == "failed"})

    def kind(self, path: str) -> str | None:
        """The type of the field at this path; None if there is nothing."""
        try:
            found = self.run.get_attribute(path)
        except self.package.inconsistency:
            return "below a field"
        return None if found is None else type(found).__name__

    def write(self, writes: Sequence[Write], sent: Sent) -> None:
        """Hand the writes over; those whose path has another type are counted as skipped."""
        for write in writes:
            if not self._one(write):
                sent.delivered -= write.items
                sent.skip(CONFLICT, write.items)

    def _one(self, write: Write) -> bool:
        if isinstance(write, WriteAtoms):
            return self.put(write.values)
        if isinstance(write, WriteFloats | WriteLines):
            wanted = "FloatSeries" if isinstance(write, WriteFloats) else "StringSeries"
            if self.kind(write.path) not in (None, wanted):
                return False
            field = self.run[write.path]
            field.extend(write.values, steps=write.steps, timestamps=write.seconds)
            return True
        wanted = "FileSeries" if isinstance(write, WriteImage) else "File"
        if self.kind(write.path) not in (None, wanted):
            return False
        if isinstance(write, WriteImage):
            found = self._file(write.media)
            self.run[write.path].append(found, step=write.step, timestamp=write.seconds)
        else:
            self._upload(write)
        return True

    def _file(self, media: Media) -> Any:
        """The path has no ending, as it is named by content: the extension is given apart."""
        return self.package.file.from_path(str(media.path), extension=extension(media))

    def _upload(self, write: WriteFile) -> None:
        if not self._keep_files:
            self.run[write.path].upload(self._file(write.media))
            return
        with write.media.path.open("rb") as stream:
            found = self.package.file.from_stream(stream, extension=extension(write.media))
            self.run[write.path].upload(found)

    def put(self, values: Mapping[str, float | bool | str]) -> bool:
        """Assign single values; one that changes its type replaces the field."""
        all_fit = True
        for path, value in values.items():
            wanted = {float: "Float", bool: "Boolean", str: "String"}[type(value)]
            kind = self.kind(path)
            if kind in {"Float", "Integer", "Boolean", "String", "Datetime"} - {wanted}:
                self.run.pop(path)
            elif kind not in (None, wanted):
                all_fit = False
                continue
            self.run[path].assign(value)
        return all_fit

    def drawable(self, media: Media) -> bool:
        """Whether the file can be a point of an image series."""
        if media.size_bytes > IMAGE_BYTES:
            return False
        image = importlib.import_module("PIL.Image")  # the package needs it, so it is there
        try:
            with image.open(media.path):
                return True
        except Exception:  # whatever the decoder of a broken file raises
            return False


class SyncEndedError(Exception):
    """The package's sync thread has ended, and sends nothing any more."""

    def __init__(self, cause: BaseException | None) -> None:
        super().__init__(one_line(cause) if cause else "the sync thread ended")
        self.cause = cause


class Ear(logging.Handler):
    """Hears what no caller is told: refusals, in the log, and why the sync thread ended."""

    def __init__(self, package: str) -> None:
        super().__init__(logging.ERROR)
        self.refusals: list[str] = []
        self.cause: BaseException | None = None
        # Threads of earlier connections may still be about; what they say is of no interest.
        self._others = {t for t in threading.enumerate() if t.name == SYNC_THREAD}
        self._loggers = [logging.getLogger(name) for name in {"neptune", package}]
        for logger in self._loggers:
            logger.addHandler(self)
        self._previous_hook = threading.excepthook
        threading.excepthook = self._thread_ended

    def emit(self, record: logging.LogRecord) -> None:
        thread = threading.current_thread()
        if thread.name == SYNC_THREAD and thread not in self._others and record.args:
            # Refusals are logged as exception objects, unlike all other errors.
            found = [a for a in record.args if isinstance(a, Exception)]
            self.refusals.extend(one_line(problem) for problem in found)

    def _thread_ended(self, arguments: threading.ExceptHookArgs, /) -> None:
        thread = arguments.thread
        if thread is None or thread.name != SYNC_THREAD:
            self._previous_hook(arguments)
        elif thread not in self._others:
            self.cause = arguments.exc_value

    def settle(self) -> None:
        """The waiting ends a moment before the thread does, and before the hook is called."""
        for thread in threading.enumerate():
            if thread.name == SYNC_THREAD and thread not in self._others:
                thread.join(1.0)

    def take(self) -> list[str]:
        heard, self.refusals = self.refusals, []
        return heard

    def stop(self) -> None:
        for logger in self._loggers:
            logger.removeHandler(self)
        if threading.excepthook == self._thread_ended:
            threading.excepthook = self._previous_hook


class Waiter(threading.Thread):
    """`run.wait()`, which takes no limit and blocks for as long as an outage lasts."""

    def __init__(self, run: Any) -> None:
        super().__init__(name="neptune-wait", daemon=True)
        self._run = run
        self.since = time.monotonic()
        self.problem: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._run.wait()
        except Exception as problem:
            self.problem = problem


class Connection:
    """One run object of the package, online, with what is needed to trust it."""

    def __init__(self, package: Package, info: RunInfo, project: str, folder: Path) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="neptune-", dir=folder))
        self.ear = Ear(package.name)
        try:
            run = package.start(info, self._folder, project=project, mode="async")
        except BaseException:
            self.ear.stop()
            raise
        self.hand = Hand(package, run, keep_files=False)
        self._waiter: Waiter | None = None

    def confirm(self, limit_seconds: float) -> None:
        """Return once the server has answered for all that was handed over.

        After `Unavailable` the same wait goes on in the next call: what was handed over cannot be
        taken back, and may arrive as soon as the outage is over.
        """
        waiter = self._waiter = self._waiter or Waiter(self.hand.run)
        waiter.join(limit_seconds)
        if waiter.is_alive():
            raise Unavailable(f"Neptune has not confirmed within {limit_seconds:g} s")
        self._waiter = None
        if waiter.problem is not None:
            self.ear.settle()
            raise SyncEndedError(self.ear.cause)

    @property
    def unconfirmed_seconds(self) -> float:
        return time.monotonic() - self._waiter.since if self._waiter else 0.0

    def read(self, kind: Kind, path: str, after: float) -> Tail:
        """What the server has of a series beyond a step."""
        wanted = {"floats": "FloatSeries", "lines": "StringSeries", "images": "FileSeries"}[kind]
        if self.hand.kind(path) != wanted:
            return Tail()
        field = self.hand.run.get_attribute(path)
        try:
            return read_images(field) if kind == "images" else read_points(field, after)
        except self.hand.package.not_found:
            return Tail()  # defined here, but never arrived there

    def stop(self, limit_seconds: float) -> None:
        """Let go of the run; what is not confirmed by now is not kept."""
        try:
            self.hand.run.stop(seconds=limit_seconds)
        except Exception as problem:
            log.warning("neptune: cannot stop: %s", one_line(problem))
        self.ear.stop()
        shutil.rmtree(self._folder, ignore_errors=True)


def read_points(field: Any, after: float) -> Tail:
    """The points of a float or string series beyond a step, from the end backwards.

    `fetch_values()` can only read a series from its beginning, so its own page reader is used.
    """
    count = field._fetch_values_from_backend(0, 1).totalItemCount
    points: list[tuple[float, Any, int]] = []
    end = count
    for _ in range(MAX_PAGES):
        begin = max(0, end - PAGE_POINTS)
        page = field._fetch_values_from_backend(begin, end - begin).values if end else []
        fresh = [(p.step, p.value, int(p.timestampMillis)) for p in page if p.step > after]
        points[:0] = fresh
        end = begin
        if end == 0 or len(fresh) < len(page):
            return Tail(points, True, count)
    return Tail(points, False, count)


def read_images(field: Any) -> Tail:
    """Of an image series the server tells the number only."""
    found = field._backend.get_image_series_values(
        field._container_id, field._container_type, field._path, 0, 1
    )
    return Tail(count=found.totalItemCount)


class NeptuneSink:
    """One run in one Neptune run, by one handle, in batches that are confirmed one by one."""

    stop_asked = ""

    def __init__(self, config: NeptuneConfig, folder: Path | None = None) -> None:
        self.config = config
        self._folder = folder  #: for the package's queue, which is ours to delete
        self._package: Package | None = None
        self._info: RunInfo | None = None
        self._connection: Connection | None = None
        self._planner: Planner | None = None
        self._unsure = False  #: something may have arrived that was not confirmed
        self._deaths = 0  #: of the sync thread, one after another, that may be due to the batch

    def open(self, run: RunInfo, memory: Memory) -> None:
        if self.config.mode == "offline":
            raise Off("mode is offline: nothing is sent, `rankgate replay --to neptune` exports")
        self._info = run
        self._planner = Planner(memory, self._read, self._drawable)
        self._package = Package.load(self.config.package)
        self._ready()

    def send(self, batch: Sequence[Item], again: bool) -> Sent:
        unsure = again or self._unsure
        size = sum(item.size_bytes for item in batch if isinstance(item, Media))
        refusals: list[str] = []
        for _ in range(TRIES):
            connection, planner = self._ready()
            writes, sent = planner.plan(batch, unsure)
            self._unsure = True
            connection.hand.write(writes, sent)
            self._confirm(connection, self.config.confirm_seconds + size / UPLOAD_BYTES_PER_SECOND)
            refusals = connection.ear.take()
            if not refusals:
                planner.commit()
                self._unsure, self._deaths = False, 0
                return sent
            unsure = True
        raise Refused("; ".join(refusals[:3]))

    def close(self, state: str, reason: str) -> Sent:
        if self._info is None:
            return Sent()
        connection, _ = self._ready()
        connection.hand.end(state, reason)
        self._confirm(connection, self.config.stop_seconds)
        self._drop(self.config.stop_seconds)
        self._info = None
        return Sent()

    def _ready(self) -> tuple[Connection, Planner]:
        """A connection that is waiting for nothing."""
        assert self._planner is not None, "open comes first"
        if self._connection is None:
            self._connection = self._connect()
            self._planner.forget()
            assert self._info is not None
            self._connection.hand.begin(self._info)
        elif self._connection.unconfirmed_seconds > 0:
            if self._connection.unconfirmed_seconds > STUCK_SECONDS:
                self._drop(0.0)
                return self._ready()
            self._confirm(self._connection, self.config.confirm_seconds)
            self._connection.ear.take()
        return self._connection, self._planner

    def _connect(self) -> Connection:
        project = self.config.project or os.environ.get("NEPTUNE_PROJECT")
        if not os.environ.get("NEPTUNE_API_TOKEN"):
            raise Off("no API token: set NEPTUNE_API_TOKEN")
        if not project:
            raise Off("no project: set NEPTUNE_PROJECT or `project` in [sinks.neptune]")
        assert self._package is not None
        assert self._info is not None
        try:
            return Connection(self._package, self._info, project, self._own_folder())
        except Exception as problem:
            if type(problem).__name__ in HOPELESS:
                raise Off(one_line(problem)) from problem
            raise Unavailable(one_line(problem)) from problem

    def _own_folder(self) -> Path:
        """Empty of what an earlier connection left: it would come too late and out of order."""
        folder = self._folder or Path(tempfile.gettempdir())
        folder.mkdir(parents=True, exist_ok=True)
        if self._folder is not None:
            for left in folder.glob("neptune-*"):
                shutil.rmtree(left, ignore_errors=True)
        return folder

    def _confirm(self, connection: Connection, limit_seconds: float) -> None:
        try:
            connection.confirm(limit_seconds)
        except SyncEndedError as dead:
            self._drop(1.0)
            self._unsure = True
            raise self._judge(dead) from dead

    def _judge(self, dead: SyncEndedError) -> Exception:
        """What the end of the sync thread says about the batch, if anything."""
        name = type(dead.cause).__name__
        if name in LIMITS:
            return Unavailable(str(dead), LIMIT_PAUSE_SECONDS)
        if name == "NeptuneFieldCountLimitExceedException":
            return Refused(str(dead))
        if name in NOT_THE_BATCH:
            return Unavailable(str(dead))
        # Any other answer may be due to a proxy in between: only one that comes twice is believed.
        self._deaths += 1
        return Unavailable(str(dead)) if self._deaths < TRIES else Refused(str(dead))

    def _drop(self, limit_seconds: float) -> None:
        if self._connection is not None:
            self._connection.stop(limit_seconds)
            self._connection = None

    def _read(self, kind: Kind, path: str, after: float) -> Tail:
        assert self._connection is not None
        return self._connection.read(kind, path, after)

    def _drawable(self, media: Media) -> bool:
        assert self._connection is not None
        return self._connection.hand.drawable(media)
