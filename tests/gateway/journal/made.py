"""Journals for tests: frames of small records, and a disk that remembers every state it was in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from gateway.journal.reader import Entry, JournalReader
from gateway.journal.writer import Journal, Mark
from rank_client.wire import frames
from rank_client.wire.disk import Disk
from rank_client.wire.frames import DATA_HEAD
from rank_client.wire.records import Kind, pack
from tests.rank_client.wire.disks import MemoryDisk

UUID = b"u" * 16
A, B = b"a" * 16, b"b" * 16


def frame(stream: bytes, first: int, n: int = 1, size: int = 8) -> bytes:
    records = b"".join(pack(Kind.TEXT, first + i, bytes(size)) for i in range(n))
    return frames.data(1, stream, first, n, records)


def batch(journal: Journal, stream: bytes, n: int = 1, size: int = 8, now_ns: int = 0) -> None:
    """Append the next `n` records of a stream, as ingest does."""
    mark = journal.streams.setdefault(stream, Mark())
    journal.append_batch(now_ns, frame(stream, mark.high_water + 1, n, size))
    mark.high_water += n


def open_stream(journal: Journal, stream: bytes, now_ns: int = 0) -> None:
    journal.streams[stream] = Mark()
    journal.append_map(Kind.OPEN, now_ns, {"stream": stream, "hello": {"rank": 0}})


def make(disk: Disk, segment_bytes: int = 1 << 20) -> Journal:
    return Journal(disk, "j", UUID, segment_bytes)


def read_all(disk: Disk, after: int = 0, polls: int = 200, max_bytes: int = 4 << 20) -> list[Entry]:
    """Everything a new reader finds, damage included."""
    reader = JournalReader(disk, "j", after)
    out: list[Entry] = []
    for _ in range(polls):
        out += reader.read(max_bytes)
    reader.close()
    return out


def seqs(entries: list[Entry]) -> list[int]:
    return [e.seq for e in entries]


def high_waters(entries: list[Entry]) -> dict[bytes, int]:
    """What the entries themselves say of how far each stream is stored."""
    out: dict[bytes, int] = {}
    for entry in entries:
        if entry.kind == Kind.BATCH:
            _, _, _, _, _, stream, first, n, _ = DATA_HEAD.unpack_from(entry.body, 8)
            assert first == out.get(stream, 0) + 1, "a hole"
            out[stream] = first + n - 1
    return out


class State(NamedTuple):
    """A disk at one instant: what is certainly on it, and what may be, by file."""

    synced: dict[str, bytes]
    written: dict[str, bytes]
    acked: int


class RememberingDisk(MemoryDisk):
    """Keeps its state before each change. `acked` is what a gateway has acknowledged by then."""

    def __init__(self) -> None:
        super().__init__()
        self.acked = 0
        self.states: list[State] = []

    def remember(self) -> None:
        files = {path: bytes(data) for path, data in self.files.items()}
        self.states.append(State(dict(self.synced), files, self.acked))

    def create(self, path: str) -> int:
        self.remember()
        return super().create(path)

    def write(self, fd: int, data: bytes | bytearray | memoryview) -> int:
        self.remember()
        return super().write(fd, data)

    def truncate(self, fd: int, size: int) -> None:
        self.remember()
        super().truncate(fd, size)

    def sync(self, fd: int) -> None:
        self.remember()
        super().sync(fd)

    def unlink(self, path: str) -> None:
        self.remember()
        super().unlink(path)


def crashes(state: State, cuts: int = 4) -> Iterator[MemoryDisk]:
    """What may be found after a loss of power: un-synced bytes are there, cut, or not."""
    for cut in range(cuts + 1):
        disk = MemoryDisk()
        for path, data in state.written.items():
            sure = len(state.synced.get(path, b""))
            keep = sure + (len(data) - sure) * cut // cuts
            if cut or path in state.synced:
                disk.files[path] = bytearray(data[:keep])
        yield disk
