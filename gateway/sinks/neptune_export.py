"""Writes a run as the offline directory of the `neptune` package, which `neptune sync` can send.

Needs no server, no token and no project. The folder can be moved: uploaded files are inside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gateway.sinks.base import Item, Memory, Off, RunInfo, Sent
from gateway.sinks.neptune import Hand, NeptuneConfig, Package
from gateway.sinks.neptune_plan import Kind, Planner, Tail

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
        self._hand: Hand | None = None
        self._planner: Planner | None = None

    def open(self, run: RunInfo, memory: Memory) -> None:
        if self._hand is not None:
            return
        package = Package.load(self.config.package)
        if any((self.data / "offline").glob("*")):
            raise Off(f"there is an export already in {self.data}: choose an empty folder")
        self.data.mkdir(parents=True, exist_ok=True)
        self._hand = Hand(package, package.start(run, self.data, mode="offline"), keep_files=True)
        self._hand.begin(run)
        self._planner = Planner(memory, nothing_there, self._hand.drawable)

    def send(self, batch: Sequence[Item], again: bool) -> Sent:
        """Written to the disk; `again` needs no care, as steps that do not rise are refused."""
        assert self._hand is not None, "open comes first"
        assert self._planner is not None
        writes, sent = self._planner.plan(batch, unsure=False)
        self._hand.write(writes, sent)
        self._hand.run.wait(disk_only=True)
        self._planner.commit()
        return sent

    def close(self, state: str, reason: str) -> Sent:
        if self._hand is None:
            return Sent()
        self._hand.end(state, reason)
        self._hand.run.stop()
        self._hand = self._planner = None
        return Sent()


def nothing_there(_kind: Kind, _path: str, _after: float) -> Tail:
    """An export has no server to ask."""
    return Tail()
