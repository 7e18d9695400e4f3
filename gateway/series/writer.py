"""Writing series.db: one transaction per fetch, the cursor in it. Used by the rules' process alone.

Rows wait in `tail` as received; at a full seal they become a segment of packed columns, and
sixteen segments become one. What lies where follows from journal order alone, not from timing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import apsw
import msgpack
import numpy as np
import numpy.typing as npt

from rank_client.wire.records import HEADER_BYTES, ROW_HEAD_BYTES

from ..rules.changes import Changes, Layout, Stream
from ..rules.generations import Generations
from ..rules.project import NEVER_CAME, Projection
from ..rules.rows import TAIL_HEAD_COLUMNS
from .db import fetch, open_writer
from .home import note_home, torn_copy

FORMAT = 3
SEAL_ROWS = 4096
SEAL_BYTES = 4 << 20
MERGE = 16
WAL_TRUNCATE_BYTES = 64 << 20
ROW_BYTES = HEADER_BYTES + ROW_HEAD_BYTES

_STREAM_COLUMNS = (
    "last_seq", "stored", "projected", "control", "quarantined", "gaps", "refused", "status",
    "text", "bye", "ended_ns", "quiet_ns", "last_step", "last_wall_ns", "generation", "bad",
)  # fmt: skip


def seal_rows(columns: int) -> int:
    """Rows per segment of a key set with so many keys."""
    return max(1, min(SEAL_ROWS, SEAL_BYTES // (8 * (TAIL_HEAD_COLUMNS + columns))))


class Series:
    """The writing end of one run's series.db, and the projection state it was built from."""

    def __init__(self, path: Path, journal: bytes, anew: bool = False) -> None:
        """Open, or begin anew: when that is asked for, or the file is another journal's, of
        another format, or a copy made while it was written to."""
        self._path = path
        anew = anew or torn_copy(path)
        try:
            db = self._open(path)
            found = self._about(db)
        except (apsw.NotADBError, apsw.CorruptError):
            found = None  # it is made from the journal, so it is made again
        if found != (FORMAT, journal) or anew:
            if found is not None:
                db.close()
            for suffix in ("", "-wal", "-shm"):
                Path(f"{path}{suffix}").unlink(missing_ok=True)
            db = self._open(path)
            with db:
                about = {"format": FORMAT, "journal": journal, "build": os.urandom(16)}
                about |= {"cursor": 0, "state": "running", "reason": ""}
                db.executemany("INSERT INTO about VALUES(?, ?)", list(about.items()))
        note_home(path)
        self.db = db
        self.projection, self.cursor = load(db)
        [(self.tail,)] = fetch(db, "SELECT value FROM about WHERE name = 'tail'") or [(0,)]
        self._placed = len(self.projection.streams)

    @staticmethod
    def _open(path: Path) -> apsw.Connection:
        db = open_writer(path, synchronous=1)
        if not db.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchone():
            with db:
                schema = (Path(__file__).parent / "schema.sql").read_text()
                for _ in db.execute(schema):
                    pass
        return db

    @staticmethod
    def _about(db: apsw.Connection) -> tuple[Any, Any]:
        found = dict(fetch(db, "SELECT name, value FROM about"))
        return found.get("format"), found.get("journal")

    def close(self) -> None:
        self.db.close()

    def note_damage(self, texts: list[str]) -> None:
        """Keep what the journal's reader could not read, for people to see."""
        with self.db:
            found: list[Any] = fetch(self.db, "SELECT value FROM about WHERE name = 'damage'")
            lines = [*(found[0][0].splitlines() if found else []), *texts]
            known = "\n".join(dict.fromkeys(lines))
            self.db.execute("INSERT OR REPLACE INTO about VALUES('damage', ?)", (known,))

    def apply(self, changes: Changes) -> None:
        """Write one fetch. All of it and its cursor, or nothing."""
        db = self.db
        with db:
            self._write_names(changes)
            for keyset, rows in changes.rows:
                self._append(keyset, rows)
            db.executemany("INSERT INTO text VALUES(?,?,?,?,?,?)", changes.texts)
            db.executemany(
                "INSERT INTO map(kind, stream, seq, wall, body) VALUES(?,?,?,?,?)",
                [(*row[:4], msgpack.packb(row[4])) for row in changes.maps],
            )
            self._write_media(changes)
            db.executemany("INSERT INTO loss VALUES(?,?,?,?,?)", changes.losses)
            db.executemany("INSERT INTO quarantine VALUES(?,?,?,?,?)", changes.quarantine)
            db.executemany(
                "INSERT INTO feed(entry, kind, keyset, stream, first, last, rule)"
                " VALUES(?,?,?,?,?,?,?)",
                changes.feed,
            )
            self._write_about(changes)
        self.cursor = changes.cursor or self.cursor
        if self._wal_bytes() > WAL_TRUNCATE_BYTES:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def _wal_bytes(self) -> int:
        try:
            return Path(f"{self._path}-wal").stat().st_size
        except OSError:
            return 0

    def _write_names(self, changes: Changes) -> None:
        db = self.db
        db.executemany("INSERT INTO key VALUES(?,?,?)", changes.keys)
        db.executemany("INSERT INTO keyset(id, keys) VALUES(?,?)", changes.keysets)
        db.executemany("INSERT INTO layout VALUES(?,?,?,?)", changes.layouts)
        columns = ("id", "stream", "hello", "rank", "kind", *_STREAM_COLUMNS)
        db.executemany(
            f"INSERT OR REPLACE INTO stream({','.join(columns)})"
            f" VALUES({','.join('?' * len(columns))})",
            [_stream_row(s) for s in changes.streams.values()],
        )

    def _write_media(self, changes: Changes) -> None:
        db = self.db
        db.executemany(
            "INSERT INTO media(stream, seq, wall, step, what, key, name, meta, rule)"
            " VALUES(?,?,?,?,?,?,?,?,?)",
            [(*row[:7], msgpack.packb(row[7]), row[8]) for row in changes.media],
        )
        # In this order: a file that was given up may come after all, never the other way round.
        db.executemany("UPDATE media SET lost = ? WHERE stream = ? AND seq = ?", changes.lost_media)
        came = 0
        for before, sha256, reason in changes.dropped:
            self._write_blobs(changes.blobs[came:before])
            came = before
            db.execute("UPDATE media SET lost = ? WHERE sha256 = ?", (reason, sha256))
        self._write_blobs(changes.blobs[came:])

    def _write_blobs(self, blobs: list[tuple[str, int, int, int]]) -> None:
        self.db.executemany(
            "UPDATE media SET sha256 = ?, size = ?, lost = NULL WHERE stream = ? AND seq = ?",
            blobs,
        )

    def _write_about(self, changes: Changes) -> None:
        projection = self.projection
        state, reason = projection.state()
        values = {
            "cursor": changes.cursor or self.cursor,
            "tail": changes.tail,
            "state": state,
            "reason": reason,
            "now_ns": projection.now_ns,
            "duplicates": projection.duplicates,
            "counters": msgpack.packb(dict(sorted(projection.counters.items()))),
            "launchers": msgpack.packb(projection.launchers),
            "early_blobs": msgpack.packb(
                [[*key, *told] for key, told in sorted(projection.early_blobs.items())]
            ),
            "gate": msgpack.packb(projection.gate.as_maps()),
        }
        if len(projection.streams) != self._placed:  # it is large, and else as it was
            self._placed = len(projection.streams)
            values["generations"] = msgpack.packb(projection.generations.dump())
        self.db.executemany("INSERT OR REPLACE INTO about VALUES(?, ?)", list(values.items()))

    # --- rows ----------------------------------------------------------------

    def _append(self, keyset: int, rows: npt.NDArray[np.uint64]) -> None:
        db = self.db
        db.execute(
            "INSERT INTO tail(keyset, n, body) VALUES(?,?,?)", (keyset, len(rows), rows.tobytes())
        )
        db.execute("UPDATE keyset SET rows = rows + ? WHERE id = ?", (len(rows), keyset))
        [(keys, total, sealed)] = fetch(
            db, "SELECT keys, rows, sealed FROM keyset WHERE id = ?", (keyset,)
        )
        size = seal_rows(len(keys) // 4)
        if total - sealed >= size:
            self._seal(keyset, np.frombuffer(keys, "<u4"), sealed, size)

    def _seal(self, keyset: int, keys: npt.NDArray[Any], sealed: int, size: int) -> None:
        """Turn the tail's full stretches into segments; what is left stays in the tail."""
        db = self.db
        bodies = fetch(db, "SELECT body FROM tail WHERE keyset = ? ORDER BY id", (keyset,))
        width = TAIL_HEAD_COLUMNS + len(keys)
        rows = np.frombuffer(b"".join(b for (b,) in bodies), "<u8").reshape(-1, width)
        whole = len(rows) // size * size
        db.execute("DELETE FROM tail WHERE keyset = ?", (keyset,))
        for start in range(0, whole, size):
            ordinal = (sealed + start) // size
            self._write_segment(keyset, keys, ordinal, 0, rows[start : start + size])
            if ordinal % MERGE == MERGE - 1:
                self._merge(keyset, keys, ordinal - MERGE + 1)
        if whole < len(rows):
            rest = rows[whole:]
            db.execute(
                "INSERT INTO tail(keyset, n, body) VALUES(?,?,?)",
                (keyset, len(rest), rest.tobytes()),
            )
        db.execute("UPDATE keyset SET sealed = ? WHERE id = ?", (sealed + whole, keyset))

    def _write_segment(
        self,
        keyset: int,
        keys: npt.NDArray[Any],
        ordinal: int,
        level: int,
        rows: npt.NDArray[np.uint64],
    ) -> None:
        """Rows sorted by stream; within one stream they keep their order, which is by seq."""
        order = np.argsort(rows[:, 0], kind="stable")
        rows = np.ascontiguousarray(rows[order].T)
        streams, offsets = np.unique(rows[0], return_index=True)
        self.db.execute(
            "INSERT INTO segment VALUES(?,?,?,?,?,?,?,?,?)",
            (
                keyset, ordinal, level, rows.shape[1],
                streams.astype("<u4").tobytes(), offsets.astype("<u4").tobytes(),
                rows[1].tobytes(), rows[2].tobytes(), rows[3].tobytes(),
            ),
        )  # fmt: skip
        self.db.executemany(
            "INSERT INTO col VALUES(?,?,?,?)",
            [
                (int(key), keyset, ordinal, rows[TAIL_HEAD_COLUMNS + i].tobytes())
                for i, key in enumerate(keys)
            ],
        )

    def _merge(self, keyset: int, keys: npt.NDArray[Any], first: int) -> None:
        """Sixteen small segments become one, under the ordinal of the first."""
        db = self.db
        where = "keyset = ? AND ordinal BETWEEN ? AND ?"
        span = (keyset, first, first + MERGE - 1)
        parts = []
        for ordinal, streams, offsets, n, *columns in fetch(
            db,
            f"SELECT ordinal, streams, offsets, n, seq, step, wall FROM segment WHERE {where}"  # noqa: S608
            " ORDER BY ordinal",
            span,
        ):
            block = np.empty((TAIL_HEAD_COLUMNS + len(keys), n), np.uint64)
            block[0] = expand(streams, offsets, n)
            for i, column in enumerate(columns):
                block[1 + i] = np.frombuffer(column, "<u8")
            for i, key in enumerate(keys):
                [(vals,)] = fetch(
                    db,
                    "SELECT vals FROM col WHERE key = ? AND keyset = ? AND ordinal = ?",
                    (int(key), keyset, ordinal),
                )
                block[TAIL_HEAD_COLUMNS + i] = np.frombuffer(vals, "<u8")
            parts.append(block.T)
        db.execute(f"DELETE FROM segment WHERE {where}", span)  # noqa: S608
        db.executemany(
            f"DELETE FROM col WHERE key = ? AND {where}",  # noqa: S608
            [(int(key), *span) for key in keys],
        )
        self._write_segment(keyset, keys, first, 1, np.concatenate(parts))


def expand(streams: bytes, offsets: bytes, n: int) -> npt.NDArray[np.uint64]:
    """The stream of each row of a segment."""
    ids = np.frombuffer(streams, "<u4")
    starts = np.frombuffer(offsets, "<u4")
    return np.repeat(ids, np.diff(np.append(starts, n))).astype(np.uint64)


def _stream_row(s: Stream) -> tuple[Any, ...]:
    hello = msgpack.packb({k: v for k, v in s.hello.items() if k != "stream"})
    values = [
        int(v) if isinstance(v, bool) else v for v in (getattr(s, c) for c in _STREAM_COLUMNS)
    ]
    return (s.index, s.id, hello, s.rank, s.kind, *values)


def load(db: apsw.Connection) -> tuple[Projection, int]:
    """The projection as it was after the last transaction, and its cursor."""
    projection = Projection()
    about: dict[str, Any] = dict(fetch(db, "SELECT name, value FROM about"))
    projection.keys.numbers = {
        (name, kind): id_ for id_, name, kind in fetch(db, "SELECT id, name, type FROM key")
    }
    by_id = {id_: column for column, id_ in projection.keys.numbers.items()}
    for id_, keys in fetch(db, "SELECT id, keys FROM keyset"):
        columns = tuple(by_id[int(k)] for k in np.frombuffer(keys, "<u4"))
        projection.keys.sets[columns] = id_
    _load_streams(db, projection)
    for stream, seq, rule, lost in fetch(
        db, "SELECT stream, seq, rule, lost FROM media WHERE sha256 IS NULL"
    ):
        if lost is None:
            projection.media_wanted[stream, seq] = rule
        elif lost == NEVER_CAME:
            projection.media_given_up[stream, seq] = rule
    if "generations" in about:
        projection.generations = Generations.load(
            msgpack.unpackb(about["generations"], strict_map_key=False)
        )
    if "counters" in about:
        projection.counters = msgpack.unpackb(about["counters"])
        projection.launchers = msgpack.unpackb(about["launchers"])
        projection.early_blobs = {
            (stream, seq): (sha256, size)
            for stream, seq, sha256, size in msgpack.unpackb(about["early_blobs"])
        }
        projection.gate = projection.gate.from_maps(msgpack.unpackb(about["gate"]))
        projection.now_ns, projection.duplicates = about["now_ns"], about["duplicates"]
    return projection, about["cursor"]


def _load_streams(db: apsw.Connection, projection: Projection) -> None:
    by_keyset = {id_: columns for columns, id_ in projection.keys.sets.items()}
    streams: dict[int, Stream] = {}
    names = ("id", "stream", "hello", "rank", "kind", *_STREAM_COLUMNS)
    for row in fetch(db, f"SELECT {','.join(names)} FROM stream ORDER BY id"):  # noqa: S608
        values = dict(zip(names, row, strict=True))
        hello = msgpack.unpackb(values.pop("hello"))
        index, id_ = values.pop("id"), values.pop("stream")
        values["bye"] = bool(values["bye"])
        stream = Stream(index=index, id=id_, hello={**hello, "stream": id_}, **values)
        streams[index] = projection.streams[id_] = stream
    for index, schema, keyset, take in fetch(db, "SELECT stream, schema, keyset, take FROM layout"):
        columns = by_keyset[keyset]
        order = None
        if take:
            indexes = tuple(np.frombuffer(take, np.int64).tolist())
            order = projection.keys.order(indexes)
            unsorted: list[tuple[str, str]] = [("", "")] * len(columns)
            for place, source in enumerate(indexes):
                unsorted[source] = columns[place]
            columns = tuple(unsorted)
        streams[index].layouts[schema] = Layout(
            schema, keyset, ROW_BYTES + 8 * len(columns), order, columns
        )
