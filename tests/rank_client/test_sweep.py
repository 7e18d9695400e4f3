"""Shipping what dead processes left: all that can be read, once, to whatever journal answers."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.ingest.answers import Reply
from gateway.ingest.peers import Peers
from gateway.journal.reader import Entry, JournalReader
from gateway.journal.writer import Journal
from gateway.rules.project import ANOTHER_JOURNAL, Projection
from gateway.sweeper import Stamp, Sweeper
from rank_client import neighbours, orphans, sweep
from rank_client import spool as spool_module
from rank_client.neighbours import Neighbours
from rank_client.orphan_source import OrphanSource
from rank_client.orphans import Orphan, find, kept, read_note
from rank_client.rows import Rows
from rank_client.spool import Spool
from rank_client.sweep import ship
from rank_client.tidy import tidy
from rank_client.wire.disk import OsDisk
from rank_client.wire.records import Kind, Schema
from rank_client.wire.segments import segment_path
from rank_client.wire.session import ClientSession
from tests.rank_client.read import decode

RUN = "r"
STREAM = b"s" * 16
DAY = 86400.0


class Gateway:
    """Real peers and journals on disk; `Link` is the way to them, in this thread."""

    disk = OsDisk()

    def __init__(self, root: Path) -> None:
        self.root = root
        self.journals: dict[str, Journal] = {}
        self.life = 0
        self.start()

    def start(self) -> None:
        """A new life, from what is on disk."""
        for journal in self.journals.values():
            journal.mark()
            journal.close()
        self.journals = {}
        self.life += 1
        self.peers = Peers(self.life, self, 1 << 30, lambda run: False)

    def directory(self, run: str) -> Path:
        return self.root / "runs" / run

    def journal(self, run: str) -> Journal:
        if run not in self.journals:
            directory = self.directory(run)
            directory.mkdir(parents=True, exist_ok=True)
            self.journals[run] = Journal(self.disk, str(directory / "journal"), os.urandom(16))
        return self.journals[run]

    def carry(self, frame: bytes) -> list[bytes]:
        out: list[Reply] = []
        self.peers.receive(time.time_ns(), b"peer", frame, out)
        for journal in self.journals.values():
            journal.commit()
        out += self.peers.committed()
        return [answer for _, answer in out]

    def projected(self, run: str = RUN) -> Projection:
        """What the rules make of the journal, ticks included."""
        now_ns = time.time_ns()
        for name, body in self.peers.tick(now_ns).items():
            self.journal(name).append_map(Kind.TICK, now_ns, body)
        journal = self.journal(run)
        journal.commit()
        journal.mark()
        projection = Projection()
        projection.take(self.entries(run))
        return projection

    def entries(self, run: str = RUN) -> list[Entry]:
        reader = JournalReader(self.disk, str(self.directory(run) / "journal"))
        out: list[Entry] = []
        while found := reader.read():
            out += found
        reader.close()
        return out


class Link:
    """What `rank_client.link.Link` does, without a socket."""

    gateway: Gateway

    def __init__(self, address: str, key: Any = None) -> None:
        self._answers: list[bytes] = []

    def send(self, frame: bytes) -> bool:
        self._answers += self.gateway.carry(frame)
        return True

    def receive(self) -> list[bytes]:
        answers, self._answers = self._answers, []
        return answers

    def wait(self, seconds: float) -> bool:
        time.sleep(0 if self._answers else min(seconds, 0.001))
        return bool(self._answers)

    def close(self) -> None:
        pass


@pytest.fixture
def gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    made = Gateway(tmp_path / "data")
    monkeypatch.setattr(Link, "gateway", made, raising=False)
    monkeypatch.setattr(sweep, "Link", Link)
    yield made
    for journal in made.journals.values():
        journal.close()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A spool whose segments are small."""
    monkeypatch.setattr(spool_module, "MARK_BYTES", 200)
    return tmp_path / "spool"


def leave(
    root: Path,
    rows: int = 100,
    stream: bytes = STREAM,
    run: str = RUN,
    before: Callable[[Spool], None] = lambda spool: None,
    about: dict[str, str] | None = None,
    **options: Any,
) -> Path:
    """The spool of a process that logged `rows` rows and is gone; its directory."""
    directory = root / run / stream.hex()
    head = {"stream": stream, "kind": "live", "run": run, "dir": "/elsewhere", "rank": 0}
    head |= about or {}
    spool = Spool(str(directory), head, segment_bytes=1000, **options)
    log = Rows(spool, lambda *_: None)
    for step in range(rows):
        log.log({"a": float(step)}, step)
    before(spool)
    spool.close()
    return directory


def leave_more(gateway: Gateway, root: Path, shipped: int, rows: int) -> bytes:
    """A stream of which a part was shipped while it lived; the journal's file at that time."""
    directory = leave(root, shipped)
    ship(only(root), "x", 10)
    gateway.start()
    shutil.rmtree(directory)
    leave(root, rows)
    return Path(segment_path(str(gateway.directory(RUN) / "journal"), 1)).read_bytes()


def only(root: Path, **options: Any) -> Orphan:
    [orphan] = find(root, None, lambda _: True, **options)
    return orphan


def again(root: Path) -> Orphan:
    [orphan] = kept(root, lambda *_: True)
    return orphan


def assert_accounted(projection: Projection, rows: int, gaps: int = 0, refused: int = 0) -> None:
    """logged = stored + lost, per stream, and nothing is quarantined."""
    [stream] = projection.streams.values()
    assert (stream.gaps, stream.refused, stream.quarantined) == (gaps, refused, 0)
    assert stream.last_seq == stream.stored + gaps
    assert stream.projected == rows


def damage(directory: Path, index: int) -> None:
    """Overwrite the middle of a segment, as a bad block does."""
    path = Path(segment_path(str(directory), index))
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * 64)


# --- whole spools --------------------------------------------------------------------------------


def test_an_orphan_is_shipped_once(gateway: Gateway, root: Path) -> None:
    """All records of a dead process arrive under its own stream; then it is no orphan any more."""
    directory = leave(root)
    shipped = ship(only(root), "x", 10)
    assert (shipped.records, shipped.whole, shipped.over) == (100, True, True)
    assert find(root, None, lambda _: True) == []
    assert read_note(directory, "done") == (gateway.journal(RUN).uuid, 100)
    projection = gateway.projected()
    assert_accounted(projection, 100)
    [stream] = projection.streams.values()
    assert (stream.id, stream.bye) == (STREAM, True)


def test_a_living_process_is_no_orphan(root: Path) -> None:
    """A spool that this very process writes is not looked at: that would drop its lock."""
    directory = root / RUN / STREAM.hex()
    spool = Spool(str(directory), {"stream": STREAM})
    assert find(root, None, lambda _: True) == []
    child = os.fork()
    if child == 0:
        orphans.own_spools.clear()
        os._exit(len(find(root, None, lambda _: True)))
    assert os.waitpid(child, 0)[1] == 0, "another process saw it as an orphan: the lock is gone"
    spool.close()
    assert len(find(root, None, lambda _: True)) == 1


def test_refusals_no_record_told_of_are_counted(gateway: Gateway, root: Path) -> None:
    """A process was killed before a LOSS record could tell of its last refusals: they come with
    BYE, by reason, and with them the values it left out. logged = last number + refused."""

    def refuse(spool: Spool) -> None:
        spool.refuse("bad step", 3)
        spool.append_map(Kind.TEXT, {"t": "x", "l": "info", "w": 0, "s": None})  # after a LOSS
        spool.refuse("metrics beyond the spool's cap", 40)
        spool.refuse("bad step", 2)
        spool.count_bad(5)

    leave(root, 10, before=refuse)
    assert ship(only(root), "x", 10).whole
    projection = gateway.projected()
    assert_accounted(projection, 11, refused=45)
    [stream] = projection.streams.values()
    assert (stream.last_seq, stream.bad) == (12, 5)
    told: dict[str, int] = {}
    changes = Projection().take(gateway.entries())
    for _, _, _, n, reason in changes.losses:
        told[reason] = told.get(reason, 0) + n
    assert told == {"bad step": 5, "metrics beyond the spool's cap": 40}


def test_shipped_in_two_goes(gateway: Gateway, root: Path) -> None:
    """A shipper that is stopped in the middle: the next goes on behind what is stored."""
    leave(root, 1000)
    stops = iter([False] * 3 + [True] * 1000)
    shipped = ship(only(root), "x", 10, stop=lambda: next(stops))
    assert not shipped.whole
    assert ship(only(root), "x", 10).whole
    assert_accounted(gateway.projected(), 1000)
    assert gateway.peers.duplicates == {}


# --- whose it is ---------------------------------------------------------------------------------


class TestWhose:
    """Which gateway of a node takes a stream, where several have a run of that name."""

    @pytest.fixture
    def other(self, gateway: Gateway, root: Path, tmp_path: Path) -> Path:
        """The data directory of another project, with a run of the same name as ours."""
        gateway.journal(RUN)
        directory = tmp_path / "other"
        (directory / "runs" / RUN / "journal").mkdir(parents=True)
        (directory / "gateway.lock").touch()
        return directory

    def takes(self, data_dir: Path, root: Path) -> bool:
        return bool(Sweeper(data_dir, "x")._find(root))

    def test_the_one_its_process_named(self, gateway: Gateway, root: Path, other: Path) -> None:
        """Not the other project, which has a run of that name; even before its own has one."""
        leave(root, about={"dir": str(other)})
        assert (self.takes(other, root), self.takes(gateway.root, root)) == (True, False)
        (other / "runs" / RUN / "journal").rmdir()
        assert (self.takes(other, root), self.takes(gateway.root, root)) == (True, False)

    def test_what_was_shipped_stays_there(self, gateway: Gateway, root: Path, other: Path) -> None:
        """A journal that never had a stream has not lost it: it is not shipped to that one."""
        directory = leave(root, about={"dir": str(other)})
        orphans.write_note(directory, "done", f"{'00' * 16} 100\n")
        assert not self.takes(gateway.root, root)

    def test_where_the_run_was_moved(self, gateway: Gateway, root: Path, other: Path) -> None:
        """Once the directory it named is gone, it is theirs who have the run."""
        leave(root, about={"dir": str(other)})
        shutil.rmtree(other)
        assert self.takes(gateway.root, root)
        assert not self.takes(root.with_name("third"), root)

    @pytest.mark.parametrize("address", ["tcp://head:7777", "tcp://[fe80::1]:7777"])
    def test_not_one_that_was_meant_for_another_address(
        self, gateway: Gateway, root: Path, address: str
    ) -> None:
        """A gateway in the same directory leaves alone what names one elsewhere, unless it has
        the run, or listens there itself."""
        leave(root, about={"dir": str(gateway.root), "addr": address})
        assert not self.takes(gateway.root, root)
        note = gateway.root / "gateway.json"
        gateway.root.mkdir(exist_ok=True)
        note.write_text('{"addresses": ["ipc:///tmp/x:7777", "tcp://10.0.0.1:5717"]}')
        assert not self.takes(gateway.root, root)
        note.write_text('{"addresses": ["ipc:///tmp/x", "tcp://10.0.0.1:7777"]}')
        assert self.takes(gateway.root, root)
        note.unlink()
        gateway.journal(RUN)
        assert self.takes(gateway.root, root)

    def test_not_another_projects_that_goes_elsewhere(
        self, gateway: Gateway, root: Path, other: Path
    ) -> None:
        """Neither its directory nor its address is ours: the run's name does not make it so."""
        leave(root, about={"dir": str(other), "addr": "tcp://head:7777"})
        assert not self.takes(gateway.root, root)

    @pytest.mark.parametrize(
        ("about", "taken"),
        [
            ({"dir": "/mine", "addr": ""}, True),
            ({"dir": "/other", "addr": "tcp://head:1"}, True),
            ({"dir": "/other", "addr": "tcp://head:2"}, False),
            ({"dir": "/other", "addr": ""}, False),
        ],
    )
    def test_a_ranks_neighbours_are_of_its_own_project(
        self,
        gateway: Gateway,
        root: Path,
        monkeypatch: pytest.MonkeyPatch,
        about: dict[str, str],
        taken: bool,
    ) -> None:
        """A rank ships, for its gateway elsewhere, what named that one or its own directory."""
        leave(root, about=about)
        monkeypatch.setattr(neighbours, "ship", lambda orphan, *_, **__: ship(orphan, "x", 10))
        session = ClientSession(b"t" * 16, dict, Spool(None, {}), lambda: 0.5)
        session.state, session.durable = "open", 0
        rank = Neighbours(root / RUN, Path("/mine"), session, "tcp://head:1", {}, print)
        rank._look()
        assert bool(find(root, None, lambda _: True)) == (not taken)


# --- another journal -----------------------------------------------------------------------------


def test_a_deleted_journal_is_sent_all_again(gateway: Gateway, root: Path) -> None:
    """What was shipped, and is kept, goes to the journal that is there now; the change is told,
    and the note names the new one."""
    directory = leave(root)
    ship(only(root), "x", 10)
    for path in (gateway.directory(RUN) / "journal").iterdir():
        path.unlink()
    gateway.start()
    shipped = ship(again(root), "x", 10)
    assert (shipped.whole, shipped.journal_changed, shipped.records) == (True, True, 100)
    assert read_note(directory, "done") == (gateway.journal(RUN).uuid, 100)
    projection = gateway.projected()
    assert_accounted(projection, 100)
    assert projection.counters[ANOTHER_JOURNAL] == 1


def test_a_journal_restored_from_an_older_copy(gateway: Gateway, root: Path) -> None:
    """The journal has less than it had acknowledged: exactly what is missing is sent again."""
    copy = leave_more(gateway, root, 50, 100)
    assert ship(only(root), "x", 10).records == 100
    gateway.start()
    Path(segment_path(str(gateway.directory(RUN) / "journal"), 1)).write_bytes(copy)
    shipped = ship(again(root), "x", 10)
    assert (shipped.whole, shipped.journal_changed, shipped.records) == (True, True, 100)
    assert gateway.peers.duplicates == {}
    assert_accounted(gateway.projected(), 100)


def test_the_same_journal_is_not_told_as_another(gateway: Gateway, root: Path) -> None:
    """A restart of the gateway is no change of its journal."""
    leave(root)
    ship(only(root), "x", 10)
    gateway.start()
    shipped = ship(again(root), "x", 10)
    assert (shipped.whole, shipped.journal_changed) == (True, False)
    projection = gateway.projected()
    assert_accounted(projection, 100)
    assert ANOTHER_JOURNAL not in projection.counters


class TestDoubt:
    """Which shipped spools a gateway asks its journal about."""

    @pytest.fixture
    def sweeper(self, gateway: Gateway) -> Sweeper:
        made = Sweeper(gateway.root, "x")
        made._began = time.time() - 60
        return made

    def doubted(self, sweeper: Sweeper, root: Path) -> bool:
        sweeper._journals.clear()
        return bool(kept(root, sweeper._doubted))

    def test_not_what_this_gateway_has_seen_ending(
        self, gateway: Gateway, sweeper: Sweeper, root: Path
    ) -> None:
        """What was acknowledged while it was there is known to be in its journal; so it is for
        the next gateway."""
        leave(root)
        ship(only(root), "x", 10)
        assert not self.doubted(sweeper, root)
        assert not self.doubted(Sweeper(gateway.root, "x"), root)

    def test_what_ended_before_it_came(
        self, gateway: Gateway, sweeper: Sweeper, root: Path
    ) -> None:
        """It may have been another journal: asked once, then known."""
        leave(root)
        ship(only(root), "x", 10)
        sweeper._began = time.time() + 60
        assert self.doubted(sweeper, root)
        sweeper._look([again(root)])
        assert not self.doubted(sweeper, root)

    def test_another_journal(self, gateway: Gateway, sweeper: Sweeper, root: Path) -> None:
        """Another name, another file, or a shorter one; but not one that has grown."""
        directory = leave(root)
        ship(only(root), "x", 10)
        assert not self.doubted(sweeper, root)
        stamp = Stamp.of(gateway.root, RUN)
        assert stamp is not None
        gateway.projected()  # it grows
        assert not self.doubted(sweeper, root)
        path = Path(segment_path(str(gateway.directory(RUN) / "journal"), 1))
        whole = path.read_bytes()
        path.write_bytes(whole[: stamp.size_bytes // 2])
        assert self.doubted(sweeper, root), "shorter"
        path.unlink()
        blocker = path.with_suffix(".other")
        blocker.touch()  # so that the file system cannot give it the same number again
        path.write_bytes(whole)
        assert self.doubted(sweeper, root), "another file"
        blocker.unlink()
        Stamp(os.urandom(16), stamp.inode, 0).write(directory)
        assert self.doubted(sweeper, root), "another name"

    def test_not_of_a_run_that_was_deleted(
        self, gateway: Gateway, sweeper: Sweeper, root: Path
    ) -> None:
        """Whoever deletes a run means it: it does not come back from the spool."""
        leave(root)
        ship(only(root), "x", 10)
        for path in (gateway.directory(RUN) / "journal").iterdir():
            path.unlink()
        assert not self.doubted(sweeper, root)


# --- damage --------------------------------------------------------------------------------------


def test_a_hole_is_shipped_up_to(gateway: Gateway, root: Path) -> None:
    """Without leave nothing behind a hole is shipped, no gap is opened, and what can never be read
    is counted; asked again it costs nothing."""
    directory = leave(root)
    damage(directory, 3)
    shipped = ship(only(root), "x", 10)
    assert not shipped.whole
    assert 0 < shipped.unreachable < 10
    assert shipped.damage
    note = (directory / "hole").read_text().split()
    assert [int(n) for n in note[1:]] == [shipped.records, shipped.unreachable, 100]
    assert find(root, None, lambda _: True) == []
    projection = gateway.projected()
    assert_accounted(projection, shipped.records)
    [stream] = projection.streams.values()
    assert not stream.bye
    assert stream.last_seq == shipped.records


def test_accepting_a_gap_ships_what_follows(gateway: Gateway, root: Path) -> None:
    """With leave the numbers in each hole become a gap, and all else arrives, schemas too."""
    directory = leave(root, 200)
    damage(directory, 3)
    damage(directory, 7)
    first = ship(only(root), "x", 10)
    assert read_note(directory, "done") is None
    shipped = ship(only(root, holes=True), "x", 10, accept_gap=True)
    assert (shipped.whole, shipped.unreachable, shipped.records) == (True, 0, 200)
    assert not (directory / "hole").exists()
    assert_accounted(gateway.projected(), 200 - first.unreachable, gaps=first.unreachable)


def test_a_missing_start_waits_for_leave(gateway: Gateway, root: Path) -> None:
    """The oldest segments are gone and no journal has them: unreachable without leave."""
    directory = leave(root)
    for index in (1, 2):
        Path(segment_path(str(directory), index)).unlink()
    source = OrphanSource(directory)
    shipped = ship(only(root), "x", 10)
    assert (shipped.records, shipped.unreachable) == (0, source.first_kept - 1)
    assert ship(only(root, holes=True), "x", 10, accept_gap=True).whole
    gaps = source.first_kept - 1
    assert_accounted(gateway.projected(), 100 - gaps, gaps=gaps)


def test_a_hole_the_gateway_has_already(gateway: Gateway, root: Path) -> None:
    """Numbers are damaged that were acknowledged before: what follows is shipped without leave."""
    leave_more(gateway, root, 60, 100)
    damage(root / RUN / STREAM.hex(), 2)
    assert len(OrphanSource(root / RUN / STREAM.hex()).stretches) == 2
    shipped = ship(only(root), "x", 10)
    assert (shipped.whole, shipped.unreachable) == (True, 0)
    assert_accounted(gateway.projected(), 100)


def test_a_lost_middle_segment_is_a_hole(root: Path) -> None:
    """Numbers on both sides of a segment that is gone are two stretches; the end is known."""
    directory = leave(root)
    Path(segment_path(str(directory), 4)).unlink()
    source = OrphanSource(directory)
    (first, last), (behind, end) = source.stretches
    assert (first, end, source.end) == (1, 100, 100)
    assert source.unreachable(0) == behind - last - 1 > 0
    assert source.unreachable(behind) == 0
    assert (source.first_kept, source.last) == (1, last)


def test_the_number_that_a_last_segment_opens_with_counts(root: Path) -> None:
    """A newest segment with nothing but its head tells how many numbers were given before it."""
    directory = leave(root)
    newest = max(directory.glob("*.log"))
    head = OrphanSource(directory)
    records = [s for s in head._segments if s[0] == int(newest.stem)]
    data = newest.read_bytes()
    size = int.from_bytes(data[4:8], "little")
    newest.write_bytes(data[:size])
    Path(segment_path(str(directory), int(newest.stem) - 1)).unlink()
    source = OrphanSource(directory)
    assert source.end == (records[0][1] - 1 if records else 100)
    assert source.unreachable(0) > 0


def test_reading_an_orphan_from_the_middle_restates_schemas(root: Path) -> None:
    """Rows from any number on come with the schemas they need, each once."""
    directory = leave(root)
    source = OrphanSource(directory)
    for first in (1, 7, 50, 99):
        schemas: dict[int, Schema] = {}
        at = first
        seen = []
        while at <= 100:
            n, data = source.read(at, 300)
            assert n
            seen += decode(data, schemas)
            at += n
        assert [w.seq for w in seen] == list(range(first, 101))


# --- what is kept --------------------------------------------------------------------------------


def shipped_spool(root: Path, name: bytes, rows: int, age_seconds: float) -> Path:
    directory = leave(root, rows, stream=name * 16)
    orphans.write_note(directory, "done", f"{'00' * 16} {rows}\n")
    when = time.time() - age_seconds
    os.utime(directory / "done", (when, when))
    return directory


def size_of(directory: Path) -> int:
    return sum(p.stat().st_size for p in directory.iterdir())


def test_what_is_kept_is_bounded_per_node(root: Path) -> None:
    """Beyond the node's budget the oldest go first, part by part; what waits for a gateway never
    goes, nor what is alive."""
    old, middle, new = (
        shipped_spool(root, n, 100, age) for n, age in ((b"o", 30), (b"m", 20), (b"n", 10))
    )
    waiting = leave(root, 100, stream=b"w" * 16)
    budget = size_of(new) + size_of(middle) // 2
    assert tidy(root, time.time(), budget) == 1
    assert not old.exists()
    assert waiting.exists()
    assert OrphanSource(new).first_kept == 1
    assert OrphanSource(middle).first_kept > 1
    assert OrphanSource(middle).end == 100
    assert size_of(new) + size_of(middle) <= budget + 1000
    assert tidy(root, time.time(), 0) == 2
    assert waiting.exists()


def test_living_processes_have_their_part_of_the_budget(root: Path) -> None:
    """What a living process keeps counts first."""
    done = shipped_spool(root, b"d", 100, 10)
    alive = Spool(str(root / RUN / (b"a" * 16).hex()), {"stream": b"a" * 16})
    for _ in range(50):
        alive.append_map(Kind.TEXT, {"t": "x" * 1000})
    assert tidy(root, time.time(), 50_000) == 1
    assert not done.exists()
    assert alive.append_map(Kind.TEXT, {"t": "x"}) == 51
    alive.close()


def test_after_a_week_it_goes(root: Path) -> None:
    """Seven days after its BYE a spool is removed, however little it is."""
    week = shipped_spool(root, b"w", 5, 7 * DAY + 1)
    young = shipped_spool(root, b"y", 5, 7 * DAY - 60)
    assert tidy(root, time.time()) == 1
    assert (week.exists(), young.exists()) == (False, True)


def test_a_note_that_is_no_note(root: Path) -> None:
    """An empty or foreign `done` is read as none."""
    directory = leave(root, 1)
    for text in ("", "zz 1", "00", "00 x"):
        (directory / "done").write_text(text)
        assert read_note(directory, "done") is None
