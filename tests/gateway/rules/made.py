"""Small journals in memory, from a list of what ranks do; and the series that follow from them."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from gateway.journal.reader import Entry
from gateway.journal.writer import Mark
from gateway.series.reader import Reader
from gateway.series.writer import Series
from rank_client.values import column_type
from rank_client.wire import frames
from rank_client.wire.records import COLUMN_CODES, ROW_HEAD, Kind, Schema, pack, pack_map
from tests.gateway.journal.made import UUID, make, read_all
from tests.rank_client.wire.disks import MemoryDisk

SECOND = 10**9


class Life:
    """One stream: records wait until `flush` makes a frame of them. `rows` is what was logged in
    rows and maps, by number."""

    def __init__(self, run: Run, number: int, hello: dict[str, Any]) -> None:
        self.run = run
        self.id = bytes([number + 1]) * 16
        self.last = 0
        self.rows: dict[int, tuple[int, dict[str, Any]]] = {}
        self.media: list[int] = []
        self._schemas: dict[tuple[tuple[str, str], ...], Schema] = {}
        self._told: dict[tuple[tuple[str, str], ...], int] = {}  # in the frame from this number on
        self._records: list[bytes] = []
        self._first = 1
        run.journal.streams[self.id] = Mark()
        run.entry(Kind.OPEN, {"stream": self.id, "hello": hello})

    def row(self, values: dict[str, Any], step: int = 0) -> Life:
        columns = tuple((k, column_type(v)) for k, v in values.items())
        schema = self._schemas.get(columns)
        if schema is None:
            keys, types = zip(*columns, strict=True)
            schema = self._schemas[columns] = Schema(len(self._schemas), keys, types)
        if columns not in self._told:
            self._records.append(schema.pack(self.last + 1))
            self._told[columns] = self._first
        codes = "".join(COLUMN_CODES[t] for t in schema.types)
        body = ROW_HEAD.pack(step, self.run.now, 0) + struct.pack(f"<{codes}", *values.values())
        self.rows[self.last + 1] = (step, values)
        return self.record(pack(Kind.ROW, self.last + 1, body, schema.id))

    def kv(self, values: dict[str, Any], step: int = 0) -> Life:
        self.rows[self.last + 1] = (step, values)
        return self.map(Kind.KV, {"s": step, "w": self.run.now, "m": 0, "v": values})

    def text(self, text: str) -> Life:
        return self.map(Kind.TEXT, {"t": text, "l": "info", "w": self.run.now, "s": None})

    def params(self, values: dict[str, Any], kind: Kind = Kind.PARAMS) -> Life:
        return self.map(kind, {"v": values, "w": self.run.now})

    def file(self, key: str = "f") -> int:
        body = {"what": "file", "key": key, "name": key, "s": 1, "meta": {}, "w": self.run.now}
        self.map(Kind.MEDIA, body)
        self.media.append(self.last)
        return self.last

    def arrived(self, media: int) -> Life:
        """The file's last byte; whether the record that names it was sent is another matter."""
        body = {"stream": self.id, "media": media, "sha256": "a" * 64, "size": 5}
        self.run.entry(Kind.BLOB, body)
        return self

    def lose(self, n: int = 1, reason: str = "bad step", **more: Any) -> Life:
        return self.map(Kind.LOSS, {"n": n, "reason": reason, **more})

    def end(self, status: str = "completed", **more: Any) -> Life:
        body = {"status": status, "text": "", "w": self.run.now, **more}
        return self.map(Kind.END, body).flush()

    def bye(self) -> Life:
        self.flush()
        self.run.entry(Kind.BYE, {"stream": self.id, "final": self.last, "status": "x"})
        return self

    def gap(self, n: int) -> Life:
        self.flush()
        body = {"stream": self.id, "from": self.last + 1, "to": self.last + n}
        self.last += n
        self._first = self.last + 1
        self.run.entry(Kind.GAP, body)
        return self

    def map(self, kind: int, body: Any) -> Life:
        return self.record(pack_map(kind, self.last + 1, body))

    def record(self, record: bytes) -> Life:
        self._records.append(record)
        self.last += 1
        return self

    def unnumbered(self, record: bytes) -> Life:
        """A record that takes no number, good or not."""
        self._records.append(record)
        return self

    # --- for lists of actions --------------------------------------------------------------------

    def summary(self, values: dict[str, Any]) -> Life:
        return self.params(values, Kind.SUMMARY)

    def some_file_arrived(self, n: int) -> None:
        if self.media:
            self.arrived(self.media[n % len(self.media)])

    def some_file_lost(self, n: int) -> None:
        if self.media:
            self.lose(0, "media lost", media=self.media[n % len(self.media)])

    def a_later_file_arrived(self, n: int) -> None:
        self.arrived(self.last + 1 + n)

    def tell_again(self) -> None:
        """As at the start of a segment, schemas are told once more before they are used."""
        self._told.clear()

    def junk(self, body: bytes) -> None:
        self.record(pack(Kind.TEXT, self.last + 1, body))

    def unknown_kind(self, kind: int) -> None:
        self.map(kind, {"x": 1})

    def corrupt(self, at: int) -> None:
        self.flush(corrupt=at)

    def quiet(self) -> None:
        self.run.tick(quiet=[self])

    def back(self) -> None:
        self.run.tick(back=[self], dup=3)

    def again(self, rank: int) -> None:
        """Some other life of the run begins."""
        self.run.life(rank, world_size=2, restart=len(self.run.lives) % 3)

    # --- to the journal --------------------------------------------------------------------------

    def flush(self, corrupt: int | None = None) -> Life:
        """Everything since the last frame as one frame. With `corrupt`, a byte of its records is
        changed before the frame's checksum is made: as by a rank with bad memory."""
        n = self.last - self._first + 1
        if n:
            records = bytearray(b"".join(self._records))
            if corrupt is not None:
                records[corrupt % len(records)] ^= 0x20
                for number in range(self._first, self.last + 1):
                    self.rows.pop(number, None)
                self._told = {c: at for c, at in self._told.items() if at < self._first}
            frame = frames.data(1, self.id, self._first, n, bytes(records))
            self.run.journal.append_batch(self.run.now, frame)
            self._records, self._first = [], self.last + 1
        return self


class Run:
    """A journal in memory; each entry is a second after the one before."""

    def __init__(self) -> None:
        self.disk = MemoryDisk()
        self.journal = make(self.disk)
        self.now = 1_790_000_000 * SECOND
        self.lives: list[Life] = []

    def life(self, rank: int = 0, world_size: int = 1, kind: str = "live", **more: Any) -> Life:
        hello = {
            "kind": kind, "run": "r", "rank": rank, "world_size": world_size, "launch": "L",
            "restart": 0, "boot": "b", "agent": "b:1:1", "node": "n", "earlier": [], **more,
        }  # fmt: skip
        life = Life(self, len(self.lives), hello)
        self.lives.append(life)
        return life

    def entry(self, kind: Kind, body: dict[str, Any]) -> None:
        self.now += SECOND
        self.journal.append_map(kind, self.now, body)

    def tick(self, quiet: Iterable[Life] = (), back: Iterable[Life] = (), dup: int = 0) -> None:
        names = {"quiet": [x.id for x in quiet], "back": [x.id for x in back]}
        self.entry(Kind.TICK, {**names, "dup": dup})

    def entries(self) -> list[Entry]:
        for life in self.lives:
            life.flush()
        self.journal.commit()
        self.journal.mark()
        return read_all(self.disk, polls=50)


def project(directory: Path, entries: list[Entry], cuts: Iterable[int] = ()) -> None:
    """Make series.db of entries, a new process for each fetch: cut before these indexes."""
    bounds = sorted({0, *cuts, len(entries)})
    for start, end in pairwise(bounds):
        series = Series(directory / "series.db", UUID)
        assert series.cursor == (entries[start - 1].seq if start else 0)
        series.apply(series.projection.take(entries[start:end]))
        series.close()


@contextmanager
def reading(directory: Path, run: Run) -> Iterator[Reader]:
    """The series of a run, made at once."""
    project(directory, run.entries())
    with Reader(directory) as reader:
        yield reader


def check_sums(reader: Reader) -> None:
    """Everything is accounted for: records of each stream, and items of the run."""
    for s in reader.streams():
        assert s.last_seq == s.stored + s.gaps
        assert s.stored == s.projected + s.quarantined + s.control
        assert s.gaps == sum(n for i, first, _, n, why in reader.losses() if _is_gap(i, s, why))
        assert s.refused == sum(
            n for i, *_, n, why in reader.losses() if i == s.index and not _is_gap(i, s, why)
        )
        quarantined = [n for _, i, _, n, _ in reader.quarantine() if i == s.index]
        assert s.quarantined == sum(quarantined)
    points = sum(len(reader.points(key)) for key in {k for _, k, _ in reader.keys()})
    projected = {
        "metric": points,
        "text": len(reader.texts()),
        "params": len(reader.maps("params")),
        "summary": len(reader.maps("summary")),
        "media": len(reader.media()),
    }
    counted = dict.fromkeys(projected, 0)
    for name, n in reader.about().counters.items():
        verb, _, rest = name.partition(" ")
        kind = rest.split(" ")[0]
        kind = {"system": "metric", "console": "text"}.get(kind, kind)
        if verb in ("passed", "held", "lost") and kind in counted:
            counted[kind] += n
    assert counted == projected


def _is_gap(index: int, stream: Any, reason: str) -> bool:
    ours = "numbers its process no longer has", "not readable in the journal"
    return index == stream.index and reason in ours
