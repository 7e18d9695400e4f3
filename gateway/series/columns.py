"""Rows of the key sets: out of the packed columns of segments, and out of the tail."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import apsw
import numpy as np
import numpy.typing as npt

from ..rules.rows import TAIL_HEAD_COLUMNS
from .db import fetch
from .tables import Block, Points

Reach = dict[int, tuple[int, int]]  #: stream → its first and last number in a segment

DTYPES = {"f8": np.dtype("<f8"), "i8": np.dtype("<i8"), "bool": np.dtype("<i8")}


class Columns:
    """The rows of one series.db; `Reader` hands on what it is asked for."""

    def __init__(self, db: apsw.Connection) -> None:
        self._db = db
        self._reaches: dict[tuple[int, int, int], Reach] = {}

    def points(self, key: str) -> Points:
        """All points of a key by its exact name, every rank and attempt, in no special order."""
        parts: list[Points] = []
        with self._db:  # one snapshot: a seal in between would move rows from tail to segment
            types = fetch(self._db, "SELECT id, type FROM key WHERE name = ? ORDER BY type", (key,))
            for id_, type_ in types:
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
            rows = self.tail(keyset, len(keys))
            if len(rows):
                values = _typed(np.ascontiguousarray(rows[:, TAIL_HEAD_COLUMNS + place[0]]), type_)
                heads = rows[:, :TAIL_HEAD_COLUMNS].astype(np.int64)
                out.append(Points(heads[:, 0], heads[:, 1], heads[:, 2], heads[:, 3], values))
        return out

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
            tail = self.tail(keyset, len(packed) // 4)[:, :3].astype(np.int64)
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
        tail = self.tail(keyset, keys)[:, :TAIL_HEAD_COLUMNS].astype(np.int64)
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
        blocks = [self._chosen(self.tail(keyset, len(keys)), wanted)]
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

    def tail(self, keyset: int, keys: int) -> npt.NDArray[np.uint64]:
        """(n, 4 + keys): what no segment holds yet, in the order of the journal."""
        bodies = fetch(self._db, "SELECT body FROM tail WHERE keyset = ? ORDER BY id", (keyset,))
        joined = b"".join(b for (b,) in bodies)
        return np.frombuffer(joined, "<u8").reshape(-1, TAIL_HEAD_COLUMNS + keys)


def _meet(reach: Reach, wanted: list[tuple[int, int, int]]) -> bool:
    nothing = (1, 0)
    return any(
        first <= reach.get(stream, nothing)[1] and last >= reach.get(stream, nothing)[0]
        for stream, first, last in wanted
    )


def _expand(streams: bytes, offsets: bytes, n: int) -> npt.NDArray[np.int64]:
    starts = np.frombuffer(offsets, "<u4")
    ends = np.append(starts, n).astype(np.int64)
    counts = ends[1:] - ends[:-1]
    return np.repeat(np.frombuffer(streams, "<u4").astype(np.int64), counts)


def _typed(raw: npt.NDArray[np.uint64], type_: str) -> npt.NDArray[Any]:
    values = raw.view(DTYPES[type_])
    return values.astype(bool) if type_ == "bool" else values
