"""The reading end: only what is committed, all of it, in order, while somebody writes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.journal.reader import LOOK_AGAIN_POLLS, Entry, JournalReader
from gateway.journal.salvage import BROKEN_BATCH
from rank_client.wire.records import Kind, walk
from tests.gateway.journal.made import UUID, A, batch, make, read_all, seqs
from tests.rank_client.wire.disks import MemoryDisk


def test_there_is_nothing_to_read_before_there_is_a_journal() -> None:
    """A reader may be there before the journal is: no entries, no name, no error."""
    disk = MemoryDisk()
    reader = JournalReader(disk, "j")
    assert reader.read() == []
    assert reader.uuid() is None
    journal = make(disk)
    assert reader.uuid() == UUID
    batch(journal, A)
    journal.commit()
    journal.mark()
    assert seqs(reader.read()) == [1]


def test_only_marked_entries_are_seen() -> None:
    """Entries on disk count only once a mark, with the next commit or when idle, says so."""
    disk = MemoryDisk()
    journal = make(disk)
    reader = JournalReader(disk, "j")
    batch(journal, A)
    journal.commit()
    assert reader.read() == []
    batch(journal, A)
    journal.commit()
    assert seqs(reader.read()) == [1]
    journal.mark()
    assert seqs(reader.read()) == [2]
    assert reader.read() == []


def test_a_file_written_anew_to_the_same_size_is_read() -> None:
    """After a loss of power the file may be cut, and grow to the very size at which the reader
    found nothing in it."""
    disk = MemoryDisk()
    journal = make(disk)
    batch(journal, A)
    journal.commit()
    journal.mark()
    [path] = [name for name in disk.files if name.endswith(".log")]
    whole = bytes(disk.files[path])
    reader = JournalReader(disk, "j")
    head = next(h for h in walk(whole) if h.kind == Kind.BATCH)
    disk.files[path][head.at :] = bytes(len(whole) - head.at)
    assert reader.read() == reader.read() == []
    disk.files[path][:] = whole
    assert [seqs(found) for _ in range(2 * LOOK_AGAIN_POLLS) if (found := reader.read())] == [[1]]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.booleans(), st.booleans(), st.sampled_from([64, 500, 9999]))
    ),
    st.sampled_from([200, 700, 1 << 20]),
    st.integers(0, 5),
)
def test_a_reader_follows_while_it_is_written(
    steps: list[tuple[int, bool, bool, int]], segment_bytes: int, after: int
) -> None:
    """However writing, marking, rolling and reading in pieces interleave, a reader sees each
    committed entry once, in order, from where it was told to start."""
    disk = MemoryDisk()
    journal = make(disk, segment_bytes)
    reader = JournalReader(disk, "j", after)
    found: list[int] = []
    for appended, marked, reads, max_bytes in steps:
        for _ in range(appended):
            batch(journal, A)
        journal.commit()
        if marked:
            journal.mark()
        if reads:
            found += seqs(reader.read(max_bytes))
            assert max(found, default=0) <= journal.durable_seq
    journal.mark()
    while more := reader.read(300):
        found += seqs(more)
    assert found == list(range(after + 1, journal.seq + 1))
    assert not reader.damage


def test_a_commit_larger_than_one_read_is_read() -> None:
    """A commit of more bytes than a read asks for does not stop the reader."""
    disk = MemoryDisk()
    journal = make(disk)
    for _ in range(20):
        batch(journal, A, size=200)
    journal.commit()
    journal.mark()
    assert seqs(read_all(disk, max_bytes=100)) == list(range(1, 21))


@pytest.mark.parametrize("after", range(12))
def test_reading_starts_after_any_entry(after: int) -> None:
    """A reader that knows entries up to a number gets those after it, from whatever segment."""
    disk = MemoryDisk()
    journal = make(disk, segment_bytes=300)
    for _ in range(11):
        batch(journal, A)
        journal.commit()
    journal.mark()
    assert len(disk.names("j")) > 2
    assert seqs(read_all(disk, after)) == list(range(after + 1, 12))


@pytest.mark.parametrize("after", [0, 3])
def test_a_damaged_table_does_not_hide_the_segments_before(after: int) -> None:
    """Where a later segment does not say where it begins, reading starts before it."""
    disk = MemoryDisk()
    journal = make(disk, segment_bytes=300)
    for _ in range(11):
        batch(journal, A)
        journal.commit()
    journal.mark()
    disk.files["j/00000002.log"][:40] = bytes(40)
    assert seqs(read_all(disk, after)) == list(range(after + 1, 12))


def test_a_torn_tail_is_waited_for() -> None:
    """A record that is half there is not read and not called damage; when it is whole it is."""
    disk = MemoryDisk()
    journal = make(disk)
    batch(journal, A)
    journal.commit()
    journal.mark()
    safe = journal._log.size
    batch(journal, A)
    journal.commit()
    journal.mark()
    whole = bytes(disk.files["j/00000001.log"])
    reader = JournalReader(disk, "j")
    found: list[int] = []
    for end in range(safe, len(whole) + 1):
        disk.files["j/00000001.log"][:] = whole[:end]
        found += seqs(reader.read())
    assert found == [1, 2]
    assert not reader.damage


@settings(max_examples=100, deadline=None)
@given(st.data(), st.booleans())
def test_damage_costs_only_what_is_damaged(data: st.DataObject, sealed: bool) -> None:
    """With any bit of an entry in the middle changed, in a finished or in the newest segment, the
    other entries are read in order and the damage is told of."""
    disk = MemoryDisk()
    journal = make(disk, 700 if sealed else 1 << 20)
    for _ in range(9):
        batch(journal, A)
        journal.commit()
        journal.mark()
    assert (len(disk.names("j")) > 1) == sealed
    file = disk.files["j/00000001.log"]
    entries = [h for h in walk(bytes(file)) if h.kind == Kind.BATCH]
    hit = data.draw(st.sampled_from(entries[:3]))
    file[data.draw(st.integers(hit.at, hit.at + hit.size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    reader = JournalReader(disk, "j")
    found: list[Entry] = []
    for _ in range(30):
        found += reader.read()
    assert seqs([e for e in found if e.kind == Kind.BATCH]) == [
        n for n in range(1, 10) if n != hit.seq
    ]
    assert [e.seq for e in found if e.kind == BROKEN_BATCH] in ([], [hit.seq])
    assert len(reader.damage) == 1
    batch(journal, A)
    journal.commit()
    journal.mark()
    assert seqs(reader.read() + reader.read()) == [10]


def test_a_hopeless_tail_is_not_read_again_and_again() -> None:
    """While a torn tail stays as it is, waiting for it costs no reading of the whole file."""
    disk = MemoryDisk()
    journal = make(disk)
    for _ in range(50):
        batch(journal, A)
    journal.commit()
    journal.mark()
    disk.files["j/00000001.log"] += b"\x01" * 4000
    reads: list[int] = []
    pread = disk.pread

    def counted(fd: int, size: int, at: int) -> bytes:
        reads.append(size)
        return pread(fd, size, at)

    disk.pread = counted  # type: ignore[method-assign]
    reader = JournalReader(disk, "j")
    for _ in range(LOOK_AGAIN_POLLS):
        reader.read()
    assert sum(size > 1000 for size in reads) <= 3


def test_kinds_of_entries_are_handed_on() -> None:
    """Every numbered entry is given, marks and tables are not."""
    disk = MemoryDisk()
    journal = make(disk, segment_bytes=200)
    for kind in (Kind.RULES, Kind.TICK, Kind.BLOB, Kind.BYE, Kind.GAP):
        journal.append_map(kind, 0, {"stream": A, "to": 0})
        journal.commit()
    journal.mark()
    assert [e.kind for e in read_all(disk)] == [
        Kind.RULES, Kind.TICK, Kind.BLOB, Kind.BYE, Kind.GAP,
    ]  # fmt: skip
