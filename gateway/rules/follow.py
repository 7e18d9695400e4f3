"""The rules' process: follows the journals of a data directory and keeps each run's series.db."""

from __future__ import annotations

import errno
import logging
import os
import signal
import time
from pathlib import Path
from zlib import crc32

import apsw

from rank_client.wire.disk import OsDisk, is_at
from rank_client.wire.records import BadRecord

from .. import parent
from ..journal.reader import Entry, JournalReader
from ..journal.writer import JournalDamaged
from ..series.writer import Series

POLL_SECONDS = 0.02
LOOK_SECONDS = 0.5  #: how often new runs are looked for
FETCH_BYTES = 8 << 20
FULL_RETRY_SECONDS = 5.0  #: while the disk is full
IDLE_SECONDS = 30.0  #: a run without news for so long is closed; it is opened again on news

log = logging.getLogger("rankgate.rules")


class Follower:
    """One run: its journal's reader and its series' writer."""

    def __init__(self, run_dir: Path) -> None:
        """Raises FileNotFoundError while there is no journal to follow."""
        self.run_dir = run_dir
        reader = JournalReader(OsDisk(), str(run_dir / "journal"))
        journal = reader.uuid()
        if journal is None:
            raise FileNotFoundError(run_dir / "journal")
        self._journal = journal
        self.series = Series(run_dir / "series.db", journal)
        self._follow(after=max(0, self.series.cursor - 1))
        self._verified = self.series.cursor == 0
        self.news_at = time.monotonic()

    def _follow(self, after: int) -> None:
        self.reader = JournalReader(OsDisk(), str(self.run_dir / "journal"), after)
        self._told = 0

    def step(self) -> bool:
        """Project what was committed since; True when there was something."""
        entries = self.reader.read(FETCH_BYTES)
        if news := self.reader.damage[self._told :]:
            self._told = len(self.reader.damage)
            self.series.note_damage(news)
            for text in news:
                log.error("run %s: %s; the good entries are kept", self.run_dir.name, text)
        if entries and not self._verified:
            entries = self._verify(entries)
        if not entries:
            return False
        self.series.apply(self.series.projection.take(entries))
        self.news_at = time.monotonic()
        return True

    def _verify(self, entries: list[Entry]) -> list[Entry]:
        """What follows the series' last entry, if that is still what the journal has there. A
        journal put back to an older state goes on under its name with other entries."""
        self._verified = True
        first, cursor = entries[0], self.series.cursor
        if first.seq != cursor:
            return entries  # not readable any more
        if crc32(first.body) == self.series.tail:
            return entries[1:]
        name = self.run_dir.name
        log.warning("the journal of run %s was put back; its series is made anew", name)
        self.series.close()
        self.series = Series(self.run_dir / "series.db", self._journal, anew=True)
        self._follow(after=0)
        return self.reader.read(FETCH_BYTES)

    def replaced(self) -> bool:
        """Has somebody deleted the journal, or put another in its place?"""
        fd, path = self.reader.file
        return fd >= 0 and not is_at(fd, path)

    def close(self) -> None:
        self.reader.close()
        self.series.close()


def _no_room(error: Exception) -> bool:
    """SQLite says it in two ways: of its log, and of the memory that readers share."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOSPC
    return isinstance(error, apsw.FullError | apsw.IOError)


def _mtime(run_dir: Path) -> int:
    """Changes whenever a journal grows or gets a new segment."""
    journal = run_dir / "journal"
    try:
        with os.scandir(journal) as segments:
            newest = max(segments, key=lambda e: e.name)
        return newest.stat().st_mtime_ns
    except (OSError, ValueError):
        return 0


class Rules:
    """All runs of a data directory."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._open: dict[str, Follower] = {}
        self._seen: dict[str, int] = {}
        self._later: dict[str, tuple[float, float]] = {}  # when to try again, after what pause

    def look(self) -> None:
        """Open the runs with news, close those without for long."""
        runs = self._root / "runs"
        names = os.listdir(runs) if runs.is_dir() else []
        for name in names:
            changed = _mtime(runs / name)
            if name not in self._open and changed and self._seen.get(name) != changed:
                self._seen[name] = changed
                self._begin(name, runs / name, changed)
        now = time.monotonic()
        for name, follower in list(self._open.items()):
            if follower.replaced():
                log.warning("the journal of run %s is another than before", name)
                self._end(name)
                self._seen.pop(name, None)
            elif now - follower.news_at > IDLE_SECONDS:
                self._seen[name] = _mtime(runs / name)
                if not self._step(name, follower):
                    self._end(name)

    def _begin(self, name: str, run_dir: Path, changed_ns: int) -> None:
        """Follow a run; one that was not written to lately is brought up to date and let go, so
        that a directory of many old runs does not cost a descriptor each."""
        now = time.monotonic()
        if now < self._later.get(name, (0.0, 0.0))[0]:
            del self._seen[name]
            return
        try:
            follower = self._open[name] = Follower(run_dir)
        except FileNotFoundError:
            del self._seen[name]
            return
        except (OSError, apsw.Error, JournalDamaged, BadRecord) as error:
            self._put_off(name, error)
            return
        if time.time_ns() - changed_ns > IDLE_SECONDS * 1e9:
            while self._step(name, follower):
                pass
            self._end(name)

    def _put_off(self, name: str, error: Exception) -> None:
        """One bad run must not stop the others: it is tried again, ever later."""
        longest = FULL_RETRY_SECONDS if _no_room(error) else 300.0
        pause = min(2 * self._later.get(name, (0.0, LOOK_SECONDS))[1], longest)
        self._later[name] = (time.monotonic() + pause, pause)
        self._seen.pop(name, None)
        log.error("run %s cannot be projected (%s); tried again in %.0f s", name, error, pause)

    def _end(self, name: str) -> None:
        follower = self._open.pop(name, None)
        if follower:
            follower.close()

    def _step(self, name: str, follower: Follower) -> bool:
        try:
            moved = follower.step()
        except (OSError, apsw.Error, JournalDamaged) as error:
            self._end(name)
            self._put_off(name, error)
            return False
        if moved:
            self._later.pop(name, None)
        return moved

    def step(self) -> bool:
        # Every one, each time: a busy run does not hold the others up.
        moved = [self._step(name, follower) for name, follower in list(self._open.items())]
        return any(moved)


def follow(root: Path) -> None:
    """Run until SIGTERM or until the parent is gone."""
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda s, _f: stopping.append(s))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    rules = Rules(root)
    look_at = 0.0
    while not stopping and not parent.gone():
        now = time.monotonic()
        if now >= look_at:
            look_at = now + LOOK_SECONDS
            rules.look()
        if not rules.step():
            time.sleep(POLL_SECONDS)


def rebuild(run_dir: Path) -> int:
    """Project everything a run's journal holds, now; the cursor it ends at."""
    follower = Follower(run_dir)
    try:
        while follower.step():
            pass
        return follower.series.cursor
    finally:
        follower.close()
