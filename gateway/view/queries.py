"""How a run stands, as frozen values: the same ones for the terminal, `--json` and the page.

Reads series.db, the sinks' files, what ingest tells each second (live.json, ingest.json) and, for
streams that ended without a word, what their spool on this node still holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from ..series.reader import Reader
from ..series.tables import About, StreamRow
from .accounting import Accounting, account, told_of
from .finding import label, reading
from .pace import RECENT_ROWS, STUCK_SECONDS, patience
from .problems import Problem, find_problems, twins, unreachable
from .serving import ANSWER_NS, gateway_of, read_json, whole
from .sinks import SinkRow, sink_rows
from .typed import typed
from .words import clean

HEARD_NS = 7 * 10**9  #: a ping comes every 5 s; without one nobody knows what it logs
JUST_OPENED_NS = 5 * 10**9  #: a rank that young may not stand in live.json yet


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


def run_view(run_dir: Path, now_ns: int, spool: Path | None = None) -> RunView:
    """How a run stands. `spool` is this node's spool root, looked into for what nobody carries."""
    with reading(run_dir) as reader:
        return view_of(reader, reader.about(), reader.streams(), now_ns, spool)


def view_of(
    reader: Reader, about: About, streams: list[StreamRow], now_ns: int, spool: Path | None = None
) -> RunView:
    """The same, from what was already read."""
    return _Making(reader.run_dir, now_ns, spool, about, streams).view(reader)


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
        fresh = now_ns - whole(self.live_file.get("at_ns")) < ANSWER_NS
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
        told = told_of(stream, live, served, self.run_spool)
        over = not served and (self.about.state != "running" or stream.generation != self.newest)
        return account(stream, told, over)

    def view(self, reader: Reader) -> RunView:
        about, named = self.about, label(self.run_dir, self.streams)
        losses, quarantine = reader.losses(), reader.quarantine()
        ranks = self.ranks(self._stuck(reader))
        starts = (whole(s.hello.get("started")) for s in self.streams if s.kind != "tool")
        started = min((ns for ns in starts if ns), default=0)
        end = self._end_ns()
        accounting = Accounting.total(self.books.values())
        passed, held = _counters(about.counters, "passed "), _counters(about.counters, "held ")
        problems = find_problems(about, self.streams, ranks, losses, quarantine)
        problems += twins(self.told_live.values()) if self.live else ()
        books = [(s, self.books[s.id]) for s in self.streams]
        sweep = clean(typed(self.run_dir.absolute().parent.parent, "sweep", "--accept-gap"))
        gone = [
            unreachable(s, b.unreachable, b.spooled_in, sweep) for s, b in books if b.unreachable
        ]
        dropped = max(about.duplicates, whole(self.live_file.get("duplicates")))
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
            sinks=sink_rows(self.run_dir, self.streams, sum(passed.values()), started),
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
        size = max((whole(s.hello.get("world_size")) for s in here), default=0)
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
        told = whole(live.get("logged"))
        heard = self.now_ns - whole(live.get("heard_ns")) < HEARD_NS
        if live.get("kind") != "live" or not (told and heard) or self._rank_state(stream) != "live":
            return 0.0
        offset = live.get("offset")
        ahead = offset if isinstance(offset, int | float) else 0.0
        return (self.now_ns - max(stream.last_wall_ns, told)) / 1e9 - ahead

    def _rank(self, stream: StreamRow, stuck: Mapping[int, float]) -> RankView:
        live = self._served(stream) or {}
        told = self.told_live.get(stream.id.hex(), {})
        state = "stuck" if stream.index in stuck else self._rank_state(stream)
        heard = whole(told.get("heard_ns")) or stream.quiet_ns or stream.last_wall_ns
        unheard = state in ("silent", "gone") and heard
        silent = max(0.0, (self._end_ns() - heard) / 1e9) if unheard else 0.0
        return RankView(
            rank=stream.rank,
            node=stream.node,
            local_rank=stream.local_rank,
            state=state,
            step=max(stream.last_step, whole(live.get("step")) if live.get("step") else -1),
            silent_seconds=silent,
            heard_ns=heard,
            logged_ns=max(stream.last_wall_ns, whole(told.get("logged"))),
            volatile=str(live.get("volatile") or ""),
            bad_values=max(stream.bad, whole(told.get("bad"))),
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
            young = self.now_ns - whole(stream.hello.get("started")) < JUST_OPENED_NS
            if live is not None and live.get("link") == "gone":
                return "gone"
            return "live" if young or (live is not None and not live.get("silent")) else "silent"
        return "silent" if stream.quiet_ns else "unknown"


def _missing(rank: int) -> RankView:
    nothing = Accounting(0, 0, 0, 0, 0, 0, 0)
    return RankView(rank, "", 0, "missing", -1, 0.0, 0, 0, "", 0, "", nothing)


def _counters(counters: Mapping[str, int], prefix: str) -> dict[str, int]:
    cut = len(prefix)
    return {name[cut:]: n for name, n in counters.items() if name.startswith(prefix) and n}
