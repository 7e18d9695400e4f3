"""The projection: journal entries in, changes to the series out. Pure and deterministic.

A fetch of entries is taken at once: the rows of frames that hold one schema only are split with
numpy, all of them together; everything else is walked record by record.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt

from rank_client.wire.frames import DATA_HEAD, DATA_HEAD_BYTES
from rank_client.wire.records import (
    HEADER_BYTES,
    MAX_EVENT_BYTES,
    UNNUMBERED,
    BadRecord,
    Head,
    Kind,
    column_type_of,
    pack,
    schema_of,
    unpack_map,
    walk,
)

from ..journal.salvage import BROKEN_BATCH, salvage, stream_of
from .changes import Changes, Layout, Stream
from .gate import Gate
from .generations import Generations
from .keys import TOO_MANY_KEYS, Keys
from .rows import Piece, all_alike, blocks, split
from .state import state_of

ITEM_KINDS = {
    Kind.TEXT: "text",
    Kind.PARAMS: "params",
    Kind.SUMMARY: "summary",
    Kind.MEDIA: "media",
}
CONSOLE = ("console", "console-err")  #: `k` of a line that was printed, and not logged as text
UNREADABLE = "not readable in the journal"
ANOTHER_JOURNAL = "streams acknowledged by another journal"
NEVER_CAME = "media lost (its bytes never came)"
MAX_REFUSED = 1 << 48  #: calls that one record may tell of

QUIET_NS = 15 * 10**9  #: how long a stream was unheard when a tick calls it quiet

_HEAD = struct.Struct("<IIQBBHI")
_STEP_WALL = struct.Struct("<qq")
_RECEIVED = struct.Struct("<q")


class Projection:
    """The state of a run's projection between fetches. `take` is its one verb."""

    def __init__(self) -> None:
        self.streams: dict[bytes, Stream] = {}
        self.keys = Keys()
        self.generations = Generations()
        self.gate = Gate()
        self.counters: dict[str, int] = {}
        self.media_wanted: dict[tuple[int, int], str] = {}  #: (stream, seq) → rule, no blob yet
        #: (stream, seq) → rule of files given up when their stream ended; they may still come
        self.media_given_up: dict[tuple[int, int], str] = {}
        #: (stream id, seq) → (sha256, size): files that overtook the record that names them
        self.early_blobs: dict[tuple[bytes, int], tuple[str, int]] = {}
        self.launchers: dict[str, int] = {}  #: launch → exit code of its launcher
        self.duplicates = 0
        self.now_ns = 0
        self._changes = Changes()
        self._pieces: dict[int, list[Piece]] = {}
        self._position = 0
        self._feed: list[tuple[int, tuple[Any, ...]]] = []
        self._newest: dict[int, int] = {}  # stream → position of the last rows it accounts for

    # --- entries -------------------------------------------------------------

    def take(self, entries: Iterable[tuple[int, int, memoryview]]) -> Changes:
        """Project committed entries that follow those taken before."""
        self._changes = changes = Changes()
        self._pieces, self._position, self._feed = {}, 0, []
        self._newest = {}
        for seq, kind, body in entries:
            changes.cursor, last = seq, body
            if kind == Kind.BATCH:
                self._batch(seq, body)
            elif kind == BROKEN_BATCH:
                self._broken_batch(seq, body)
            else:
                self._event(seq, kind, body)
        if changes.cursor:
            changes.tail = crc32(last)
        for keyset, pieces in self._pieces.items():
            self._rows(keyset, pieces)
        self._feed.sort(key=lambda f: f[0])
        changes.feed = [entry for _, entry in self._feed]
        changes.quarantine.sort(key=lambda q: (q[0], q[2]))  # rows were looked at last
        return changes

    def _event(self, seq: int, kind: int, packed: memoryview) -> None:
        try:
            self._mapped_event(seq, kind, unpack_map(bytes(packed)))
        except (BadRecord, KeyError, TypeError, ValueError, AttributeError):
            # Of a damaged journal: after a bad header, what a rank sent may look like an entry.
            self._count("unreadable journal entries")

    def _mapped_event(self, seq: int, kind: int, body: dict[str, Any]) -> None:
        self.now_ns = max(self.now_ns, body.get("r", 0))
        if kind == Kind.OPEN:
            self._open(body)
            return
        if kind == Kind.RULES:
            self.gate = Gate.from_maps(body["rules"])
            return
        if kind == Kind.TICK:
            self._tick(body)
            return
        if kind == Kind.DROP:
            told = len(self._changes.blobs), str(body["sha256"]), str(body["reason"])
            self._changes.dropped.append(told)
            return
        stream = self.streams.get(body.get("stream", b""))
        if kind == Kind.BLOB:
            self._blob(seq, stream, body)
            return
        if stream is None:
            self._count("journal entries of an unknown stream")
            return
        if kind == Kind.GAP:
            self._unreadable(stream, body["from"])
            self._gap(stream, body["from"], body["to"], "numbers its process no longer has")
        elif kind == Kind.BYE:
            stream.bye = True
            self._refusals(stream, body)
            self._give_up_media(stream)
            stream.ended_ns = stream.ended_ns or body["r"]
            self._unreadable(stream, body["final"] + 1)
            self._touch(stream)

    def _open(self, body: dict[str, Any]) -> None:
        hello = {**body["hello"], "stream": body["stream"]}
        kind = str(hello.get("kind", "live"))
        rank = hello.get("rank")
        stream = Stream(
            index=len(self.streams),
            id=body["stream"],
            hello=hello,
            generation=self.generations.place(hello) if kind != "tool" else -1,
            rank=rank if isinstance(rank, int) and abs(rank) < 1 << 31 else -1,
            kind=kind,
        )
        self.streams[stream.id] = stream
        self._touch(stream)
        for id_, generation in self.generations.moved.items():
            late = self.streams[id_]
            late.generation = generation
            self._touch(late)

    def _tick(self, body: dict[str, Any]) -> None:
        self.duplicates = max(self.duplicates, body.get("dup", 0))
        if body.get("changed"):
            self._count(ANOTHER_JOURNAL, body["changed"])
        for name, value in (("quiet", self.now_ns - QUIET_NS), ("back", 0)):
            for id_ in body.get(name, ()):
                stream = self.streams.get(id_)
                if stream is not None:
                    stream.quiet_ns = value
                    self._touch(stream)

    def _unreadable(self, stream: Stream, following: int) -> None:
        """Count what is missing before a number. Ingest had it, as it accepts nothing that does
        not follow: only a damaged journal has such a hole."""
        if following > stream.last_seq + 1:
            self._gap(stream, stream.last_seq + 1, following - 1, UNREADABLE)

    def _gap(self, stream: Stream, first: int, last: int, reason: str) -> None:
        stream.gaps += last - first + 1
        stream.last_seq = last
        self._changes.losses.append((stream.index, first, last, last - first + 1, reason))
        self._touch(stream)

    def _blob(self, entry: int, stream: Stream | None, body: dict[str, Any]) -> None:
        """A file's last byte: only now may a sink see it. Files travel beside the records, so it
        may come before the record that names it."""
        media, told = body["media"], (body["sha256"], body["size"])
        if stream is None or media > stream.last_seq:
            self.early_blobs[body["stream"], media] = told
            return
        rule = self.media_wanted.pop((stream.index, media), None)
        if rule is None and (stream.index, media) in self.media_given_up:
            rule = self.media_given_up.pop((stream.index, media))
            self._count_lost_media(rule, -1)
        if rule is not None:  # else told twice, as a sender may not hear our answer
            self._whole_media(entry, stream, media, rule, told)

    def _give_up_media(self, stream: Stream) -> None:
        """A stream is over, and with it the files whose bytes have not come."""
        for key in [k for k in self.media_wanted if k[0] == stream.index]:
            rule = self.media_given_up[key] = self.media_wanted.pop(key)
            self._changes.lost_media.append((NEVER_CAME, *key))
            self._count_lost_media(rule, 1)

    def _count_lost_media(self, rule: str, n: int) -> None:
        if rule:
            self._count("passed media", -n)
            self._count("lost media", n)

    def _whole_media(
        self, entry: int, stream: Stream, media: int, rule: str, told: tuple[str, int]
    ) -> None:
        self._changes.blobs.append((*told, stream.index, media))
        if rule:
            feed = (entry, "media", 0, stream.index, media, media, rule)
            self._feed.append((self._next(), feed))

    def _touch(self, stream: Stream) -> None:
        self._changes.streams[stream.index] = stream

    def _next(self) -> int:
        self._position += 1
        return self._position

    def _count(self, name: str, n: int = 1) -> None:
        self.counters[name] = self.counters.get(name, 0) + n

    # --- batches -------------------------------------------------------------

    def _batch(self, entry: int, body: memoryview) -> None:
        _, _, _, _, _, id_, first, n, _ = DATA_HEAD.unpack_from(body, 8)
        (self.now_ns,) = _RECEIVED.unpack_from(body)
        stream = self.streams.get(id_)
        records = body[8 + DATA_HEAD_BYTES :]
        if stream is None:
            self._quarantine(entry, None, first, n, "a stream that was never opened")
            return
        if first <= stream.last_seq:
            self._quarantine(entry, None, first, n, "numbers that were told of before")
            return
        self._unreadable(stream, first)
        stream.last_seq = first + n - 1
        stream.stored += n
        stream.quiet_ns = 0
        self._touch(stream)
        if len(records) >= HEADER_BYTES:
            _, size, _, kind, _, schema, _ = _HEAD.unpack_from(records)
            layout = stream.layouts.get(schema)
            if (
                kind == Kind.ROW
                and layout is not None
                and size == layout.row_bytes
                and len(records) == n * size
                and (n == 1 or all_alike(records, size))
            ):
                self._add_piece(entry, stream, layout, first, n, records)
                return
        self._walk(entry, stream, first, n, records)

    def _walk(self, entry: int, stream: Stream, first: int, n: int, records: memoryview) -> None:
        """Record by record; a frame whose chain is not what it says is quarantined whole."""
        heads = list(walk(records))
        end = heads[-1].at + heads[-1].size if heads else 0
        numbered = [h.seq for h in heads if h.kind not in UNNUMBERED]
        if end != len(records) or numbered != list(range(first, first + n)):
            self._quarantine(entry, stream, first, n, "its records are not the ones it announced")
            return
        self._take_records(entry, stream, heads, records)

    def _broken_batch(self, entry: int, body: memoryview) -> None:
        """A batch that is damaged on the disk: the records that are still good, and gaps."""
        stream = self.streams.get(stream_of(body))
        if stream is None:
            self._count("journal entries of an unknown stream")
            return
        found = salvage(body, stream.last_seq)
        for head in found.heads:
            if head.kind not in UNNUMBERED:
                self._unreadable(stream, head.seq)
                stream.last_seq = head.seq
                stream.stored += 1
        self._touch(stream)
        self._take_records(entry, stream, found.heads, found.records)

    def _take_records(
        self, entry: int, stream: Stream, heads: list[Head], records: memoryview
    ) -> None:
        """Good records in order; between those of a broken batch numbers may be missing."""
        run: list[Head] = []
        for head in heads:
            if run and not _goes_on(run[-1], head):
                self._row_run(entry, stream, run, records)
                run = []
            if head.kind == Kind.ROW:
                run.append(head)
            elif head.kind == Kind.SCHEMA:
                self._schema(entry, stream, head, records)
            elif head.kind != Kind.HEAD:
                self._record(entry, stream, head, records)
        if run:
            self._row_run(entry, stream, run, records)

    def _row_run(self, entry: int, stream: Stream, run: list[Head], records: memoryview) -> None:
        """Consecutive rows of one schema."""
        layout = stream.layouts.get(run[0].schema)
        if layout is None or any(h.size != layout.row_bytes for h in run):
            # Whether its schema was refused is not kept: where any was, that is the likely reason.
            refused = layout is None and TOO_MANY_KEYS in self.counters
            reason = TOO_MANY_KEYS if refused else "a row without its schema"
            self._quarantine(entry, stream, run[0].seq, len(run), reason)
            return
        data = records[run[0].at : run[-1].at + run[-1].size]
        if len(data) != len(run) * layout.row_bytes:
            data = memoryview(b"".join(records[h.at : h.at + h.size] for h in run))
        self._add_piece(entry, stream, layout, run[0].seq, len(run), data)

    def _add_piece(
        self,
        entry: int,
        stream: Stream,
        layout: Layout,
        first: int,
        n: int,
        data: bytes | memoryview,
    ) -> None:
        piece = Piece(self._next(), entry, stream, layout, first, n, data, self.gate)
        self._pieces.setdefault(layout.keyset, []).append(piece)

    def _schema(self, entry: int, stream: Stream, head: Head, records: memoryview) -> None:
        try:
            schema = schema_of(head, records)
        except BadRecord as error:
            self._quarantine(entry, stream, head.seq, 0, f"a schema: {error}")
            return
        known = stream.layouts.get(schema.id)
        if known is None:
            if self._too_many(zip(schema.keys, schema.types, strict=True)):
                return  # its rows are quarantined
            layout = self.keys.layout(schema, self._changes)
            stream.layouts[schema.id] = layout
            take = b"" if layout.take is None else layout.take.tobytes()
            self._changes.layouts.append((stream.index, schema.id, layout.keyset, take))
        elif known.columns != tuple(zip(schema.keys, schema.types, strict=True)):
            self._quarantine(entry, stream, head.seq, 0, "a schema id used for two schemas")

    def _too_many(self, columns: Iterable[tuple[str, str]]) -> bool:
        refused = self.keys.too_many(columns)
        if refused:
            self._count(TOO_MANY_KEYS)
        return refused

    # --- rows ----------------------------------------------------------------

    def _rows(self, keyset: int, pieces: list[Piece]) -> None:
        """All rows of a fetch under one key set, split at once, in journal order."""
        stretches: list[npt.NDArray[np.uint64]] = []
        good: list[Piece] = []
        for block in blocks(pieces):
            rows = split(block)
            if rows is None:
                block = [p for p in block if self._whole(p)]
                rows = split(block) if block else None
            if rows is not None:
                stretches.append(rows)
                good.extend(block)
        if good:
            all_rows = stretches[0] if len(stretches) == 1 else np.concatenate(stretches)
            self._changes.rows.append((keyset, all_rows))
        for piece in good:
            self._account_rows(keyset, piece)

    def _whole(self, piece: Piece) -> bool:
        """Does a frame hold the rows it announced, each with its checksum? Else it is
        quarantined whole."""
        if split([piece]) is not None:
            return True
        reason = "its records are not the ones it announced"
        self._quarantine(piece.entry, piece.stream, piece.first, piece.n, reason)
        return False

    def _account_rows(self, keyset: int, piece: Piece) -> None:
        stream, n = piece.stream, piece.n
        at = (n - 1) * piece.layout.row_bytes + HEADER_BYTES
        kind = piece.layout.kind
        newer = piece.position > self._newest.get(stream.index, 0)  # key sets come one by one
        if newer and kind == "metric":  # the others count their own steps
            self._newest[stream.index] = piece.position
            stream.last_step, stream.last_wall_ns = _STEP_WALL.unpack_from(piece.data, at)
        stream.projected += n
        rule = self._gated(kind, stream.rank, n * len(piece.layout.columns), piece.gate)
        if rule:
            last = piece.first + n - 1
            ref = (piece.entry, "rows", keyset, stream.index, piece.first, last, rule)
            self._feed.append((piece.position, ref))

    def _gated(self, kind: str, rank: int, items: int, gate: Gate) -> str:
        """Count items as passed or held; the rule's name if they pass."""
        rule, passes = gate.decide(kind, rank)
        self._count(f"passed {kind}" if passes else f"held {kind} {rule}", items)
        return rule if passes else ""

    # --- other records -------------------------------------------------------

    def _record(self, entry: int, stream: Stream, head: Head, records: memoryview) -> None:
        try:
            if head.size > MAX_EVENT_BYTES:
                raise BadRecord("larger than a record may be")
            body = unpack_map(bytes(records[head.body]))
        except BadRecord as error:
            self._quarantine(entry, stream, head.seq, 1, str(error))
            return
        try:
            if head.kind == Kind.KV:
                self._kv(entry, stream, head.seq, body)
                return  # counted with the rows
            if head.kind in ITEM_KINDS:
                self._item(entry, stream, head, body)
            else:
                self._control(stream, head, body)
                stream.control += 1
                return
        except (KeyError, TypeError, ValueError, OverflowError, struct.error) as error:
            self._quarantine(entry, stream, head.seq, 1, f"a field: {type(error).__name__}")
            return
        stream.projected += 1

    def _kv(self, entry: int, stream: Stream, seq: int, body: dict[str, Any]) -> None:
        values = sorted(((k, column_type_of(v)), v) for k, v in _map(body["v"]).items())
        columns = tuple(c for c, _ in values)
        if self._too_many(columns):
            self._quarantine(entry, stream, seq, 1, TOO_MANY_KEYS)
            return
        codes = "".join("d" if t == "f8" else "q" for _, t in columns)
        packed = struct.pack(f"<qqq{codes}", body["s"], body["w"], 0, *(v for _, v in values))
        row = pack(Kind.ROW, seq, packed)
        keyset = self.keys.set_of(columns, self._changes)
        layout = Layout(0, keyset, len(row), None, columns)
        self._add_piece(entry, stream, layout, seq, 1, row)

    def _item(self, entry: int, stream: Stream, head: Head, body: dict[str, Any]) -> None:
        kind, where = ITEM_KINDS[Kind(head.kind)], (stream.index, head.seq, _i64(body["w"]))
        step = None if body.get("s") is None else _i64(body["s"])
        if kind == "media":
            named = (str(body["what"]), str(body["key"]), str(body["name"]))
            meta = _map(body.get("meta") or {})
            rule = self._gated(kind, stream.rank, 1, self.gate)
            self._changes.media.append((*where, step, *named, meta, rule))
            told = self.early_blobs.pop((stream.id, head.seq), None)
            if told is None:
                self.media_wanted[stream.index, head.seq] = rule  # in the feed when they are here
            else:
                self._whole_media(entry, stream, head.seq, rule, told)
            return
        if kind == "text":
            kind = "console" if str(body.get("k", "")) in CONSOLE else kind
            self._changes.texts.append((*where, step, str(body["l"]), str(body["t"])))
        else:
            self._changes.maps.append((kind, *where, _map(body["v"])))
        rule = self._gated(kind, stream.rank, 1, self.gate)
        if rule:
            feed = (entry, kind, 0, stream.index, head.seq, head.seq, rule)
            self._feed.append((self._next(), feed))

    def _control(self, stream: Stream, head: Head, body: dict[str, Any]) -> None:
        if head.kind == Kind.LOSS:
            reason = str(body.get("reason", "unknown"))
            n, media = _i64(body.get("n", 0)), _i64(body.get("media", -1))
            if not 0 <= n <= MAX_REFUSED:
                raise ValueError(n)
            stream.refused += n
            self._changes.losses.append((stream.index, head.seq, head.seq, n, reason))
            wanted = self.media_wanted.pop((stream.index, media), None)
            if wanted is not None:
                self._changes.lost_media.append((reason, stream.index, media))
                self._count_lost_media(wanted, 1)
        elif head.kind == Kind.END:
            stream.ended_ns = _i64(body.get("w", 0))
            stream.status = str(body.get("status", ""))[:32]
            stream.text = str(body.get("text", ""))
            self._refusals(stream, body)
            if stream.kind == "tool" and isinstance(body.get("code"), int):
                self.launchers[str(stream.hello.get("launch", ""))] = body["code"]
        else:
            self._count("records of an unknown kind")

    def _refusals(self, stream: Stream, body: dict[str, Any]) -> None:
        """The sums a stream ends with: what no LOSS record told of is told now."""
        bad, refused, owed = body.get("bad"), body.get("refused"), body.get("owed")
        if isinstance(bad, int) and 0 <= bad <= MAX_REFUSED:
            stream.bad = max(stream.bad, bad)
        if not isinstance(refused, int) or not stream.refused < refused <= MAX_REFUSED:
            return
        reasons = owed if isinstance(owed, dict) else {}
        untold = refused - stream.refused
        for reason, n in [*reasons.items(), ("refused at its end", untold)]:
            n = min(n, untold) if isinstance(n, int) else 0
            if n > 0:
                last = stream.last_seq
                self._changes.losses.append((stream.index, last, last, n, str(reason)))
                untold -= n
        stream.refused = refused

    def _quarantine(
        self, entry: int, stream: Stream | None, first: int, n: int, reason: str
    ) -> None:
        if stream is not None:
            stream.quarantined += n
            self._touch(stream)
        index = None if stream is None else stream.index
        self._changes.quarantine.append((entry, index, first, n, reason))

    def state(self) -> tuple[str, str]:
        """(running | completed | failed | lost, why)."""
        return state_of(self.generations, self.streams.values(), self.launchers, self.now_ns)


def _goes_on(before: Head, head: Head) -> bool:
    """Is this the next row of one stretch of rows?"""
    same = head.kind == Kind.ROW and head.schema == before.schema
    return same and head.seq == before.seq + 1


def _i64(value: Any) -> int:
    """An integer that a column can hold: a rank may say anything. Raises what `_record` catches."""
    number = int(value)
    if not -(1 << 63) <= number < 1 << 63:
        raise OverflowError(number)
    return number


def _map(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(type(value).__name__)
    return value
