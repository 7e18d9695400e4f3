"""Carries a run to a Neptune 2.x server through the `neptune` package, or its fork `minfx`.

Each `send` returns once the server has answered for all of it; what it refused is read back, told
apart and sent anew. `neptune_run.py` is how the package is used.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec

from gateway.sinks.base import (
    RECEIPTS,
    Item,
    Memory,
    Off,
    Refused,
    RunInfo,
    Sent,
    Unavailable,
)
from gateway.sinks.neptune_plan import (
    Kind,
    Planner,
    Tail,
    Write,
    drawable,
    first_fields,
    last_fields,
)
from gateway.sinks.neptune_run import OnlineRun, Package, one_line
from gateway.sinks.retry import asked_seconds

LIMIT_PAUSE_SECONDS = 60.0  #: how long to wait when a workspace's limit is reached
TRIES = 2  #: of a batch that is refused, the second after reading back

#: Answers to `init_run` that no later try will change.
HOPELESS: Set[str] = {
    "NeptuneInvalidApiTokenException",
    "NeptuneMissingApiTokenException",
    "NeptuneMissingProjectNameException",
    "NeptuneClientUpgradeRequiredError",
    "NeptuneLegacyProjectException",
    "ProjectNotFound",
    "ProjectNotFoundWithSuggestions",
    "Unauthorized",
}

#: Answers that are about the connection or the run, and not about what was sent.
LOST_CONNECTION = {
    "Unauthorized",
    "Forbidden",
    "NeptuneInvalidApiTokenException",
    "ContainerUUIDNotFound",
    "MetadataContainerNotFound",
    "ObjectNotFound",
}
LIMITS = {"NeptuneLimitExceedException", "NeptuneStorageLimitException"}
#: Answers that may be about what was sent: believed when they come twice.
REFUSALS = {"ClientHttpError", "HTTPClientError", "NeptuneFieldCountLimitExceedException"}

log = logging.getLogger(__name__)


class NeptuneConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`[sinks.neptune]`; the API token comes from NEPTUNE_API_TOKEN only."""

    #: `offline`: an export that `neptune sync` can send later, see `neptune_export.py`
    mode: Literal["online", "offline"] = "online"
    package: Literal["neptune", "minfx"] = "neptune"
    #: `workspace/project`; left out = NEPTUNE_PROJECT
    project: str | None = None


class NeptuneSink:
    """One run in one Neptune run, by one handle, in batches that are confirmed one by one."""

    def __init__(self, config: NeptuneConfig, folder: Path | None = None) -> None:
        self.config = config
        self.stop_asked = ""
        self._folder = folder  #: for the package's own files, which are ours to delete
        self._package: Package | None = None
        self._info: RunInfo | None = None
        self._run: OnlineRun | None = None
        self._planner: Planner | None = None
        self._hopeless = HOPELESS  #: nothing is, once we were connected
        self._unsure = False  #: something may have arrived that was not confirmed

    def open(self, run: RunInfo, memory: Memory) -> None:
        if self.config.mode == "offline":
            raise Off("mode is offline: nothing is sent, `rankgate replay --to neptune` exports")
        self._info = run
        if memory.get(RECEIPTS):  # a token that was good may become so again, as after an outage
            self._hopeless = HOPELESS - {"Unauthorized"}
        self._planner = Planner(memory, self._read, drawable, run)
        self._package = Package.load(self.config.package)
        self._ready()

    def send(self, batch: Sequence[Item], again: bool) -> Sent:
        self._look_for_stop()
        unsure = again or self._unsure
        refusals: list[str] = []
        for _ in range(TRIES if batch else 0):
            run, planner = self._ready(), self._planner
            assert planner is not None
            with self._judged():
                if unsure:
                    run.refresh()
                writes, sent = planner.plan(batch, unsure)
            self._unsure = unsure = True
            refusals = self._write(run, writes, sent)
            if not refusals:
                planner.commit()
                self._unsure = False
                return sent
        if refusals:
            raise Refused("; ".join(refusals[:3]))
        return Sent()

    def close(self, state: str, reason: str) -> Sent:
        if self._info is None:
            return Sent()
        refusals = self._write(self._ready(), [last_fields(state, reason)], Sent())
        if refusals:
            log.warning("neptune: the run's state: %s", "; ".join(refusals))
        self._drop()
        self._info = None
        return Sent()

    def _look_for_stop(self) -> None:
        """The package has ended its run by then, so a new handle goes on with it."""
        if self._run is not None and self._run.bell.rung:
            self.stop_asked = "stopped in Neptune"
            self._drop()

    def _ready(self) -> OnlineRun:
        if self._run is None:
            assert self._planner is not None and self._info is not None, "open comes first"
            self._run = self._connect(self._info)
            self._planner.forget()
            self._write(self._run, [first_fields(self._info)], Sent())
        return self._run

    def _connect(self, info: RunInfo) -> OnlineRun:
        project = self.config.project or os.environ.get("NEPTUNE_PROJECT")
        if not os.environ.get("NEPTUNE_API_TOKEN"):
            raise Off("no API token: set NEPTUNE_API_TOKEN")
        if not project:
            raise Off("no project: set NEPTUNE_PROJECT or `project` in [sinks.neptune]")
        assert self._package is not None
        try:
            run = OnlineRun(self._package, info, project, self._own_folder())
        except Off:
            raise
        except Exception as problem:
            if type(problem).__name__ in self._hopeless:
                raise Off(one_line(problem)) from problem
            raise unavailable(problem) from problem
        self._hopeless = frozenset()
        return run

    def _own_folder(self) -> Path:
        """Empty of what an earlier life left."""
        folder = self._folder or Path(tempfile.gettempdir())
        folder.mkdir(parents=True, exist_ok=True)
        if self._folder is not None:
            for left in folder.glob("neptune-*"):
                shutil.rmtree(left, ignore_errors=True)
        return folder

    def _write(self, run: OnlineRun, writes: Sequence[Write], sent: Sent) -> list[str]:
        """What the server refused; a whole request, too, by an answer that names no point of it."""
        with self._judged():
            try:
                return run.write(writes, sent)
            except Exception as problem:
                if type(problem).__name__ not in REFUSALS:
                    raise
                return [one_line(problem)]

    @contextmanager
    def _judged(self) -> Iterator[None]:
        """What the package raises becomes Unavailable; where need be with a new connection."""
        try:
            yield
        except Exception as problem:
            name = type(problem).__name__
            if name in LIMITS:
                raise Unavailable(one_line(problem), LIMIT_PAUSE_SECONDS) from problem
            if name in LOST_CONNECTION:
                self._drop()
            raise unavailable(problem) from problem

    def _drop(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.stop()

    def _read(self, kind: Kind, path: str, after: float) -> Tail:
        assert self._run is not None
        return self._run.read(kind, path, after)


def unavailable(problem: Exception) -> Unavailable:
    """With the time the server asked to be left alone for: the package itself reads only the
    first digit of it."""
    answer = getattr(problem.__cause__, "response", None)
    headers = getattr(answer, "headers", None) or {}
    asked = headers.get("Retry-After") or headers.get("retry-after")
    return Unavailable(one_line(problem), asked_seconds(asked, time.time()) if asked else None)
