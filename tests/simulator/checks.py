"""The promises, as a simulated world can see them: it knows what was written, and what is on disk.

At every step: an answer never claims what the gateway's disk would lose with its power. At the
end: everything that must arrive is in journal, series and backend, once, in order, accounted for.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from gateway.ingest.media import blob_path
from gateway.journal.reader import JournalReader
from gateway.rules.gate import Gate
from gateway.rules.project import Projection
from gateway.rules.rows import TAIL_HEAD_COLUMNS
from gateway.series.tables import StreamRow
from gateway.sinks.keep import DROPPED
from rank_client.wire.frames import COMMON, COMMON_BYTES, DATA_HEAD, DATA_HEAD_BYTES, Type
from rank_client.wire.records import UNNUMBERED, Kind, unpack_map, walk

from .disk import File
from .parts import JOURNAL, RUN, Life, SimFile, SinkPart
from .stores import RUN_DIR, SimSeries, taken_of

if TYPE_CHECKING:
    from .world import World

#: what was logged → what the rules call it
KINDS = {"row": "metric", "text": "text", "params": "params", "media": "media"}
_ANSWERS = (Type.WELCOME, Type.ACK, Type.PONG, Type.BYE_ACK)


class Checks:
    """Raises AssertionError where a promise is broken."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.replaced = False
        self.rules_changed = False
        self.blobs: dict[bytes, SimFile] = {}  #: the streams that carry files
        self._lives: dict[bytes, Life] = {}
        self._given_up: dict[bytes, set[int]] = {}
        #: stream → (first, last, the rules that stood before) of its batches
        self._gates: dict[bytes, list[tuple[int, int, Gate]]] = {}

    def life(self, stream: bytes) -> Life:
        if stream not in self._lives:
            self._lives = {life.stream: life for life in self.world.lives}
        return self._lives[stream]

    def journal_replaced(self) -> None:
        self.replaced = True

    # --- at every step ---------------------------------------------------------------------------

    def answer(self, frame: bytes) -> None:
        """A frame that the gateway sends: what it claims must be on its disk, synced."""
        self.world.received(frame)
        _, _, type_, _, _, stream = COMMON.unpack_from(frame)
        if type_ not in _ANSWERS:
            return
        if stream in self.blobs:
            if type_ == Type.BYE_ACK:
                self._file_is_safe(self.blobs[stream])
            return
        claimed = unpack_map(frame[COMMON_BYTES:])["durable"]
        safe = self._safe().get(stream, 0)
        assert claimed <= safe, f"{Type(type_).name} claims {claimed}, only {safe} is on disk"

    def _file_is_safe(self, file: SimFile) -> None:
        path = str(blob_path(self.world.gateway.directory(RUN), file.sha256))
        found = self.world.gateway_disk.files.get(path)
        safe = found is not None and found.entry_synced and found.synced == file.data
        assert safe, "a file is called stored that a loss of power would take"

    def removes(self, sha256: str) -> None:
        """A file goes now: the journal is sure to tell of it, and no sink still needs it."""
        told, names, high = self._told_of(sha256)
        assert told, "a file goes before the journal is sure to tell of it"
        for stream, number in names:
            assert number <= high.get(stream, 0), "a file goes whose record is still to come"
            if not self._passes(stream, number):
                continue
            for sink in self.world.sinks:
                taken = taken_of(sink.committed)
                done = (stream, number) in taken.records - taken.aside
                assert done and sha256 not in taken.held, f"a sink still needs file {number}"

    def _told_of(self, sha256: str) -> tuple[bool, list[tuple[bytes, int]], dict[bytes, int]]:
        """Of what a loss of power leaves in the journal: is the file's end there, after it was
        last told to be here; the records that name it; and how far each stream is stored."""
        told, names, high = False, [], {}
        gate = Gate()
        self._gates.clear()
        for path, file in sorted(self.world.gateway_disk.files.items()):
            if not (path.startswith(JOURNAL) and file.entry_synced):
                continue
            for head in walk(file.synced):
                if head.kind == Kind.BATCH:
                    at = head.at + 32
                    _, _, _, _, _, stream, first, n, _ = DATA_HEAD.unpack_from(file.synced, at)
                    high[stream] = first + n - 1
                    self._gates.setdefault(stream, []).append((first, high[stream], gate))
                elif head.kind == Kind.RULES:
                    gate = Gate.from_maps(unpack_map(file.synced[head.body])["rules"])
                elif head.kind == Kind.DROP:
                    told |= unpack_map(file.synced[head.body])["sha256"] == sha256
                elif head.kind == Kind.BLOB:
                    body = unpack_map(file.synced[head.body])
                    if body["sha256"] == sha256:
                        told = False
                        names.append((body["stream"], body["media"]))
        return told, names, high

    def _passes(self, stream: bytes, number: int) -> bool:
        """Is a record in the journal, and do the rules that stood before it let it pass?"""
        life = self.life(stream)
        for first, last, gate in self._gates.get(stream, ()):
            if first <= number <= last:
                return gate.decide(KINDS[life.wrote[number - 1][0]], life.rank)[1]
        return False

    def _safe(self) -> dict[bytes, int]:
        """stream → the last number that a loss of power leaves in the journal."""
        safe: dict[bytes, int] = {}
        for path, file in sorted(self.world.gateway_disk.files.items()):
            if path.startswith(JOURNAL) and file.entry_synced:
                safe.update(self._marks(file))
        return safe

    def _marks(self, file: File) -> dict[bytes, int]:
        at, marks = file.scanned
        if marks is None or at > len(file.synced):
            at, marks = 0, {}
        assert isinstance(marks, dict)
        for head in walk(file.synced, at):
            at = head.at + head.size
            if head.kind == Kind.BATCH:
                _, _, _, _, _, stream, first, n, _ = DATA_HEAD.unpack_from(
                    file.synced, head.at + 32
                )
                marks[stream] = first + n - 1
            elif head.kind == Kind.GAP:
                body = unpack_map(file.synced[head.body])
                marks[body["stream"]] = body["to"]
            elif head.kind == Kind.TABLE:
                marks |= {s: high for s, high, _ in unpack_map(file.synced[head.body])["streams"]}
        file.scanned = (at, marks)
        return marks

    # --- when all has healed ---------------------------------------------------------------------

    def has_whole(self, life: Life) -> bool:
        """Does a note say that the journal which answers now has all of a dead life?"""
        if life.done is None:
            return False
        if not self.replaced:
            return True
        journal = self.world.gateway.newest_journal
        if journal is None or journal.uuid != life.done[0]:
            return False
        mark = journal.streams.get(life.stream)
        if life.trimmed and not (mark and mark.high_water):
            return True  # its beginning is gone, and a shipper opens no gap
        return (
            mark is not None
            and mark.high_water >= life.done[1]
            and (mark.ended or life.unreachable > 0)
        )

    def waiting(self) -> str:
        """What is not done yet, or nothing."""
        world = self.world
        for life in world.lives:
            name = f"rank {life.rank} of group {life.group}"
            if life.alive:
                return f"{name} has not ended"
            if not self.has_whole(life):
                return f"{name} is not shipped"
        journal = world.gateway.newest_journal
        if journal is None:
            return "" if not world.lives else "the gateway has no journal"
        if journal.pending_bytes or world.series is None or world.series.cursor < journal.seq:
            return "the rules"
        entries = len(world.series.feed(0, 1 << 30))
        if any(sink.committed.get("feed", 0) < entries for sink in world.sinks):
            return "a sink"
        return "files that policy drops" if world.keep.surplus().keys() - self._brought() else ""

    def _brought(self) -> set[str]:
        """Files that somebody brings, or began to bring and died: nobody removes these yet."""
        streams = self.world.gateway.peers.streams.values()
        return {s.file.blob.sha256 for s in streams if s.file and not s.ended}

    def drained(self) -> bool:
        return not self.waiting()

    def end(self) -> None:
        records = self._journal_records()
        for life in self.world.lives:
            self._nothing_lost(life, records.get(life.stream, 0))
        self._same_when_rebuilt()
        self._sums()
        self._points()
        self._files()
        self._kept()
        for sink in self.world.sinks:
            self._delivered(sink)
        if not self.replaced:
            self._order_of_groups()

    def _journal_records(self) -> dict[bytes, int]:
        """stream → how many records the journal has of it; in order, without a hole or a double."""
        have: dict[bytes, int] = {}
        gate = Gate()
        self._gates.clear()
        reader = JournalReader(self.world.gateway_disk.view(), JOURNAL)
        expected = 1
        while entries := reader.read():
            for entry in entries:
                assert entry.seq == expected, f"entry {entry.seq} follows {expected - 1}"
                expected += 1
                if entry.kind == Kind.BATCH:
                    stream, first = self._batch(entry.body, have)
                    self._gates.setdefault(stream, []).append((first, have[stream], gate))
                elif entry.kind == Kind.RULES:
                    gate = Gate.from_maps(unpack_map(bytes(entry.body))["rules"])
                elif entry.kind == Kind.GAP:
                    self._gap(unpack_map(bytes(entry.body)), have)
        assert not reader.damage, reader.damage
        return have

    def _gap(self, body: dict[str, Any], have: dict[bytes, int]) -> None:
        """Only what was acknowledged from memory may be gone, when that journal is gone too."""
        life, told = self.life(body["stream"]), f"numbers {body['from']} to {body['to']} given up"
        memory = life.never_on_disk is not None and life.never_on_disk <= body["from"]
        assert self.replaced and (memory or body["to"] <= life.trimmed), told
        have[body["stream"]] = body["to"]
        self._given_up.setdefault(body["stream"], set()).update(range(body["from"], body["to"] + 1))

    def _arrived(self, s: StreamRow) -> Iterator[tuple[int, str, Any]]:
        """(number, what, told) of all that was written and is not given up."""
        given_up = self._given_up.get(s.id, set())
        for number, (what, told) in enumerate(self.life(s.id).wrote[: s.last_seq], 1):
            if number not in given_up:
                yield number, what, told

    @staticmethod
    def _batch(body: memoryview, have: dict[bytes, int]) -> tuple[bytes, int]:
        _, _, _, _, _, stream, first, n, _ = DATA_HEAD.unpack_from(body, 8)
        heads = list(walk(body[8 + DATA_HEAD_BYTES :]))
        numbers = [h.seq for h in heads if h.kind not in UNNUMBERED]
        assert numbers == list(range(first, first + n)), "a frame that is not what it says"
        assert first == have.get(stream, 0) + 1, f"{first} follows {have.get(stream, 0)}"
        have[stream] = first + n - 1
        return stream, first

    def _nothing_lost(self, life: Life, stored: int) -> None:
        name = f"rank {life.rank} of group {life.group}"
        due = life.must_arrive(self.replaced)
        if self.replaced and life.trimmed > stored:
            return  # nobody has what comes next, and only its own process may give it up
        assert stored >= due, f"{name}: {stored} stored of {due} that must be"
        if life.unsure and stored == len(life.wrote) + 1:
            life.wrote.append(life.unsure)
        assert stored <= len(life.wrote), f"{name}: {stored} stored, {len(life.wrote)} written"

    def _same_when_rebuilt(self) -> None:
        """A projection from zero, in one go, agrees with the one that was killed and went on."""
        series = self.world.series
        assert series is not None
        reader, again = JournalReader(self.world.gateway_disk.view(), JOURNAL), Projection()
        entries: list[Any] = []
        while found := reader.read():
            entries += found
        rebuilt = SimSeries(series.journal, b"")
        rebuilt.apply(again.take(entries), again)
        assert rebuilt.feed(0, 1 << 30) == series.feed(0, 1 << 30), "another feed when rebuilt"
        assert rebuilt.media() == series.media(), "other files when rebuilt"
        assert dict(again.counters) == series.counters
        assert again.state() == series.state
        states = {s.id: (s.generation, s.last_seq, s.projected) for s in again.streams.values()}
        assert states == {s.id: (s.generation, s.last_seq, s.projected) for s in series.streams()}
        self._generations = again.generations

    def _sums(self) -> None:
        """The accounting identity of every stream, and what was refused."""
        series = self.world.series
        assert series is not None
        self._quarantined(series)
        for s in series.streams():
            life = self.life(s.id)
            assert s.last_seq == s.stored + s.gaps, s
            assert s.stored == s.projected + s.quarantined + s.control, s
            if not life.power_lost and not self.replaced:
                told = s.refused == life.refused or life.unsure or life.in_memory
                assert told, f"{life.refused} calls were refused, {s.refused} told of"

    def _quarantined(self, series: SimSeries) -> None:
        """Only what follows a schema that went with its node's power is kept aside."""
        streams = series.streams()
        for _, index, first, n, reason in series.quarantined:
            life = self.life(streams[index].id)
            excused = life.power_lost and reason == "a row without its schema"
            assert excused, f"kept aside: {n} records of rank {life.rank}: {reason}"
            self._given_up.setdefault(life.stream, set()).update(range(first, first + n))

    def _points(self) -> None:
        """Every point that was logged is in the series once, with its step and value."""
        series = self.world.series
        assert series is not None
        streams = {s.index: s for s in series.streams()}
        have: Counter[tuple[bytes, int, str, int, float]] = Counter()
        for keyset, parts in series.rows_of.items():
            rows = np.concatenate(parts)
            names = series.keyset(keyset)
            for row in rows:
                stream = streams[int(row[0])].id
                for (name, type_), raw in zip(names, row[TAIL_HEAD_COLUMNS:], strict=True):
                    value = float(raw.view(np.float64) if type_ == "f8" else raw.view(np.int64))
                    have[stream, int(row[1]), name, int(row[2]), value] += 1
        want: Counter[tuple[bytes, int, str, int, float]] = Counter()
        for s in streams.values():
            for number, what, told in self._arrived(s):
                if what == "row":
                    for key, value in told[1].items():
                        want[s.id, number, key, told[0], float(value)] += 1
        assert have == want, f"lost {list(want - have)[:3]}, too many {list(have - want)[:3]}"

    def _files(self) -> None:
        """Every file is there whole, and known in the series, or is said to be lost."""
        world, series = self.world, self.world.series
        assert series is not None
        for s in series.streams():
            life = self.life(s.id)
            for number, data in life.files.items():
                row = series.files.get((s.index, number))
                if row is None or number > s.last_seq:
                    continue
                if row.sha256 is None:
                    excused = self.replaced or number in life.lost
                    assert excused, f"file {number} of rank {s.rank} never came: {row.lost}"
                    assert row.lost or life.unreachable or self.replaced
                    continue
                assert row.sha256 == hashlib.sha256(data).hexdigest()
                if row.lost:
                    assert row.lost.startswith(DROPPED), f"it came, and is called {row.lost}"
                    continue
                path = str(blob_path(RUN_DIR, row.sha256))
                found = world.gateway_disk.files.get(path)
                assert self.replaced or (found is not None and bytes(found.data) == data), path

    def _kept(self) -> None:
        """Of each rank whose checkpoints came at least one is kept; what was dropped is gone."""
        series = self.world.series
        assert series is not None
        ranks = {s.index: s.rank for s in series.streams()}
        came = [m for m in series.media() if m.sha256]
        here = [m for m in came if not m.lost]
        without = {ranks[m.stream] for m in came if m.what == "checkpoint"}
        left = {ranks[m.stream] for m in here if m.what == "checkpoint"}
        if self.world.plan.policy.cap_bytes and left:
            without.clear()  # a cap takes all of a rank but the newest of all
        assert without <= left, "the only checkpoint was dropped"
        needed = self._brought() | series.media_early() | {m.sha256 for m in here}
        needed = needed.union(*(taken_of(sink.committed).held for sink in self.world.sinks))
        for path in (str(blob_path(RUN_DIR, str(m.sha256))) for m in came if m.lost):
            there = path in self.world.gateway_disk.files
            assert not there or path.rpartition("/")[2] in needed, "called dropped, and there"

    def _delivered(self, sink: SinkPart) -> None:
        """The backend has each item that passed once; what it refuses is kept aside, counted."""
        series, backend = self.world.series, sink.backend
        assert series is not None
        want: Counter[tuple[bytes, int, str]] = Counter()
        poisoned = 0
        for s in series.streams():
            for number, what, told in self._arrived(s):
                keys = told[1] if what == "row" else [what] if what in ("text", "params") else []
                if what == "media" and series.files[s.index, number].sha256:
                    keys = [what]
                if not keys or not self._passes(s.id, number):
                    continue
                for key in keys:
                    if key == backend.poison:
                        poisoned += 1
                    else:
                        want[s.id, number, key] += 1
        have = backend.have
        if not (self.replaced and self.rules_changed):
            # Else what another journal's rules held back may count as dealt with.
            assert not want - have, f"lost: {list(want - have)[:3]}"
        if self.replaced:  # it may have what the journal lost, but that once too
            assert max(have.values(), default=1) == 1, have.most_common(3)
            return
        assert have == want, f"too many: {list(have - want)[:3]}"
        aside = sum(kept.items for kept in sink.committed.get("quarantine", ()))
        assert aside == poisoned, f"{aside} kept aside, {poisoned} poisoned"
        passed = sum(n for name, n in series.counters.items() if name.startswith("passed "))
        rows = [m for m in series.media() if not m.sha256 and not m.lost]
        waiting = sum((m.stream, m.seq) in series.media_passed() for m in rows)
        assert not sink.committed.get("skipped"), "a sink was there, and is told of a dropped file"
        assert passed == sink.committed.get("delivered", 0) + aside + waiting

    def _order_of_groups(self) -> None:
        """A later launch wins over an earlier one, however late that one's spool came."""
        series = self.world.series
        assert series is not None
        placed = [
            (self.life(s.id).group, self._generations.position(s.generation))
            for s in series.streams()
        ]
        ordered = sorted((group, position) for group, position in placed if position >= 0)
        positions = [position for _, position in ordered]
        assert positions == sorted(positions), f"(group, position): {ordered}"
