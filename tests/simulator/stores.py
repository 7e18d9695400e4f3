"""Stand-ins for series.db, a sink's store, and a backend, with the faults of each.

They keep the contracts of `series.reader.Reader`, `sinks.store.Store` and `sinks.base.Sink`: what
is committed is so at once or not at all, and a killed process finds what was committed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from gateway.ingest.media import blob_path
from gateway.rules.changes import Changes
from gateway.rules.project import Projection
from gateway.rules.rows import TAIL_HEAD_COLUMNS
from gateway.series.tables import About, Block, FeedEntry, MediaRow, StreamRow
from gateway.sinks.base import Item, Media, Memory, Refused, Rows, RunInfo, Sent, Unavailable
from gateway.sinks.keep import HOLDS, Taken
from gateway.sinks.quarantine import Kept, Row
from gateway.sinks.store import Spans

RUN_DIR = Path("/data/runs/r")
_STREAM_FIELDS = StreamRow.__slots__[3:]


class Killed(BaseException):
    """SIGKILL at this very instruction of a process. No `except Exception` stops it."""


class SimSeries:
    """series.db: the committed projection of one journal, as a sink reads it."""

    run_dir = RUN_DIR

    def __init__(self, journal: bytes, build: bytes) -> None:
        self.journal = journal
        self.build = build
        self.cursor = 0
        self.chunks: list[int] = []  #: the cursor after each transaction
        self.state = ("running", "")
        self.counters: dict[str, int] = {}
        self.rows_of: dict[int, list[Any]] = {}
        self.keysets: dict[int, list[tuple[str, str]]] = {}
        self.quarantined: list[tuple[Any, ...]] = []
        self.losses: list[tuple[Any, ...]] = []
        self._streams: list[StreamRow] = []
        self._feed: list[FeedEntry] = []
        self.files: dict[tuple[int, int], MediaRow] = {}
        self._passed: set[tuple[int, int]] = set()
        self._early: set[str] = set()
        self._texts: dict[tuple[int, int], tuple[Any, ...]] = {}
        self._maps: dict[tuple[str, int, int], tuple[int, dict[str, Any]]] = {}
        self._keys: dict[int, tuple[str, str]] = {}

    def apply(self, changes: Changes, projection: Projection) -> None:
        """One transaction: the changes and the cursor."""
        for id_, name, type_ in changes.keys:
            self._keys[id_] = (name, type_)
        for id_, keys in changes.keysets:
            self.keysets[id_] = [self._keys[int(k)] for k in np.frombuffer(keys, "<u4")]
        for keyset, rows in changes.rows:
            self.rows_of.setdefault(keyset, []).append(rows)
        for stream, seq, wall, step, level, text in changes.texts:
            self._texts[stream, seq] = (wall, step, level, text)
        for kind, stream, seq, wall, values in changes.maps:
            self._maps[kind, stream, seq] = (wall, values)
        self._apply_media(changes)
        self._feed += [
            FeedEntry(len(self._feed) + i, *entry) for i, entry in enumerate(changes.feed, 1)
        ]
        self.quarantined += changes.quarantine
        self.losses += changes.losses
        self._streams = [
            StreamRow(s.index, s.id, s.hello, *(getattr(s, f) for f in _STREAM_FIELDS))
            for s in projection.streams.values()
        ]
        self.state = projection.state()
        self.counters = dict(projection.counters)
        self._early = {sha256 for sha256, _ in projection.early_blobs.values()}
        self.cursor = changes.cursor or self.cursor
        self.chunks.append(self.cursor)

    def _apply_media(self, changes: Changes) -> None:
        for stream, seq, wall, step, what, key, name, meta, rule in changes.media:
            about = (wall, step, what, key, name, meta)
            self.files[stream, seq] = MediaRow(stream, seq, *about, None, None, None)
            if rule:
                self._passed.add((stream, seq))
        for reason, stream, seq in changes.lost_media:
            self.files[stream, seq] = replace(self.files[stream, seq], lost=reason)
        came = 0
        for before, dropped, reason in changes.dropped:
            self._apply_blobs(changes.blobs[came:before])
            came = before
            for place, row in self.files.items():
                if row.sha256 == dropped:
                    self.files[place] = replace(row, lost=reason)
        self._apply_blobs(changes.blobs[came:])

    def _apply_blobs(self, blobs: list[tuple[str, int, int, int]]) -> None:
        for sha256, size, stream, seq in blobs:
            whole = {"sha256": sha256, "size_bytes": size, "lost": None}
            self.files[stream, seq] = replace(self.files[stream, seq], **whole)

    # --- what a sink's loop and the choice of files read -----------------------------------------

    def about(self) -> About:
        return About(
            self.build, self.journal, self.cursor, *self.state, 0, 0, self.counters, [], {}
        )

    def streams(self) -> list[StreamRow]:
        return self._streams

    def feed(self, after: int, limit: int) -> list[FeedEntry]:
        """Never cut between two rows of one journal entry, as the real one."""
        end = min(after + limit, len(self._feed))
        while end < len(self._feed) and self._feed[end].entry == self._feed[end - 1].entry:
            end += 1
        return self._feed[after:end]

    def keyset(self, id_: int) -> list[tuple[str, str]]:
        return self.keysets[id_]

    def rows(self, keyset: int, spans: Iterable[tuple[int, int, int]]) -> Block:
        rows = np.concatenate(self.rows_of[keyset]).view(np.int64)
        keep = np.zeros(len(rows), bool)
        for stream, first, last in spans:
            keep |= (rows[:, 0] == stream) & (rows[:, 1] >= first) & (rows[:, 1] <= last)
        rows = rows[keep]
        rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
        values = rows[:, TAIL_HEAD_COLUMNS:].view(np.uint64)
        return Block(rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3], values)

    def text_at(self, stream: int, seq: int) -> tuple[Any, ...]:
        return self._texts[stream, seq]

    def media_at(self, stream: int, seq: int) -> MediaRow:
        return self.files[stream, seq]

    def media(self) -> list[MediaRow]:
        return sorted(self.files.values(), key=lambda row: (row.wall_ns, row.stream, row.seq))

    def media_early(self) -> set[str]:
        return self._early

    def media_passed(self) -> set[tuple[int, int]]:
        return self._passed

    def map_at(self, kind: str, stream: int, seq: int) -> tuple[int, dict[str, Any]]:
        return self._maps[kind, stream, seq]


class NobodyAsks:
    """A quarantine that no person looks into."""

    def due(self, limit: int) -> list[Row]:
        return []


class SimStore:
    """A sink's store. `kill(where)` may raise Killed before or after each commit."""

    quarantine = NobodyAsks()

    def __init__(self, committed: dict[str, Any], kill: Callable[[str], None]) -> None:
        self._kept = committed
        self._kill = kill
        self._puts: dict[str, Any] = {}

    def get(self, key: str) -> Any:
        return self._puts.get(key, self._kept.get(f"memory {key}"))

    def put(self, key: str, value: Any) -> None:
        self._puts[key] = value

    def put_now(self, key: str, value: Any) -> None:
        self._commit({f"memory {key}": value})

    def forget_puts(self) -> None:
        self._puts.clear()

    def about(self, name: str, otherwise: Any = None) -> Any:
        return self._kept.get(name, otherwise)

    def note(self, **values: Any) -> None:
        self._commit(values)

    def intended(self) -> Spans:
        return dict(self._kept.get("intent", {}))

    def intend(self, spans: Spans, piece: str, deaths: int) -> None:
        self.note(intent=dict(spans), trying=piece, deaths=deaths)

    def taken(self) -> tuple[Spans, set[tuple[bytes, int]]]:
        return dict(self._kept.get("spans", {})), set(self._kept.get("media", ()))

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
        kept = self._kept
        self._commit(
            {
                **{f"memory {key}": value for key, value in self._puts.items()},
                **about,
                "spans": {**kept.get("spans", {}), **spans},
                "media": {*kept.get("media", ()), *media},
                "quarantine": [*kept.get("quarantine", ()), *quarantine],
                "delivered": kept.get("delivered", 0) + delivered,
                "skipped": Counter(kept.get("skipped", {})) + Counter(skipped),
                "intent": dict(intended),
            }
        )
        self._puts.clear()

    def _commit(self, values: dict[str, Any]) -> None:
        self._kill("before a commit")
        self._kept.update(values)
        self._kill("after a commit")


def taken_of(committed: dict[str, Any]) -> Taken:
    """What `keep.taken_by` reads of a sink's store."""
    aside = {(k.stream, k.seq) for k in committed.get("quarantine", ()) if k.kind == "media"}
    held = committed.get(f"memory {HOLDS}")
    return Taken(set(committed.get("media", ())), aside, set(held or ()))


Identity = tuple[bytes, int, str]


def identities(item: Item) -> list[Identity]:
    """Each item's name for ever: (stream, seq, key of a point, else its kind)."""
    if isinstance(item, Rows):
        return [(item.stream, seq, key) for seq in item.seq.tolist() for key in item.columns]
    return [(item.stream, item.seq, type(item).__name__.lower())]


class Backend:
    """A service that can be read back but knows no keys: it appends whatever it is sent."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.have: Counter[Identity] = Counter()
        self.away = False
        self.flaky = 0.0
        self.poison = ""  #: a key it will never take
        self.missed: list[Path] = []  #: files that were not there when they were to be sent


class SimSink:
    """Delivers to a `Backend`, reading back what a batch sent `again` may already have left.

    A checkpoint it holds back now and then: its receipt comes first, its bytes are needed later.
    """

    def __init__(
        self, backend: Backend, kill: Callable[[str], None], has: Callable[[Path], bool]
    ) -> None:
        self.stop_asked = ""
        self._backend = backend
        self._kill = kill
        self._has = has

    def open(self, run: RunInfo, memory: Memory) -> None:
        if self._backend.away:
            raise Unavailable("away")
        self._memory = memory

    def send(self, batch: Sequence[Item], again: bool) -> Sent:
        backend = self._backend
        if backend.away:
            raise Unavailable("away")
        names = [name for item in batch for name in identities(item)]
        if backend.poison and any(name[2] == backend.poison for name in names):
            raise Refused("poison")
        self._read_files([item for item in batch if isinstance(item, Media)])
        missing = [n for n in names if n not in backend.have] if again else names
        faulty = backend.random.random() < backend.flaky
        arrives = backend.random.randint(0, len(missing)) if faulty else len(missing)
        backend.have.update(missing[:arrives])
        self._kill("after a delivery")
        if faulty:
            raise Unavailable("the answer was lost")
        return Sent(delivered=sum(item.items for item in batch))

    def _read_files(self, files: list[Media]) -> None:
        random, held = self._backend.random, self._memory.get(HOLDS)
        if held and random.random() < 0.1:
            self._read(blob_path(RUN_DIR, held[0]))
            self._memory.put(HOLDS, None)
            held = None
        for file in files:
            if file.what == "checkpoint" and not held and random.random() < 0.5:
                held = [file.sha256]
                self._memory.put(HOLDS, held)
            else:
                self._read(file.path)

    def _read(self, path: Path) -> None:
        if not self._has(path):
            self._backend.missed.append(path)

    def close(self, state: str, reason: str) -> Sent:
        if held := self._memory.get(HOLDS):
            self._read(blob_path(RUN_DIR, held[0]))
            self._memory.put(HOLDS, None)
        return Sent()
