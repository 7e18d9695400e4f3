"""Planted bugs: each is a mistake that somebody could make, and that the simulator must find.

    python -m tests.simulator --mutants
    python -m tests.simulator --mutant "ack before commit"

A mutant is a set of patches on the product's classes, put in for the time of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gateway.ingest import media
from gateway.ingest.answers import Answers
from gateway.ingest.drop import Drops
from gateway.ingest.media import Blob, Job
from gateway.ingest.peers import Peers
from gateway.journal.reader import JournalReader
from gateway.journal.writer import Journal
from gateway.rules.generations import Generations
from gateway.rules.project import Projection
from gateway.sinks import keep
from gateway.sinks.loop import Loop
from gateway.sinks.quarantine import Kept
from rank_client.spool import Spool
from rank_client.wire import records, segments
from rank_client.wire.frames import Type
from rank_client.wire.segments import SegmentLog
from rank_client.wire.session import ClientSession

from . import parts, stores

Patches = list[tuple[Any, str, Any]]
_MUTANTS: dict[str, Callable[[], Patches]] = {}


def mutant(name: str) -> Callable[[Callable[[], Patches]], Callable[[], Patches]]:
    def keep(make: Callable[[], Patches]) -> Callable[[], Patches]:
        _MUTANTS[name] = make
        return make

    return keep


def names() -> list[str]:
    return list(_MUTANTS)


@contextmanager
def planted(name: str) -> Iterator[None]:
    patches = _MUTANTS[name]()
    before = [(owner, attribute, owner.__dict__[attribute]) for owner, attribute, _ in patches]
    for owner, attribute, value in patches:
        setattr(owner, attribute, value)
    try:
        yield
    finally:
        for owner, attribute, value in before:
            setattr(owner, attribute, value)


# --- the gateway's session ------------------------------------------------------------------------


@mutant("ack before commit")
def _() -> Patches:
    right = Answers.ack_body

    def wrong(self: Answers, stream: Any) -> dict[str, Any]:
        return right(self, stream) | {"durable": stream.high_water}

    return [(Answers, "ack_body", wrong)]


@mutant("dedupe without stream")
def _() -> Patches:
    right = Journal.append_batch

    def wrong(self: Journal, now_ns: int, frame: bytes) -> None:
        right(self, now_ns, frame)
        for mark in self.streams.values():  # one high water for all
            mark.high_water = max(m.high_water for m in self.streams.values())

    return [(Journal, "append_batch", wrong)]


def _accepts(rule: Callable[[int, int], bool]) -> Patches:
    """Peers that take a frame when `rule(first, high_water)` says so."""
    right = Peers._on_data

    def wrong(self: Peers, now_ns: int, peer: bytes, frame: bytes, out: Any) -> None:
        head = parts.frames.read_data(frame)
        stream = self.streams.get(head.stream)
        if stream is not None and stream.file is None and head.session == self.session:
            high = stream.journal.streams[stream.id].high_water
            if head.first != high + 1 and rule(head.first, high):
                stream.journal.streams[stream.id].high_water = head.first - 1
        right(self, now_ns, peer, frame, out)

    return [(Peers, "_on_data", wrong)]


@mutant("no dedupe")
def _() -> Patches:
    return _accepts(lambda first, high: first <= high)


@mutant("ack past a gap")
def _() -> Patches:
    return _accepts(lambda first, high: first > high + 1)


@mutant("any session's frames count")
def _() -> Patches:
    right = Peers.receive

    def wrong(self: Peers, now_ns: int, peer: bytes, frame: bytes, out: Any) -> None:
        if len(frame) > 40 and frame[3] == Type.DATA:
            stream = self.streams.get(frame[16:32])
            if stream is not None and stream.file is None:
                head = parts.frames.read_data(frame) if _whole(frame) else None
                if head is not None and head.session != self.session:
                    body = frame[parts.frames.DATA_HEAD_BYTES :]
                    frame = parts.frames.data(
                        self.session, head.stream, stream.high_water + 1, head.n, body
                    )
        right(self, now_ns, peer, frame, out)

    return [(Peers, "receive", wrong)]


def _whole(frame: bytes) -> bool:
    try:
        parts.frames.read_data(frame)
    except parts.frames.BadFrame:
        return False
    return True


@mutant("checksum not looked at")
def _() -> Patches:
    right = parts.frames.read_data

    def wrong(frame: bytes) -> Any:
        if len(frame) < parts.frames.DATA_HEAD_BYTES:
            return right(frame)
        _, _, _, _, session, stream, first, n, _ = parts.frames.DATA_HEAD.unpack_from(frame)
        return parts.frames.Data(session, stream, first, n, len(frame))

    return [(parts.frames, "read_data", wrong)]


@mutant("full disk takes and forgets")
def _() -> Patches:
    right = Journal.commit

    def wrong(self: Journal) -> None:
        try:
            right(self)
        except OSError:
            self._pending.clear()

    return [(Journal, "commit", wrong)]


@mutant("failed sync is tried again")
def _() -> Patches:
    def wrong(self: Journal) -> None:
        try:
            self._log.sync()
        except OSError:
            self._log.sync()

    return [(Journal, "_sync", wrong)]


@mutant("shipper may open a gap")
def _() -> Patches:
    right = Peers._gap

    def wrong(self: Peers, now_ns: int, stream: Any, body: dict[str, Any]) -> None:
        kind, stream.kind = stream.kind, "live"
        right(self, now_ns, stream, body | {"first": body.get("last", 0)})
        stream.kind = kind

    return [(Peers, "_gap", wrong)]


@mutant("a gap is claimed before its commit")
def _() -> Patches:
    right = Peers._gap

    def wrong(self: Peers, now_ns: int, stream: Any, body: dict[str, Any]) -> bool:
        right(self, now_ns, stream, body)
        stream.durable = stream.high_water
        return False

    return [(Peers, "_gap", wrong)]


@mutant("one sender of a file speaks for all")
def _() -> Patches:
    right = Peers._on_bye

    def wrong(self: Peers, now_ns: int, peer: bytes, stream: Any, body: Any, out: Any) -> None:
        right(self, now_ns, peer, stream, {k: v for k, v in body.items() if k != "of"}, out)

    return [(Peers, "_on_bye", wrong)]


@mutant("a file is stored before its sync")
def _() -> Patches:
    return [(Blob, "_sync", lambda self: None)]


@mutant("a file's name is not synced")
def _() -> Patches:
    return [(media, "sync_names", lambda disk, path, above: None)]


# --- the journal ----------------------------------------------------------------------------------


@mutant("mark before sync")
def _() -> Patches:
    right = Journal.commit

    def wrong(self: Journal) -> None:
        if self._pending:
            self._pending.append(records.pack(records.Kind.MARK, self.seq, b""))
        right(self)

    return [(Journal, "commit", wrong)]


@mutant("no sync at commit")
def _() -> Patches:
    return [(Journal, "_sync", lambda self: None)]


@mutant("recovery trusts the page cache")
def _() -> Patches:
    right = SegmentLog.resume

    def wrong(self: SegmentLog, index: int, size: int, sure: int) -> None:
        right(self, index, size, sure=size)

    return [(SegmentLog, "resume", wrong)]


@mutant("recovery does not sync")
def _() -> Patches:
    def wrong(self: SegmentLog, index: int, size: int, sure: int) -> None:
        self.fd = self.disk.open_append(segments.segment_path(self.directory, index))
        self.disk.truncate(self.fd, size)
        self.index, self.size = index, size

    return [(SegmentLog, "resume", wrong)]


@mutant("torn tail is kept")
def _() -> Patches:
    right = SegmentLog.resume

    def wrong(self: SegmentLog, index: int, size: int, sure: int) -> None:
        fd = self.disk.open_read(segments.segment_path(self.directory, index))
        whole = self.disk.size(fd)
        self.disk.close(fd)
        right(self, index, whole, sure)

    return [(SegmentLog, "resume", wrong)]


@mutant("new segment without its table")
def _() -> Patches:
    def wrong(self: Journal) -> list[bytes]:
        table = {"uuid": self.uuid, "r": self.received_ns, "streams": []}
        return [records.pack_map(records.Kind.TABLE, self.durable_seq + 1, table)]

    return [(Journal, "_opening", wrong)]


@mutant("reader does not wait for the mark")
def _() -> Patches:
    right = JournalReader._parse

    def wrong(self: JournalReader, buf: bytes, whole: bool, sealed: bool) -> Any:
        heads = list(records.walk(buf))
        end = heads[-1].at + heads[-1].size if heads else 0
        return right(self, buf[:end], True, True) if heads else right(self, buf, whole, sealed)

    return [(JournalReader, "_parse", wrong)]


# --- the client's session -------------------------------------------------------------------------


@mutant("ack from another journal trusted")
def _() -> Patches:
    right = ClientSession._on_welcome

    def wrong(self: ClientSession, now: float, session: int, body: dict[str, Any]) -> None:
        before = self.durable
        right(self, now, session, body)
        if self.state == "open" and self.durable < before:
            self.durable = before
            self._go_back(before + 1)

    return [(ClientSession, "_on_welcome", wrong)]


@mutant("never sends again")
def _() -> Patches:
    right = ClientSession._go_back

    def wrong(self: ClientSession, to: int) -> None:
        right(self, max(to, self._cursor))

    return [(ClientSession, "_go_back", wrong)]


@mutant("an unknown session is no matter")
def _() -> Patches:
    right = ClientSession._restart

    def wrong(self: ClientSession, now: float) -> None:
        if not self.welcomed:
            right(self, now)

    return [(ClientSession, "_restart", wrong)]


@mutant("credit is never given back")
def _() -> Patches:
    right = ClientSession._on_answer

    def wrong(self: ClientSession, now: float, type_: int, body: dict[str, Any]) -> None:
        before = self._in_flight_bytes
        right(self, now, type_, body)
        self._in_flight_bytes = max(self._in_flight_bytes, before)

    return [(ClientSession, "_on_answer", wrong)]


@mutant("renumber after a gap")
def _() -> Patches:
    right = ClientSession._send_data

    def wrong(self: ClientSession, now: float, out: list[bytes]) -> None:
        right(self, now, out)
        for at, frame in enumerate(out):
            if frame[3] == Type.DATA and self.resent_total > 20:
                head = parts.frames.read_data(frame)
                body = frame[parts.frames.DATA_HEAD_BYTES :]
                out[at] = parts.frames.data(
                    head.session, head.stream, self.durable + 1, head.n, body
                )

    return [(ClientSession, "_send_data", wrong)]


@mutant("orphan under a new id")
def _() -> Patches:
    right = parts.Shipment.__init__

    def wrong(self: parts.Shipment, world: Any, life: parts.Life) -> None:
        right(self, world, life)
        self.session.stream = bytes(reversed(life.stream))

    return [(parts.Shipment, "__init__", wrong)]


# --- the spool ------------------------------------------------------------------------------------


@mutant("trim on send")
def _() -> Patches:
    right = Spool.trim

    def wrong(self: Spool, durable: int) -> None:
        at = self._reader._at[1] - 1 if self._reader._at else durable
        keep, self._keep_bytes = self._keep_bytes, 0
        right(self, max(durable, at))
        self._keep_bytes = keep

    return [(Spool, "trim", wrong)]


@mutant("a short write stays")
def _() -> Patches:
    def wrong(self: SegmentLog, data: bytes) -> None:
        self.size += self._write(self.fd, data)

    return [(SegmentLog, "append", wrong)]


@mutant("healing forgets what was in memory")
def _() -> Patches:
    right = Spool.heal

    def wrong(self: Spool) -> None:
        if self.ring and self.volatile:
            self.ring.pop()
        right(self)

    return [(Spool, "heal", wrong)]


@mutant("schemas are told once only")
def _() -> Patches:
    def wrong(self: Spool) -> list[bytes]:
        return [records.pack_map(records.Kind.HEAD, self.last + 1, self._head)]

    def unsaid(self: Spool, first: int, max_bytes: int) -> tuple[int, bytes]:
        return self._read(first, max_bytes)

    return [(Spool, "_opening", wrong), (Spool, "read", unsaid)]


@mutant("refused calls are not told")
def _() -> Patches:
    return [(Spool, "tell_losses", lambda self: self.owed.clear())]


# --- the rules ------------------------------------------------------------------------------------


@mutant("late orphan wins")
def _() -> Patches:
    def wrong(self: Generations, position: int, hello: dict[str, Any]) -> Any:
        return right(self, len(self.order), hello)

    right = Generations._insert
    return [
        (Generations, "_insert", wrong),
        (Generations, "_put_older_before", lambda self, newer: None),
    ]


@mutant("rules' cursor before their output")
def _() -> Patches:
    right = stores.SimSeries.apply

    def wrong(self: stores.SimSeries, changes: Any, projection: Projection) -> None:
        rows, changes.rows = changes.rows, []
        right(self, changes, projection)
        if self.cursor % 7:  # the second transaction does not always come to be
            for keyset, found in rows:
                self.rows_of.setdefault(keyset, []).append(found)

    return [(stores.SimSeries, "apply", wrong)]


@mutant("rows are gated by the rules at the end of their fetch")
def _() -> Patches:
    right = Projection._gated

    def wrong(self: Projection, kind: str, rank: int, items: int, gate: Any) -> str:
        return right(self, kind, rank, items, self.gate)

    return [(Projection, "_gated", wrong)]


@mutant("rules come with the journal only")
def _() -> Patches:
    right = Projection._mapped_event

    def wrong(self: Projection, seq: int, kind: int, body: dict[str, Any]) -> None:
        if kind != records.Kind.RULES or seq == 1:
            right(self, seq, kind, body)

    return [(Projection, "_mapped_event", wrong)]


@mutant("a file passes by the rules at its last byte")
def _() -> Patches:
    right = Projection._whole_media

    def wrong(
        self: Projection, entry: int, stream: Any, media: int, rule: str, told: tuple[str, int]
    ) -> None:
        name, passes = self.gate.decide("media", stream.rank)
        right(self, entry, stream, media, name if passes else "", told)

    return [(Projection, "_whole_media", wrong)]


# --- files that policy drops ----------------------------------------------------------------------


def _chosen_with(stores_of: Callable[[list[keep.Taken]], list[keep.Taken]]) -> Patches:
    """The choice of files, with other stores than there are."""
    right = keep.choose

    def wrong(reader: Any, policy: Any, stores: Any, is_there: Any) -> dict[str, str]:
        return right(reader, policy, stores_of(list(stores)), is_there)

    return [(keep, "choose", wrong)]


@mutant("a file goes before the last sink's receipt")
def _() -> Patches:
    return _chosen_with(lambda stores: stores[:-1])


@mutant("a file goes that a sink holds back")
def _() -> Patches:
    return _chosen_with(lambda stores: [keep.Taken(s.records, s.aside, set()) for s in stores])


@mutant("what was set aside counts as dealt with")
def _() -> Patches:
    return [(keep.Taken, "needs", lambda self, record: record not in self.records)]


@mutant("a file goes whose record is still to come")
def _() -> Patches:
    return [(stores.SimSeries, "media_early", lambda self: set())]


@mutant("a file goes before the journal tells of it")
def _() -> Patches:
    right = Drops._drop

    def wrong(self: Drops, now_ns: int, blob: Blob, reason: str) -> None:
        if self._peers.let_go(blob.run, blob.sha256):
            self._work(Job(b"", blob, "drop"))
            right(self, now_ns, blob, reason)

    return [(Drops, "_drop", wrong)]


@mutant("a file that came again goes all the same")
def _() -> Patches:
    right = Drops.carry_out

    def wrong(self: Drops, now_ns: int, run: str, request: Any) -> None:
        self._peers.newest_blob[run] = 0
        right(self, now_ns, run, request)

    return [(Drops, "carry_out", wrong)]


@mutant("a removal that was cut short is forgotten")
def _() -> Patches:
    right = keep.choose

    def wrong(reader: Any, policy: Any, stores: Any, is_there: Any) -> dict[str, str]:
        return right(reader, policy, stores, lambda sha256: False)

    return [(keep, "choose", wrong)]


# --- the sinks ------------------------------------------------------------------------------------


@mutant("cursor before delivery")
def _() -> Patches:
    right = Loop._deliver

    def wrong(self: Loop, items: Any, again: bool) -> Any:
        entries = self._batch[0] if self._batch else []
        self._store.note(feed=entries[-1].id, spans=self._store.taken()[0] | self._reach(entries))
        return right(self, items, again)

    return [(Loop, "_deliver", wrong)]


@mutant("no intent")
def _() -> Patches:
    return [(Loop, "_may_be_there", lambda self, entry: False)]


@mutant("an intent covers the next batch only")
def _() -> Patches:
    right = Loop._receipt

    def wrong(self: Loop, entries: Any, items: Any, sent: Any) -> None:
        self._intended = {}
        right(self, entries, items, sent)

    return [(Loop, "_receipt", wrong)]


@mutant("items known by their place in the feed")
def _() -> Patches:
    return [(Loop, "_untaken", lambda self, entry: entry)]


@mutant("a bad item takes its batch along")
def _() -> Patches:
    def wrong(self: Loop, items: Any, again: bool) -> Any:
        try:
            return self._sink.send(items, again)
        except stores.Refused as error:
            n = sum(i.items for i in items)
            self._quarantine.append(Kept("rows", b"", 0, "", n, "batch", str(error)))
            return stores.Sent()

    return [(Loop, "_deliver", wrong)]
