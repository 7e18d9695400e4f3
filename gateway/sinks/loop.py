"""The loop around every sink: feed → items → batches → delivery → receipt. Retries, splitting,
quarantine and accounting are written here, once.

An intent is noted before a delivery and the receipt, with cursor and counts, after it; so a death
at any point costs at most one batch sent `again`. What was dealt with is known by (stream, kind,
sequence number), never by a position in the feed: a rebuilt series is not sent twice.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import apsw

from ..series.reader import Reader
from ..series.tables import FeedEntry
from .base import Item, Off, Refused, RunInfo, Sent, Sink, Unavailable
from .items import Items
from .keep import DROPPED
from .pieces import identity, newest_wall_ns, piece_name, set_aside, split
from .quarantine import BEGUN, Kept
from .retry import Backoff
from .store import Spans, Store

FETCH_ENTRIES = 512
FETCH_RECORDS = 8192  #: of a batch, about: after an outage entries are long
IDLE_SECONDS = 0.2  #: between two looks for something new
KEEP_ALIVE_SECONDS = 10.0  #: of nothing to deliver, before the sink is called with nothing
FILES_SECONDS = 10.0  #: since the last item that an ended run's files are waited for, as ranks do
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
        self._items = Items(reader)
        self._batch: tuple[list[FeedEntry], list[Item]] | None = None
        self._idle_seconds = 0.0
        self._awaited_seconds = 0.0  # for files, after the run's end
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
            self._store.intend(self._intended, piece_name(WHOLE, items), self._deaths)
            sent = self._deliver(items, again)
        sent.skip(DROPPED, self._dropped)
        self._receipt(entries, items, sent)
        self._batch = None
        self._idle_seconds = self._awaited_seconds = 0.0
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
        return self._items.stream(entry), kind

    # --- fetching ------------------------------------------------------------

    def _cursor(self) -> int:
        """A hint only: valid for one build of series.db."""
        if self._store.about("build") != self._reader.about().build:
            return 0
        return int(self._store.about("feed", 0))

    def _fetch(self) -> tuple[list[FeedEntry], list[Item]]:
        entries = self._reader.feed(self._cursor(), FETCH_ENTRIES)
        if entries:
            self._items.look()
            entries = _bounded(self._as_before(entries))
        wanted = [w for e in entries if (w := self._untaken(e)) is not None]
        items, self._dropped = self._items.of(wanted)
        return entries, items

    def _as_before(self, entries: list[FeedEntry]) -> list[FeedEntry]:
        """Up to the last that may be there: with newer items before them in its requests, a sink
        could not tell which of these are in doubt."""
        doubted = [i for i, entry in enumerate(entries) if self._may_be_there(entry)]
        return entries[: doubted[-1] + 1] if doubted else entries

    def _untaken(self, entry: FeedEntry) -> FeedEntry | None:
        stream = self._items.stream(entry)
        if entry.kind == "media":
            return None if (stream, entry.first) in self._media else entry
        last = self._spans.get((stream, entry.kind), 0)
        if entry.last <= last:
            return None
        return replace(entry, first=max(entry.first, last + 1))

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
                    self._quarantine.append(set_aside(items[0], str(error)[:1000]))
                    return Sent()
        total = Sent()
        for number, half in enumerate(halves):
            total.add(self._send(half, again, f"{place}{number}"))
        return total

    def _send_piece(self, items: list[Item], again: bool, place: str) -> Sent:
        """Raises Refused for one item that no life has survived."""
        if self._ended_in:
            piece = piece_name(place, items)
            deaths = self._deaths if piece == self._ended_in else 0  # its own
            if deaths >= DEADLY:
                raise Refused(f"{deaths} processes in a row ended when it was delivered")
            self._store.note(trying=piece, deaths=deaths)
        return self._sink.send(items, again)

    def _receipt(self, entries: list[FeedEntry], items: list[Item], sent: Sent) -> None:
        media = [(self._items.stream(e), e.first) for e in entries if e.kind == "media"]
        spans: Spans = {}
        for entry in entries:
            if entry.kind != "media":
                key = (self._items.stream(entry), entry.kind)
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
                "sent_wall_ns": newest_wall_ns(items) or self._store.about("sent_wall_ns", 0),
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
        self._items.look()
        found = self._items.again(due)
        sent = Sent()
        if found:
            self._store.quarantine.begin(found)
            sent = self._send(list(found.values()), due[0].asked == BEGUN, RELEASE)
        again = {(k.kind, k.stream, k.seq, k.key): k.reason for k in self._quarantine}
        stay = {r.id: again[identity(r)] for r in due if identity(r) in again}
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

    # --- the end -------------------------------------------------------------

    def _idle(self) -> float:
        about = self._reader.about()
        if self._store.about("build") != about.build:
            self._store.note(build=about.build, feed=0)
        if self._wait_for_end and about.state not in ENDED:
            return self._keep_alive()
        if self._reader.feed(self._cursor(), 1):
            return 0.0  # the last items came after the look at the feed, together with the end
        if self._wait_for_end and self._files_are_on_their_way():
            self._awaited_seconds += IDLE_SECONDS
            return IDLE_SECONDS
        state = about.state if about.state in ENDED else "lost"
        sent = self._sink.close(state, about.reason)
        self._receipt_of_held(sent, {"state": "drained", "reason": "", "closed": about.state})
        self._opened = False
        self.done = True
        return IDLE_SECONDS

    def _files_are_on_their_way(self) -> bool:
        """A rank tells its end before its last files are here: closed now, the backend's run would
        be opened again for each of them."""
        if self._awaited_seconds >= FILES_SECONDS:
            return False
        return any(row.sha256 is None and row.lost is None for row in self._reader.media())

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
