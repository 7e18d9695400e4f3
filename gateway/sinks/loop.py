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
from .keep import DROPPED
from .quarantine import BEGUN, Kept, Row
from .retry import Backoff
from .store import Spans, Store

FETCH_ENTRIES = 512
FETCH_RECORDS = 8192  #: of a batch, about: after an outage entries are long
IDLE_SECONDS = 0.2  #: between two looks for something new
KEEP_ALIVE_SECONDS = 10.0  #: of nothing to deliver, before the sink is called with nothing
ENDED = ("completed", "failed", "lost")
WHOLE = "."  #: a batch; its halves are ".0" and ".1", and so on
DEADLY = 12  #: lives in a row that end in the delivery of one item, before it is kept aside
RELEASE = "r."  #: the same of what a person released from the quarantine
NOT_THERE = "the run's series do not have it (any more)"
SURVIVED = {"trying": "", "deaths": 0}
ENDED_IN_DELIVERY = "its process ended in a delivery, and was started again; see gateway.log"

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
        self._idle_seconds = 0.0
        self._ended_in = store.about("trying", "")  # the piece the life before did not survive
        self._deaths = store.about("deaths", 0) + 1 if self._ended_in else 0
        if self._ended_in:
            store.note(state="retrying", reason=ENDED_IN_DELIVERY)
        self._dropped = 0  # files of the open batch that policy dropped
        self._quarantine: list[Kept] = []

    def step(self) -> float:
        """Never raises; what goes wrong is in the store, and tried again."""
        try:
            return self._step()
        except Off as error:
            self._store.forget_puts()
            self._note_trouble("off", str(error))
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
        self._note_trouble("retrying", reason[:1000])
        return self._backoff.next_seconds(after_seconds)

    def _note_trouble(self, state: str, reason: str) -> None:
        self._ended_in, self._deaths = "", 0
        try:
            self._store.note(state=state, reason=reason, **SURVIVED)
        except apsw.Error as error:
            log.error("cannot note that (%s): %s", reason, error)  # its own disk is full, say

    def _step(self) -> float:
        if not self._opened:
            self._sink.open(self._info, self._store)
            self._opened = True
            self._store.note(state="delivering", reason="")
        if self._batch is None and not self._intended and self._release():
            return 0.0
        entries, items = self._batch or self._fetch()
        self._batch = (entries, items)
        if not entries:
            self._batch = None
            return self._idle()
        sent = Sent()
        if items:
            again = any(self._may_be_there(entry) for entry in entries)
            self._intended |= self._reach(entries)
            self._store.intend(self._intended, _piece(WHOLE, items), self._deaths)
            sent = self._deliver(items, again)
        sent.skip(DROPPED, self._dropped)
        self._receipt(entries, items, sent)
        self._batch = None
        self._idle_seconds = 0.0
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
        self._dropped = 0
        for entry in wanted:
            if entry.kind == "media" and self._is_dropped(entry):
                self._dropped += 1
                continue
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
        if entry.kind in ("text", "console"):
            wall, step, level, text = reader.text_at(entry.stream, entry.first)
            console = entry.kind == "console"
            return Text(**where, wall_ns=wall, level=level, text=text, step=step, console=console)
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

    def _is_dropped(self, entry: FeedEntry) -> bool:
        """Did policy drop a file before this sink was there?"""
        lost = self._reader.media_at(entry.stream, entry.first).lost
        return lost is not None and lost.startswith(DROPPED)

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
        return self._send(items, again, WHOLE)

    def _send(self, items: list[Item], again: bool, place: str) -> Sent:
        """`place` is which half of which half of the batch this is. What ended the life before
        is halved too: one item may make a vendor's package crash or hang whenever it comes."""
        halves = list(split(items)) if self._ended_in.startswith(place) else []
        if not halves:
            try:
                return self._send_piece(items, again, place)
            except Refused as error:
                halves = list(split(items))
                if not halves:
                    self._quarantine.append(_kept(items[0], str(error)[:1000]))
                    return Sent()
        total = Sent()
        for number, half in enumerate(halves):
            add(total, self._send(half, again, f"{place}{number}"))
        return total

    def _send_piece(self, items: list[Item], again: bool, place: str) -> Sent:
        """Raises Refused for one item that no life has survived."""
        if self._ended_in:
            piece = _piece(place, items)
            deaths = self._deaths if piece == self._ended_in else 0  # its own
            if deaths >= DEADLY:
                raise Refused(f"{deaths} processes in a row ended when it was delivered")
            self._store.note(trying=piece, deaths=deaths)
        return self._sink.send(items, again)

    def _receipt(self, entries: list[FeedEntry], items: list[Item], sent: Sent) -> None:
        media = [(self._streams[e.stream].id, e.first) for e in entries if e.kind == "media"]
        spans: Spans = {}
        for entry in entries:
            if entry.kind != "media":
                key = (self._streams[entry.stream].id, entry.kind)
                spans[key] = max(spans.get(key, self._spans.get(key, 0)), entry.last)
        done = {self._key(e) for e in entries if e.kind == "media"}
        intended = {
            key: last
            for key, last in self._intended.items()
            if key not in done and last > spans.get(key, self._spans.get(key, 0))
        }
        self._store.receipt(
            delivered=sent.delivered,
            skipped=sent.skipped,
            maybe_duplicate=sent.maybe_duplicate,
            spans=spans,
            media=media,
            quarantine=self._quarantine,
            intended=intended,
            about={
                "state": "delivering",
                "reason": "",
                "build": self._reader.about().build,
                "feed": entries[-1].id,
                "sent_wall_ns": _newest(items) or self._store.about("sent_wall_ns", 0),
                **SURVIVED,
            },
        )
        # Only now: without a receipt all of it may be there, and comes again.
        self._intended = intended
        self._spans.update(spans)
        self._media.update(media)
        self._ended_in, self._deaths = "", 0
        self._quarantine.clear()

    # --- the quarantine ------------------------------------------------------

    def _release(self) -> bool:
        """Once more what a person released from the quarantine; True when there was something.
        Not while a batch is in doubt: what is newer there would hide what of it is."""
        due = self._store.quarantine.due(FETCH_ENTRIES)
        if not due:
            return False
        self._streams = {s.index: s for s in self._reader.streams()}
        found = self._kept_items(due)
        sent = Sent()
        if found:
            self._store.quarantine.begin(found)
            sent = self._send(list(found.values()), due[0].asked == BEGUN, RELEASE)
        again = {(k.kind, k.stream, k.seq, k.key): k.reason for k in self._quarantine}
        stay = {r.id: again[_identity(r)] for r in due if _identity(r) in again}
        stay |= {row.id: NOT_THERE for row in due if row.id not in found}
        self._store.receipt_of_release(
            sent,
            gone=found.keys() - stay.keys(),
            stay=stay.items(),
            about={"state": "delivering", "reason": "", **SURVIVED},
        )
        self._ended_in = ""
        self._quarantine.clear()
        self._backoff.reset()
        return True

    def _kept_items(self, rows: list[Row]) -> dict[int, Item]:
        """id → the item again, by what it is for ever; without those the series have no more."""
        index = {s.id: i for i, s in self._streams.items()}
        places = {i: self._reader.stretches(i) for i in {index.get(r.stream, -1) for r in rows}}
        entries: dict[int, list[FeedEntry]] = {}
        for row in rows:
            stream = index.get(row.stream, -1)
            first, last, keyset = places[stream]
            here = keyset[(first <= row.seq) & (last >= row.seq)] if row.kind == "rows" else [0]
            entries[row.id] = [
                FeedEntry(0, 0, row.kind, int(k), stream, row.seq, row.seq, "") for k in here
            ]
        blocks = self._blocks([entry for each in entries.values() for entry in each])
        found = {r.id: self._kept_item(r, entries[r.id], blocks) for r in rows}
        return {id_: item for id_, item in found.items() if item is not None}

    def _kept_item(
        self, row: Row, entries: list[FeedEntry], blocks: dict[int, Block]
    ) -> Item | None:
        for entry in entries:
            if entry.stream not in self._streams:
                return None
            try:
                if entry.kind == "media" and self._is_dropped(entry):
                    return None
                item = self._item(entry, blocks)
            except ValueError:  # no such record
                return None
            if not isinstance(item, Rows):
                return item
            if len(item.seq) and row.key in item.columns:
                return replace(item, columns={row.key: item.columns[row.key]})
        return None

    # --- the end -------------------------------------------------------------

    def _idle(self) -> float:
        about = self._reader.about()
        if self._store.about("build") != about.build:
            self._store.note(build=about.build, feed=0)
        if self._wait_for_end and about.state not in ENDED:
            return self._keep_alive()
        if self._reader.feed(self._cursor(), 1):
            return 0.0  # the last items came after the look at the feed, together with the end
        state = about.state if about.state in ENDED else "lost"
        sent = self._sink.close(state, about.reason)
        self._receipt_of_held(sent, {"state": "drained", "reason": "", "closed": about.state})
        self._opened = False
        self.done = True
        return IDLE_SECONDS

    def _keep_alive(self) -> float:
        """Time is counted in waits: this reads no clock."""
        if self._idle_seconds >= KEEP_ALIVE_SECONDS:
            sent = self._sink.send([], again=False)
            self._receipt_of_held(sent, {"state": "delivering", "reason": ""})
            self._idle_seconds = 0.0
            self._backoff.reset()
        self._idle_seconds += IDLE_SECONDS
        return IDLE_SECONDS

    def _receipt_of_held(self, sent: Sent, about: dict[str, Any]) -> None:
        """The receipt of a call that brought no new items, but may report ones held before."""
        self._store.receipt(
            delivered=sent.delivered,
            skipped=sent.skipped,
            maybe_duplicate=sent.maybe_duplicate,
            spans={},
            media=[],
            quarantine=[],
            intended=self._intended,
            about=about,
        )


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


def _piece(place: str, items: list[Item]) -> str:
    """A piece of a batch as it is noted: the same text in another life is the same piece."""
    return f"{place} {len(items)} {items[0].stream.hex()} {_name(items[0])}"


def _kept(item: Item, reason: str) -> Kept:
    """A single point, line or file, as it is set aside."""
    kind, seq, key = type(item).__name__.lower(), item.seq, ""
    if isinstance(item, Rows):
        seq, key = int(item.seq[0]), next(iter(item.columns))
    return Kept(kind, item.stream, int(seq), key, item.items, _name(item), reason)


def _identity(row: Row) -> tuple[str, bytes, int, str]:
    return row.kind, row.stream, row.seq, row.key


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
