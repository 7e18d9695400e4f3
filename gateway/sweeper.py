"""A thread of the supervisor: ships what dead ranks of this node left behind, and keeps watch that
no journal has lost what was shipped before."""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from rank_client import orphans, sweep
from rank_client.meant import meant_for
from rank_client.spool_place import spool_root
from rank_client.tidy import tidy
from rank_client.wire.records import BadRecord, read_head, unpack_map

SWEEP_SECONDS = 2.0
TIDY_SECONDS = 60.0
SHIP_SECONDS = 60.0

log = logging.getLogger("rankgate")


class Sweeper(threading.Thread):
    """Ships orphans of this node, every few seconds, and again what a journal has lost; `busy`
    while there is one to ship."""

    def __init__(self, root: Path, address: str) -> None:
        super().__init__(name="rankgate-sweep", daemon=True)
        self.busy = True  # until the first look
        self._root = root
        self._address = address
        self._stop_event = threading.Event()
        self._later: dict[Path, tuple[float, float]] = {}  # when to try again, after what pause
        self._began = time.time()
        self._journals: dict[str, Stamp | None] = {}  # as they are at this look

    def run(self) -> None:
        spool = spool_root(os.environ)
        tidy_at = 0.0
        while not self._stop_event.is_set():
            try:
                self._look(self._find(spool))
                if time.monotonic() >= tidy_at:
                    tidy_at = time.monotonic() + TIDY_SECONDS
                    tidy(spool, time.time())
            except Exception:
                log.exception("sweeping the spool failed; it is tried again")
            self._stop_event.wait(SWEEP_SECONDS)

    def _find(self, spool: Path) -> list[orphans.Orphan]:
        """What was never shipped, and what our journal may have lost since."""
        self._journals.clear()
        found = orphans.find(spool, self._root, self._has_run)
        kept = orphans.kept(spool, self._doubted)
        return [*found, *(o for o in kept if self._meant_for_us(o))]

    def _look(self, found: list[orphans.Orphan]) -> None:
        """Ship what is due; what does not get through waits ever longer, and holds nobody up."""
        now = time.monotonic()
        due = [o for o in found if now >= self._later.get(o.directory, (0.0, 0.0))[0]]
        self.busy = bool(due)
        for orphan in due:
            shipped = sweep.ship(orphan, self._address, SHIP_SECONDS, stop=self._stop_event.is_set)
            self._tell(orphan, shipped)
            if shipped.over:
                self._later.pop(orphan.directory, None)
                if stamp := Stamp.of(self._root, orphan.run):
                    stamp.write(orphan.directory)
            else:
                pause = min(2 * self._later.get(orphan.directory, (0.0, 2.0))[1], 600.0)
                self._later[orphan.directory] = (time.monotonic() + pause, pause)
        self.busy = False

    @staticmethod
    def _tell(orphan: orphans.Orphan, shipped: sweep.Shipped) -> None:
        for text in shipped.damage:
            log.error("spool of a process of run %s: %s", orphan.run, text)
        if shipped.unreachable:
            log.error(
                "%d records of a process of run %s can never be read; to give them up and ship "
                "those behind them: rankgate sweep --accept-gap",
                shipped.unreachable,
                orphan.run,
            )
        if shipped.journal_changed:
            log.warning("the journal of run %s is not the one that had its records", orphan.run)
        if shipped.whole:
            log.info(
                "shipped %d records and %d files of a process of run %s that is gone",
                shipped.records,
                shipped.files,
                orphan.run,
            )

    def _has_run(self, run: str) -> bool:
        return (self._root / "runs" / run / "journal").is_dir()

    def _meant_for_us(self, orphan: orphans.Orphan) -> bool:
        return meant_for(orphan.hello, orphan.run, self._root, self._has_run)

    def _doubted(self, directory: Path, journal: bytes) -> bool:
        """May the journal of a run lack what this shipped stream's had? Not where there is none:
        whoever deletes a run means it."""
        run = directory.parent.name
        if run not in self._journals:
            self._journals[run] = Stamp.of(self._root, run)
        now = self._journals[run]
        if now is None:
            return False
        before = Stamp.read(directory)
        if before is None and now.uuid == journal and self._seen_ending(directory):
            now.write(directory)
            return False
        return before is None or journal != now.uuid or not now.follows(before)

    def _seen_ending(self, directory: Path) -> bool:
        """Was it acknowledged while this gateway was there, and so by this very journal?"""
        try:
            return (directory / "done").stat().st_mtime >= self._began
        except OSError:
            return False

    def stop(self) -> None:
        self._stop_event.set()


@dataclass(frozen=True)
class Stamp:
    """Which journal a run has, and how long it is: one restored from an older copy is another
    file, or shorter. Kept beside each shipped stream, so that few have to be asked for."""

    uuid: bytes
    inode: int
    size_bytes: int

    @classmethod
    def of(cls, root: Path, run: str) -> Stamp | None:
        directory = root / "runs" / run / "journal"
        try:
            with os.scandir(directory) as segments:
                size = sum(entry.stat().st_size for entry in segments)
            with (directory / "00000001.log").open("rb") as first:
                buf = first.read(4096)
                inode = os.fstat(first.fileno()).st_ino
            head = read_head(buf, 0, len(buf))
            uuid = unpack_map(buf[head.body]).get("uuid") if head else None
        except (OSError, BadRecord):
            return None
        return cls(uuid, inode, size) if isinstance(uuid, bytes) else None

    @classmethod
    def read(cls, directory: Path) -> Stamp | None:
        try:
            uuid, inode, size = (directory / "journal").read_text().split()
            return cls(bytes.fromhex(uuid), int(inode), int(size))
        except (OSError, ValueError):
            return None

    def write(self, directory: Path) -> None:
        text = f"{self.uuid.hex()} {self.inode} {self.size_bytes}\n"
        orphans.write_note(directory, "journal", text)

    def follows(self, before: Stamp) -> bool:
        same = (self.uuid, self.inode) == (before.uuid, before.inode)
        return same and self.size_bytes >= before.size_bytes
