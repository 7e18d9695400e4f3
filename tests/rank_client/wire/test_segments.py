"""Segments: only whole records, whatever the disk does; every segment is readable on its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rank_client.wire.disk import OsDisk
from rank_client.wire.records import HEADER_BYTES, Kind, pack, walk
from rank_client.wire.segments import (
    SPOOL_KINDS,
    SegmentLog,
    read_whole,
    scan_segment,
    segment_indexes,
    segment_path,
)
from tests.rank_client.wire.disks import MemoryDisk

HEAD = pack(Kind.HEAD, 1, b"head")


def started(disk: MemoryDisk, segment_bytes: int = 1 << 20) -> SegmentLog:
    log = SegmentLog(disk, "d", lambda: [HEAD], segment_bytes)
    log.start(1)
    return log


def text(n: int, size: int = 10) -> bytes:
    return pack(Kind.TEXT, n, bytes(size))


def test_a_segment_opens_with_its_head_and_holds_what_was_appended() -> None:
    """The records `head` gives come first, then the appended ones; `size` is the file's size."""
    disk = MemoryDisk()
    log = started(disk)
    log.append(text(1))
    log.append(text(2))
    buf, found = scan_segment(disk, "d", 1, SPOOL_KINDS)
    assert [h.kind for h in found.heads] == [Kind.HEAD, Kind.TEXT, Kind.TEXT]
    assert not found.damage
    assert log.size == len(buf)


@given(st.integers(0, 300), st.lists(st.integers(0, 100), min_size=1, max_size=6))
def test_a_full_disk_leaves_whole_records(room: int, sizes: list[int]) -> None:
    """Wherever a disk becomes full, what stays in the file is the records whose append returned."""
    disk = MemoryDisk()
    log = started(disk)
    disk.room = room
    kept = []
    for n, size in enumerate(sizes, 1):
        try:
            log.append(text(n, size))
            kept.append(n)
        except OSError:
            pass
    buf, found = scan_segment(disk, "d", 1, SPOOL_KINDS)
    assert [h.seq for h in found.heads[1:]] == kept
    assert not found.damage
    assert log.size == len(buf)


def test_appending_goes_on_after_space_returns() -> None:
    """A short write is undone, and the same record can be appended when there is room again."""
    disk = MemoryDisk()
    log = started(disk)
    disk.room = HEADER_BYTES
    with pytest.raises(OSError, match="space"):
        log.append(text(1))
    disk.room = 1000
    log.append(text(1))
    assert [h.seq for h in walk(disk.files["d/00000001.log"])] == [1, 1]


@pytest.mark.parametrize("room", [0, 1, len(HEAD) - 1])
def test_a_segment_that_cannot_be_started_leaves_nothing(room: int) -> None:
    """Without room for the head there is no new file, no open fd, and the old segment goes on."""
    disk = MemoryDisk()
    log = started(disk)
    descriptors = disk.descriptors
    disk.room = room
    with pytest.raises(OSError, match="space"):
        log.start(2)
    assert segment_indexes(disk, "d") == [1]
    assert disk.descriptors == descriptors
    disk.room = 1000
    log.append(text(1))
    assert len(scan_segment(disk, "d", 1, SPOOL_KINDS)[1].heads) == 2


def test_starting_the_next_segment_gives_back_the_one_before() -> None:
    """`start` returns the fd of the segment before, for its owner to sync and close when it may."""
    disk = MemoryDisk()
    log = SegmentLog(disk, "d", lambda: [HEAD])
    assert log.start(1) == -1
    first = log.fd
    assert log.start(2) == first
    assert log.fd != first
    assert log.index == 2


def test_a_log_is_full_at_its_segment_size() -> None:
    """`full` turns true when the segment has reached its size."""
    log = started(MemoryDisk(), segment_bytes=len(HEAD) + 40)
    assert not log.full
    log.append(text(1, 16))
    assert log.full


@given(st.integers(0, 200))
def test_resume_cuts_what_is_not_good(torn: int) -> None:
    """A log resumed at the last good byte goes on from there, and what lay after it is gone."""
    disk = MemoryDisk()
    log = started(disk)
    log.append(text(1))
    good = log.size
    disk.files["d/00000001.log"] += bytes(torn)
    again = SegmentLog(disk, "d", lambda: [HEAD])
    again.resume(1, good, sure=0)
    again.append(text(2))
    found = scan_segment(disk, "d", 1, SPOOL_KINDS)[1]
    assert [h.seq for h in found.heads] == [1, 1, 2]
    assert not found.damage


def test_indexes_ignore_other_files(tmp_path: Path) -> None:
    """Only files named like segments count, in numeric order; a missing directory has none."""
    for name in ("00000010.log", "00000002.log", "lock", "x.log", "00000003.part"):
        (tmp_path / name).touch()
    assert segment_indexes(OsDisk(), str(tmp_path)) == [2, 10]
    assert segment_indexes(OsDisk(), str(tmp_path / "none")) == []


def test_the_real_disk_keeps_files_private(tmp_path: Path) -> None:
    """Segments are 0600 in directories of 0700, whatever the umask, and never follow a link."""
    disk, directory = OsDisk(), tmp_path / "a" / "b"
    before = os.umask(0)
    try:
        disk.make_dir(str(directory))
        log = SegmentLog(disk, str(directory), lambda: [HEAD])
        log.start(1)
    finally:
        os.umask(before)
    path = Path(segment_path(str(directory), 1))
    assert path.stat().st_mode & 0o777 == 0o600
    assert directory.stat().st_mode & 0o777 == 0o700
    log.append(text(1))
    log.sync()
    log.close()
    assert read_whole(disk, str(path)) == HEAD + text(1)
    Path(segment_path(str(directory), 2)).symlink_to(tmp_path / "elsewhere")
    log.start(2)
    assert not Path(segment_path(str(directory), 2)).is_symlink()
    assert not (tmp_path / "elsewhere").exists()
