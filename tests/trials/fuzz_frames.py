"""Hostile frames into the cores of both sides: a gateway's, with a good rank beside; a rank's.

A world is a gateway's core on a disk in memory, one good rank, and victims whose frames are
recorded and made worse. After so many frames its journal is projected, everything is added up, and
the next world begins: what is stored must not count as memory.
"""

from __future__ import annotations

import hashlib
import struct
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from gateway.ingest.answers import Reply
from gateway.ingest.media import CHUNK_BYTES
from gateway.ingest.peers import Peers
from gateway.ingest.presence import superseded
from gateway.journal.reader import Entry, JournalReader
from gateway.journal.writer import Journal
from gateway.rules.gate import Gate
from gateway.series.reader import Reader
from gateway.series.writer import Series
from rank_client.wire import frames
from rank_client.wire.records import ROW_HEAD, Kind, Schema, pack, pack_map
from rank_client.wire.session import ClientSession
from tests.rank_client.wire.disks import MemoryDisk

from .mutants import Mutator

WORLD_FRAMES = 25_000
GOOD_EVERY = 50  #: frames between two steps of the good rank
COMMIT_EVERY = 100
RESTART_EVERY = 8_000  #: the gateway's core is made anew, from its journal
HONEST = 0.25  #: of the mutants
PEERS = 8  #: names under which some mutants come again and again
NAME_FRAMES = 30  #: frames under each other name
SECOND = 10**9
UUID = b"u" * 16
GOOD, GOOD_PEER = b"good" * 4, b"good"
BUDGET_BYTES = 128 << 20
TICK_BYTES = 40 << 20  #: what one tick of a rank may bring forth, whatever it was told
GOOD_COUNTED = ("last_seq", "stored", "projected", "quarantined", "gaps", "refused")


class Source:
    """Records in memory; `more` writes rows of one schema."""

    def __init__(self) -> None:
        self.records: list[bytes] = []
        self.first_kept = 1
        self.schema = Schema(0, ("a", "b", "c"), ("f8", "i8", "bool"))

    @property
    def last(self) -> int:
        return len(self.records)

    def add(self, record: bytes) -> None:
        self.records.append(record)

    def row(self) -> None:
        seq = self.last + 1
        body = ROW_HEAD.pack(seq, seq, 0) + struct.pack("<dqq", seq / 7, seq, seq & 1)
        self.add(pack(Kind.ROW, seq, body, 0))

    def read(self, first: int, max_bytes: int) -> tuple[int, bytes]:
        n, size = 0, 0
        for record in self.records[first - 1 :]:
            if n and size + len(record) > max_bytes:
                break
            n, size = n + 1, size + len(record)
        return n, self.schema.pack(first) + b"".join(self.records[first - 1 : first - 1 + n])


class Chunks(Source):
    """A file as a source."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.records = [data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES)]

    def read(self, first: int, max_bytes: int) -> tuple[int, bytes]:
        return 1, self.records[first - 1]


def every_kind() -> Source:
    """A stream with records of every kind."""
    source = Source()
    source.row()
    bodies: list[tuple[int, dict[str, Any]]] = [
        (Kind.KV, {"s": 1, "w": 1, "m": 0, "v": {"a": 1.0, "k": 2}}),
        (Kind.TEXT, {"t": "text", "l": "info", "w": 1, "s": None}),
        (Kind.PARAMS, {"v": {"lr": 0.1}, "w": 1}),
        (Kind.SUMMARY, {"v": {"best": 1}, "w": 1}),
        (Kind.MEDIA, {"what": "file", "key": "f", "name": "f", "s": 1, "meta": {}, "w": 1}),
        (Kind.LOSS, {"n": 3, "reason": "too large"}),
    ]
    for kind, body in bodies:
        source.add(pack_map(kind, source.last + 1, body))
    source.row()
    return source


class OneRun:
    """Runs of a gateway, all in memory."""

    def __init__(self) -> None:
        self.disk = MemoryDisk()
        self._open: dict[str, Journal] = {}

    def directory(self, run: str) -> Path:
        return Path("runs") / run

    def journal(self, run: str) -> Journal:
        found = self._open.get(run)
        if found is None:
            found = Journal(self.disk, f"runs/{run}/journal", UUID)
            if found.seq == 0:
                found.append_map(Kind.RULES, 1, {"rules": Gate().as_maps()})
            self._open[run] = found
        return found

    def commit(self) -> None:
        for journal in self._open.values():
            journal.commit()

    def close(self) -> None:
        for journal in self._open.values():
            journal.mark()
            journal.close()
        self._open.clear()


class World:
    """One gateway's core, the good rank, the victims."""

    def __init__(self, random: Random, folder: Path) -> None:
        self.random = random
        self.folder = folder
        self.counts: Counter[str] = Counter()
        self.runs = OneRun()
        self.now = 1_790_000_000 * SECOND
        self.session = random.getrandbits(63) | 1
        self.peers = self._peers()
        self.source = Source()
        self.good = self._rank(GOOD, self.source, {"rank": 0, "world_size": 2})
        self.recorded = self._record()
        self.mutator = Mutator(random, self.recorded, self._follow)

    def _peers(self) -> Peers:
        return Peers(self.session, self.runs, BUDGET_BYTES, lambda run: False)

    def _rank(self, id_: bytes, source: Source, about: dict[str, Any]) -> ClientSession:
        hello = {"run": "r", "kind": "live", "launch": "l", "restart": 0, **about}
        return ClientSession(id_, lambda: hello, source, self.random.random)

    def _follow(self, stream: bytes) -> int:
        """What comes next of a stream, as one who listens to the answers knows."""
        known = self.peers.streams.get(stream)
        return min(known.high_water + 1, (1 << 64) - 1) if known else 1

    def _record(self) -> list[bytes]:
        """What two victims and a file say when all goes well."""
        data = self.random.randbytes(3000)
        blob = {"kind": "blob", "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        recorded: list[bytes] = []
        for n, (source, about) in enumerate([
            (every_kind(), {"rank": 1, "world_size": 2, "earlier": [b"e" * 16]}),
            (every_kind(), {"kind": "replay", "rank": 1}),
            (Chunks(data), {**blob, "of": b"victim00" * 2, "media": 6}),
        ]):  # fmt: skip
            session = self._rank(b"victim0%d" % n * 2, source, about)
            if n:  # the first goes on living
                session.end({"status": "completed"})
            for _ in range(6):
                recorded += self.talk(session, b"victim")
        return recorded

    def talk(self, session: ClientSession, peer: bytes) -> list[bytes]:
        """One exchange; what the rank said."""
        self.now += SECOND // 10
        seconds = self.now / SECOND
        said = session.tick(seconds)
        out: list[Reply] = []
        for frame in said:
            self.peers.receive(self.now, peer, frame, out)
        self.runs.commit()
        for to, answer in [*out, *self.peers.committed()]:
            if to == peer:
                session.receive(seconds, answer)
        return said

    # --- the trial -----------------------------------------------------------

    def run(self, n: int) -> None:
        for i in range(n):
            self._one(i)
            if i % GOOD_EVERY == 0:
                self.source.row()
                self.talk(self.good, GOOD_PEER)
            if i % COMMIT_EVERY == 0:
                self.now += SECOND // 50
                self.runs.commit()
                self.peers.committed()
            if i % RESTART_EVERY == RESTART_EVERY - 1:
                self._restart()
        self._end()

    def _one(self, i: int) -> None:
        random = self.random
        honest = random.random() < HONEST
        mutant = self.mutator.mutant(honest)
        # Most under new names, as one that sends many bad frames is not listened to for a while.
        name = int(random.random() * PEERS) if i % 8 == 0 else i // NAME_FRAMES + PEERS
        peer = b"%d" % name
        journal = self.runs.journal("r")
        before = journal.seq, len(self.peers.streams)
        self.peers.receive(self.now, peer, mutant.frame, self._answers())
        self.counts["frames"] += 1
        if mutant.honest:
            self.counts["honest"] += 1
        elif (journal.seq, len(self.peers.streams)) != before:
            raise AssertionError(f"a frame with a wrong checksum did something: {mutant.frame!r}")

    def _answers(self) -> list[Reply]:
        return []

    def _restart(self) -> None:
        """Ticks until those that are gone are forgotten, then a gateway that knows the journal."""
        for body in self.peers.tick(self.now).values():
            self.runs.journal("r").append_map(Kind.TICK, self.now, body)
        superseded(self.peers.streams.values(), "r")
        self.runs.commit()
        self.runs.close()
        self.peers = self._peers()
        self.peers.expect(self.now, "r")
        self.counts["restarts"] += 1

    def _end(self) -> None:
        """The good rank finishes; everything is projected, twice, and added up."""
        self.good.end({"status": "completed"})
        for _ in range(400):
            self.talk(self.good, GOOD_PEER)
            if self.good.state == "closed":
                break
        assert self.good.state == "closed", f"the good rank is {self.good.state}"
        assert self.good.resent_total < len(self.source.records) * 3
        self.runs.commit()
        self.runs.close()
        entries = self._entries()
        self._project(entries)

    def _entries(self) -> list[Entry]:
        reader = JournalReader(self.runs.disk, "runs/r/journal")
        entries: list[Entry] = []
        while found := reader.read():
            entries += found
        reader.close()
        assert not reader.damage, reader.damage
        for entry in entries:
            if entry.kind == Kind.BATCH:
                frames.read_data(bytes(entry.body[8:]))  # raises when the checksum is wrong
        self.counts["stored"] += len(entries)
        return entries

    def _project(self, entries: list[Entry]) -> None:
        path = self.folder / "series.db"
        for suffix in ("", "-wal", "-shm"):
            Path(f"{path}{suffix}").unlink(missing_ok=True)
        half = len(entries) // 2
        for part in (entries[:half], entries[half:]):
            series = Series(path, UUID)
            series.apply(series.projection.take(part))
            series.close()
        with Reader(self.folder) as reader:
            for stream in reader.streams():
                assert stream.last_seq == stream.stored + stream.gaps, stream
                done = stream.projected + stream.quarantined + stream.control
                assert stream.stored == done, stream
                self.counts["quarantined"] += stream.quarantined
            [good] = [s for s in reader.streams() if s.id == GOOD]
            total = len(self.source.records)
            found = tuple(getattr(good, name) for name in GOOD_COUNTED)
            assert found == (total, total, total, 0, 0, 0), (found, total)
            points = reader.points("a")
            mine = points.stream == good.index
            assert points.step[mine].tolist() == list(range(1, total + 1))
            assert points.value[mine].tolist() == [n / 7 for n in range(1, total + 1)]
            reader.texts(), reader.maps("params"), reader.maps("summary"), reader.media()
            reader.losses(), reader.quarantine(), reader.about(), reader.feed(0, 1 << 30)


# --- a rank and a hostile gateway ----------------------------------------------------------------


class Endless(Source):
    """There is more to send than any tick should take."""

    last = 100 * (200 << 20) // frames.MAX_DATA_BYTES  # type: ignore[assignment]

    def read(self, first: int, max_bytes: int) -> tuple[int, bytes]:
        return 100, bytes(max_bytes)


def hostile_gateway(random: Random, n: int, counts: Counter[str]) -> None:
    """Mutants of what a gateway says, into a rank's session, which goes on ticking."""
    stream = b"rank" * 4
    recorded: list[bytes] = []
    bodies: dict[int, dict[str, Any]] = {
        frames.Type.WELCOME: {"v": 1, "journal": UUID, "durable": 5, "credit": 1 << 20, "now": 1},
        frames.Type.REJECT: {"text": "no", "fatal": False, "retry_seconds": 1, "code": "full"},
        frames.Type.ACK: {"durable": 9, "credit": 1 << 20, "back": 7},
        frames.Type.PONG: {"t": 1.0, "now": 1, "durable": 9, "credit": 1 << 20, "stop": True},
        frames.Type.BYE_ACK: {"durable": 9},
        frames.Type.DRAIN: {},
        frames.Type.UNKNOWN: {},
    }
    recorded = [frames.control(t, 7, stream, b) for t, b in bodies.items()]
    recorded.append(frames.data(7, stream, 1, 1, pack_map(Kind.TEXT, 1, {"t": "x"})))
    mutator = Mutator(random, recorded, lambda _: 1)
    session, now, made = _session(random, stream), 0.0, 0
    for i in range(n):
        if i % 500 == 0 or session.state in ("rejected", "closed"):
            session, made = _session(random, stream), made + 1
            said = session.tick(now)
            _welcome(session, now, said, stream)
        mutant = mutator.mutant(random.random() < HONEST)
        before = _state(session)
        session.receive(now, mutant.frame)
        if not mutant.honest and _state(session) != before:
            raise AssertionError(f"a frame with a wrong checksum did something: {mutant.frame!r}")
        if i % 16 == 0:
            now += random.random()
            said = session.tick(now)
            size = sum(map(len, said))
            assert size <= TICK_BYTES, f"a tick of a rank made {size >> 20} MiB of frames"
    counts["frames"] += n
    counts["sessions"] += made


def _session(random: Random, stream: bytes) -> ClientSession:
    hello = {"run": "r", "kind": "live"}
    return ClientSession(stream, lambda: hello, Endless(), random.random)


def _welcome(session: ClientSession, now: float, said: list[bytes], stream: bytes) -> None:
    for frame in said:
        hello = frames.read_control(frame)
        body = {
            "v": 1, "nonce": hello.body.get("nonce"), "journal": UUID, "durable": 0,
            "credit": 1 << 16, "now": 1,
        }  # fmt: skip
        session.receive(now, frames.control(frames.Type.WELCOME, 7, stream, body))


def _state(session: ClientSession) -> tuple[Any, ...]:
    return session.state, session.durable, session.stop, session.journal, session.journal_changed


def fuzz(seed: int, n: int, folder: Path) -> tuple[Counter[str], list[int], list[str]]:
    """One worker's frames: what happened, resident KiB after each world, what is broken."""
    random = Random(seed)
    counts: Counter[str] = Counter()
    resident: list[int] = []
    began = time.monotonic()
    while counts["frames"] < n:
        world_seed = random.getrandbits(32)
        try:
            left = min(WORLD_FRAMES, n - counts["frames"])
            world = World(Random(world_seed), folder)
            world.run(left - left // 5)
            counts += world.counts
            hostile_gateway(Random(world_seed), left // 5, counts)
        except Exception as error:  # whatever it is, it is what is looked for
            text = f"world {world_seed} of seed {seed}: {type(error).__name__}: {error}"
            return counts, resident, [text[:800]]
        resident.append(resident_kib())
    counts["milliseconds"] = int((time.monotonic() - began) * 1000)
    return counts, resident, []


def resident_kib(pid: str | int = "self") -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    return 0
