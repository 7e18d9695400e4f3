"""Reading series.db: plain fetches that end their transaction before anything is made of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from .columns import Columns
from .db import fetch, open_reader
from .tables import About, Block, FeedEntry, MediaRow, Points, StreamRow


class Reader:
    """A read-only view of one run. Raises apsw.Error when there is no series.db.

    `built_in` is where the series are, if not in the run's own directory.
    """

    def __init__(self, run_dir: Path, built_in: Path | None = None) -> None:
        self.run_dir = run_dir
        self._db = open_reader((built_in or run_dir) / "series.db")
        self._inode = self._inode_now()
        self._columns = Columns(self._db)

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

    def media_early(self) -> set[str]:
        """sha256 of the files that came before a record that names them."""
        packed = fetch(self._db, "SELECT value FROM about WHERE name = 'early_blobs'")
        return {sha256 for [early] in packed for *_, sha256, _ in msgpack.unpackb(early)}

    def media_passed(self) -> set[tuple[int, int]]:
        """(stream, seq) of the files that the rules let pass to sinks."""
        return set(fetch(self._db, "SELECT stream, seq FROM media WHERE rule != ''"))

    def losses(self) -> list[tuple[int, int, int, int, str]]:
        """(stream, first, last, n, reason)."""
        return fetch(self._db, "SELECT stream, first, last, n, reason FROM loss")

    def quarantine(self) -> list[tuple[int, int | None, int, int, str]]:
        """(journal entry, stream, first, n, reason)."""
        return fetch(self._db, "SELECT entry, stream, first, n, reason FROM quarantine")

    # --- rows ----------------------------------------------------------------

    def points(self, key: str) -> Points:
        """All points of a key, of every rank and attempt; see `Columns.points`."""
        return self._columns.points(key)

    def heads(
        self, keyset: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(stream, seq, step) of every row of a key set; see `Columns.heads`."""
        return self._columns.heads(keyset)

    def recent_rows(self, streams: Iterable[int], enough: int) -> npt.NDArray[np.int64]:
        """(n, 4) of stream, seq, step, wall_ns; see `Columns.recent_rows`."""
        return self._columns.recent_rows(streams, enough)

    def rows(self, keyset: int, spans: Iterable[tuple[int, int, int]]) -> Block:
        """The rows of these (stream, first seq, last seq), sorted by stream and seq."""
        return self._columns.rows(keyset, spans)

    def keysets(self) -> dict[int, frozenset[str]]:
        """The names of the keys in every key set."""
        names = {id_: name for id_, name, _ in self.keys()}
        rows = fetch(self._db, "SELECT id, keys FROM keyset ORDER BY id")
        return {i: frozenset(names[int(k)] for k in np.frombuffer(p, "<u4")) for i, p in rows}

    def keyset(self, id_: int) -> list[tuple[str, str]]:
        """The (name, type) of a key set's columns, in order."""
        [(packed,)] = fetch(self._db, "SELECT keys FROM keyset WHERE id = ?", (id_,))
        names = {id_: (name, type_) for id_, name, type_ in self.keys()}
        return [names[int(k)] for k in np.frombuffer(packed, "<u4")]

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
            yield f"tail {keyset}", self._columns.tail(keyset, len(keys) // 4).tobytes()
        for table, order in (
            ("stream", "id"), ("key", "id"), ("keyset", "id"), ("layout", "stream, schema"),
            ("segment", "keyset, ordinal"), ("text", "stream, seq"), ("map", "kind, stream, seq"),
            ("media", "stream, seq"), ("loss", "rowid"), ("quarantine", "rowid"), ("feed", "id"),
            ("col", "key, keyset, ordinal"),
        ):  # fmt: skip
            for row in fetch(db, f"SELECT * FROM {table} ORDER BY {order}"):  # noqa: S608
                yield table, row


def _media_row(row: tuple[Any, ...]) -> MediaRow:
    values = list(row)
    values[7] = msgpack.unpackb(row[7])
    return MediaRow(*values)
