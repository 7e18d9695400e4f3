"""A loss of power, and a kill, before every change of the disk that a run makes.

The journal with its reader and files, a rank's spool and its sweep, series.db and a sink's store
each do a run of so many commits on storage that knows what was synced. It is cut at each point, and
what may be found then is recovered and held against what had been promised: what was acknowledged
is there, what is there is a prefix of what was written, recovering twice gives the same, and it
can be written on.

Run: python -m tests.trials.crashpoints [--commits N] [--seed S]
"""

from __future__ import annotations

import hashlib
import os
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import apsw

import rank_client.spool
from gateway.ingest.drop import Drops, Request
from gateway.ingest.media import CHUNK_BYTES, Blob, Job, blob_path
from gateway.ingest.peers import Peers
from gateway.journal.reader import Entry, JournalReader
from gateway.journal.writer import Journal, JournalDamaged, Mark
from gateway.series.reader import Reader
from gateway.series.writer import Series
from gateway.sinks.quarantine import Kept
from gateway.sinks.store import Store
from rank_client.orphan_source import OrphanSource
from rank_client.spool import Spool
from rank_client.wire import frames
from rank_client.wire.records import (
    ROW_HEAD,
    UNNUMBERED,
    Kind,
    Schema,
    pack,
    pack_map,
    unpack_map,
    walk,
)
from tests.rank_client.read import decode

from . import trial
from .storage import CrashDisk, File, Files, Storage, parent_of

SECOND = 10**9
RUN_DIR = "data/runs/r"
SPOOL_DIR = "spool/r/stream"
JOURNAL_SEGMENT_BYTES = 6 << 10
SPOOL_SEGMENT_BYTES = 3 << 10
SPOOL_MARK_BYTES = 512
SPOOL_KEEP_BYTES = 8 << 10
TAIL_ENTRIES = 40  #: so much of a journal is compared at each point
FULL_EVERY = 16  #: points between those at which all of it is
SHOWN = 10  #: broken promises that are told

Found = list[tuple[int, int, bytes]]  #: (number, kind, body) of entries


class Points:
    """What all runs have in common: which points this worker looks at, and what it found."""

    def __init__(self, name: str, seed: int, worker: int, workers: int) -> None:
        self.name = name
        self.random = Random(f"{name} {seed}")
        self.counts: Counter[str] = Counter()
        self.broken: list[str] = []
        self._seed = seed
        self._mine = worker, workers
        self._number = 0
        self._looking = False

    def point(self) -> None:
        """Called before each change of the disk."""
        if self._looking:
            return
        self._number += 1
        worker, workers = self._mine
        if self._number % workers != worker or len(self.broken) >= SHOWN:
            return
        self.counts["points"] += 1
        self._looking = True
        try:
            self.look(self._number, Random(f"{self._seed} {self._number}"))
        finally:
            self._looking = False

    def look(self, number: int, random: Random) -> None:
        raise NotImplementedError

    def check(self, what: str, body: Callable[[], None]) -> None:
        """One crash: `body` recovers and asserts."""
        self.counts["crashes"] += 1
        try:
            body()
        except (AssertionError, OSError, JournalDamaged, apsw.Error, KeyError, ValueError) as error:
            text = f"{self.name}, point {self._number}, {what}: {type(error).__name__}: {error}"
            self.broken.append(text[:600])


# --- the journal -----------------------------------------------------------------------------


def frame(stream: bytes, first: int, n: int, random: Random) -> bytes:
    records = b"".join(
        pack(Kind.TEXT, first + i, random.randbytes(random.randrange(0, 60))) for i in range(n)
    )
    return frames.data(1, stream, first, n, records)


def entries_of(storage: Storage, after: int) -> Found:
    reader = JournalReader(CrashDisk(storage), f"{RUN_DIR}/journal", after)
    found: Found = []
    while entries := reader.read():
        found += _plain(entries)
    reader.close()
    assert not reader.damage, reader.damage
    return found


def _plain(entries: list[Entry]) -> Found:
    return [(e.seq, e.kind, bytes(e.body)) for e in entries]


class OneRun:
    """What `Drops` asks of its shell, over one journal."""

    def __init__(self, disk: CrashDisk, journal: Journal) -> None:
        self.disk = disk
        self._journal = journal

    def journal(self, run: str) -> Journal:
        return self._journal

    def directory(self, run: str) -> Path:
        return Path(RUN_DIR)


def drop(run: OneRun, now: int, sha256: str, work: Callable[[Job], None]) -> None:
    """Ask for one file, as of all that the journal holds."""
    journal = run.journal("r")
    drops = Drops(Peers(1, run, 1, lambda run: False), run, journal.commit, work)
    drops.carry_out(now, "r", Request(journal.uuid, journal.seq, {sha256: "policy"}))


class JournalPoints(Points):
    """Ingest's part: streams, batches, ticks, ends, files that come and go; with a disk that is
    full at times."""

    def __init__(self, seed: int, commits: int, worker: int, workers: int) -> None:
        super().__init__("journal", seed, worker, workers)
        self.acked: dict[bytes, int] = {}
        self.acked_seq = 0
        self.seen: Found = []
        self.files: dict[str, bytes] = {}  #: path → content, acknowledged and not dropped
        self.dropped: dict[str, bytes] = {}
        self.storage = Storage("data")
        self.storage.before = self.point
        self.commits = commits
        self.now = 0
        self.reader = JournalReader(CrashDisk(self.storage), f"{RUN_DIR}/journal")

    def run(self) -> None:
        self._open()
        for _ in range(self.commits):
            self._step()
        self.point()

    def _open(self) -> None:
        self.disk = CrashDisk(self.storage)
        self.journal = make_journal(self.disk)

    def _step(self) -> None:
        random, journal = self.random, self.journal
        self.now += SECOND
        for _ in range(random.randint(1, 5)):
            self._append()
        full = random.random() < 0.06
        if full:
            self.storage.room = random.randrange(journal.pending_bytes + 200)
        try:
            journal.commit()
            self._acknowledge()
            if random.random() < 0.4:
                journal.mark()
        except OSError:
            journal.close()
            self.storage.room = 1 << 40
            self._open()  # as ingest does when the disk is full
        self.storage.room = 1 << 40
        if random.random() < 0.05:
            self._file()
        if self.files and random.random() < 0.05:
            self._drop()

    def _append(self) -> None:
        journal, random = self.journal, self.random
        streams = [s for s, mark in journal.streams.items() if not mark.ended]
        dice = random.random()
        if not streams or dice < 0.05:
            stream = random.randbytes(16)
            journal.streams[stream] = Mark()
            journal.append_map(Kind.OPEN, self.now, {"stream": stream, "hello": {"rank": 0}})
        elif dice < 0.15:
            journal.append_map(Kind.TICK, self.now, {"quiet": [], "back": [], "dup": 0})
        elif dice < 0.18 and len(streams) > 2:
            mark = journal.streams[streams[0]]
            mark.ended = True
            body = {"stream": streams[0], "final": mark.high_water, "status": "x"}
            journal.append_map(Kind.BYE, self.now, body)
        else:
            append_batch(journal, random.choice(streams), random, self.now)

    def _acknowledge(self) -> None:
        self.acked = {s: mark.high_water for s, mark in self.journal.streams.items()}
        self.acked_seq = self.journal.durable_seq

    def _file(self) -> None:
        """A file of one or two chunks, entered in the journal and acknowledged."""
        data = self.random.randbytes(self.random.choice([1000, CHUNK_BYTES + 100]))
        if self.dropped and self.random.random() < 0.3:
            _, data = self.dropped.popitem()  # it comes again
        sha256 = hashlib.sha256(data).hexdigest()
        blob = Blob.announced(self.disk, "r", Path(RUN_DIR), sha256, len(data))
        blob.open()
        for number, at in enumerate(range(0, len(data), CHUNK_BYTES), 1):
            blob.write(number, data[at : at + CHUNK_BYTES])
        blob.finish()
        body = {"stream": b"x" * 16, "media": 1, "sha256": sha256, "size": len(data)}
        self.journal.append_map(Kind.BLOB, self.now, body)
        self.journal.commit()
        self._acknowledge()
        self.files[str(blob_path(Path(RUN_DIR), sha256))] = data

    def _drop(self) -> None:
        """Policy drops a file: until the journal is sure to tell of it, it must be there."""
        path = self.random.choice(list(self.files))

        def remove(job: Job) -> None:
            self._acknowledge()
            self.dropped[path] = self.files.pop(path)
            job.run()
            assert job.error is None, job.error

        drop(OneRun(self.disk, self.journal), self.now, Path(path).name, remove)
        assert path not in self.files, "not dropped"

    # --- at a point ----------------------------------------------------------

    def look(self, number: int, random: Random) -> None:
        self.seen = [*self.seen, *_plain(self.reader.read())][-TAIL_ENTRIES:]
        after = 0 if number % FULL_EVERY == 0 else max(0, self.acked_seq - TAIL_ENTRIES)
        written: Found = []

        def killed() -> None:
            written.extend(self._recover(self.storage.killed(), after, None))

        self.check("killed", killed)
        for what, files in self.storage.crashes(random):
            self.check(what, lambda files=files: self._recover(files, after, written) and None)
        self.check("killed, then a loss of power", lambda: self._killed_twice(random))

    def _recover(self, files: Files, after: int, written: Found | None) -> Found:
        """All that must hold of what is found; the entries after `after`."""
        storage = Storage("data", files)
        journal = make_journal(CrashDisk(storage))
        assert not journal.damage, journal.damage
        found = entries_of(storage, after)
        last = found[-1][0] if found else after
        assert [e[0] for e in found] == list(range(after + 1, last + 1)), "a hole"
        assert last == journal.seq or journal.seq < after == 0
        assert last >= self.acked_seq, f"acknowledged {self.acked_seq}, found {last}"
        if written is not None:
            # Entries of a commit for which there was no room may be there after all: nobody was
            # told of them, and their ranks send them again or see that they are stored.
            sure = last if self.storage.only_grew else self.acked_seq
            there = [e for e in found if e[0] <= sure]
            assert there == written[: len(there)], "not a prefix of what was written"
        by_number = {e[0]: e for e in found}
        for entry in self.seen:
            assert entry[0] <= last, f"a reader saw {entry[0]}, found {last}"
            assert by_number.get(entry[0], entry) == entry, f"a reader saw another {entry[0]}"
        for stream, high in self.acked.items():
            assert journal.streams[stream].high_water >= high, "a stream's acknowledged records"
        if after == 0:
            assert high_waters(found) == {
                s: m.high_water for s, m in journal.streams.items() if m.high_water
            }, "high waters"
        self._check_files(files, found)
        self._again(storage, journal, last)
        return found

    def _check_files(self, files: Files, found: Found) -> None:
        wanted = {Path(path).name: True for path in self.files}
        for _, kind, body in found:
            if kind in (Kind.BLOB, Kind.DROP):
                wanted[unpack_map(body)["sha256"]] = kind == Kind.BLOB
        for sha256, here in wanted.items():
            path = str(blob_path(Path(RUN_DIR), sha256))
            if here:
                assert path in files, f"{path} is gone"
                assert len(files[path]) and hashlib.sha256(files[path]).hexdigest() == sha256, path
            elif path in files:
                self._finish_drop(files, path)

    def _finish_drop(self, files: Files, path: str) -> None:
        """The journal calls a file dropped that is there: asked again, the next gateway removes
        it, and no loss of power brings it back."""
        storage = Storage("data", files)
        disk = CrashDisk(storage)
        journal = make_journal(disk)
        drop(OneRun(disk, journal), self.now, Path(path).name, Job.run)
        journal.close()
        assert path not in storage.names and path not in storage.durable, f"{path} is there"
        self.counts["drops finished"] += 1

    def _again(self, storage: Storage, journal: Journal, last: int) -> None:
        """A second recovery finds the same, and the journal goes on."""
        before = entries_of(storage, max(0, last - TAIL_ENTRIES))
        journal.close()
        journal = make_journal(CrashDisk(storage))
        again = entries_of(storage, max(0, last - TAIL_ENTRIES))
        assert again == before, "a second recovery finds something else"
        stream = b"n" * 16
        journal.streams.setdefault(stream, Mark())
        append_batch(journal, stream, Random(1), 0)
        journal.commit()
        journal.mark()
        journal.close()
        assert [e[0] for e in entries_of(storage, last)] == [last + 1], "it does not go on"

    def _killed_twice(self, random: Random) -> None:
        """What is acknowledged after a kill and a restart survives a loss of power too."""
        storage = self.storage.copy()
        journal = make_journal(CrashDisk(storage))
        for _ in range(2):
            stream = b"n" * 16
            journal.streams.setdefault(stream, Mark())
            append_batch(journal, stream, random, 0)
            journal.commit()
        for what, files in storage.crashes(random):
            again = make_journal(CrashDisk(Storage("data", files)))
            assert again.seq >= journal.durable_seq, (what, again.seq, journal.durable_seq)


def make_journal(disk: CrashDisk) -> Journal:
    return Journal(disk, f"{RUN_DIR}/journal", b"u" * 16, JOURNAL_SEGMENT_BYTES)


def append_batch(journal: Journal, stream: bytes, random: Random, now: int) -> None:
    mark, n = journal.streams[stream], random.randint(1, 4)
    journal.append_batch(now, frame(stream, mark.high_water + 1, n, random))
    mark.high_water += n


def high_waters(found: Found) -> dict[bytes, int]:
    out: dict[bytes, int] = {}
    for _, kind, body in found:
        if kind == Kind.BATCH:
            *_, stream, first, n, _ = frames.DATA_HEAD.unpack_from(body, 8)
            assert first == out.get(stream, 0) + 1, "a hole in a stream"
            out[stream] = first + n - 1
    return out


# --- the spool -------------------------------------------------------------------------------


class SpoolPoints(Points):
    """A rank's part: rows and texts, segments, trims, a full disk that heals; read by sweep."""

    def __init__(self, seed: int, commits: int, worker: int, workers: int) -> None:
        super().__init__("spool", seed, worker, workers)
        rank_client.spool.MARK_BYTES = SPOOL_MARK_BYTES  # else a segment is never full here
        self.storage = Storage("spool")
        self.storage.before = self.point
        self.commits = commits
        self.written: dict[int, bytes] = {}
        self.returned = 0  #: the last number `append` returned for, when it was not in memory
        self.synced = 0
        self.durable = 0
        self.schemas: list[Schema] = []

    def run(self) -> None:
        disk = CrashDisk(self.storage)
        self.spool = Spool(
            SPOOL_DIR, {"run": "r"}, disk, SPOOL_SEGMENT_BYTES, keep_bytes=SPOOL_KEEP_BYTES
        )
        assert not self.spool.volatile, self.spool.volatile
        for _ in range(self.commits):
            self._step()
        self.point()

    def _step(self) -> None:
        random, spool = self.random, self.spool
        if random.random() < 0.02:
            self.storage.room = random.randrange(300)
        for _ in range(random.randint(1, 5)):
            self._append()
            if not spool.volatile:
                self.returned = spool.last
        if random.random() < 0.1:
            self.storage.room = 1 << 40
            spool.heal()
            if not spool.volatile:
                self.returned = spool.last
        if random.random() < 0.5:
            returned = self.returned
            spool.sync()
            self.synced = max(self.synced, returned)
        if random.random() < 0.3:
            self.durable = random.randint(self.durable, max(self.durable, self.returned))
            spool.trim(self.durable)

    def _append(self) -> None:
        random, spool = self.random, self.spool
        number = spool.last + 1
        with spool.lock:
            turn = spool.begin()
            before, record = b"", pack_map(Kind.TEXT, number, {"t": "x" * random.randrange(50)})
            if random.random() < 0.7:
                before, record = self._row(number)
            self.written[number] = record
            spool.append(turn, record, before)

    def _row(self, number: int) -> tuple[bytes, bytes]:
        random = self.random
        if not self.schemas or (len(self.schemas) < 8 and random.random() < 0.1):
            n = len(self.schemas) + 1
            made = self.spool.add_schema(tuple(f"k{i}" for i in range(n)), ("f8",) * n)
            assert made
            self.schemas.append(made)
            schema, before = made, made.pack(number)
        else:
            schema, before = random.choice(self.schemas), b""
        values = struct.pack(f"<{len(schema.keys)}d", *(random.random() for _ in schema.keys))
        return before, pack(Kind.ROW, number, ROW_HEAD.pack(number, 0, 0) + values, schema.id)

    # --- at a point ----------------------------------------------------------

    def look(self, number: int, random: Random) -> None:
        returned, synced = self.returned, self.synced
        self.check("killed", lambda: self._recover(self.storage.killed(), returned))
        for what, files in self.storage.crashes(random):
            self.check(what, lambda files=files: self._recover(files, synced))

    def _recover(self, files: Files, promised: int) -> None:
        found = self._swept(files)
        assert found == self._swept(files), "a second sweep finds something else"
        if promised > self.durable:
            assert found, f"nothing, but {promised} were promised"
            assert found[0][0] <= self.durable + 1, "a record that was never acknowledged is gone"
            assert found[-1][0] >= promised, f"promised {promised}, found {found[-1][0]}"
        for number, record in found:
            assert self.written[number] == record, f"record {number} is another"

    def _swept(self, files: Files) -> list[tuple[int, bytes]]:
        """What a session would send; every row has its schema before it."""
        storage = Storage("spool", files)
        if f"{SPOOL_DIR}/00000001.log" not in files and not any(".log" in p for p in files):
            return []
        source = OrphanSource(Path(SPOOL_DIR), CrashDisk(storage))
        out: list[tuple[int, bytes]] = []
        schemas: dict[int, Schema] = {}
        first = source.first_kept
        while first <= source.last:
            n, data = source.read(first, 700)
            assert n > 0, f"record {first} cannot be read"
            numbers = [w.seq for w in decode(data, schemas)]
            assert numbers == list(range(first, first + n)), (first, n, numbers)
            out += [(i, r) for i, r in _records(data)]
            first += n
        return out


def _records(data: bytes) -> list[tuple[int, bytes]]:
    return [(h.seq, data[h.at : h.at + h.size]) for h in walk(data) if h.kind not in UNNUMBERED]


# --- SQLite ----------------------------------------------------------------------------------


BASE_VFS = "unix"


class WatchedFile(apsw.VFSFile):
    """A real file, and beside it what is known of it in a Storage."""

    def __init__(self, storage: Storage, name: Any, flags: list[int]) -> None:
        self._path = name.filename() if isinstance(name, apsw.URIFilename) else str(name)
        super().__init__(BASE_VFS, name, flags)
        self._storage = storage
        known = self._path in storage.names
        ours = parent_of(self._path) == storage.root  # what is recovered is opened beside it
        self._watched = ours and self._path.endswith((".db", "-wal"))
        if self._watched and not known:
            storage.put(self._path, File())

    @property
    def _file(self) -> Any:
        return self._storage.names[self._path]

    def xWrite(self, data: Any, offset: int) -> None:
        if self._watched:
            self._storage.write(self._file, offset, bytes(data))
        super().xWrite(data, offset)

    def xTruncate(self, size: int) -> None:
        if self._watched:
            self._storage.truncate(self._file, size)
        super().xTruncate(size)

    def xSync(self, flags: int) -> None:
        super().xSync(flags)
        if self._watched:
            self._storage.sync(self._file)
            if self._path.endswith("-wal"):  # SQLite syncs the directory with a new log
                self._storage.sync_dir(parent_of(self._path))


class WatchedVfs(apsw.VFS):
    """SQLite's own, telling a Storage of every change."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        super().__init__("crashpoints", BASE_VFS)

    def xOpen(self, name: Any, flags: list[int]) -> WatchedFile:
        return WatchedFile(self._storage, name, flags)

    def xDelete(self, name: str, sync: bool) -> None:
        if name in self._storage.names:
            self._storage.remove(name)
        super().xDelete(name, sync)


class TablePoints(Points):
    """SQLite's part, watched through a VFS of our own; `folder` holds the real files."""

    def __init__(self, name: str, seed: int, worker: int, workers: int, folder: Path) -> None:
        super().__init__(name, seed, worker, workers)
        self.folder = folder
        self.storage = Storage(str(folder))
        self.storage.before = self.point
        self._vfs = WatchedVfs(self.storage)

    def watched(self, make: Callable[[], Any]) -> Any:
        """Open something whose files are watched."""
        apsw.set_default_vfs("crashpoints")
        try:
            return make()
        finally:
            apsw.set_default_vfs(BASE_VFS)

    def look(self, number: int, random: Random) -> None:
        for what, files in [("killed", self.storage.killed()), *self.storage.crashes(random)]:
            self.check(what, lambda files=files: self._on_copy(files))

    def _on_copy(self, files: Files) -> None:
        with tempfile.TemporaryDirectory(dir=self.folder.parent) as folder:
            for path, data in files.items():
                (Path(folder) / Path(path).name).write_bytes(data)
            self.recover(Path(folder))

    def recover(self, folder: Path) -> None:
        raise NotImplementedError


class StorePoints(TablePoints):
    """A sink's store: receipts that were given are there, and nothing of later ones but whole."""

    def __init__(self, seed: int, commits: int, worker: int, workers: int, folder: Path) -> None:
        super().__init__("store", seed, worker, workers, folder)
        self.commits = commits
        self.given = 0

    def run(self) -> None:
        store = self.watched(lambda: Store(self.folder / "s.db"))
        for n in range(1, self.commits + 1):
            key = (self.random.randbytes(16), "rows")
            store.put("own", {"n": n, "pad": self.random.randbytes(self.random.randrange(3000))})
            store.receipt(
                delivered=1, skipped={"x": 1}, maybe_duplicate=0, spans={key: n},
                media=[(key[0], n)], intended={},
                quarantine=[Kept("rows", key[0], n, "k", 1, "what", "why")],
                about={"state": "delivering", "feed": n},
            )  # fmt: skip
            self.given = n
        self.point()
        store.close()

    def recover(self, folder: Path) -> None:
        store = Store(folder / "s.db")
        try:
            n = store.about("delivered", 0)
            assert n in (self.given, self.given + 1), f"{self.given} receipts, found {n}"
            spans, media = store.taken()
            own = store.get("own")
            assert (len(spans), len(media), store.about("feed", 0)) == (n, n, n), "half a receipt"
            assert (own["n"] if own else 0) == n, "a sink's own note without its receipt"
            assert store.db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        finally:
            store.close()


class SeriesPoints(TablePoints):
    """series.db: after any crash it is as it was after one of the fetches, and goes on from it."""

    def __init__(self, seed: int, commits: int, worker: int, workers: int, folder: Path) -> None:
        super().__init__("series", seed, worker, workers, folder)
        self.journal = Storage("data")
        self.commits = commits
        self.fetches: list[list[Entry]] = []
        self.dumps: dict[int, bytes] = {}  #: cursor → digest of the tables

    def run(self) -> None:
        self._fill_journal()
        self._reference()
        series = self.watched(lambda: Series(self.folder / "series.db", b"u" * 16))
        for fetch in self.fetches:
            series.apply(series.projection.take(fetch))
        self.point()
        series.close()

    def _fill_journal(self) -> None:
        disk, random = CrashDisk(self.journal), self.random
        journal = make_journal(disk)
        reader = JournalReader(disk, f"{RUN_DIR}/journal")
        streams = [random.randbytes(16) for _ in range(2)]
        for rank, stream in enumerate(streams):
            journal.streams[stream] = Mark()
            hello = {"rank": rank, "world_size": 2, "kind": "live"}
            journal.append_map(Kind.OPEN, SECOND, {"stream": stream, "hello": hello})
        schema = Schema(0, ("a", "b"), ("f8", "i8"))
        for step in range(self.commits):
            stream = random.choice(streams)
            mark = journal.streams[stream]
            first, n = mark.high_water + 1, random.randint(1, 30)
            values = [struct.pack("<qqqdq", step, 0, 0, random.random(), i) for i in range(n)]
            rows = [pack(Kind.ROW, first + i, v) for i, v in enumerate(values)]
            file = {"what": "checkpoint", "key": "last.pt", "name": "last.pt", "w": step}
            rows.append(pack_map(Kind.MEDIA, first + n, file))
            records = schema.pack(first) + b"".join(rows)
            journal.append_batch(SECOND, frames.data(1, stream, first, n + 1, records))
            mark.high_water += n + 1
            self._file_comes_and_one_goes(journal, step, {"stream": stream, "media": first + n})
            journal.commit()
            journal.mark()
            self.fetches.append(reader.read())

    def _file_comes_and_one_goes(self, journal: Journal, step: int, of: dict[str, Any]) -> None:
        """Every other time it is dropped in the fetch after its own."""
        body = {**of, "sha256": f"{step:064x}", "size": 1}
        journal.append_map(Kind.BLOB, SECOND, body)
        if step % 2:
            journal.append_map(
                Kind.DROP, SECOND, {"sha256": f"{step - 1:064x}", "reason": "policy"}
            )

    def _reference(self) -> None:
        folder = self.folder.parent / "reference"
        folder.mkdir()
        series = Series(folder / "series.db", b"u" * 16)
        self.dumps[0] = dump(folder)
        for fetch in self.fetches:
            series.apply(series.projection.take(fetch))
            self.dumps[series.cursor] = dump(folder)
        series.close()

    def recover(self, folder: Path) -> None:
        series = Series(folder / "series.db", b"u" * 16)
        cursor = series.cursor
        assert cursor in self.dumps, f"a cursor of no fetch: {cursor}"
        assert dump(folder) == self.dumps[cursor], f"other tables than at cursor {cursor}"
        for fetch in self.fetches:
            if fetch[-1].seq > cursor:
                series.apply(series.projection.take(fetch))
                break
        assert dump(folder) == self.dumps[series.cursor], "it does not go on"
        series.close()


def dump(folder: Path) -> bytes:
    with Reader(folder) as reader:
        return hashlib.sha256(repr(reader.dump()).encode()).digest()


# --- all of it -------------------------------------------------------------------------------

SHARES = {"journal": 1.0, "spool": 1.0, "store": 0.2, "series": 0.04}  #: of the commits


def carry_out(name: str, seed: int, commits: int, worker: int, workers: int) -> Points:
    """One worker's points of one run."""
    commits = max(4, int(commits * SHARES[name]))
    # Syncs are watched, not needed: where there is a disk in memory, the real files are there.
    there = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="rankgate-crashpoints-", dir=there) as place:
        folder = Path(place) / "run"
        folder.mkdir()
        made: Any = {
            "journal": lambda: JournalPoints(seed, commits, worker, workers),
            "spool": lambda: SpoolPoints(seed, commits, worker, workers),
            "store": lambda: StorePoints(seed, commits, worker, workers, folder),
            "series": lambda: SeriesPoints(seed, commits, worker, workers, folder),
        }[name]()
        made.run()
        return made


def _outcome(*args: Any) -> tuple[str, Counter[str], list[str]]:
    points = carry_out(*args)
    return points.name, points.counts, points.broken


def main(commits: int, seed: int) -> trial.Figures:
    workers = max(1, min(4, os.cpu_count() or 1))
    jobs = [(name, seed, commits, w, workers) for name in SHARES for w in range(workers)]
    figures: dict[str, Any] = {"commits": commits, "points": 0, "crashes": 0, "broken": []}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for name, counts, broken in pool.map(_outcome, *zip(*jobs, strict=True)):
            figures["points"] += counts["points"]
            figures["crashes"] += counts["crashes"]
            figures[name] = figures.get(name, 0) + counts["crashes"]
            figures["broken"] += broken
    return figures


if __name__ == "__main__":
    parser = trial.parser(__doc__.splitlines()[0], seconds=300)
    parser.add_argument("--commits", type=int, default=500)
    options = parser.parse_args()
    sys.exit(trial.run("crashpoints", options.seed, lambda _: main(options.commits, options.seed)))
