"""What a sink remembers: its cursor, intent, receipt, quarantine and the backend's own notes.

One SQLite file per (run, sink), synchronous=FULL, written by that sink's process alone. Anyone
may read it with `read_view`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw
import msgpack

from rank_client.redact import Redactor

from ..series.db import fetch, open_reader, open_writer
from . import quarantine
from .base import RECEIPTS, Sent
from .quarantine import Kept, Quarantine

_SCHEMA = """
CREATE TABLE IF NOT EXISTS about(name TEXT PRIMARY KEY, value ANY) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS memory(name TEXT PRIMARY KEY, value BLOB) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS taken(
  stream BLOB NOT NULL, kind TEXT NOT NULL, last INTEGER NOT NULL, PRIMARY KEY(stream, kind)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS taken_media(
  stream BLOB NOT NULL, seq INTEGER NOT NULL, PRIMARY KEY(stream, seq)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS skipped(
  reason TEXT PRIMARY KEY, items INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
"""


EXPORT_SUFFIX = ".export"

Spans = dict[tuple[bytes, str], int]  #: (stream, kind) → the highest number


def store_name(sink: str, mode: str) -> str:
    """The file of a sink; an export has its own, as it knows nothing of what a service has."""
    return f"{sink}{EXPORT_SUFFIX if mode == 'offline' else ''}.db"


@dataclass(frozen=True, slots=True)
class SinkView:
    """A sink as people see it. Counts are items; `passed` − all others = waiting."""

    name: str
    state: str  #: starting | delivering | retrying | drained | off | exported
    reason: str
    delivered: int
    skipped: dict[str, int]
    quarantined: int
    maybe_duplicate: int
    sent_wall_ns: int  #: wall time of the newest item delivered
    updated_ns: int
    export: str  #: the folder of a whole offline export, or empty
    asked: int = 0  #: of the quarantined: about to be tried again

    def waiting(self, passed: int) -> int:
        """Items that passed the rules and are neither delivered nor skipped nor quarantined."""
        return max(0, passed - self.delivered - sum(self.skipped.values()) - self.quarantined)


class Store:
    """The writing end. `get`, `put` and `put_now` are the `Memory` a sink sees."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.db = open_writer(path, synchronous=2)
        with self.db:
            for _ in self.db.execute(_SCHEMA + quarantine.SCHEMA):
                pass
        self._secrets = Redactor(os.environ)
        self.quarantine = Quarantine(self.db, self._secrets.text)
        self._puts: dict[str, Any] = {}

    def close(self) -> None:
        self.db.close()

    # --- what a sink remembers -----------------------------------------------

    def get(self, key: str) -> Any:
        if key in self._puts:
            return self._puts[key]
        found = fetch(self.db, "SELECT value FROM memory WHERE name = ?", (key,))
        return msgpack.unpackb(found[0][0], strict_map_key=False) if found else None

    def put(self, key: str, value: Any) -> None:
        self._puts[key] = value

    def put_now(self, key: str, value: Any) -> None:
        self._puts.pop(key, None)
        self._write_memory({key: value})

    def _write_memory(self, values: dict[str, Any]) -> None:
        self.db.executemany(
            "INSERT OR REPLACE INTO memory VALUES(?, ?)",
            [(name, msgpack.packb(value)) for name, value in values.items()],
        )

    def forget_puts(self) -> None:
        """A call failed: what it meant to remember with its receipt is not so."""
        self._puts.clear()

    # --- what the loop remembers ---------------------------------------------

    def about(self, name: str, otherwise: Any = None) -> Any:
        found = fetch(self.db, "SELECT value FROM about WHERE name = ?", (name,))
        return found[0][0] if found else otherwise

    def note(self, **values: Any) -> None:
        values["updated_ns"] = time.time_ns()
        if "reason" in values:  # a backend's words, which may quote a key
            values["reason"] = self._secrets.text(values["reason"])
        with self.db:
            self._set(values)

    def _set(self, values: dict[str, Any]) -> None:
        self.db.executemany("INSERT OR REPLACE INTO about VALUES(?, ?)", list(values.items()))

    def taken(self) -> tuple[Spans, set[tuple[bytes, int]]]:
        """(stream, kind) → last seq dealt with; (stream, seq) of the files dealt with."""
        spans = {(s, k): last for s, k, last in fetch(self.db, "SELECT * FROM taken")}
        return spans, {(s, q) for s, q in fetch(self.db, "SELECT * FROM taken_media")}

    def intended(self) -> Spans:
        """What a delivery that has no receipt may have brought there."""
        packed = self.about("intent")
        return {(s, k): last for s, k, last in msgpack.unpackb(packed)} if packed else {}

    def intend(self, spans: Spans, piece: str, deaths: int) -> None:
        """Before a delivery: should we die now, the next life knows that this may be there, and
        which piece of a batch we did not survive, after so many deaths in a row."""
        self.note(intent=_packed(spans), trying=piece, deaths=deaths)

    def receipt(
        self,
        *,
        delivered: int,
        skipped: dict[str, int],
        maybe_duplicate: int,
        spans: Spans,
        media: Iterable[tuple[bytes, int]],
        quarantine: Iterable[Kept],
        intended: Spans,
        about: dict[str, Any],
    ) -> None:
        """After a delivery: counts, cursor and the sink's own notes in one transaction.
        `intended`: what may be there without a receipt even now."""
        with self.db:
            self._write_memory({**self._puts, RECEIPTS: (self.get(RECEIPTS) or 0) + 1})
            self.db.executemany(
                "INSERT OR REPLACE INTO taken VALUES(?,?,?)",
                [(stream, kind, last) for (stream, kind), last in spans.items()],
            )
            self.db.executemany("INSERT OR IGNORE INTO taken_media VALUES(?,?)", list(media))
            self.quarantine.add(quarantine)
            self._count(delivered, skipped, maybe_duplicate)
            self._set({**about, "intent": _packed(intended), "updated_ns": time.time_ns()})
        self._puts.clear()

    def receipt_of_release(
        self,
        sent: Sent,
        gone: Iterable[int],
        stay: Iterable[tuple[int, str]],
        about: dict[str, Any],
    ) -> None:
        """After another try of what was in quarantine: `gone` ids were taken, `stay` refused."""
        with self.db:
            self._write_memory({**self._puts, RECEIPTS: (self.get(RECEIPTS) or 0) + 1})
            self.quarantine.settle(gone, stay)
            self._count(sent.delivered, sent.skipped, sent.maybe_duplicate)
            self._set({**about, "updated_ns": time.time_ns()})
        self._puts.clear()

    def _count(self, delivered: int, skipped: dict[str, int], maybe_duplicate: int) -> None:
        self.db.executemany(
            "INSERT INTO skipped VALUES(?,?)"
            " ON CONFLICT(reason) DO UPDATE SET items = items + excluded.items",
            list(skipped.items()),
        )
        self._set(
            {
                "delivered": self.about("delivered", 0) + delivered,
                "maybe_duplicate": self.about("maybe_duplicate", 0) + maybe_duplicate,
            }
        )


def _packed(spans: Spans) -> bytes:
    return msgpack.packb([[*key, last] for key, last in spans.items()]) if spans else b""


def read_view(path: Path) -> SinkView:
    """How a sink stands, from its file alone. Raises apsw.Error when there is none."""
    db = open_reader(path)
    try:
        with db:
            about: dict[str, Any] = dict(fetch(db, "SELECT name, value FROM about"))
            skipped = dict(fetch(db, "SELECT reason, items FROM skipped"))
            [(quarantined, asked)] = fetch(
                db,
                "SELECT coalesce(sum(items), 0), coalesce(sum(items * (asked > 0)), 0)"
                " FROM quarantine",
            )
    finally:
        db.close()
    return SinkView(
        path.stem.removesuffix(EXPORT_SUFFIX),
        about.get("state", "starting"),
        about.get("reason", ""),
        about.get("delivered", 0),
        skipped,
        quarantined,
        about.get("maybe_duplicate", 0),
        about.get("sent_wall_ns", 0),
        about.get("updated_ns", 0),
        about.get("export", ""),
        asked,
    )


def read_views(run_dir: Path) -> list[SinkView]:
    """Every sink of a run, by name."""
    out = []
    for path in sorted((run_dir / "sinks").glob("*.db")):
        try:
            out.append(read_view(path))
        except apsw.Error:
            continue  # being made at this moment
    return out
