"""The writing end: a commit is all or nothing, and a restart knows exactly what is stored."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.journal.writer import Journal, JournalDamaged
from rank_client.wire.records import Kind, unpack_map
from tests.gateway.journal.made import (
    UUID,
    A,
    B,
    RememberingDisk,
    batch,
    crashes,
    high_waters,
    make,
    open_stream,
    read_all,
    seqs,
)
from tests.rank_client.wire.disks import MemoryDisk


def test_entries_are_numbered_without_a_hole() -> None:
    """Entries of all kinds are 1, 2, 3 in the order they were appended."""
    disk = MemoryDisk()
    journal = make(disk)
    open_stream(journal, A)
    batch(journal, A)
    journal.append_map(Kind.TICK, 0, {"dup": 0})
    journal.commit()
    journal.mark()
    entries = read_all(disk)
    assert [(e.seq, e.kind) for e in entries] == [(1, Kind.OPEN), (2, Kind.BATCH), (3, Kind.TICK)]


def test_received_times_never_go_back() -> None:
    """An entry's time is that of the clock, or of the entry before when the clock went back."""
    disk = MemoryDisk()
    journal = make(disk)
    for now in (5, 9, 3, 10):
        batch(journal, A, now_ns=now)
        journal.append_map(Kind.TICK, now, {})
    journal.commit()
    journal.mark()
    times = [
        int.from_bytes(e.body[:8], "little") if e.kind == Kind.BATCH else unpack_map(e.body)["r"]
        for e in read_all(disk)
    ]
    assert times == [5, 5, 9, 9, 9, 9, 10, 10]
    again = make(disk.copy())
    assert again.received_ns == 10


def test_durable_follows_the_commit() -> None:
    """What is appended is durable only after commit has synced it."""
    disk = MemoryDisk()
    journal = make(disk)
    batch(journal, A)
    assert (journal.seq, journal.durable_seq) == (1, 0)
    disk.calls.clear()
    journal.commit()
    assert disk.calls == ["write", "sync"]
    assert journal.durable_seq == 1
    assert journal.pending_bytes == 0


def test_an_empty_commit_touches_nothing() -> None:
    """A commit without entries makes no call to the disk."""
    disk = MemoryDisk()
    journal = make(disk)
    disk.calls.clear()
    journal.commit()
    journal.mark()
    assert disk.calls == []


def test_a_commit_that_fails_changes_nothing() -> None:
    """Without room the commit raises and nothing of it can be read; the journal, opened again when
    there is room, goes on where it was, the streams' marks too."""
    disk = MemoryDisk()
    journal = make(disk)
    open_stream(journal, A)
    batch(journal, A, 3)
    journal.commit()
    disk.room = 30
    batch(journal, A, 2)
    journal.append_map(Kind.BYE, 0, {"stream": A, "final": 5})
    journal.streams[A].ended = True
    open_stream(journal, B)
    with pytest.raises(OSError, match="space"):
        journal.commit()
    assert journal.durable_seq == 2
    journal.close()
    disk.room = 10_000
    journal = make(disk)
    assert (journal.seq, journal.streams[A].high_water, journal.streams[A].ended) == (2, 3, False)
    assert B not in journal.streams
    batch(journal, A, 2)
    journal.commit()
    journal.mark()
    entries = read_all(disk)
    assert seqs(entries) == [1, 2, 3]
    assert high_waters(entries) == {A: 5}


def test_a_commit_that_failed_can_be_tried_again() -> None:
    """When nothing was dropped, the next commit writes all of it, once."""
    disk = MemoryDisk()
    journal = make(disk)
    batch(journal, A)
    disk.room = 10
    with pytest.raises(OSError, match="space"):
        journal.commit()
    disk.room = 10_000
    journal.commit()
    journal.mark()
    assert seqs(read_all(disk)) == [1]


def test_a_restart_recovers_what_is_stored() -> None:
    """A journal opened again has its name, its numbers, its streams' high water and ends."""
    disk = MemoryDisk()
    journal = make(disk, segment_bytes=300)
    open_stream(journal, A)
    open_stream(journal, B)
    for _ in range(10):
        batch(journal, A, 3, now_ns=77)
        journal.commit()
    journal.append_map(Kind.GAP, 0, {"stream": B, "from": 1, "to": 9})
    journal.streams[B].high_water = 9
    journal.append_map(Kind.BYE, 0, {"stream": A, "final": 30})
    journal.streams[A].ended = True
    journal.commit()
    assert len(disk.names("j")) > 2
    again = Journal(disk.copy(), "j", b"other name", 300)
    assert again.uuid == UUID
    assert (again.seq, again.durable_seq) == (journal.seq, journal.seq)
    assert again.received_ns == 77
    assert {s: (m.high_water, m.ended) for s, m in again.streams.items()} == {
        A: (30, True),
        B: (9, False),
    }
    assert not again.damage


def test_a_restarted_journal_goes_on() -> None:
    """After a restart the next entry has the next number, in the same segment."""
    disk = MemoryDisk()
    journal = make(disk)
    batch(journal, A)
    journal.commit()
    again = make(disk.copy())
    batch(again, A)
    again.commit()
    again.mark()
    assert seqs(read_all(again._disk)) == [1, 2]
    assert disk.names("j") == ["00000001.log"]


@settings(max_examples=40, deadline=None)
@given(
    commits=st.lists(
        st.lists(st.tuples(st.sampled_from([A, B]), st.integers(1, 3)), min_size=1, max_size=4),
        min_size=1,
        max_size=5,
    )
)
def test_a_torn_tail_never_loses_what_was_acknowledged(
    commits: list[list[tuple[bytes, int]]],
) -> None:
    """With the last commit cut at every byte, what is recovered is a prefix that holds everything
    acknowledged, the marks of streams agree with it, and the journal goes on without a hole."""
    disk = MemoryDisk()
    journal = make(disk)
    for commit in commits:
        acked, safe = journal.durable_seq, journal._log.size
        for stream, n in commit:
            batch(journal, stream, n)
        journal.commit()
    journal.mark()
    everything = read_all(disk)
    whole = bytes(disk.files["j/00000001.log"])
    for cut in range(safe, len(whole) + 1):
        torn = MemoryDisk()
        torn.files["j/00000001.log"] = bytearray(whole[:cut])
        again = make(torn)
        found = read_all(torn, polls=2)
        assert found == everything[: len(found)]
        assert acked <= len(found) == again.seq == again.durable_seq
        assert {s: m.high_water for s, m in again.streams.items()} == high_waters(found)
        batch(again, A)
        again.commit()
        again.mark()
        assert high_waters(read_all(torn, polls=2))[A] == again.streams[A].high_water


@pytest.mark.parametrize("segment_bytes", [150, 400, 1 << 20])
def test_every_crash_point_is_safe(segment_bytes: int) -> None:
    """Power may be lost before any change of the disk, in commits and at the start of segments,
    with any part of what was not synced: all that was acknowledged is recovered, as a prefix
    without holes, and the journal can be written on and read."""
    disk = RememberingDisk()
    journal = make(disk, segment_bytes)
    for n in range(9):
        open_stream(journal, bytes([n]) * 16)
        batch(journal, A, 2)
        journal.commit()
        disk.acked = journal.durable_seq
        if n % 3 == 2:
            journal.mark()
    disk.remember()
    everything = read_all(disk)
    for state in disk.states:
        for found_disk in crashes(state):
            again = make(found_disk, segment_bytes)
            found = read_all(found_disk, polls=30)
            assert found == everything[: len(found)]
            assert state.acked <= len(found) == again.seq
            marks = {s: m.high_water for s, m in again.streams.items() if m.high_water}
            assert marks == high_waters(found)
            batch(again, A, 2)
            again.commit()
            again.mark()
            assert seqs(read_all(found_disk, polls=30)) == list(range(1, again.seq + 1))
            assert read_all(found_disk, after=again.seq - 1, polls=30)[0].seq == again.seq


def test_damage_in_an_older_place_is_told_and_the_rest_is_kept() -> None:
    """A bad entry in the middle is told of; the good ones after it count."""
    disk = MemoryDisk()
    journal = make(disk)
    for _ in range(5):
        batch(journal, A)
        journal.commit()
    journal.mark()
    data = disk.files["j/00000001.log"]
    data[len(data) // 2] ^= 0x40
    again = make(disk)
    assert again.seq == 5
    assert again.streams[A].high_water == 5
    assert len(again.damage) == 1
    assert "00000001.log" in again.damage[0]


def test_a_damaged_table_falls_back_to_the_segment_before() -> None:
    """When the newest segment's first record is bad, the marks come from the one before."""
    disk = MemoryDisk()
    journal = make(disk, segment_bytes=300)
    while len(disk.names("j")) < 3:
        batch(journal, A, 2)
        journal.commit()
    batch(journal, A)
    journal.commit()
    disk.files["j/00000003.log"][30] ^= 1
    again = make(disk, segment_bytes=300)
    assert again.streams[A].high_water == journal.streams[A].high_water
    assert again.seq == journal.seq
    assert again.damage


def test_a_journal_with_entries_but_no_table_is_not_written() -> None:
    """Where entries are left but no table says how far the streams were, nothing is guessed: the
    error names the directory and what to do."""
    disk = MemoryDisk()
    journal = make(disk)
    batch(journal, A)
    journal.commit()
    disk.files["j/00000001.log"][30] ^= 1
    before = bytes(disk.files["j/00000001.log"])
    with pytest.raises(JournalDamaged, match="Move the directory away"):
        make(disk)
    assert bytes(disk.files["j/00000001.log"]) == before


def test_a_map_that_cannot_be_read_is_damage_not_an_end() -> None:
    """An entry whose map is too deep to read is told of, and the journal opens."""
    disk = MemoryDisk()
    journal = make(disk)
    deep: dict[str, object] = {}
    for _ in range(12):
        deep = {"k": deep}
    journal.append_map(Kind.OPEN, 0, {"stream": A, "hello": deep})
    batch(journal, A)
    journal.commit()
    again = make(disk)
    assert again.streams[A].high_water == 1
    assert len(again.damage) == 1
