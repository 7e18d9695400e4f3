"""One seed, one history: who runs, what befalls them and when, and that all ends well.

Faults until `heal`, then a quiet minute in which everything must arrive.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any
from zlib import crc32

import gateway.ingest.media
import gateway.ingest.room
import rank_client.rows
import rank_client.spool
from gateway.ingest.drop import Request
from gateway.sinks.keep import Policy
from rank_client.wire import frames

from .checks import Checks
from .disk import SimDisk
from .network import CLEAR, Network, Weather
from .parts import (
    FILE_CHUNK_BYTES,
    RUN,
    GatewayPart,
    KeepPart,
    Life,
    RankPart,
    RulesPart,
    Shipment,
    SinkPart,
)
from .stores import Backend, Killed, SimSeries

DRAIN_SECONDS = 60.0  #: after the heal
SPOOL = "/spool/r"


@dataclass
class Plan:
    """What a seed chose. Chances are per wake or per frame, times in simulated seconds."""

    ranks: int
    heal: float
    busy: float
    weather: Weather
    keep_bytes: int
    cap_bytes: int
    budget_bytes: int
    kill_chance: float
    policy: Policy
    sinks: int
    faults: list[tuple[float, str]]


#: what may befall a job: name → how often it is drawn
FAULTS = {
    "kill a rank": 3,
    "new group": 3,
    "rank node loses power": 1,
    "rank disk full": 2,
    "rank stops": 1,
    "cut off": 3,
    "deaf": 1,
    "kill gateway": 4,
    "gateway loses power": 2,
    "gateway leaves": 1,
    "gateway stops": 1,
    "gateway disk full": 2,
    "sync fails": 1,
    "kill rules": 1,
    "kill sink": 2,
    "backend away": 2,
    "clock jumps": 1,
    "rebuild series": 3,
    "another shipper": 1,
    "rules change": 3,
    "doom somebody": 4,
}
DOOMS = (
    "before write", "before sync", "before truncate", "before create", "before rename",
    "before unlink", "before sync of a directory",
    "rules, before their transaction", "rules, after their transaction",
    "before a commit", "after a delivery", "after a commit",
)  # fmt: skip
POLICIES = (
    *(Policy("all", 0),) * 4, Policy("last", 0), Policy("best", 0), Policy("all", 400),
    Policy("last", 300),
)  # fmt: skip
RARE = ("journal restored", "journal deleted")


def plan(random: Random) -> Plan:
    heal = random.uniform(4.0, 12.0)
    names, weights = list(FAULTS), list(FAULTS.values())
    drawn = random.choices(names, weights, k=random.randint(0, 7))
    faults = [(random.uniform(0.5, heal), name) for name in drawn]
    keep = 1 << 30
    if random.random() < 0.25:
        faults.append((random.uniform(heal / 2, heal), random.choice(RARE)))
    if random.random() < 0.4:
        keep = 3000
    weather = CLEAR
    if random.random() < 0.7:
        bad = lambda most: random.choice((0.0, random.uniform(0.0, most)))  # noqa: E731
        weather = Weather(bad(0.3), bad(0.3), bad(0.1), bad(0.2), random.choice((0.1, 1.0, 4.0)))
    return Plan(
        ranks=random.randint(1, 3),
        heal=heal,
        busy=random.uniform(0.05, 0.5),
        weather=weather,
        keep_bytes=keep,
        cap_bytes=random.choice((2500, 6000, 1 << 30)),
        budget_bytes=random.choice((4000, 20_000, 1 << 20)),
        kill_chance=random.choice((0.0, 0.0, 0.01, 0.05)),
        policy=random.choice(POLICIES),
        sinks=1 if random.random() < 0.88 else 2,
        faults=sorted(faults),
    )


class World:
    """The agenda and all that runs by it. `run` plays the history, and raises AssertionError
    where a promise is broken."""

    def __init__(self, seed: int, tell: Callable[[str], None] | None = None) -> None:
        self.seed = seed
        self.random = Random(seed)
        self.now = 0.0
        self.digest = 0
        self.events = 0
        self.plan = plan(self.random)
        self.stop_logging = self.plan.heal + 1.0
        self._tell = tell
        self._agenda: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._added = 0
        self._clock_ns = 1_790_000_000 * 10**9
        self._group = -1
        self.gateway_disk = SimDisk(self.random)
        self.rank_disks = [SimDisk(self.random) for _ in range(self.random.randint(1, 2))]
        self.network = Network(self.random, self.at)
        self.network.weather = self.plan.weather
        self.checks = Checks(self)
        #: few, so that ranks log the same ones
        self.files = [self.random.randbytes(size) for size in (0, 40, 250)]
        self.series: SimSeries | None = None
        self.gateway = GatewayPart(self)
        self.rules = RulesPart(self)
        self.sinks = [SinkPart(self, self._backend()) for _ in range(self.plan.sinks)]
        self.keep = KeepPart(self)
        self.request: Request | None = None  #: what policy asked for
        self.lives: list[Life] = []
        self.ranks: list[RankPart] = []
        self.shipments: list[Shipment] = []
        self.links = 0
        self._doom = ""  #: whoever comes to this instruction next dies there
        self._copy: dict[str, bytes] = {}

    def _backend(self) -> Backend:
        made = Backend(self.random)
        made.flaky = self.random.choice((0.0, 0.3))
        made.poison = self.random.choice(("", "", "", "epoch", "epoch", "media"))
        return made

    # --- time ------------------------------------------------------------------------------------

    @property
    def wall_ns(self) -> int:
        return self._clock_ns + int(self.now * 1e9)

    def at(self, seconds: float, call: Callable[..., None], *arguments: Any) -> None:
        self._added += 1
        heapq.heappush(self._agenda, (self.now + seconds, self._added, call, arguments))

    def trace(self, text: str, *values: object) -> None:
        if self._tell is not None:
            self._tell(f"{self.now:8.3f}  " + text % values)

    def healed_before(self, seconds: float) -> bool:
        """Has nothing bad happened for so long?"""
        return self.now >= self.plan.heal + seconds

    def kill_now(self, where: str, chance: float = 0.0) -> None:
        """Die at this instruction, by chance."""
        if self.now >= self.plan.heal:
            return
        if where == self._doom or self.random.random() < max(chance, self.plan.kill_chance):
            if where == self._doom and self.random.random() < 0.3:
                self.at(0.0, self._rebuild_series)
            self._doom = ""
            self.trace("killed: %s", where)
            raise Killed(where)

    # --- the history -----------------------------------------------------------------------------

    def run(self) -> None:
        with small_sizes(self):
            if self.random.random() < 0.8:
                self.gateway.start()
            else:
                self.at(self.random.uniform(0.0, self.plan.heal), self.gateway.start)
            self.new_group()
            self.rules.wake()
            self.sinks[0].wake()
            for later in self.sinks[1:]:
                self.at(self.random.uniform(0.0, self.plan.heal), later.wake)
            if not self.plan.policy.keeps_all:
                self.keep.wake()
            self.at(1.0, self._sweep)
            for when, name in self.plan.faults:
                self.at(when, self._befall, name)
            self.at(self.plan.heal / 2, self._remember_copy)
            self.at(self.plan.heal, self._heal)
            self._play(self.plan.heal)
            self._play(self.plan.heal + DRAIN_SECONDS, until_drained=True)
            self.checks.end()

    def _play(self, end: float, until_drained: bool = False) -> None:
        look = end - DRAIN_SECONDS
        while self._agenda and self._agenda[0][0] <= end:
            self.now, _, call, arguments = heapq.heappop(self._agenda)
            self.events += 1
            call(*arguments)
            if until_drained and self.now >= look:
                look = self.now + 0.5
                if self.checks.drained():
                    return
        if until_drained:
            raise AssertionError(f"not drained within {DRAIN_SECONDS:g} s: {self.checks.waiting()}")

    def new_group(self) -> None:
        """As torchrun after a failure: all ranks end, and a next generation starts."""
        for rank in self.ranks:
            rank.kill()
        self._group += 1
        self.ranks = []
        if self.now > self.plan.heal:
            return
        for rank in range(self.plan.ranks):
            self._spawn(rank)
        self.trace("group %d of %d ranks starts", self._group, self.plan.ranks)

    def _spawn(self, rank: int) -> None:
        disk = self.rank_disks[rank % len(self.rank_disks)]
        stream = self.random.randbytes(16)
        hello = {
            "kind": "live", "run": RUN, "dir": "/data", "rank": rank, "local_rank": rank,
            "world_size": self.plan.ranks, "launch": f"launch{self._group}", "restart": 0,
            "agent": f"agent{self._group}", "boot": f"node{rank % len(self.rank_disks)}",
            "earlier": [life.stream for life in self.lives if life.disk is disk],
        }  # fmt: skip
        life = Life(rank, self._group, stream, f"{SPOOL}/{stream.hex()}", disk, hello)
        part = RankPart(self, life)
        self.lives.append(life)
        self.ranks.append(part)
        self.at(self.random.random() * 0.3, part.wake)

    def _sweep(self) -> None:
        """A gateway that sees the spools, or a next incarnation, ships what the dead left."""
        busy = {shipment.life.stream for shipment in self.shipments if not shipment.over}
        for life in self.lives:
            if not life.alive and life.stream not in busy and not self.checks.has_whole(life):
                self.ship(life)
        self.at(2.0, self._sweep)

    def ship(self, life: Life) -> None:
        shipment = Shipment(self, life)
        self.shipments.append(shipment)
        shipment.wake()

    # --- faults ----------------------------------------------------------------------------------

    def _befall(self, name: str) -> None:
        self.trace("fault: %s", name)
        getattr(self, "_" + name.replace(" ", "_"))()

    def _for_a_while(self, undo: Callable[[], None], most_seconds: float = 4.0) -> None:
        left = self.plan.heal - self.now
        self.at(min(left, self.random.uniform(0.1, most_seconds)), undo)

    def _a_rank(self) -> RankPart | None:
        alive = [rank for rank in self.ranks if rank.life.alive]
        return self.random.choice(alive) if alive else None

    def _kill_a_rank(self) -> None:
        if rank := self._a_rank():
            rank.kill()

    def _new_group(self) -> None:
        self.new_group()

    def _rank_node_loses_power(self) -> None:
        disk = self.random.choice(self.rank_disks)
        for rank in self.ranks:
            if rank.life.disk is disk:
                rank.kill()
        for life in self.lives:
            if life.disk is disk:
                life.power_lost = True
                life.lost |= life.unsent
        for shipment in self.shipments:
            shipment.over |= shipment.life.disk is disk
        disk.lose_power()

    def _rank_disk_full(self) -> None:
        disk = self.random.choice(self.rank_disks)
        disk.room = self.random.randint(0, 300)
        self._for_a_while(lambda: setattr(disk, "room", 1 << 40))

    def _rank_stops(self) -> None:
        if rank := self._a_rank():
            rank.stopped_until = self.now + self.random.uniform(0.5, 20.0)

    def _cut_off(self) -> None:
        ends = [r.link for r in self.ranks] + [s.link for s in self.shipments if not s.over]
        away = self.random.sample(ends, self.random.randint(0, len(ends)))
        self.network.cut_off.update(away)
        self._for_a_while(lambda: self.network.cut_off.difference_update(away), 10.0)

    def _deaf(self) -> None:
        away = [r.link for r in self.ranks if self.random.random() < 0.5]
        self.network.deaf.update(away)
        self._for_a_while(lambda: self.network.deaf.difference_update(away), 10.0)

    def _kill_gateway(self) -> None:
        self.gateway.kill()
        self._gateway_back()

    def _gateway_back(self) -> None:
        if self.random.random() < 0.5:
            self.rules.kill()
            self._kill_sinks()
        self._for_a_while(self.gateway.start)

    def _gateway_loses_power(self) -> None:
        self.gateway.kill()
        self.lose_gateway_power()
        self._gateway_back()

    def lose_gateway_power(self) -> None:
        self.trace("gateway: its node loses power")
        self.rules.kill()
        self._kill_sinks()
        self.gateway_disk.lose_power()
        if self.random.random() < 0.5:
            self.request = None

    def _gateway_leaves(self) -> None:
        self.gateway.leave()
        self._gateway_back()

    def _gateway_stops(self) -> None:
        self.gateway.stopped_until = self.now + self.random.uniform(0.5, 20.0)

    def _gateway_disk_full(self) -> None:
        self.gateway_disk.room = self.random.randint(0, 2000)
        self._for_a_while(lambda: setattr(self.gateway_disk, "room", 1 << 40))

    def _sync_fails(self) -> None:
        self.gateway_disk.failing_syncs = 1

    def _kill_rules(self) -> None:
        self.rules.kill()

    def _kill_sink(self) -> None:
        self.random.choice(self.sinks).kill()

    def _kill_sinks(self) -> None:
        for sink in self.sinks:
            sink.kill()

    def _backend_away(self) -> None:
        backend = self.random.choice(self.sinks).backend
        backend.away = True
        self._for_a_while(lambda: setattr(backend, "away", False), 10.0)

    def _rules_change(self) -> None:
        for _ in range(self.random.randint(1, 8)):
            self._for_a_while(self.gateway.change_rules, 12.0)
        self.checks.rules_changed = True

    def _clock_jumps(self) -> None:
        self._clock_ns += int(self.random.uniform(-600, 600) * 1e9)

    def _rebuild_series(self) -> None:
        self.rules.kill()
        self._kill_sinks()
        self.series = None

    def _another_shipper(self) -> None:
        dead = [life for life in self.lives if not life.alive]
        if dead:
            self.ship(self.random.choice(dead))

    def _doom_somebody(self) -> None:
        self._doom = self.random.choice(DOOMS)

    def _remember_copy(self) -> None:
        self._copy = self.gateway_disk.copy_of("/data/")

    def _journal_restored(self) -> None:
        self._replace_journal(self._copy)

    def _journal_deleted(self) -> None:
        self._replace_journal({})

    def _replace_journal(self, found: dict[str, bytes]) -> None:
        self.gateway.kill()
        self._rebuild_series()
        self.gateway_disk.restore("/data/", found)
        self.checks.journal_replaced()
        self._gateway_back()

    def _heal(self) -> None:
        """From now on nothing bad happens, and everybody who should be there is."""
        self.network.weather = CLEAR
        self.network.cut_off.clear()
        self.network.deaf.clear()
        self.gateway_disk.room = 1 << 40
        self.gateway_disk.failing_syncs = 0
        for disk in self.rank_disks:
            disk.room = 1 << 40
        for sink in self.sinks:
            sink.backend.away, sink.backend.flaky = False, 0.0
        self.gateway.stopped_until = min(self.gateway.stopped_until, self.now)
        for rank in self.ranks:
            rank.stopped_until = min(rank.stopped_until, self.now)
            if rank.life.alive:
                self.at(0.0, rank.wake)
        self.gateway.start()
        self.trace("healed")

    def received(self, frame: bytes) -> None:
        self.digest = crc32(frame, self.digest)


#: limits that are large in real life, so that small histories meet them
SMALL = {
    (rank_client.spool, "RING_BYTES"): 6000,
    (rank_client.spool, "MARK_BYTES"): 300,
    (frames, "MAX_DATA_BYTES"): 900,
    (gateway.ingest.room, "CREDIT_FLOOR_BYTES"): 1200,
    (gateway.ingest.media, "CHUNK_BYTES"): FILE_CHUNK_BYTES,
    (gateway.ingest.media, "SYNC_BYTES"): 200,
}


@contextmanager
def small_sizes(world: World) -> Iterator[None]:
    """Small limits, and the world's clock for rows, while a history is played."""
    clock = lambda: world.wall_ns  # noqa: E731
    wanted = {
        **SMALL,
        (rank_client.rows, "time_ns"): clock,
        (rank_client.rows, "monotonic_ns"): clock,
    }
    before = {place: getattr(*place) for place in wanted}
    for (module, name), value in wanted.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)
