"""How a run stands, as frozen values: the same ones for the terminal, `--json` and the page.

Reads series.db, the sinks' files, what ingest tells each second (live.json, ingest.json) and, for
streams that ended without a word, what their spool on this node still holds.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from rank_client.counts import COUNTS
from rank_client.rendezvous import LOCK_GATEWAY, locked
from rank_client.wire.disk import OsDisk
from rank_client.wire.records import UNNUMBERED
from rank_client.wire.segments import SPOOL_KINDS, scan_segment, segment_indexes

from ..rules.changes import SYSTEM
from ..series.reader import About, Reader, StreamRow
from ..sinks.store import SinkView, read_views
from .finding import Label, label, reading, run_dirs
from .media import FileRow, files_of
from .pace import RECENT_ROWS, STUCK_SECONDS, patience
from .points import KeyRow, key_row, lives_of, matching_keys
from .problems import Problem, find_problems, twins, unreachable

ANSWER_NS = 3 * 10**9  #: ingest says each second that it is there
HEARD_NS = 7 * 10**9  #: a ping comes every 5 s; without one nobody knows what it logs
JUST_OPENED_NS = 5 * 10**9  #: a rank that young may not stand in live.json yet
SINKS = ("clearml", "hub", "neptune")
LOOKED_AT_KEYS = 200  #: by `show`, for values that are no numbers


@dataclass(frozen=True, slots=True)
class Gateway:
    """The gateway of a data directory: serving | not answering | not running."""

    state: str
    dir: str
    addresses: tuple[str, ...]
    pid: int
    up_seconds: float
    answered_ns: int  #: when ingest last said that it is there, 0 for never
    full: bool  #: the disk takes no more
    bytes: int  #: what the data directory holds
    alarms: tuple[str, ...] = ()  #: what has run out, in words


@dataclass(frozen=True, slots=True)
class Accounting:
    """Records: logged = stored + on_the_way + lost; lost = gaps + refused + unreachable."""

    logged: int
    stored: int
    on_the_way: int
    lost: int
    gaps: int
    refused: int
    unreachable: int
    spooled_in: str = ""  #: where records on the way stand, when no process carries them

    @classmethod
    def total(cls, parts: Iterable[Accounting]) -> Accounting:
        parts = list(parts)
        names = ("logged", "stored", "on_the_way", "lost", "gaps", "refused", "unreachable")
        sums = {n: sum(getattr(p, n) for p in parts) for n in names}
        places = sorted({p.spooled_in for p in parts if p.spooled_in})
        return cls(**sums, spooled_in=", ".join(places))


@dataclass(frozen=True, slots=True)
class RankView:
    """A rank's newest life. `state`: live | stuck (heard, but logs nothing) | silent | gone (not
    heard and not connected) | finished | failed | dead | missing, or `unknown` where no gateway
    tells."""

    rank: int
    node: str
    local_rank: int
    state: str
    step: int
    silent_seconds: float
    heard_ns: int
    logged_ns: int  #: its wall clock at its last `log`
    volatile: str  #: why its records are in memory only, or empty
    bad_values: int
    text: str  #: how it failed
    accounting: Accounting
    stuck_seconds: float = 0.0  #: since it last logged, when that is too long
    connected: bool = False  #: one that is silent


@dataclass(frozen=True, slots=True)
class SinkRow:
    """A sink of a run; counts are items. feed = delivered + skipped + quarantined + waiting."""

    sink: str
    state: str
    reason: str
    feed: int
    delivered: int
    skipped: int
    skipped_reasons: dict[str, int]
    quarantined: int
    waiting: int
    lag_seconds: float
    maybe_duplicate: int
    export: str


@dataclass(frozen=True, slots=True)
class RunView:
    """A run at one moment; `live` says that a gateway serves it now."""

    run: str
    short: str
    name: str
    project: str
    path: str
    state: str  #: running | completed | failed | lost
    reason: str
    live: bool
    as_of_ns: int
    started_ns: int
    seconds: float
    step: int
    last_record_ns: int
    world_size: int
    live_ranks: int
    nodes: tuple[str, ...]
    ranks: tuple[RankView, ...]
    problems: tuple[Problem, ...]
    accounting: Accounting
    duplicates: int
    quarantined: int
    passed: dict[str, int]
    held: dict[str, int]
    sinks: tuple[SinkRow, ...]
    journal_entry: int
    streams: dict[str, Accounting] = field(default_factory=dict)  #: by stream, in hex


@dataclass(frozen=True, slots=True)
class Shown:
    """What `show` tells beside the run: keys, at the step that most of them share."""

    view: RunView
    attempt: int  #: the newest
    step: int
    keys: tuple[KeyRow, ...]
    all_keys: int
    summary: dict[str, dict[int, Any]]  #: key → rank → final value
    files: tuple[FileRow, ...] = ()


# --- files -------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """A small file that is replaced by rename; empty when it is not there or no map."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def gateway_of(data_dir: Path, now_ns: int, measure: bool = False) -> Gateway:
    """How the gateway of a data directory stands; `measure` also sums up the files."""
    ingest, started = read_json(data_dir / "ingest.json"), read_json(data_dir / "gateway.json")
    at_ns, pid = _int(ingest.get("at_ns")), _int(ingest.get("pid"))
    here = started.get("host") in (None, socket.gethostname())
    serving = 0 < now_ns - at_ns < ANSWER_NS and not (here and not _alive(pid))
    if serving:
        state = "serving"
    elif locked(data_dir / "gateway.lock", LOCK_GATEWAY):
        state = "not answering"
    else:
        state = "not running"
    return Gateway(
        state,
        str(data_dir),
        tuple(str(a) for a in started.get("addresses") or ()),
        pid,
        max(0.0, (now_ns - _mtime_ns(data_dir / "gateway.json")) / 1e9) if serving else 0.0,
        at_ns,
        bool(ingest.get("full")),
        tree_bytes(data_dir) if measure else 0,
        tuple(str(a) for a in ingest.get("alarms") or ()),
    )


def _int(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return pid > 0


def _mtime_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def tree_bytes(root: Path) -> int:
    total = 0
    for folder, _, names in os.walk(root):
        for name in names:
            try:
                total += os.lstat(f"{folder}/{name}").st_size
            except OSError:
                continue  # gone since it was listed
    return total


# --- accounting --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Told:
    """What a stream's own side says: the highest number it gave, the calls it refused."""

    last: int
    refused: int
    spool: str = ""  #: where its records stand, when it was the spool that said so
    holes: int = 0  #: numbers it gave of which the spool has nothing that can be read


def account(stream: StreamRow, told: _Told, over: bool) -> Accounting:
    """The books of one stream. `over`: nobody will send the rest any more."""
    last = stream.last_seq if stream.bye else max(stream.last_seq, told.last)
    refused = max(stream.refused, told.refused)
    missing = last - stream.last_seq
    unreachable = missing if over and not told.spool else min(missing, told.holes)
    return Accounting(
        logged=last + refused,
        stored=stream.stored,
        on_the_way=missing - unreachable,
        lost=stream.gaps + refused + unreachable,
        gaps=stream.gaps,
        refused=refused,
        unreachable=unreachable,
        spooled_in=told.spool if missing else "",
    )


def spool_told(folder: Path) -> _Told:
    """What a spool on this node says of its stream: read from its last segment and its counts."""
    disk, last = OsDisk(), 0
    try:
        indexes = segment_indexes(disk, str(folder))
        for index in reversed(indexes):
            _, found = scan_segment(disk, str(folder), index, SPOOL_KINDS)
            if found.heads:
                head = found.heads[-1]
                last = head.seq - (head.kind in UNNUMBERED)
                break
        refused, _ = COUNTS.unpack_from((folder / "counts").read_bytes())
    except (OSError, ValueError, TypeError):
        refused = 0
    return _Told(last, refused, str(folder) if last else "", _holes(folder))


def _holes(folder: Path) -> int:
    """As whoever tried to ship it has noted."""
    try:
        return int((folder / "hole").read_text().split()[2])
    except (OSError, ValueError, IndexError):
        return 0


def _told(
    stream: StreamRow, live: Mapping[str, Any], served: bool, run_spool: Path | None
) -> _Told:
    last, refused = _int(live.get("last")), _int(live.get("refused"))
    alive = served and live.get("kind") != "replay"
    if stream.bye or alive or run_spool is None:
        return _Told(last, refused)
    found = spool_told(run_spool / stream.id.hex())
    return _Told(max(last, found.last), max(refused, found.refused), found.spool, found.holes)


# --- the run -----------------------------------------------------------------


def run_view(run_dir: Path, now_ns: int, spool: Path | None = None) -> RunView:
    """How a run stands. `spool` is this node's spool root, looked into for what nobody carries."""
    with reading(run_dir) as reader:
        about, streams = reader.about(), reader.streams()
        return _Making(run_dir, now_ns, spool, about, streams).view(reader)


class _Making:
    """Puts a RunView together from what was read."""

    def __init__(
        self,
        run_dir: Path,
        now_ns: int,
        spool: Path | None,
        about: About,
        streams: list[StreamRow],
    ) -> None:
        self.run_dir, self.now_ns, self.about, self.streams = run_dir, now_ns, about, streams
        self.live_file = read_json(run_dir / "live.json")
        self.told_live = {
            str(s.get("stream")): s
            for s in self.live_file.get("streams") or ()
            if isinstance(s, dict)
        }
        gateway = gateway_of(run_dir.parent.parent, now_ns)
        fresh = now_ns - _int(self.live_file.get("at_ns")) < ANSWER_NS
        self.live = gateway.state == "serving" and fresh and about.state in ("running", "lost")
        self.newest = about.generations[-1] if about.generations else -1
        self.run_spool = spool / run_dir.name if spool else None
        self.books = {s.id: self._book(s) for s in streams}

    def _served(self, stream: StreamRow) -> Mapping[str, Any] | None:
        """What ingest says of a stream now; None when it does not know of it."""
        return self.told_live.get(stream.id.hex()) if self.live else None

    def _book(self, stream: StreamRow) -> Accounting:
        live = self.told_live.get(stream.id.hex(), {})
        served = self._served(stream) is not None
        told = _told(stream, live, served, self.run_spool)
        over = not served and (self.about.state != "running" or stream.generation != self.newest)
        return account(stream, told, over)

    def view(self, reader: Reader) -> RunView:
        about, named = self.about, label(self.run_dir, self.streams)
        losses, quarantine = reader.losses(), reader.quarantine()
        ranks = self.ranks(self._stuck(reader))
        starts = (_int(s.hello.get("started")) for s in self.streams if s.kind != "tool")
        started = min((ns for ns in starts if ns), default=0)
        end = self._end_ns()
        accounting = Accounting.total(self.books.values())
        passed, held = _counters(about.counters, "passed "), _counters(about.counters, "held ")
        problems = find_problems(about, self.streams, ranks, losses, quarantine)
        problems += twins(self.told_live.values()) if self.live else ()
        books = [(s, self.books[s.id]) for s in self.streams]
        gone = [unreachable(s, b.unreachable, b.spooled_in) for s, b in books if b.unreachable]
        dropped = max(about.duplicates, _int(self.live_file.get("duplicates")))
        return RunView(
            run=self.run_dir.name,
            short=named.short,
            name=named.name,
            project=named.project,
            path=str(self.run_dir),
            state=about.state,
            reason=about.reason,
            live=self.live,
            as_of_ns=self.now_ns if self.live else end,
            started_ns=started,
            seconds=max(0.0, (end - started) / 1e9) if started else 0.0,
            step=max((r.step for r in ranks), default=-1),
            last_record_ns=max([about.now_ns if not ranks else 0, *(r.logged_ns for r in ranks)]),
            world_size=len(ranks),
            live_ranks=sum(r.state in ("live", "stuck") for r in ranks),
            nodes=tuple(dict.fromkeys(r.node for r in ranks if r.node)),
            ranks=ranks,
            problems=(*problems, *gone),
            accounting=accounting,
            duplicates=dropped,
            quarantined=sum(n for _, _, _, n, _ in quarantine),
            passed=passed,
            held=held,
            sinks=self.sinks(sum(passed.values()), started),
            journal_entry=about.cursor,
            streams={id_.hex(): book for id_, book in self.books.items()},
        )

    def _end_ns(self) -> int:
        """Now for a run that is being served, else the last that is known of it."""
        if self.live:
            return self.now_ns
        ended = [s.ended_ns for s in self.streams if s.generation == self.newest]
        if self.about.state in ("completed", "failed") and ended and all(ended):
            return max(ended)
        return max([self.about.now_ns, *ended])

    # --- ranks ---------------------------------------------------------------

    def ranks(self, stuck: Mapping[int, float]) -> tuple[RankView, ...]:
        """The ranks of the newest launch, those never heard of too; sorted as numbers."""
        here = [s for s in self.streams if s.generation == self.newest and s.kind != "tool"]
        size = max((_int(s.hello.get("world_size")) for s in here), default=0)
        by_rank = {s.rank: s for s in here}
        expected = {*by_rank, *(range(size) if -1 not in by_rank else ())}
        return tuple(
            self._rank(by_rank[r], stuck) if r in by_rank else _missing(r) for r in sorted(expected)
        )

    def _stuck(self, reader: Reader) -> dict[int, float]:
        """Index of a stream that is heard but logs nothing any more → for how many seconds."""
        idle = {s.index: self._idle_seconds(s) for s in self.streams}
        idle = {index: seconds for index, seconds in idle.items() if seconds > STUCK_SECONDS}
        longest = patience(reader.recent_rows(idle, RECENT_ROWS)) if idle else {}
        return {i: seconds for i, seconds in idle.items() if seconds > longest.get(i, inf)}

    def _idle_seconds(self, stream: StreamRow) -> float:
        """Since the last `log` of a rank that is heard; 0 where its pings do not tell."""
        live = self._served(stream) or {}
        told = _int(live.get("logged"))
        heard = self.now_ns - _int(live.get("heard_ns")) < HEARD_NS
        if live.get("kind") != "live" or not (told and heard) or self._rank_state(stream) != "live":
            return 0.0
        offset = live.get("offset")
        ahead = offset if isinstance(offset, int | float) else 0.0
        return (self.now_ns - max(stream.last_wall_ns, told)) / 1e9 - ahead

    def _rank(self, stream: StreamRow, stuck: Mapping[int, float]) -> RankView:
        live = self._served(stream) or {}
        told = self.told_live.get(stream.id.hex(), {})
        state = "stuck" if stream.index in stuck else self._rank_state(stream)
        heard = _int(told.get("heard_ns")) or stream.quiet_ns or stream.last_wall_ns
        unheard = state in ("silent", "gone") and heard
        silent = max(0.0, (self._end_ns() - heard) / 1e9) if unheard else 0.0
        return RankView(
            rank=stream.rank,
            node=stream.node,
            local_rank=stream.local_rank,
            state=state,
            step=max(stream.last_step, _int(live.get("step")) if live.get("step") else -1),
            silent_seconds=silent,
            heard_ns=heard,
            logged_ns=max(stream.last_wall_ns, _int(told.get("logged"))),
            volatile=str(live.get("volatile") or ""),
            bad_values=max(stream.bad, _int(told.get("bad"))),
            text=stream.text,
            accounting=self.books[stream.id],
            stuck_seconds=stuck.get(stream.index, 0.0),
            connected=state == "silent" and live.get("link") == "up",
        )

    def _rank_state(self, stream: StreamRow) -> str:
        if stream.status == "failed":
            return "failed"
        if stream.status:
            return "finished"
        if stream.bye or str(stream.hello.get("launch", "")) in self.about.launchers:
            return "dead"
        if self.live:
            live = self._served(stream)
            young = self.now_ns - _int(stream.hello.get("started")) < JUST_OPENED_NS
            if live is not None and live.get("link") == "gone":
                return "gone"
            return "live" if young or (live is not None and not live.get("silent")) else "silent"
        return "silent" if stream.quiet_ns else "unknown"

    # --- sinks ---------------------------------------------------------------

    def sinks(self, feed: int, started_ns: int) -> tuple[SinkRow, ...]:
        """The sinks that have a file, then those that are not in the config."""
        newest = max((s.last_wall_ns for s in self.streams), default=0)
        rows = [_sink_row(v, feed, newest, started_ns) for v in read_views(self.run_dir)]
        known = {r.sink for r in rows}
        off = [
            SinkRow(n, "off", f"not in the config: add [sinks.{n}]", 0, 0, 0, {}, 0, 0, 0.0, 0, "")
            for n in SINKS
            if n not in known
        ]
        return (*rows, *off)


def _missing(rank: int) -> RankView:
    nothing = Accounting(0, 0, 0, 0, 0, 0, 0)
    return RankView(rank, "", 0, "missing", -1, 0.0, 0, 0, "", 0, "", nothing)


def _counters(counters: Mapping[str, int], prefix: str) -> dict[str, int]:
    cut = len(prefix)
    return {name[cut:]: n for name, n in counters.items() if name.startswith(prefix) and n}


def _sink_row(view: SinkView, feed: int, newest_ns: int, started_ns: int) -> SinkRow:
    waiting = view.waiting(feed)
    since = view.sent_wall_ns or started_ns
    return SinkRow(
        sink=view.name,
        state=view.state,
        reason=view.reason,
        feed=feed,
        delivered=view.delivered,
        skipped=sum(view.skipped.values()),
        skipped_reasons=view.skipped,
        quarantined=view.quarantined,
        waiting=waiting,
        lag_seconds=max(0.0, (newest_ns - since) / 1e9) if waiting and since else 0.0,
        maybe_duplicate=view.maybe_duplicate,
        export=view.export,
    )


# --- keys --------------------------------------------------------------------


def key_order(name: str) -> tuple[int, str]:
    """Losses first, then compute and step times, then the rest; how the machine is comes last."""
    if name.startswith(SYSTEM):
        return 3, name
    last = name.rpartition("/")[2].lower()
    if last.endswith("loss"):
        return 0, name
    return (1 if "compute" in last or "step_time" in last or "step_seconds" in last else 2), name


def shown(
    run_dir: Path,
    now_ns: int,
    spool: Path | None = None,
    globs: Sequence[str] = ("*",),
    limit: int = LOOKED_AT_KEYS,
) -> Shown:
    """A run with its keys at the last step that all ranks have."""
    with reading(run_dir) as reader:
        about, streams = reader.about(), reader.streams()
        lives = lives_of(reader, about, streams)
        making = _Making(run_dir, now_ns, spool, about, streams)
        view = making.view(reader)
        names = sorted(matching_keys(reader, globs), key=key_order)
        ranks = frozenset(r.rank for r in view.ranks)
        newest = len(about.generations) - 1
        found = [key_row(reader, lives, name, newest, ranks) for name in names[:limit]]
        summary = final_values(reader, streams)
        files = files_of(reader, streams)
    rows = tuple(row for row in found if row is not None)
    return Shown(view, lives.attempts, _shared_step(rows), rows, len(names), summary, files)


def _shared_step(rows: Sequence[KeyRow]) -> int:
    """The step most keys of the training stand at; the later one of two."""
    steps = [row.step for row in rows if not row.key.startswith(SYSTEM)]
    return max(steps, key=lambda s: (steps.count(s), s), default=-1)


def final_values(
    reader: Reader, streams: Sequence[StreamRow], kind: str = "summary"
) -> dict[str, dict[int, Any]]:
    """key → rank → the last value given to `log_summary` (or, with `params`, `log_params`)."""
    out: dict[str, dict[int, Any]] = {}
    rows = reader.maps(kind)
    rows.sort(key=lambda row: (row[0], row[1]))  # a later life of a rank has a higher index
    for stream, _, _, values in rows:
        for key, value in values.items():
            out.setdefault(key, {})[streams[stream].rank] = value
    return out


# --- many runs ---------------------------------------------------------------


def newest_first(data_dir: Path) -> list[Path]:
    """The runs of a data directory, that with the newest news first."""

    def news(run: Path) -> int:
        # Not series.db: whoever reads it touches its log.
        return max((_mtime_ns(p) for p in (run / "journal").glob("*.log")), default=0)

    return sorted(run_dirs(data_dir), key=news, reverse=True)


def run_label(run_dir: Path) -> Label:
    with reading(run_dir) as reader:
        return label(run_dir, reader.streams())
