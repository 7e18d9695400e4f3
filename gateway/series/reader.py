"""Reading series.db: plain fetches that end their transaction before anything is made of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from ..rules.rows import TAIL_HEAD_COLUMNS
from .db import fetch, open_reader

Reach = dict[int, tuple[int, int]]  #: stream → its first and last number in a segment

DTYPES = {"f8": np.dtype("<f8"), "i8": np.dtype("<i8"), "bool": np.dtype("<i8")}


@dataclass(frozen=True, slots=True)
class About:
    """The run as a whole, as of journal entry `cursor`."""

    build: bytes
    journal: bytes
    cursor: int
    state: str  #: running | completed | failed | lost
    reason: str
    now_ns: int
    duplicates: int
    counters: dict[str, int]
    generations: list[int]  #: ids, oldest first
    launchers: dict[str, int]
    damage: tuple[str, ...] = ()  #: stretches of the journal that could not be read


@dataclass(frozen=True, slots=True)
class StreamRow:
    """One life of one process; see schema.sql."""

    index: int
    id: bytes
    hello: dict[str, Any]
    generation: int
    rank: int
    kind: str
    last_seq: int
    stored: int
    projected: int
    control: int
    quarantined: int
    gaps: int
    refused: int
    status: str
    text: str
    bye: bool
    ended_ns: int
    quiet_ns: int
    last_step: int
    last_wall_ns: int
    bad: int

    @property
    def node(self) -> str:
        return str(self.hello.get("node", ""))

    @property
    def local_rank(self) -> int:
        value = self.hello.get("local_rank")
        return value if isinstance(value, int) else 0

    @property
    def ended(self) -> bool:
        return bool(self.status or self.bye)


@dataclass(frozen=True, slots=True)
class Points:
    """Points of one key: arrays of one length. `value` is float64, int64, bool, or object where
    the key changed its type."""

    stream: npt.NDArray[np.int64]
    seq: npt.NDArray[np.int64]
    step: npt.NDArray[np.int64]
    wall_ns: npt.NDArray[np.int64]
    value: npt.NDArray[Any]

    def __len__(self) -> int:
        return len(self.seq)

    def pick(self, index: npt.NDArray[Any]) -> Points:
        """A selection or reordering of all columns."""
        arrays = (self.stream, self.seq, self.step, self.wall_ns, self.value)
        return Points(*(a[index] for a in arrays))


@dataclass(frozen=True, slots=True)
class FeedEntry:
    id: int
    entry: int
    kind: str
    keyset: int
    stream: int
    first: int
    last: int
    rule: str


@dataclass(frozen=True, slots=True)
class MediaRow:
    stream: int
    seq: int
    wall_ns: int
    step: int | None
    what: str
    key: str
    name: str
    meta: dict[str, Any]
    sha256: str | None
    size_bytes: int | None
    lost: str | None


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of one key set, in journal order within a stream: (n,) heads and (n, keys) of raw
    8-byte values."""

    stream: npt.NDArray[np.int64]
    seq: npt.NDArray[np.int64]
    step: npt.NDArray[np.int64]
    wall_ns: npt.NDArray[np.int64]
    values: npt.NDArray[np.uint64]


class Reader:
    """A read-only view of one run. Raises apsw.Error when there is no series.db.

    `built_in` is where the series are, if not in the run's own directory.
    """

    def __init__(self, run_dir: Path, built_in: Path | None = None) -> None:
        self.run_dir = run_dir
        self._db = open_reader((built_in or run_dir) / "series.db")
        self._inode = self._inode_now()
        self._reaches: dict[tuple[int, int, int], Reach] = {}

    def close(self) -> None:
        self._db.close()

    def _inode_now(self) -> int:
        try:
            return (self.run_dir / "series.db").stat().st_ino
        except FileNotFoundError:
            return 0  # just being made anew

    def replaced(self) -> bool:
        """Was the series made anew? Then this still reads the old one."""
        return self._inode_now() != self._inode

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the run -------------------------------------------------------------

    def about(self) -> About:
        found: dict[str, Any] = dict(fetch(self._db, "SELECT name, value FROM about"))
        generations: list[int] = []
        if "generations" in found:
            dump = msgpack.unpackb(found["generations"], strict_map_key=False)
            generations = [g[0] for g in dump["order"]]
        return About(
            found["build"],
            found["journal"],
            found["cursor"],
            found["state"],
            found["reason"],
            found.get("now_ns", 0),
            found.get("duplicates", 0),
            msgpack.unpackb(found["counters"]) if "counters" in found else {},
            generations,
            msgpack.unpackb(found["launchers"]) if "launchers" in found else {},
            tuple(found.get("damage", "").splitlines()),
        )

    def streams(self) -> list[StreamRow]:
        """In the order of their `open` entries."""
        names = (
            "id, stream, hello, generation, rank, kind, last_seq, stored, projected, control, "
            "quarantined, gaps, refused, status, text, bye, ended_ns, quiet_ns, last_step, "
            "last_wall_ns, bad"
        )
        rows = fetch(self._db, f"SELECT {names} FROM stream ORDER BY id")  # noqa: S608
        out = []
        for row in rows:
            values = list(row)
            values[2], values[15] = msgpack.unpackb(row[2]), bool(row[15])
            out.append(StreamRow(*values))
        return out

    def keys(self) -> list[tuple[int, str, str]]:
        """(id, name, type); a name may stand under several types."""
        return fetch(self._db, "SELECT id, name, type FROM key ORDER BY name, type")

    def texts(
        self, after: tuple[int, int, int] = (-(1 << 63), -1, -1), limit: int = -1
    ) -> list[tuple[int, int, int, int | None, str, str]]:
        """(stream, seq, wall_ns, step, level, text) by wall time, after (wall, stream, seq)."""
        return fetch(
            self._db,
            "SELECT stream, seq, wall, step, level, text FROM text"
            " WHERE (wall, stream, seq) > (?,?,?) ORDER BY wall, stream, seq LIMIT ?",
            (*after, limit),
        )

    def key_names(self) -> list[str]:
        """Each key once, in the order of its first appearance."""
        rows = fetch(self._db, "SELECT name FROM key GROUP BY name ORDER BY min(id)")
        return [name for (name,) in rows]

    def last_texts(
        self, limit: int, streams: Iterable[int] | None = None
    ) -> list[tuple[int, int, int, int | None, str, str]]:
        """The newest by wall time, oldest first; of these streams only."""
        chosen = "" if streams is None else ",".join(str(int(s)) for s in streams) or "-1"
        where = f"WHERE stream IN ({chosen})" if chosen else ""
        rows = fetch(
            self._db,
            f"SELECT stream, seq, wall, step, level, text FROM text {where}"  # noqa: S608
            " ORDER BY wall DESC, stream DESC, seq DESC LIMIT ?",
            (limit,),
        )
        return rows[::-1]

    def texts_of(self, stream: int, after: int) -> list[tuple[int, int, int, int | None, str, str]]:
        """One stream's lines after a number, as they were logged."""
        return fetch(
            self._db,
            "SELECT stream, seq, wall, step, level, text FROM text"
            " WHERE stream = ? AND seq > ? ORDER BY seq",
            (stream, after),
        )

    def maps(self, kind: str) -> list[tuple[int, int, int, dict[str, Any]]]:
        """(stream, seq, wall_ns, values) of every `params` or `summary` call."""
        rows = fetch(
            self._db,
            "SELECT stream, seq, wall, body FROM map WHERE kind = ? ORDER BY wall, stream, seq",
            (kind,),
        )
        return [(s, q, w, msgpack.unpackb(body)) for s, q, w, body in rows]

    def media(self) -> list[MediaRow]:
        rows = fetch(
            self._db,
            "SELECT stream, seq, wall, step, what, key, name, meta, sha256, size, lost FROM media"
            " ORDER BY wall, stream, seq",
        )
        return [_media_row(row) for row in rows]

    def media_passed(self) -> set[tuple[int, int]]:
        """(stream, seq) of the files that the rules let pass to sinks."""
        return set(fetch(self._db, "SELECT stream, seq FROM media WHERE rule != ''"))

    def losses(self) -> list[tuple[int, int, int, int, str]]:
        """(stream, first, last, n, reason)."""
        return fetch(self._db, "SELECT stream, first, last, n, reason FROM loss")

    def quarantine(self) -> list[tuple[int, int | None, int, int, str]]:
        """(journal entry, stream, first, n, reason)."""
        return fetch(self._db, "SELECT entry, stream, first, n, reason FROM quarantine")

    # --- points --------------------------------------------------------------

    def points(self, key: str) -> Points:
        """All points of a key by its exact name, every rank and attempt, in no special order."""
        parts: list[Points] = []
        with self._db:  # one snapshot: a seal in between would move rows from tail to segment
            for id_, _, type_ in (k for k in self.keys() if k[1] == key):
                parts += self._segment_points(id_, type_)
                parts += self._tail_points(id_, type_)
        if not parts:
            none = np.empty(0, np.int64)
            return Points(none, none, none, none, np.empty(0, np.float64))
        kinds = {p.value.dtype for p in parts}
        values = [p.value if len(kinds) == 1 else p.value.astype(object) for p in parts]
        return Points(
            np.concatenate([p.stream for p in parts]),
            np.concatenate([p.seq for p in parts]),
            np.concatenate([p.step for p in parts]),
            np.concatenate([p.wall_ns for p in parts]),
            np.concatenate(values),
        )

    def keysets(self) -> dict[int, frozenset[str]]:
        """The names of the keys in every key set."""
        names = {id_: name for id_, name, _ in self.keys()}
        rows = fetch(self._db, "SELECT id, keys FROM keyset ORDER BY id")
        return {i: frozenset(names[int(k)] for k in np.frombuffer(p, "<u4")) for i, p in rows}

    def heads(
        self, keyset: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(stream, seq, step) of every row of a key set; each stream's rows in its order."""
        with self._db:
            rows = fetch(
                self._db,
                "SELECT streams, offsets, n, seq, step FROM segment WHERE keyset = ?"
                " ORDER BY ordinal",
                (keyset,),
            )
            [(packed,)] = fetch(self._db, "SELECT keys FROM keyset WHERE id = ?", (keyset,))
            tail = self._tail(keyset, len(packed) // 4)[:, :3].astype(np.int64)
        parts = [
            (_expand(streams, offsets, n), np.frombuffer(seq, "<i8"), np.frombuffer(step, "<i8"))
            for streams, offsets, n, seq, step in rows
        ]
        parts.append((tail[:, 0], tail[:, 1], tail[:, 2]))
        stream, seq, step = (np.concatenate(column) for column in zip(*parts, strict=True))
        return stream, seq, step

    def recent_rows(self, streams: Iterable[int], enough: int) -> npt.NDArray[np.int64]:
        """(n, 4) of stream, seq, step, wall_ns, by stream and seq: the newest rows of each of these
        streams, `enough` or all that there are, with none between them left out."""
        wanted = np.array(sorted(streams), np.int64)
        since = np.zeros(len(wanted), np.int64)
        parts = [np.empty((0, TAIL_HEAD_COLUMNS), np.int64)]
        with self._db:
            for keyset, packed in fetch(self._db, "SELECT id, keys FROM keyset ORDER BY id"):
                part = self._newest_rows(keyset, len(packed) // 4, wanted, enough)
                part = part[np.lexsort((part[:, 1], part[:, 0]))]
                stream, first, n = np.unique(part[:, 0], return_index=True, return_counts=True)
                cut = n >= enough  # of this key set there may be older ones
                place = np.searchsorted(wanted, stream[cut])
                since[place] = np.maximum(since[place], part[first[cut], 1])
                parts.append(part)
        rows = np.concatenate(parts)
        rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
        return rows[rows[:, 1] >= since[np.searchsorted(wanted, rows[:, 0])]]

    def _newest_rows(
        self, keyset: int, keys: int, wanted: npt.NDArray[np.int64], enough: int
    ) -> npt.NDArray[np.int64]:
        """Heads of one key set: the tail's, and those of newer segments while a stream of
        `wanted` has not enough."""
        tail = self._tail(keyset, keys)[:, :TAIL_HEAD_COLUMNS].astype(np.int64)
        rows = tail[np.isin(tail[:, 0], wanted)]
        for ordinal, streams, offsets, n in fetch(
            self._db,
            "SELECT ordinal, streams, offsets, n FROM segment WHERE keyset = ?"
            " ORDER BY ordinal DESC",
            (keyset,),
        ):
            have = np.bincount(np.searchsorted(wanted, rows[:, 0]), minlength=len(wanted))
            lacking = wanted[have < enough]
            if not len(lacking):
                break
            if not np.isin(lacking, np.frombuffer(streams, "<u4")).any():
                continue
            [columns] = fetch(
                self._db,
                "SELECT seq, step, wall FROM segment WHERE keyset = ? AND ordinal = ?",
                (keyset, ordinal),
            )
            heads = [_expand(streams, offsets, n), *(np.frombuffer(c, "<i8") for c in columns)]
            found = np.stack(heads, axis=1)
            rows = np.concatenate([rows, found[np.isin(found[:, 0], lacking)]])
        return rows

    def _segment_points(self, key: int, type_: str) -> list[Points]:
        rows = fetch(
            self._db,
            "SELECT s.streams, s.offsets, s.n, s.seq, s.step, s.wall, c.vals FROM col c"
            " JOIN segment s ON s.keyset = c.keyset AND s.ordinal = c.ordinal WHERE c.key = ?"
            " ORDER BY c.keyset, c.ordinal",
            (key,),
        )
        return [
            Points(
                _expand(streams, offsets, n),
                np.frombuffer(seq, "<i8"),
                np.frombuffer(step, "<i8"),
                np.frombuffer(wall, "<i8"),
                _typed(np.frombuffer(vals, "<u8"), type_),
            )
            for streams, offsets, n, seq, step, wall, vals in rows
        ]

    def _tail_points(self, key: int, type_: str) -> list[Points]:
        out = []
        for keyset, packed in fetch(self._db, "SELECT id, keys FROM keyset ORDER BY id"):
            keys = np.frombuffer(packed, "<u4")
            place = np.flatnonzero(keys == key)
            if len(place) == 0:
                continue
            rows = self._tail(keyset, len(keys))
            if len(rows):
                values = _typed(np.ascontiguousarray(rows[:, TAIL_HEAD_COLUMNS + place[0]]), type_)
                heads = rows[:, :TAIL_HEAD_COLUMNS].astype(np.int64)
                out.append(Points(heads[:, 0], heads[:, 1], heads[:, 2], heads[:, 3], values))
        return out

    def _tail(self, keyset: int, keys: int) -> npt.NDArray[np.uint64]:
        bodies = fetch(self._db, "SELECT body FROM tail WHERE keyset = ? ORDER BY id", (keyset,))
        joined = b"".join(b for (b,) in bodies)
        return np.frombuffer(joined, "<u8").reshape(-1, TAIL_HEAD_COLUMNS + keys)

    # --- the feed ------------------------------------------------------------

    def feed(self, after: int, limit: int) -> list[FeedEntry]:
        """The next entries, never cut between two of one journal entry."""
        rows = fetch(
            self._db,
            "SELECT id, entry, kind, keyset, stream, first, last, rule FROM feed WHERE id > ?1"
            " AND entry <= (SELECT max(entry) FROM"
            "   (SELECT entry FROM feed WHERE id > ?1 ORDER BY id LIMIT ?2))"
            " ORDER BY id",
            (after, limit),
        )
        return [FeedEntry(*row) for row in rows]

    def stretches(
        self, stream: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(first, last, keyset) of each stretch of a stream's rows that passed."""
        sql = "SELECT first, last, keyset FROM feed WHERE kind = 'rows' AND stream = ?"
        found = np.array(fetch(self._db, sql, (stream,)), np.int64).reshape(-1, 3)
        return found[:, 0], found[:, 1], found[:, 2]

    def feed_end(self) -> int:
        [(last,)] = fetch(self._db, "SELECT coalesce(max(id), 0) FROM feed")
        return int(last)

    def keyset(self, id_: int) -> list[tuple[str, str]]:
        """The (name, type) of a key set's columns, in order."""
        [(packed,)] = fetch(self._db, "SELECT keys FROM keyset WHERE id = ?", (id_,))
        names = {id_: (name, type_) for id_, name, type_ in self.keys()}
        return [names[int(k)] for k in np.frombuffer(packed, "<u4")]

    def rows(self, keyset: int, spans: Iterable[tuple[int, int, int]]) -> Block:
        """The rows of these (stream, first seq, last seq), sorted by stream and seq."""
        with self._db:
            rows = self._find_rows(keyset, sorted(spans))
        rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
        heads = rows[:, :TAIL_HEAD_COLUMNS].astype(np.int64)
        values = rows[:, TAIL_HEAD_COLUMNS:]
        return Block(heads[:, 0], heads[:, 1], heads[:, 2], heads[:, 3], values)

    def _find_rows(self, keyset: int, wanted: list[tuple[int, int, int]]) -> npt.NDArray[np.uint64]:
        [(packed,)] = fetch(self._db, "SELECT keys FROM keyset WHERE id = ?", (keyset,))
        keys = np.frombuffer(packed, "<u4")
        blocks = [self._chosen(self._tail(keyset, len(keys)), wanted)]
        found = len(blocks[0])
        expected = sum(last - first + 1 for _, first, last in wanted)
        if found < expected:
            # Newest first: what a sink wants is near the end, unless it replays.
            for ordinal, n in fetch(
                self._db,
                "SELECT ordinal, n FROM segment WHERE keyset = ? ORDER BY ordinal DESC",
                (keyset,),
            ):
                if not _meet(self._reach(keyset, ordinal, n), wanted):
                    continue
                block = self._chosen(self._segment_rows(keyset, ordinal, keys), wanted)
                blocks.insert(0, block)
                found += len(block)
                if found >= expected:
                    break
        return np.concatenate(blocks)

    def _reach(self, keyset: int, ordinal: int, n: int) -> Reach:
        """What a segment holds, remembered: a replay asks for one stretch after the other."""
        found = self._reaches.get((keyset, ordinal, n))
        if found is None:
            [(streams, offsets, seq)] = fetch(
                self._db,
                "SELECT streams, offsets, seq FROM segment WHERE keyset = ? AND ordinal = ?",
                (keyset, ordinal),
            )
            starts, numbers = np.frombuffer(offsets, "<u4"), np.frombuffer(seq, "<i8")
            lasts = np.append(starts[1:], n).astype(np.int64) - 1
            spans = zip(numbers[starts].tolist(), numbers[lasts].tolist(), strict=True)
            found = dict(zip(np.frombuffer(streams, "<u4").tolist(), spans, strict=True))
            self._reaches[keyset, ordinal, n] = found
        return found

    @staticmethod
    def _chosen(
        rows: npt.NDArray[np.uint64], spans: list[tuple[int, int, int]]
    ) -> npt.NDArray[np.uint64]:
        keep = np.zeros(len(rows), bool)
        stream, seq = rows[:, 0].astype(np.int64), rows[:, 1].astype(np.int64)
        for index, first, last in spans:
            keep |= (stream == index) & (seq >= first) & (seq <= last)
        return rows[keep]

    def _segment_rows(
        self, keyset: int, ordinal: int, keys: npt.NDArray[Any]
    ) -> npt.NDArray[np.uint64]:
        [(streams, offsets, n, *heads)] = fetch(
            self._db,
            "SELECT streams, offsets, n, seq, step, wall FROM segment"
            " WHERE keyset = ? AND ordinal = ?",
            (keyset, ordinal),
        )
        rows = np.empty((TAIL_HEAD_COLUMNS + len(keys), n), np.uint64)
        rows[0] = _expand(streams, offsets, n)
        for i, column in enumerate(heads):
            rows[1 + i] = np.frombuffer(column, "<u8")
        for i, key in enumerate(keys):
            [(vals,)] = fetch(
                self._db,
                "SELECT vals FROM col WHERE key = ? AND keyset = ? AND ordinal = ?",
                (int(key), keyset, ordinal),
            )
            rows[TAIL_HEAD_COLUMNS + i] = np.frombuffer(vals, "<u8")
        return rows.T

    def text_at(self, stream: int, seq: int) -> tuple[int, int | None, str, str]:
        """(wall_ns, step, level, text)."""
        [row] = fetch(
            self._db,
            "SELECT wall, step, level, text FROM text WHERE stream = ? AND seq = ?",
            (stream, seq),
        )
        return row  # type: ignore[no-any-return]

    def map_at(self, kind: str, stream: int, seq: int) -> tuple[int, dict[str, Any]]:
        """(wall_ns, values)."""
        [(wall, body)] = fetch(
            self._db,
            "SELECT wall, body FROM map WHERE kind = ? AND stream = ? AND seq = ?",
            (kind, stream, seq),
        )
        return wall, msgpack.unpackb(body)

    def media_at(self, stream: int, seq: int) -> MediaRow:
        [row] = fetch(
            self._db,
            "SELECT stream, seq, wall, step, what, key, name, meta, sha256, size, lost FROM media"
            " WHERE stream = ? AND seq = ?",
            (stream, seq),
        )
        return _media_row(row)

    # --- for tests and rebuilds ----------------------------------------------

    def dump(self) -> list[tuple[str, Any]]:
        """Every table in order, as one journal must always give it: what depends on when a
        fetch ended (how the tail is cut into blobs, the build's name) is left out."""
        out: list[tuple[str, Any]] = []
        with self._db:
            out += self._dump()
        return out

    def _dump(self) -> Iterable[tuple[str, Any]]:
        db = self._db
        for name, value in fetch(db, "SELECT name, value FROM about ORDER BY name"):
            if name != "build":
                yield f"about {name}", value
        for keyset, keys in fetch(db, "SELECT id, keys FROM keyset ORDER BY id"):
            yield f"tail {keyset}", self._tail(keyset, len(keys) // 4).tobytes()
        for table, order in (
            ("stream", "id"), ("key", "id"), ("keyset", "id"), ("layout", "stream, schema"),
            ("segment", "keyset, ordinal"), ("text", "stream, seq"), ("map", "kind, stream, seq"),
            ("media", "stream, seq"), ("loss", "rowid"), ("quarantine", "rowid"), ("feed", "id"),
            ("col", "key, keyset, ordinal"),
        ):  # fmt: skip
            for row in fetch(db, f"SELECT * FROM {table} ORDER BY {order}"):  # noqa: S608
                yield table, row


def _meet(reach: Reach, wanted: list[tuple[int, int, int]]) -> bool:
    nothing = (1, 0)
    return any(
        first <= reach.get(stream, nothing)[1] and last >= reach.get(stream, nothing)[0]
        for stream, first, last in wanted
    )


def _media_row(row: tuple[Any, ...]) -> MediaRow:
    values = list(row)
    values[7] = msgpack.unpackb(row[7])
    return MediaRow(*values)


def _expand(streams: bytes, offsets: bytes, n: int) -> npt.NDArray[np.int64]:
    starts = np.frombuffer(offsets, "<u4")
    ends = np.append(starts, n).astype(np.int64)
    counts = ends[1:] - ends[:-1]
    return np.repeat(np.frombuffer(streams, "<u4").astype(np.int64), counts)


def _typed(raw: npt.NDArray[np.uint64], type_: str) -> npt.NDArray[Any]:
    values = raw.view(DTYPES[type_])
    return values.astype(bool) if type_ == "bool" else values
