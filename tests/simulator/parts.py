"""The processes of a simulated job: each is the shell around one core, as thin as it can be.

A part is woken by the world's agenda, and may die between any two wakes, or in the middle of one
(`Killed`): before each change of its disk or store.
"""

from __future__ import annotations

import errno
import hashlib
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateway.ingest.answers import Reply
from gateway.ingest.drop import Drops, Request
from gateway.ingest.media import Job, blob_path
from gateway.ingest.peers import Peers
from gateway.journal.reader import JournalReader
from gateway.journal.writer import Journal, JournalDamaged, SyncFailed
from gateway.rules.gate import BUILT_IN, KINDS, Gate, Rule
from gateway.rules.project import Projection
from gateway.sinks import keep
from gateway.sinks.base import RunInfo
from gateway.sinks.loop import Loop
from gateway.sinks.retry import Backoff
from rank_client.counts import read_counts
from rank_client.media import blob_session
from rank_client.orphan_source import OrphanSource
from rank_client.rows import Rows
from rank_client.sender import Carrier
from rank_client.spool import Spool
from rank_client.wire import frames
from rank_client.wire.records import Kind
from rank_client.wire.session import ClientSession

from .disk import SimDisk, unharmed
from .network import SimLink
from .stores import RUN_DIR, Backend, Killed, SimSeries, SimSink, SimStore, taken_of

if TYPE_CHECKING:
    from .world import World

RUN = "r"
JOURNAL = f"{RUN_DIR}/journal"
COMMIT_SECONDS = 0.01
TICK_SECONDS = 1.0
FINISH_SECONDS = 45.0  #: more than the longest pause before anything is tried again
SHIP_SECONDS = 30.0
FILE_CHUNK_BYTES = 100
KEEP_SECONDS = 1.0  #: between two looks for files that policy drops
REMOVAL_DEADLY = 0.4  #: how often a gateway dies there: there are few
ROOM_BYTES = 20_000  #: of free space before a full gateway goes on
RANK_SEGMENT_BYTES = 1500
KEYS = ("last.pt", "last.pt", "best.pt")
JOURNAL_SEGMENT_BYTES = 6000

#: what the rules may change to
RULES = (
    BUILT_IN,
    (Rule("all", KINDS, "all"),),
    (Rule("rank 1", ("metric",), (1,)), Rule("no files", ("media",), "none"), *BUILT_IN),
    (Rule("files only", ("media",), "all"), Rule("nothing else", KINDS, "none")),
)


@dataclass
class Life:
    """One life of one rank, and the truth about it: what each number was given to."""

    rank: int
    group: int
    stream: bytes
    directory: str
    disk: SimDisk
    hello: dict[str, Any]
    wrote: list[tuple[str, Any]] = field(default_factory=list)  #: record n is wrote[n - 1]
    files: dict[int, bytes] = field(default_factory=dict)  #: by the number of their record
    sent: set[int] = field(default_factory=set)  #: of these, those the gateway says to have
    lost: set[int] = field(default_factory=set)  #: and those that were lost with their node's power
    refused: int = 0
    acked: int = 0
    synced: int = 0  #: the last number that its own disk is known to hold
    in_memory: int | None = None  #: the first number that was in memory only when it died
    never_on_disk: int | None = None  #: the first that was acknowledged from memory, and forgotten
    trimmed: int = 0  #: the last number that was acknowledged and is kept no longer
    unsure: tuple[str, Any] | None = None  #: the call it died in, which may or may not be there
    power_lost: bool = False
    alive: bool = True
    finished: bool = False  #: it ended by itself, and was told that all is stored
    done: tuple[bytes, int] | None = None  #: (journal, durable) of who has all that can be had
    unreachable: int = 0  #: numbers in holes of its spool, as its shipper has counted them

    @property
    def unsent(self) -> set[int]:
        return self.files.keys() - self.sent - self.lost

    def must_arrive(self, journal_replaced: bool) -> int:
        """The last number that nothing excuses the loss of, but for `trimmed`."""
        kept = len(self.wrote) if self.in_memory is None else self.in_memory - 1
        if self.power_lost:
            kept = min(kept, self.synced)
        if journal_replaced:
            return kept if self.never_on_disk is None else min(kept, self.never_on_disk - 1)
        return max(kept, self.acked)


class SimFile:
    """A file of a rank: what `rank_client.media.FileSource` is, in memory."""

    first_kept = 1

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.size_bytes = len(data)
        self.last = -(-len(data) // FILE_CHUNK_BYTES)

    def read(self, first: int, max_bytes: int) -> tuple[int, bytes]:
        piece = self.data[(first - 1) * FILE_CHUNK_BYTES : first * FILE_CHUNK_BYTES]
        return (1, piece) if piece else (0, b"")


class Files:
    """Carries the files of one life, each in a session of its own, over its own link."""

    def __init__(self, world: World, life: Life) -> None:
        self.world = world
        self.life = life
        self._carriers: dict[int, tuple[SimLink, Carrier]] = {}

    def step(self, now: float) -> bool:
        """True when the gateway has every file."""
        for number in self.life.unsent:
            if number not in self._carriers:
                self._carriers[number] = self._carry(number)
        for number, (link, carrier) in list(self._carriers.items()):
            carrier.step(now)
            if carrier.session.state == "closed":
                link.close()
                del self._carriers[number]
                self.life.sent.add(number)
        return not self.life.unsent

    def _carry(self, number: int) -> tuple[SimLink, Carrier]:
        world, life = self.world, self.life
        world.links += 1
        link = SimLink(world.network, world.gateway.receive, b"f%d" % world.links)
        source = SimFile(life.files[number])
        session = blob_session(source, RUN, life.stream, number, world.random.random)
        world.checks.blobs[session.stream] = source
        return link, Carrier(session, link)  # type: ignore[arg-type]

    def close(self) -> None:
        for link, _ in self._carriers.values():
            link.close()
        self._carriers.clear()


class RankPart:
    """A training process: logs now and then, and carries its spool to the gateway."""

    def __init__(self, world: World, life: Life) -> None:
        self.world = world
        self.life = life
        self.view = life.disk.view()
        self.stopped_until = 0.0
        self.finishing = 0.0
        head = {"stream": life.stream, **life.hello}
        self.spool = Spool(
            life.directory,
            head,
            self.view,
            RANK_SEGMENT_BYTES,
            world.plan.keep_bytes,
            world.plan.cap_bytes,
        )
        self.view.kill = world.kill_now
        self.rows = Rows(self.spool, lambda what, text: None)
        random = world.random.random
        self.session = ClientSession(life.stream, lambda: life.hello, self.spool, random)
        self.session.on_ping(lambda: {"last": self.spool.last})
        self.link = SimLink(world.network, world.gateway.receive, life.stream)
        self.carrier = Carrier(self.session, self.link)  # type: ignore[arg-type]
        self.files = Files(world, life)
        self._upkeep_at = world.now + 1.0
        self._step = 0

    def wake(self) -> None:
        world, life = self.world, self.life
        if not life.alive:
            return
        if world.now < self.stopped_until:
            world.at(self.stopped_until - world.now, self.wake)
            return
        try:
            self._live()
        except Killed:
            self.kill()

    def _live(self) -> None:
        world, life = self.world, self.life
        if not self.finishing:
            if world.now >= world.stop_logging:
                self._end()
            elif world.random.random() < world.plan.busy:
                self._log(world.random.randint(1, 6))
        self.carrier.step(world.now + life.rank)
        life.acked = max(life.acked, self.session.durable)
        if self.files.step(world.now + life.rank) and self.finishing:
            self.session.end({"status": "completed"})
        if world.now >= self._upkeep_at:
            self._upkeep_at = world.now + 1.0
            self._upkeep()
        if self.session.state == "closed" or (self.finishing and world.now > self.finishing):
            self._leave()
        else:
            world.at(0.05 + 0.15 * world.random.random(), self.wake)

    def _log(self, calls: int) -> None:
        random, rank = self.world.random, self.life.rank
        for _ in range(calls):
            self._step += 1
            step, pick = self._step, random.random()
            if pick < 0.7:
                values = {"loss": step + rank / 8, "lr": 0.5}
                if pick < 0.1:
                    values = {f"layer{random.randint(0, 3)}/norm": float(step)}
                elif pick < 0.2:
                    values["epoch"] = step  # another type: another schema
                self._note("row", (step, values), lambda s=step, v=values: self.rows.log(v, s))
            elif pick < 0.78:
                for _ in range(1 if self.world.plan.policy.keeps_all else random.randint(1, 2)):
                    self._log_file(step)
            elif pick < 0.9:
                text = f"step {step} " + "x" * random.randint(0, 200)
                body = {"t": text, "l": "info", "w": self.world.wall_ns, "s": step}
                self._note("text", text, lambda b=body: self.spool.append_map(Kind.TEXT, b))
            else:
                body = {"v": {"lr": step, "name": "x"}, "w": self.world.wall_ns}
                self._note("params", step, lambda b=body: self.spool.append_map(Kind.PARAMS, b))

    def _log_file(self, step: int) -> None:
        random = self.world.random
        data = random.choice(self.world.files)
        names: dict[str, Any] = {"what": "file", "key": "f", "name": "f", "s": step, "meta": {}}
        if random.random() < 0.7:
            data = random.choice((data, data, random.randbytes(90)))
            meta = {"best": random.random() < 0.3, "final": random.random() < 0.05}
            names |= {"what": "checkpoint", "key": random.choice(KEYS), "meta": meta}
        body = {**names, "w": self.world.wall_ns}
        self._note("media", data, lambda: self.spool.append_map(Kind.MEDIA, body))
        if self.life.wrote and self.life.wrote[-1] == ("media", data):
            self.life.files[len(self.life.wrote)] = data

    def _note(self, what: str, told: Any, call: Any) -> None:
        """Make a call, and write down the number it got: the last one, after LOSS records."""
        spool, life = self.spool, self.life
        refused = sum(spool.refused.values())
        life.unsure = (what, told)
        self.view.kill = unharmed if spool.owed else self.world.kill_now
        call()
        life.unsure = None
        life.refused = sum(spool.refused.values())
        new = spool.last - len(life.wrote)
        if life.refused == refused:
            life.wrote += [("control", None)] * (new - 1) + [(what, told)]
        else:
            life.wrote += [("control", None)] * new

    def _upkeep(self) -> None:
        spool, life = self.spool, self.life
        try:
            if spool.volatile:
                self._forget_memory()  # in case it dies over that
                spool.heal()
                life.in_memory = None
            last, durable = spool.last, self.session.durable
            spool.sync()
            if spool.ring and spool.ring[0][0] <= durable and life.never_on_disk is None:
                life.never_on_disk = spool.ring[0][0]
            spool.trim(durable)
            life.trimmed = max(life.trimmed, spool.first_kept - 1)
            if not spool.volatile:
                life.synced = last
        except OSError:
            pass  # as the sender: told, and tried again

    def _end(self) -> None:
        body = {"status": "completed", "text": "", "w": self.world.wall_ns}
        self._note("control", None, lambda: self.spool.append_map(Kind.END, body))
        self.finishing = self.world.now + FINISH_SECONDS

    def _leave(self) -> None:
        life = self.life
        self._forget_memory()
        whole = self.session.state == "closed" and self.session.durable >= self.spool.last
        assert whole or not self.world.healed_before(FINISH_SECONDS), "finish did not get through"
        life.finished = whole
        if whole:
            life.done = (self.session.journal or b"", self.session.durable)
        self.spool.close()
        self._gone()

    def _forget_memory(self) -> None:
        if self.spool.memory_records:
            self.life.in_memory = self.spool.ring[0][0]

    def kill(self) -> None:
        """SIGKILL: what is in the page cache stays."""
        if self.life.alive:
            self._forget_memory()
            self.life.refused = sum(self.spool.refused.values())
            self.life.trimmed = max(self.life.trimmed, self.spool.first_kept - 1)
            self._gone()

    def _gone(self) -> None:
        self.life.alive = False
        self.link.close()
        self.files.close()
        self.view.die()
        self.world.trace("rank %d of group %d is gone", self.life.rank, self.life.group)


class Shipment:
    """Somebody who can see a dead process's spool sends it, under its own stream id."""

    def __init__(self, world: World, life: Life) -> None:
        self.world = world
        self.life = life
        self.source = OrphanSource(Path(life.directory), life.disk.view())
        hello = {**life.hello, "kind": "replay"}
        random = world.random.random
        self.session = ClientSession(life.stream, lambda: hello, self.source, random)
        name = life.stream + bytes([len(world.shipments) % 256, len(world.shipments) // 256])
        self.link = SimLink(world.network, world.gateway.receive, name)
        self.carrier = Carrier(self.session, self.link)  # type: ignore[arg-type]
        self.files = Files(world, life)
        self.over = False  #: it has done what it could, or died with its node
        self._deadline = world.now + SHIP_SECONDS

    def wake(self) -> None:
        world, session = self.world, self.session
        if self.over:
            return
        self.carrier.step(world.now)
        if session.state == "open":
            self.source.follow(session.durable)
        if session.idle and self.files.step(world.now):
            self.life.unreachable = self.source.unreachable(session.durable)
            if self.life.unreachable:
                self._close(session)
                return
            counts = read_counts(self.source._disk, self.life.directory)
            told = {"refused": counts.refused, "bad": counts.bad_values, "owed": counts.owed}
            session.end({"status": "adopted", **told})
            self.carrier.step(world.now)
        if session.state == "closed":
            self._close(session)
        if session.state in ("closed", "rejected") or world.now > self._deadline:
            self.over = True
            self.link.close()
            self.files.close()
            return
        world.at(0.05 + 0.1 * world.random.random(), self.wake)

    def _close(self, session: ClientSession) -> None:
        self.life.done = (session.journal or b"", session.durable)
        self.over = True
        self.link.close()
        self.files.close()


class GatewayPart:
    """Ingest: the listener's loop around `Peers` and one journal, as `listener.py` has it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.store = world.gateway_disk
        self.up = False
        self.stopped_until = 0.0
        self.view = self.store.view()
        self.journals: dict[str, Journal] = {}
        self.resting: Journal | None = None  #: closed, as all its streams had ended
        self._routes: dict[bytes, SimLink] = {}
        self._commit_due = False
        self._no_room: frozenset[str] = frozenset()
        self._life = 0

    # --- what `Peers` asks of its shell ----------------------------------------------------------

    @property
    def disk(self) -> Any:
        return self.view

    def directory(self, run: str) -> Path:
        return Path("/data/runs") / run

    def journal(self, run: str) -> Journal:
        found = self.journals.get(run)
        if found is None:
            uuid = self.world.random.randbytes(16)
            found = Journal(self.view, f"/data/runs/{run}/journal", uuid, JOURNAL_SEGMENT_BYTES)
            if found.seq == 0:
                maps = {"rules": Gate().as_maps()}
                found.append_map(Kind.RULES, self.world.wall_ns, maps)
            self.journals[run] = found
        return found

    @property
    def newest_journal(self) -> Journal | None:
        return self.journals.get(RUN) or self.resting

    # --- life ------------------------------------------------------------------------------------

    def start(self) -> None:
        world = self.world
        if self.up:
            return
        self.up, self._commit_due, self._no_room = True, False, frozenset()
        self._life += 1
        self.view = self.store.view()
        self.view.kill = world.kill_now
        self.journals, self._routes, self.resting = {}, {}, None
        session = world.random.getrandbits(63) + 1
        self.peers = Peers(session, self, world.plan.budget_bytes, lambda run: False)
        self.drops = Drops(self.peers, self, self._commit_all, self._remove)
        world.trace("gateway: life %d", self._life)
        world.at(TICK_SECONDS, self._tick, self._life)
        try:
            if self.view.names(JOURNAL) and not self.peers.expect(world.wall_ns, RUN):
                self.resting = self.journals.pop(RUN)
                self.resting.close()
        except JournalDamaged as error:
            raise AssertionError(f"a crash damaged the journal: {error}") from error
        except (OSError, Killed):
            self._die()

    def _die(self) -> None:
        """Ended by what happened to it; the supervisor starts it again."""
        self.kill()
        random = self.world.random.random
        if random() < 0.4:
            self.world.at(0.45 * random(), self._node_follows)
        self.world.at(0.5, self.start)

    def _node_follows(self) -> None:
        if not self.up:
            self.world.lose_gateway_power()

    def kill(self) -> None:
        self.up = False
        self.view.die()
        self.world.trace("gateway: killed")

    def leave(self) -> None:
        """SIGTERM: commit, say DRAIN, close."""
        if not self.up:
            return
        if self._commit() and self.up:
            drain = [
                (s.peer, frames.control(frames.Type.DRAIN, self.peers.session, s.id, {}))
                for s in self.peers.streams.values()
            ]
            self._send(drain)
            with suppress(Killed):  # it leaves anyway
                self._mark()
        self.kill()

    def receive(self, name: bytes, link: SimLink, frame: bytes) -> None:
        world = self.world
        if not self.up:
            return
        if world.now < self.stopped_until:  # a stopped process: its socket keeps what comes
            world.at(self.stopped_until - world.now, self.receive, name, link, frame)
            return
        self._routes[name] = link
        out: list[Reply] = []
        try:
            self.peers.receive(world.wall_ns, name, frame, out)
        except Killed:
            self._die()
            return
        self._send(out)
        if not self._commit_due and self.up:
            self._commit_due = True
            world.at(COMMIT_SECONDS, self._commit_now, self._life)

    def _commit_now(self, life: int) -> None:
        if life == self._life and self.up:
            self._commit_due = False
            self._commit()

    def _commit(self) -> bool:
        """False when it died over it."""
        try:
            self._commit_all()
            return True
        except (OSError, SyncFailed, Killed) as error:
            self.world.trace("gateway: %s; stopping", error)
            self._die()
            return False

    def _commit_all(self) -> None:
        self._no_room = frozenset(r for r, journal in self.journals.items() if self._full(journal))
        self._send(self.peers.committed(self._no_room))
        if self.world.random.random() < 0.7:
            self._mark()

    def _full(self, journal: Journal) -> bool:
        """Commit; True when there was no room: what is buffered waits until there is."""
        if self.peers.room.full and self._no_room:
            return True
        try:
            journal.commit()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            self.world.trace("gateway: disk full")
            self.peers.room.full = True
            return True
        return False

    def _mark(self) -> None:
        for journal in self.journals.values():
            try:
                journal.mark()
            except OSError:
                pass

    def _tick(self, life: int) -> None:
        world = self.world
        if life != self._life or not self.up:
            return
        if world.now >= self.stopped_until:
            if self.peers.room.full:
                self.peers.room.full = self.store.room < ROOM_BYTES
            try:
                for run, body in self.peers.tick(world.wall_ns).items():
                    if run in self._no_room:
                        continue
                    self.journal(run).append_map(Kind.TICK, world.wall_ns, body)
            except (OSError, Killed):
                self._die()
                return
            if self._commit():
                self._drop_files()
        world.at(TICK_SECONDS, self._tick, life)

    def _drop_files(self) -> None:
        """What policy asked for; a request is gone once it is read."""
        world = self.world
        request, world.request = world.request, None
        if request is None:
            return
        try:
            self.drops.carry_out(world.wall_ns, RUN, request)
        except (OSError, SyncFailed, Killed) as error:
            world.trace("gateway: %s; stopping", error)
            self._die()

    def _remove(self, job: Job) -> None:
        self.world.checks.removes(job.blob.sha256)
        self.world.trace("gateway: removes %s", job.blob.sha256[:8])
        self.world.kill_now("before a removal", REMOVAL_DEADLY)
        job.run()
        self.drops.done(job)

    def change_rules(self) -> None:
        """Other ranks' items pass from here on."""
        if self.up and RUN in self.journals:
            rules = self.world.random.choice(RULES)
            maps = {"rules": Gate(rules).as_maps()}
            self.journals[RUN].append_map(Kind.RULES, self.world.wall_ns, maps)

    def _send(self, out: list[Reply]) -> None:
        world = self.world
        for name, frame in out:
            world.checks.answer(frame)
            link = self._routes.get(name)
            if link is not None:
                world.network.send(frame, link, False, link.arrive)


class RulesPart:
    """The rules' process: follows the journal into `world.series`."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._reader: JournalReader | None = None
        self._projection = Projection()
        self._fetch_bytes = 0

    def kill(self) -> None:
        self._reader = None

    def wake(self) -> None:
        world = self.world
        try:
            if self._reader is not None or self._begin():
                self._step()
        except Killed:
            world.trace("rules: killed")
            self.kill()
        world.at(0.1 + 0.2 * world.random.random(), self.wake)

    def _begin(self) -> bool:
        """Open the series, and find the projection again as it was after its last transaction."""
        world = self.world
        view = world.gateway_disk.view()
        uuid = JournalReader(view, JOURNAL).uuid()
        if uuid is None:
            return False
        if world.series is None or world.series.journal != uuid:
            world.series = SimSeries(uuid, world.random.randbytes(16))
        self._projection = Projection()
        reader = JournalReader(view, JOURNAL)
        done = 0
        while done < world.series.cursor:
            entries = [e for e in reader.read(1 << 20) if e.seq <= world.series.cursor]
            if not entries:
                return False  # the mark after them was lost with the power; the gateway writes one
            self._projection.take(entries)
            done = entries[-1].seq
        self._fetch_bytes = world.random.choice((600, 3000, 1 << 20))
        self._reader = JournalReader(view, JOURNAL, done)
        return True

    def _step(self) -> None:
        world = self.world
        assert self._reader is not None and world.series is not None
        entries = self._reader.read(self._fetch_bytes)
        assert not self._reader.damage, self._reader.damage
        if entries:
            changes = self._projection.take(entries)
            world.kill_now("rules, before their transaction")
            world.series.apply(changes, self._projection)
            world.kill_now("rules, after their transaction")


class KeepPart:
    """The supervisor's look at which files policy keeps."""

    def __init__(self, world: World) -> None:
        self.world = world

    def wake(self) -> None:
        world = self.world
        if reasons := self.surplus():
            assert world.series is not None
            world.request = Request(world.series.journal, world.series.cursor, reasons)
            world.trace("policy: drops %s", [sha256[:8] for sha256 in reasons])
        world.at(KEEP_SECONDS, self.wake)

    def surplus(self) -> dict[str, str]:
        world = self.world
        if world.series is None or world.plan.policy.keeps_all:
            return {}
        stores = (taken_of(sink.committed) for sink in world.sinks)
        series: Any = world.series
        return keep.choose(series, world.plan.policy, stores, self._is_there)

    def _is_there(self, sha256: str) -> bool:
        return str(blob_path(RUN_DIR, sha256)) in self.world.gateway_disk.files


class SinkPart:
    """One sink's process."""

    def __init__(self, world: World, backend: Backend) -> None:
        self.world = world
        self.backend = backend
        self.committed: dict[str, Any] = {}
        self._loop: Loop | None = None
        self._series: SimSeries | None = None

    def kill(self) -> None:
        self._loop = None

    def wake(self) -> None:
        world = self.world
        wait = 0.2
        try:
            if self._series is not world.series:
                self.kill()  # it reads a series that was made anew
            if self._loop is None and world.series is not None:
                self._series = world.series
                self._loop = self._begin()
            if self._loop is not None:
                wait = self._loop.step()
                assert not self._loop.off, self._loop.off
                missed = self.backend.missed and not world.checks.replaced
                assert not missed, f"a sink misses {self.backend.missed}"
                if self._loop.done:
                    self.kill()
        except Killed:
            world.trace("sink: killed")
            self.kill()
        world.at(max(0.05, min(wait, 10.0)), self.wake)

    def _begin(self) -> Loop:
        world = self.world
        store = SimStore(self.committed, world.kill_now)
        has = lambda path: str(path) in world.gateway_disk.files  # noqa: E731
        sink = SimSink(self.backend, world.kill_now, has)
        info = RunInfo(RUN, "p", "n", (), 0)
        backoff = Backoff(world.random.random)
        return Loop(world.series, store, sink, info, backoff)  # type: ignore[arg-type]
