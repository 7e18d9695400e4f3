"""A run of the `neptune` package, or of its fork `minfx`, reached below the package's own queue.

That queue is sent by a thread which reports nothing and ends for good at the first 4xx, and what a
killed process leaves in it comes out of order later, or never. So operations go straight to the
backend object that the thread itself calls: the answer comes in the same call, and nothing waits
anywhere but here. To be used in a process of its own: the package changes hooks of the whole
process.
"""

from __future__ import annotations

import atexit
import base64
import gc
import hashlib
import importlib
import logging
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from gateway.sinks.base import Media, Off, RunInfo, Sent
from gateway.sinks.neptune_plan import (
    CONFLICT,
    Atom,
    Kind,
    Point,
    Tail,
    Write,
    WriteAtoms,
    WriteFile,
    WriteImage,
    WriteLines,
    WriteWhole,
    extension,
)

CUSTOM_ID_CHARACTERS = 36  #: the package ignores a longer id and makes a new run each time
REQUEST_BYTES = 4 * 1024 * 1024  #: of one request, about; the rest follows in the next
OFFLINE_POINTS = 100  #: of one operation in a queue, as by the package's own `extend`
POINT_BYTES = 80  #: of one point in a request, about
PAGE_POINTS = 1000  #: what the package itself asks for at once
MAX_PAGES = 100  #: of a series read back; older points than that are taken to be there
STOP_SECONDS = 10.0  #: for the package's threads to end

UPLOAD_PATIENCE = 30  #: times longer than else a part of a file is tried again within one call

#: Read by the package when imported; the user's own values win. In brackets its own defaults.
PACKAGE_SETTINGS = {
    # (60 s) One try in a call: of what a server asks with Retry-After it reads the first digit,
    # and the loop around us waits better.
    "NEPTUNE_RETRIES_TIMEOUT": "1",
    "NEPTUNE_REQUEST_TIMEOUT": "60",  # (600 s)
}
#: With this off, a full disk makes the package drop what it is given, with a warning only.
RAISE_ON_FULL_DISK = {"NEPTUNE_RAISE_ERROR_ON_DISK_USAGE_EXCEEDED": "True"}

SERIES = {"floats": "floatSeries", "lines": "stringSeries", "images": "imageSeries"}
ATOM_TYPES: dict[type, str] = {float: "float", bool: "bool", str: "string"}
SINGLE_VALUES = {"float", "int", "bool", "string", "datetime"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Package:
    """What is used of the vendor's package."""

    root: ModuleType
    clients: ModuleType  #: its module that logs in, once in a process
    tries: Any  #: its module that tries again
    operation: Any  #: its module of operations: what can be done to a field
    signals: Any  #: its module that hears what people ask for in the app
    not_found: type[Exception]

    @classmethod
    def load(cls, name: str) -> Package:
        """Raises Off when it is not installed, or is a version without what is used of it."""
        try:
            settings = {k: os.environ.get(k, v) for k, v in PACKAGE_SETTINGS.items()}
            with environment(settings | RAISE_ON_FULL_DISK), warnings.catch_warnings():
                # Its dependencies use what jsonschema deprecates: under -W error no import works.
                warnings.simplefilter("ignore", DeprecationWarning)
                root = importlib.import_module(name)
                base = name if name == "neptune" else "minfx.neptune_v2"
                parts = [importlib.import_module(f"{base}.{part}") for part in PARTS]
        except ImportError as problem:
            text = f"cannot import {name} ({problem}): pip install '{INSTALL[name]}'"
            raise Off(text) from problem
        for part, names in zip(parts, PARTS.values(), strict=True):
            check(part, names, name)
        gc.freeze()  # half of a large batch's time went into looking through all it has imported
        clients, tries, operation, signals, errors = parts
        not_found = errors.FetchAttributeNotFoundException
        return cls(root, clients, tries, operation, signals, not_found)

    @contextmanager
    def patience(self) -> Iterator[None]:
        """A file goes in many parts, and one that fails should not cost the others."""
        before = self.tries.retries_timeout
        self.tries.retries_timeout = before * UPLOAD_PATIENCE
        try:
            yield
        finally:
            self.tries.retries_timeout = before

    def start(self, info: RunInfo, folder: Path, **arguments: Any) -> Any:
        """`init_run` with all that it captures by default switched off, and no hooks left."""
        for found in vars(self.clients).values():
            # Else a new connection would go on with what the server has ceased to accept.
            getattr(found, "cache_clear", int)()
        hook = sys.excepthook
        with environment({"NEPTUNE_DATA_DIRECTORY": str(folder.absolute())}):
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
                **arguments,
            )
        sys.excepthook = hook
        # At exit the package would wait without a limit; whoever wants a clean end calls `stop`.
        atexit.unregister(getattr(run, "_shutdown_hook", print))
        return run


#: where what is used of the package comes from; `rankgate[neptune]` names versions that were tried
INSTALL = {"neptune": "rankgate[neptune]", "minfx": "minfx>=0.7.4,<0.8"}
#: modules and names in them that the package's documentation does not promise
PARTS: dict[str, tuple[str, ...]] = {
    "internal.backends.hosted_client": (),
    "common.backends.utils": ("retries_timeout",),
    "internal.operation": (
        "AssignBool", "AssignFloat", "AssignString", "DeleteAttribute", "ImageValue", "LogFloats",
        "LogImages", "LogSeriesValue", "LogStrings", "UploadFile", "UploadFileContent",
    ),
    "internal.websockets.websocket_signals_background_job": ("process_killer",),
    "exceptions": ("FetchAttributeNotFoundException",),
}  # fmt: skip
RUN = ("_backend", "_id", "_op_processor", "container_type")
BACKEND = (
    "execute_operations", "get_attributes", "get_float_series_values", "get_image_series_values",
    "get_string_series_values",
)  # fmt: skip


def check(part: Any, names: Sequence[str], package: str) -> None:
    """Raises Off where a version of the package lacks what is used of it."""
    missing = [name for name in names if not hasattr(part, name)]
    if missing:
        where = getattr(part, "__name__", type(part).__name__)
        raise Off(
            f"this version of {package} is not one that rankgate knows ({where} has no "
            f"{', '.join(missing)}): pip install '{INSTALL[package]}'"
        )


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


class Fields:
    """The type of the field at each path. A path is a field or a folder of fields, never both."""

    def __init__(self, types: Mapping[str, str]) -> None:
        self._types: dict[str, str] = {}
        self._folders: set[str] = set()
        for path, type_ in types.items():
            self[path] = type_

    def __setitem__(self, path: str, type_: str) -> None:
        self._types[path] = type_
        self._folders.update(above(path))

    def __getitem__(self, path: str) -> str | None:
        """The field's type; what stands in its way; or None where one can be made."""
        found = self._types.get(path)
        if found is None and path in self._folders:
            return "folder"
        if found is None and any(folder in self._types for folder in above(path)):
            return "below a field"
        return found


def above(path: str) -> list[str]:
    """`a` and `a/b` of `a/b/c`."""
    parts = path.split("/")
    return ["/".join(parts[:n]) for n in range(1, len(parts))]


class Scribe:
    """Writes become the package's operations; what has a type of its own already is skipped."""

    def __init__(self, operation: Any, fields: Fields, keep: Callable[[Media], Any]) -> None:
        self._operation = operation
        self._fields = fields
        self._keep = keep  #: says where the bytes of a file will be found when they are sent
        self._series: dict[str, Any] = {}  #: of the request being made
        self._request: list[Any] = []
        self._bytes = 0
        self.uploads: list[Any] = []  #: of files; whole after the last request

    def requests(self, writes: Sequence[Write], sent: Sent) -> Iterator[list[Any]]:
        """Lists of operations, each for one request; in each a series has one operation. The
        files stand apart: each takes requests of its own."""
        for write in writes:
            if not self._add(write):
                sent.delivered -= write.items
                sent.skip(CONFLICT, write.items)
            if self._bytes > REQUEST_BYTES:
                yield self._take()
        if self._request:
            yield self._take()

    def _take(self) -> list[Any]:
        taken, self._request, self._series, self._bytes = self._request, [], {}, 0
        return taken

    def _add(self, write: Write) -> bool:
        if isinstance(write, WriteAtoms):
            fits = [self._assign(path, value) for path, value in write.values.items()]
            return all(fits)
        if isinstance(write, WriteFile | WriteWhole):
            return self._upload(write)
        kind: Kind = "floats"
        if isinstance(write, WriteLines):
            kind = "lines"
        elif isinstance(write, WriteImage):
            kind = "images"
        if not self._has_type(write.path, SERIES[kind]):
            return False
        if isinstance(write, WriteImage):
            self._log("LogImages", write.path, [self._image(write)], [write.step], [write.seconds])
        else:
            name = "LogFloats" if kind == "floats" else "LogStrings"
            self._log(name, write.path, write.values, write.steps, write.seconds)
        return True

    def _has_type(self, path: str, wanted: str) -> bool:
        found = self._fields[path]
        if found is None:
            self._fields[path] = wanted
        return found in (None, wanted)

    def _log(
        self, name: str, path: str, values: list[Any], steps: list[int], seconds: list[float]
    ) -> None:
        point = self._operation.LogSeriesValue
        points = [point(*each) for each in zip(values, steps, seconds, strict=True)]
        if path in self._series:
            self._series[path].values.extend(points)
        else:
            made = getattr(self._operation, name)(path.split("/"), points)
            self._series[path] = made
            self._request.append(made)
        self._bytes += POINT_BYTES * len(points)
        if name == "LogStrings":
            self._bytes += sum(map(len, values))

    def _image(self, write: WriteImage) -> Any:
        data = base64.b64encode(write.media.path.read_bytes()).decode()
        self._bytes += len(data)
        return self._operation.ImageValue(data=data, name=None, description=None)

    def _upload(self, write: WriteFile | WriteWhole) -> bool:
        if not self._has_type(write.path, "file"):
            return False
        path = write.path.split("/")
        if isinstance(write, WriteWhole):
            data = base64.b64encode(write.text.encode()).decode()
            made = self._operation.UploadFileContent(path, "txt", data)
        else:
            made = self._operation.UploadFile(
                path, extension(write.media), **self._keep(write.media)
            )
        self.uploads.append(made)
        return True

    def _assign(self, path: str, value: Atom) -> bool:
        """A single value that changes its type replaces the field."""
        wanted, found = ATOM_TYPES[type(value)], self._fields[path]
        parts = path.split("/")
        if found in SINGLE_VALUES - {wanted}:
            self._request.append(self._operation.DeleteAttribute(parts))
        elif found not in (None, wanted):
            return False
        name = {"float": "AssignFloat", "bool": "AssignBool", "string": "AssignString"}[wanted]
        self._request.append(getattr(self._operation, name)(parts, value))
        self._bytes += POINT_BYTES + (len(value) if isinstance(value, str) else 0)
        self._fields[path] = wanted
        return True


class StopBell:
    """Takes the place of what ends this process and all its children when somebody stops the run
    in the app: the training decides for itself, and what is logged until then still arrives."""

    def __init__(self) -> None:
        self.rung = False

    def kill_me(self) -> None:
        """The package's name for it."""
        self.rung = True


class OnlineRun:
    """One run on the server. Every method may raise what the package raises."""

    def __init__(self, package: Package, info: RunInfo, project: str, folder: Path) -> None:
        self.bell = package.signals.process_killer = StopBell()
        self._folder = Path(tempfile.mkdtemp(prefix="neptune-", dir=folder))
        # In this mode the package has no queue: what `init_run` itself writes is answered too.
        self._run = package.start(info, self._folder, project=project, mode="sync")
        self._package = package
        self.fields = Fields({})
        try:
            check(self._run, RUN, package.root.__name__)
            self._backend = only_backend(self._run._backend)
            check(self._backend, BACKEND, package.root.__name__)
            self._where = (self._run._id, self._run.container_type)
            self.refresh()
        except Exception:  # its threads would go on beside those of the next connection
            self.stop()
            raise

    def refresh(self) -> None:
        """Read what fields there are: after a lost answer it is not known."""
        found = self._backend.get_attributes(*self._where)
        self.fields = Fields({field.path: field.type.value for field in found})

    def write(self, writes: Sequence[Write], sent: Sent) -> list[str]:
        """Send all, request by request; what the server refused of it, in its words."""
        refused: list[str] = []
        scribe = Scribe(self._package.operation, self.fields, keep_in_place)
        for request in scribe.requests(writes, sent):
            refused += self._execute(request)
        with self._package.patience():
            return refused + self._execute(scribe.uploads)

    def _execute(self, operations: list[Any]) -> list[str]:
        storage = self._run._op_processor.operation_storage
        refused: list[str] = []
        while operations:
            done, errors = self._backend.execute_operations(*self._where, operations, storage)
            refused += [one_line(error) for error in errors]
            operations = operations[done:]
        return refused

    def read(self, kind: Kind, path: str, after: float) -> Tail:
        """What the server has of a series beyond a step."""
        if self.fields[path] != SERIES[kind]:
            return Tail()
        try:
            return self._read_images(path) if kind == "images" else self._read(kind, path, after)
        except self._package.not_found:
            return Tail()

    def _read_images(self, path: str) -> Tail:
        """Of an image series the server tells the number only."""
        found = self._backend.get_image_series_values(*self._where, path.split("/"), 0, 1)
        return Tail(count=found.totalItemCount)

    def _read(self, kind: Kind, path: str, after: float) -> Tail:
        """From the end backwards, as the package itself can read only from the beginning."""
        backend = self._backend
        fetch = (
            backend.get_float_series_values
            if kind == "floats"
            else backend.get_string_series_values
        )
        parts = path.split("/")
        count = fetch(*self._where, parts, 0, 1).totalItemCount
        points: list[Point] = []
        end = count
        for _ in range(MAX_PAGES):
            begin = max(0, end - PAGE_POINTS)
            page = fetch(*self._where, parts, begin, end - begin).values if end else []
            fresh = [(p.step, p.value, int(p.timestampMillis)) for p in page if p.step > after]
            points[:0] = fresh
            end = begin
            if end == 0 or len(fresh) < len(page):
                return Tail(points, True, count)
        return Tail(points, False, count)

    def stop(self) -> None:
        """End its threads; what it cannot end is said in the log."""
        try:
            self._run.stop(seconds=STOP_SECONDS)
        except Exception as problem:
            log.warning("neptune: cannot stop: %s", one_line(problem))
        shutil.rmtree(self._folder, ignore_errors=True)


def only_backend(backend: Any) -> Any:
    """`minfx` takes several tokens, for several servers at once. Its answer says then that one of
    them has it, and no longer which points were refused."""
    inner = getattr(backend, "iterate_backends", None)
    if inner is None:
        return backend
    found = list(inner())
    if len(found) != 1:
        raise Off("NEPTUNE_API_TOKEN holds several tokens: a sink carries a run to one server")
    return found[0]


def keep_in_place(media: Media) -> dict[str, Any]:
    """The gateway's own file: named by its content, it neither changes nor goes."""
    return {"file_path": str(media.path.absolute())}


def in_pieces(operation: Any) -> Iterator[Any]:
    """`neptune sync` makes a request of up to 1,000 operations, however large they are."""
    values = getattr(operation, "values", None)
    if not isinstance(values, list):
        yield operation
        return
    for start in range(0, len(values), OFFLINE_POINTS):
        yield type(operation)(operation.path, values[start : start + OFFLINE_POINTS])


class OfflineRun:
    """One run in a folder, as the package's own command `neptune sync` reads it."""

    def __init__(self, package: Package, info: RunInfo, folder: Path) -> None:
        self._package = package
        self._run = package.start(info, folder, mode="offline")
        self._files = 0
        self.fields = Fields({})

    def write(self, writes: Sequence[Write], sent: Sent) -> None:
        """On the disk when it returns; files are copied beside."""
        scribe = Scribe(self._package.operation, self.fields, self._keep_copy)
        for request in (*scribe.requests(writes, sent), scribe.uploads):
            for operation in request:
                for piece in in_pieces(operation):
                    self._run._op_processor.enqueue_operation(piece, wait=False)
        self._run.wait(disk_only=True)

    def _keep_copy(self, media: Media) -> dict[str, Any]:
        self._files += 1
        name = f"{self._files:06}.{extension(media) or 'bin'}"
        shutil.copyfile(media.path, self._run._op_processor.operation_storage.upload_path / name)
        return {"tmp_file_name": name}

    def stop(self) -> None:
        self._run.stop()
