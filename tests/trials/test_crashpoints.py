"""Crash points, small: nothing that was promised is lost; and each planted fault is found."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import gateway.journal.writer
import gateway.sinks.store
from gateway.ingest.drop import Drops
from gateway.ingest.media import Blob, Job
from gateway.journal.reader import JournalReader
from gateway.journal.writer import Journal
from gateway.rules.changes import Changes
from gateway.series.db import open_writer
from gateway.series.writer import Series
from rank_client.spool import Spool
from rank_client.wire.segments import SegmentLog

from .crashpoints import SHARES, CrashDisk, carry_out

SEED = 11
COMMITS = 40
EVERY = {"journal": 1, "spool": 2, "store": 2, "series": 8}  #: which points are looked at
Patch = Callable[[pytest.MonkeyPatch], None]


@pytest.mark.parametrize("name", SHARES)
def test_no_crash_breaks_a_promise(name: str) -> None:
    """Before every change of the disk, a kill and a loss of power leave what was promised."""
    points = carry_out(name, SEED, COMMITS, 0, EVERY[name])
    assert points.broken == [], f"seed {SEED}"
    assert points.counts["points"] > 10
    assert points.counts["crashes"] > 5 * points.counts["points"]
    assert name != "journal" or points.counts["drops finished"] > 0


def test_a_seed_gives_the_same_run_again() -> None:
    """Two runs of one seed cut at the same points and find the same number of states."""
    first, second = (carry_out("journal", SEED, 12, 0, 1) for _ in range(2))
    assert first.counts == second.counts
    assert first.storage.killed() == second.storage.killed()  # type: ignore[attr-defined]


def nothing(*_: object, **__: object) -> None:
    """In the place of what must not be left out."""


def _never_synced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Journal, "_sync", nothing)


def _names_not_synced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gateway.journal.writer, "sync_names", nothing)


def _hole_is_kept(patch: pytest.MonkeyPatch) -> None:
    def tail_only(found, size):  # type: ignore[no-untyped-def]
        return min((start for start, end in found.damage if end == size), default=size)

    patch.setattr(gateway.journal.writer, "_sound_bytes", tail_only)


def _reads_beyond_the_mark(patch: pytest.MonkeyPatch) -> None:
    read_here = JournalReader._read_here
    patch.setattr(
        JournalReader, "_read_here", lambda self, size, sealed: read_here(self, size, True)
    )


def _short_write_stays(patch: pytest.MonkeyPatch) -> None:
    def append(self: SegmentLog, data: bytes) -> None:
        self.size += self._write(self.fd, data)

    patch.setattr(SegmentLog, "append", append)


def _file_not_synced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Blob, "_sync", nothing)


def _file_name_not_synced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("gateway.ingest.media.sync_names", nothing)


def _file_removed_before_its_entry(patch: pytest.MonkeyPatch) -> None:
    drop = Drops._drop

    def wrong(self: Drops, now_ns: int, blob: Blob, reason: str) -> None:
        blob.drop()
        drop(self, now_ns, blob, reason)

    patch.setattr(Drops, "_drop", wrong)


def _removal_not_synced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Blob, "drop", lambda self: self.disk.unlink(str(self.path)))


def _file_removed_without_its_entry(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: Drops, now_ns: int, blob: Blob, reason: str) -> None:
        self._work(Job(b"", blob, "drop"))

    patch.setattr(Drops, "_drop", wrong)


def _spool_not_synced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Spool, "sync", nothing)


def _spool_trimmed_too_far(patch: pytest.MonkeyPatch) -> None:
    trim = Spool.trim
    patch.setattr(Spool, "trim", lambda self, _: trim(self, self.last))


def _receipts_not_synced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        gateway.sinks.store, "open_writer", lambda path, synchronous: open_writer(path, 1)
    )


def _cursor_before_its_rows(patch: pytest.MonkeyPatch) -> None:
    def apply(self: Series, changes: Changes) -> None:
        with self.db:
            self._write_names(changes)
            self._write_about(changes)
        with self.db:
            for keyset, rows in changes.rows:
                self._append(keyset, rows)
        self.cursor = changes.cursor

    patch.setattr(Series, "apply", apply)


@pytest.mark.parametrize(
    ("name", "plant"),
    [
        ("journal", _never_synced),
        ("journal", _names_not_synced),
        ("journal", _hole_is_kept),
        ("journal", _reads_beyond_the_mark),
        ("journal", _short_write_stays),
        ("journal", _file_not_synced),
        ("journal", _file_name_not_synced),
        ("journal", _file_removed_before_its_entry),
        ("journal", _file_removed_without_its_entry),
        ("journal", _removal_not_synced),
        ("spool", _short_write_stays),
        ("spool", _spool_not_synced),
        ("spool", _spool_trimmed_too_far),
        ("store", _receipts_not_synced),
        ("series", _cursor_before_its_rows),
    ],
)
def test_a_planted_fault_is_found(name: str, plant: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the recovery rests on, without it a promise is broken."""
    plant(monkeypatch)
    monkeypatch.setattr("tests.trials.crashpoints.SHOWN", 1)
    assert carry_out(name, SEED, 80, 0, EVERY[name]).broken, f"seed {SEED}"


def test_storage_is_a_disk() -> None:
    """What the trial stands in for is the whole of what the product asks of storage."""
    from rank_client.wire.disk import Disk

    wanted = {n for n in vars(Disk) if not n.startswith("_")}
    assert wanted <= set(dir(CrashDisk))
