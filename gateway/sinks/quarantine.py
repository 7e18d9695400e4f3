"""What a backend will never take: kept aside with its reason, until a person releases it.

An item is known by what it is for ever (stream, number, key), so that a rebuilt series still has
it. One that is to be tried again stays counted here until the receipt of that try. Lives in the
sink's own file, and is written by whoever holds the sink's lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import apsw

from ..series.db import fetch, open_reader

SCHEMA = """
CREATE TABLE IF NOT EXISTS quarantine(
  id INTEGER PRIMARY KEY AUTOINCREMENT, at_ns INTEGER NOT NULL, items INTEGER NOT NULL,
  what TEXT NOT NULL, reason TEXT NOT NULL,
  kind TEXT NOT NULL, stream BLOB NOT NULL, seq INTEGER NOT NULL, key TEXT NOT NULL,
  asked INTEGER NOT NULL DEFAULT 0 -- 1: to be tried again, 2: that try may have got through
) STRICT;
CREATE INDEX IF NOT EXISTS quarantine_asked ON quarantine(asked) WHERE asked > 0;
"""

ASKED, BEGUN = 1, 2
SKIPPED = "skipped by hand"  #: the reason under which a person's skips are counted

_COLUMNS = "id, at_ns, items, what, reason, kind, stream, seq, key, asked"


@dataclass(frozen=True, slots=True)
class Kept:
    """An item as it is set aside: `key` names the one point of a row, else it is empty."""

    kind: str  #: rows | text | params | summary | media
    stream: bytes
    seq: int
    key: str
    items: int
    what: str  #: for people
    reason: str


@dataclass(frozen=True, slots=True)
class Row:
    """An item in quarantine; ids are never given twice."""

    id: int
    at_ns: int
    items: int
    what: str
    reason: str
    kind: str
    stream: bytes
    seq: int
    key: str
    asked: int  #: 0 | ASKED | BEGUN


class Quarantine:
    """The writing end. `add` and `settle` are for inside a transaction of the caller's."""

    def __init__(self, db: apsw.Connection, clean: Callable[[str], str]) -> None:
        """`clean` takes secrets out of a backend's reason."""
        self._db = db
        self._clean = clean

    def add(self, kept: Iterable[Kept]) -> None:
        now = time.time_ns()
        self._db.executemany(
            "INSERT INTO quarantine(at_ns, items, what, reason, kind, stream, seq, key)"
            " VALUES(?,?,?,?,?,?,?,?)",
            [
                (now, k.items, k.what, self._clean(k.reason), k.kind, k.stream, k.seq, k.key)
                for k in kept
            ],
        )

    def due(self, limit: int) -> list[Row]:
        """What is to be tried again now: first all that may have got through, and alone, for
        they are in doubt together."""
        sql = f"SELECT {_COLUMNS} FROM quarantine WHERE asked = ? ORDER BY id LIMIT ?"  # noqa: S608
        found = fetch(self._db, sql, (BEGUN, limit)) or fetch(self._db, sql, (ASKED, limit))
        return [Row(*row) for row in found]

    def begin(self, ids: Iterable[int]) -> None:
        """Before the try: should we die now, the next life knows that these may be there."""
        with self._db:
            self._db.executemany(
                "UPDATE quarantine SET asked = ? WHERE id = ?", [(BEGUN, id_) for id_ in ids]
            )

    def settle(self, gone: Iterable[int], stay: Iterable[tuple[int, str]]) -> None:
        """After the try: `gone` were taken, `stay` (id, reason) were refused once more."""
        now = time.time_ns()
        self._db.executemany("DELETE FROM quarantine WHERE id = ?", [(id_,) for id_ in gone])
        self._db.executemany(
            "UPDATE quarantine SET asked = 0, at_ns = ?, reason = ? WHERE id = ?",
            [(now, self._clean(reason), id_) for id_, reason in stay],
        )

    def retry(self, ids: Sequence[int] | None) -> int:
        """Have these (None: all) tried again; how many items they are."""
        return self._each("UPDATE quarantine SET asked = max(asked, 1)", ids)

    def skip(self, ids: Sequence[int] | None) -> int:
        """Give these (None: all) up; how many items they were."""
        with self._db:
            items = self._each("DELETE FROM quarantine", ids)
            if items:
                self._db.execute(
                    "INSERT INTO skipped VALUES(?,?)"
                    " ON CONFLICT(reason) DO UPDATE SET items = items + excluded.items",
                    (SKIPPED, items),
                )
        return items

    def _each(self, change: str, ids: Sequence[int] | None) -> int:
        """The sum of `items` of the rows that a statement changed."""
        with self._db:
            if ids is None:
                found = fetch(self._db, f"{change} RETURNING items")
            else:
                sql = f"{change} WHERE id = ? RETURNING items"
                found = [row for id_ in set(ids) for row in fetch(self._db, sql, (id_,))]
        return sum(items for (items,) in found)


def read_quarantine(path: Path) -> list[Row]:
    """What a sink's file holds aside, oldest first. Raises apsw.Error when there is no file."""
    db = open_reader(path)
    try:
        sql = f"SELECT {_COLUMNS} FROM quarantine ORDER BY id"  # noqa: S608 - our own words
        return [Row(*row) for row in fetch(db, sql)]
    finally:
        db.close()
