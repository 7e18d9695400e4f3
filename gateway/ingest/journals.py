"""The journals of a data directory that are open for writing."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from rank_client.wire.disk import Disk, OsDisk
from rank_client.wire.records import Kind

from ..journal.writer import Journal
from ..rules.gate import Gate

FULL_RETRY_SECONDS = 2.0
RECENT_SECONDS = 86400.0
REST_SECONDS = 60.0

log = logging.getLogger("rankgate.ingest")


class RunStore:
    """The open journals, by run id."""

    def __init__(self, root: Path, disk: Disk | None = None) -> None:
        self.root = root
        self.open: dict[str, Journal] = {}
        self.ends: dict[str, int] = {}  #: last entry of the journals that were closed
        self._needed: dict[str, float] = {}
        self._failed: dict[str, tuple[float, OSError]] = {}
        self.disk: Disk = disk or OsDisk()

    def directory(self, run: str) -> Path:
        return self.root / "runs" / run

    def journal(self, run: str) -> Journal:
        """Raises JournalDamaged, OSError."""
        found = self.open.get(run)
        if found is None:
            failed = self._failed.get(run)
            if failed and time.monotonic() < failed[0]:
                raise failed[1]  # every rank asks, and finding out reads a whole segment
            try:
                found = self.open[run] = self._journal(run)
            except OSError as error:
                self._failed = {run: (time.monotonic() + FULL_RETRY_SECONDS, error)}
                raise
        return found

    def _journal(self, run: str) -> Journal:
        directory = self.directory(run)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = Journal(self.disk, str(directory / "journal"), os.urandom(16))
        if found.seq == 0:
            found.append_map(Kind.RULES, time.time_ns(), {"rules": Gate().as_maps()})
        for text in found.damage:
            log.error("journal of run %s is damaged: %s", run, text)
        return found

    def recent(self) -> list[str]:
        """Runs whose journal was written to in the last day."""
        since = time.time() - RECENT_SECONDS
        runs = self.root / "runs"
        journals = sorted(runs.glob("*/journal")) if runs.is_dir() else []
        return [j.parent.name for j in journals if _newest(j) > since]

    def drop(self, run: str) -> None:
        """Close a journal; it is read from disk again when next asked for."""
        self.open.pop(run).close()

    def rest(self, busy: set[str], now: float) -> None:
        """Close the journals that no stream has needed for a while: a run costs a descriptor."""
        for run, journal in list(self.open.items()):
            if run in busy or journal.pending_bytes:
                self._needed.pop(run, None)
            elif now - self._needed.setdefault(run, now) > REST_SECONDS:
                del self._needed[run]
                self.ends[run] = journal.durable_seq
                mark(journal)
                self.drop(run)


def mark(journal: Journal) -> None:
    """Say that all before is on disk, for readers."""
    try:
        journal.mark()
    except OSError as error:  # no room: the next commit brings it, or a restart
        log.debug("cannot write a commit mark: %s", error)


def _newest(journal: Path) -> float:
    with os.scandir(journal) as segments:
        return max((e.stat().st_mtime for e in segments), default=0.0)
