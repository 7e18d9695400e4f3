"""Writes a run as the offline directory of the `neptune` package, which `neptune sync` can send.

Needs no server, no token and no project. The folder can be moved: uploaded files are inside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gateway.sinks.base import Item, Memory, Off, RunInfo, Sent
from gateway.sinks.neptune import NeptuneConfig
from gateway.sinks.neptune_plan import Kind, Planner, Tail, drawable, first_fields, last_fields
from gateway.sinks.neptune_run import OfflineRun, Package

DATA_FOLDER = ".neptune"  #: `neptune sync --path FOLDER` looks for this name in FOLDER


class NeptuneExport:
    """One run into one empty folder, whole once `close` has returned.

    An export that broke off cannot be taken up again: it is made anew, into another folder.
    """

    stop_asked = ""

    def __init__(self, config: NeptuneConfig, folder: Path) -> None:
        self.config = config
        named = folder.name == DATA_FOLDER
        self.data = folder if named else folder / DATA_FOLDER
        self._run: OfflineRun | None = None
        self._planner: Planner | None = None

    def open(self, run: RunInfo, memory: Memory) -> None:
        if self._run is not None:
            return
        package = Package.load(self.config.package)
        if any((self.data / "offline").glob("*")):
            raise Off(f"there is an export already in {self.data}: choose an empty folder")
        self.data.mkdir(parents=True, exist_ok=True)
        self._run = OfflineRun(package, run, self.data)
        self._run.write([first_fields(run)], Sent())
        self._planner = Planner(memory, nothing_there, drawable, run)

    def send(self, batch: Sequence[Item], again: bool) -> Sent:
        """Written to the disk; `again` needs no care, as steps that do not rise are refused."""
        assert self._run is not None, "open comes first"
        assert self._planner is not None
        writes, sent = self._planner.plan(batch, unsure=False)
        self._run.write(writes, sent)
        self._planner.commit()
        return sent

    def close(self, state: str, reason: str) -> Sent:
        if self._run is None:
            return Sent()
        self._run.write([last_fields(state, reason)], Sent())
        self._run.stop()
        self._run = self._planner = None
        return Sent()


def nothing_there(_kind: Kind, _path: str, _after: float) -> Tail:
    """An export has no server to ask."""
    return Tail()
