"""The loop around every sink: feed → items → batches → delivery → receipt. Retries, splitting,
quarantine and accounting are written here, once.

An intent is noted before a delivery and the receipt, with cursor and counts, after it; so a death
at any point costs at most one batch sent `again`. What was dealt with is known by (stream, kind,
sequence number), never by a position in the feed: a rebuilt series is not sent twice.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import apsw
import numpy as np

from ..ingest.media import blob_path
from ..series.reader import DTYPES, Block, FeedEntry, Reader, StreamRow
from .base import (
    Item,
    Media,
    Off,
    Params,
    Refused,
    Rows,
    RunInfo,
    Sent,
    Sink,
    Summary,
    Text,
    Unavailable,
)
from .retry import Backoff
from .store import Spans, Store

FETCH_ENTRIES = 512
FETCH_RECORDS = 8192  #: of a batch, about: after an outage entries are long
ENDED = ("completed", "failed", "lost")

log = logging.getLogger("rankgate.sinks")


class Loop:
    """One run to one sink. `step` does what is due and says in how many seconds to call again.

    `done` is set when everything is dealt with and the backend's run closed: once the run has
    ended, or (`wait_for_end` False, for an export) as soon as there is no more. `off` says why the
    sink cannot work here.
    """

    def __init__(
        self,
        reader: Reader,
        store: Store,
        sink: Sink,
        info: RunInfo,
        backoff: Backoff,
        wait_for_end: bool = True,
    ) -> None:
        self.done = False
        self.off = ""
        self._reader = reader
        self._store = store
        self._sink = sink
        self._info = info
        self._backoff = backoff
        self._wait_for_end = wait_for_end
        self._opened = False
        self._intended = store.intended()
        self._spans, self._media = store.taken()
        self._streams: dict[int, StreamRow] = {}
        self._batch: tuple[list[FeedEntry], list[Item]] | None = None
        self._quarantine: list[tuple[int, str, str]] = []

    def step(self) -> float:
        """Never raises; what goes wrong is in the store, and tried again."""
        try:
            return self._step()
        except Off as error:
            self._store.forget_puts()
            self._store.note(state="off", reason=str(error))
            self.off = str(error)
            return 0.0
        except Unavailable as error:
            return self._retry(str(error), error.after_seconds)
        except Exception as error:  # a vendor's package may raise anything at all
            log.exception("sink failed")
            return self._retry(f"{type(error).__name__}: {error}", None)

    def _retry(self, reason: str, after_seconds: float | None) -> float:
        self._store.forget_puts()
        self._quarantine.clear()
        try:
            self._store.note(state="retrying", reason=reason[:1000])
        except apsw.Error as error:
            log.error("cannot note that (%s): %s", reason, error)  # its own disk is full, say
        return self._backoff.next_seconds(after_seconds)

    def _step(self) -> float:
        if not self._opened:
            self._sink.open(self._info, self._store)
            self._opened = True
            self._store.note(state="delivering", reason="")
        entries, items = self._batch or self._fetch()
        self._batch = (entries, items)
        if not entries:
            self._batch = None
            return self._idle()
        sent = Sent()
        if items:
            again = any(self._may_be_there(entry) for entry in entries)
            self._intended |= self._reach(entries)
            self._store.intend(self._intended)
            sent = self._deliver(items, again)
        self._receipt(entries, items, sent)
        self._batch = None
        self._backoff.reset()
        return 0.0

    def _may_be_there(self, entry: FeedEntry) -> bool:
        """Did a delivery that has no receipt hold a part of this? Asked of the items' own numbers:
        a series that is being rebuilt gives them out in other batches."""
        return entry.first <= self._intended.get(self._key(entry), 0)

    def _reach(self, entries: list[FeedEntry]) -> Spans:
        """(stream, kind) → the highest number these entries hold, or one intended before."""
        reach: Spans = {}
        for entry in entries:
            key = self._key(entry)
            reach[key] = max(reach.get(key, self._intended.get(key, 0)), entry.last)
        return reach

    def _key(self, entry: FeedEntry) -> tuple[bytes, str]:
        """Files come in any order, so that of theirs each stands for itself."""
        kind = f"media {entry.first}" if entry.kind == "media" else entry.kind
        return self._streams[entry.stream].id, kind

    # --- fetching ------------------------------------------------------------

    def _cursor(self) -> int:
        """A hint only: valid for one build of series.db."""
        if self._store.about("build") != self._reader.about().build:
            return 0
        return int(self._store.about("feed", 0))

    def _fetch(self) -> tuple[list[FeedEntry], list[Item]]:
        entries = self._reader.feed(self._cursor(), FETCH_ENTRIES)
        if entries:
            self._streams = {s.index: s for s in self._reader.streams()}
            entries = _bounded(self._as_before(entries))
        wanted = [w for e in entries if (w := self._untaken(e)) is not None]
        blocks = self._blocks(wanted)
        items: list[Item] = []
        for entry in wanted:
            item = self._item(entry, blocks)
            before = items[-1] if items else None
            if isinstance(item, Rows) and isinstance(before, Rows) and _follows(before, item):
                items[-1] = _join(before, item)
            else:
                items.append(item)
        return entries, items

    def _as_before(self, entries: list[FeedEntry]) -> list[FeedEntry]:
        """Up to the last that may be there: with newer items before them in its requests, a sink
        could not tell which of these are in doubt."""
        doubted = [i for i, entry in enumerate(entries) if self._may_be_there(entry)]
        return entries[: doubted[-1] + 1] if doubted else entries

    def _untaken(self, entry: FeedEntry) -> FeedEntry | None:
        stream = self._streams[entry.stream].id
        if entry.kind == "media":
            return None if (stream, entry.first) in self._media else entry
        last = self._spans.get((stream, entry.kind), 0)
        if entry.last <= last:
            return None
        return replace(entry, first=max(entry.first, last + 1))

    def _blocks(self, entries: Sequence[FeedEntry]) -> dict[int, Block]:
        spans: dict[int, list[tuple[int, int, int]]] = {}
        for entry in entries:
            if entry.kind == "rows":
                spans.setdefault(entry.keyset, []).append((entry.stream, entry.first, entry.last))
        return {keyset: self._reader.rows(keyset, s) for keyset, s in spans.items()}

    def _item(self, entry: FeedEntry, blocks: dict[int, Block]) -> Item:
        stream, reader = self._streams[entry.stream], self._reader
        where: dict[str, Any] = {"stream": stream.id, "rank": stream.rank, "seq": entry.first}
        if entry.kind == "rows":
            return self._rows(entry, stream, blocks[entry.keyset])
        if entry.kind == "text":
            wall, step, level, text = reader.text_at(entry.stream, entry.first)
            return Text(**where, wall_ns=wall, level=level, text=text, step=step)
        if entry.kind == "media":
            return self._media_item(entry, where)
        wall, values = reader.map_at(entry.kind, entry.stream, entry.first)
        kind = Params if entry.kind == "params" else Summary
        return kind(**where, wall_ns=wall, values=values)

    def _rows(self, entry: FeedEntry, stream: StreamRow, block: Block) -> Rows:
        # A block is sorted by (stream, seq), so an entry is one stretch of it.
        start, end = np.searchsorted(block.stream, [entry.stream, entry.stream + 1])
        first, last = np.searchsorted(block.seq[start:end], [entry.first, entry.last + 1]) + start
        here = slice(int(first), int(last))
        columns: dict[str, Any] = {}
        for i, (name, type_) in enumerate(self._reader.keyset(entry.keyset)):
            values = np.ascontiguousarray(block.values[here, i]).view(DTYPES[type_])
            columns[name] = values.astype(bool) if type_ == "bool" else values
        return Rows(
            stream.id, stream.rank, block.seq[here], block.step[here], block.wall_ns[here], columns
        )

    def _media_item(self, entry: FeedEntry, where: dict[str, Any]) -> Media:
        row = self._reader.media_at(entry.stream, entry.first)
        assert row.sha256 is not None and row.size_bytes is not None  # else it is not in the feed
        return Media(
            **where,
            wall_ns=row.wall_ns,
            what=row.what,
            key=row.key,
            name=row.name,
            step=row.step,
            path=blob_path(self._reader.run_dir, row.sha256),
            sha256=row.sha256,
            size_bytes=row.size_bytes,
            meta=row.meta,
        )

    # --- delivering ----------------------------------------------------------

    def _deliver(self, items: list[Item], again: bool) -> Sent:
        """Send a batch; one that is refused is halved down to the bad item, which is kept aside."""
        try:
            return self._sink.send(items, again)
        except Refused as error:
            halves = list(split(items))
            if not halves:
                self._quarantine.append((items[0].items, _name(items[0]), str(error)[:1000]))
                return Sent()
        total = Sent()
        for half in halves:
            add(total, self._deliver(half, again))
        return total

    def _receipt(self, entries: list[FeedEntry], items: list[Item], sent: Sent) -> None:
        media = [(self._streams[e.stream].id, e.first) for e in entries if e.kind == "media"]
        for entry in entries:
            if entry.kind != "media":
                key = (self._streams[entry.stream].id, entry.kind)
                self._spans[key] = max(self._spans.get(key, 0), entry.last)
        self._media.update(media)
        done = {self._key(e) for e in entries if e.kind == "media"}
        intended = {
            key: last
            for key, last in self._intended.items()
            if key not in done and last > self._spans.get(key, 0)
        }
        self._store.receipt(
            delivered=sent.delivered,
            skipped=sent.skipped,
            maybe_duplicate=sent.maybe_duplicate,
            spans={
                (self._streams[e.stream].id, e.kind): self._spans[
                    self._streams[e.stream].id, e.kind
                ]
                for e in entries
                if e.kind != "media"
            },
            media=media,
            quarantine=self._quarantine,
            intended=intended,
            about={
                "state": "delivering",
                "reason": "",
                "build": self._reader.about().build,
                "feed": entries[-1].id,
                "sent_wall_ns": _newest(items) or self._store.about("sent_wall_ns", 0),
            },
        )
        self._intended = intended  # only now: without a receipt it may be there still
        self._quarantine.clear()

    # --- the end -------------------------------------------------------------

    def _idle(self) -> float:
        about = self._reader.about()
        if self._store.about("build") != about.build:
            self._store.note(build=about.build, feed=0)
        if self._wait_for_end and about.state not in ENDED:
            return 0.2
        state = about.state if about.state in ENDED else "lost"
        sent = self._sink.close(state, about.reason)
        self._store.receipt(
            delivered=sent.delivered,
            skipped=sent.skipped,
            maybe_duplicate=sent.maybe_duplicate,
            spans={},
            media=[],
            quarantine=[],
            intended=self._intended,
            about={"state": "drained", "reason": "", "closed": about.state},
        )
        self._opened = False
        self.done = True
        return 0.2


def _bounded(entries: list[FeedEntry]) -> list[FeedEntry]:
    """The first of them, never cut between two of one journal entry."""
    records = 0
    for i, entry in enumerate(entries[:-1]):
        records += entry.last - entry.first + 1
        if records >= FETCH_RECORDS and entries[i + 1].entry != entry.entry:
            return entries[: i + 1]
    return entries


def add(total: Sent, sent: Sent) -> None:
    total.delivered += sent.delivered
    total.maybe_duplicate += sent.maybe_duplicate
    for reason, items in sent.skipped.items():
        total.skip(reason, items)


def split(items: list[Item]) -> Iterator[list[Item]]:
    """Two halves of a batch: by items, of one item by rows, of one row by keys; none for a
    single point, line or file."""
    if len(items) > 1:
        middle = len(items) // 2
        yield items[:middle]
        yield items[middle:]
        return
    [item] = items
    if not isinstance(item, Rows):
        return
    if len(item.seq) > 1:
        middle = len(item.seq) // 2
        yield [_cut(item, slice(0, middle))]
        yield [_cut(item, slice(middle, None))]
    elif len(item.columns) > 1:
        names = list(item.columns)
        for part in (names[: len(names) // 2], names[len(names) // 2 :]):
            yield [replace(item, columns={name: item.columns[name] for name in part})]


def _cut(rows: Rows, part: slice) -> Rows:
    return Rows(
        rows.stream,
        rows.rank,
        rows.seq[part],
        rows.step[part],
        rows.wall_ns[part],
        {name: values[part] for name, values in rows.columns.items()},
    )


def _follows(before: Rows, after: Rows) -> bool:
    return (
        before.stream == after.stream
        and before.columns.keys() == after.columns.keys()
        and all(before.columns[k].dtype == after.columns[k].dtype for k in before.columns)
    )


def _join(before: Rows, after: Rows) -> Rows:
    return Rows(
        before.stream,
        before.rank,
        np.concatenate((before.seq, after.seq)),
        np.concatenate((before.step, after.step)),
        np.concatenate((before.wall_ns, after.wall_ns)),
        {k: np.concatenate((v, after.columns[k])) for k, v in before.columns.items()},
    )


def _name(item: Item) -> str:
    """What a quarantined item is, for people."""
    if isinstance(item, Rows):
        return f"{next(iter(item.columns))} step {int(item.step[0])} rank {item.rank}"
    if isinstance(item, Media):
        return f"{item.what} {item.key} rank {item.rank}"
    return f"{type(item).__name__.lower()} record {item.seq} rank {item.rank}"


def _newest(items: Sequence[Item]) -> int:
    return max(
        (int(i.wall_ns.max()) if isinstance(i, Rows) else i.wall_ns for i in items), default=0
    )
