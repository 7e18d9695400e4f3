"""Opening SQLite as this project wants it: each pragma is read back, as a failing one is silent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import apsw

from .home import resting_copy

PAGE_BYTES = 16 << 10
BUSY_MS = 5000


def pragma(db: apsw.Connection, name: str, value: Any) -> None:
    """Set and check one pragma. (A multi-statement string would stop at the first row.)"""
    list(db.execute(f"PRAGMA {name} = {value}"))
    found = db.execute(f"PRAGMA {name}").fetchone()
    if found is None or str(found[0]).lower() != str(value).lower():
        raise apsw.Error(f"PRAGMA {name} is {found}, not {value}")


def open_writer(path: Path, synchronous: int) -> apsw.Connection:
    """The one writing connection. `synchronous`: 1 where the file can be rebuilt, else 2."""
    db = apsw.Connection(str(path))
    db.set_busy_timeout(BUSY_MS)
    if not db.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchone():
        pragma(db, "page_size", PAGE_BYTES)
    pragma(db, "journal_mode", "wal")
    pragma(db, "synchronous", synchronous)
    return db


def open_reader(path: Path) -> apsw.Connection:
    """Read-only. On a read-only mount there is no shared-memory file to make: open immutable. So
    is a copy made at rest, that no log of writes is left beside it."""
    if resting_copy(path):
        return _connect(path, "immutable=1")
    try:
        db = _connect(path, "mode=ro")
        db.set_busy_timeout(BUSY_MS)
        db.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchall()
    except (apsw.CantOpenError, apsw.ReadOnlyError):
        db = _connect(path, "immutable=1")
    return db


def _connect(path: Path, how: str) -> apsw.Connection:
    flags = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
    return apsw.Connection(f"file:{_quote(path)}?{how}", flags)


def _quote(path: Path) -> str:
    return str(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")


def fetch(db: apsw.Connection, sql: str, args: tuple[Any, ...] = ()) -> list[Any]:
    """All rows at once: an open cursor would keep the write-ahead log from ever shrinking."""
    return list(db.execute(sql, args).fetchall())
