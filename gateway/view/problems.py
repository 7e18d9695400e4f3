"""One sentence per problem of a run, with rank and node, worst first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..rules.project import ANOTHER_JOURNAL
from ..series.tables import About, StreamRow
from .words import clean, count, duration, plural, ranges, rank_name

ALONE = 3  #: so many silent ranks get a sentence each, more are told by node
TWINS_SECONDS = 10.0  #: an old process may take so long to end when a new one has begun
GOES_ON_NS = 5 * 10**9  #: logged so long after another was last heard: not waiting for it
WAIT_SECONDS = 15.0  #: silent for less: whether the others wait or are within a step is not known


@dataclass(frozen=True, slots=True)
class Problem:
    """`kind`: failed | silent | gone | stuck | dead | missing | lost | damaged | journal |
    memory | values | quarantine | unordered | twins; rank and node where it is one rank's."""

    kind: str
    text: str
    rank: int | None = None
    node: str = ""


class Rank(Protocol):
    """What is looked at of a queries.RankView."""

    @property
    def rank(self) -> int: ...
    @property
    def node(self) -> str: ...
    @property
    def local_rank(self) -> int: ...
    @property
    def state(self) -> str: ...
    @property
    def step(self) -> int: ...
    @property
    def silent_seconds(self) -> float: ...
    @property
    def stuck_seconds(self) -> float: ...
    @property
    def connected(self) -> bool: ...
    @property
    def heard_ns(self) -> int: ...
    @property
    def logged_ns(self) -> int: ...
    @property
    def volatile(self) -> str: ...
    @property
    def bad_values(self) -> int: ...
    @property
    def text(self) -> str: ...


def find_problems(
    about: About,
    streams: Sequence[StreamRow],
    ranks: Sequence[Rank],
    losses: Sequence[tuple[int, int, int, int, str]],
    quarantine: Sequence[tuple[int, int | None, int, int, str]],
) -> tuple[Problem, ...]:
    """Every problem, worst first, but for records that are `unreachable`."""
    out = [*_failures(about, ranks), *_damage(about), *_another_journal(about)]
    out += _silences(ranks) if about.state == "running" else _gone(about, ranks)
    out += _missing(ranks) if about.state in ("running", "lost") else ()
    out += _losses(streams, losses)
    out += _memory(ranks)
    out += _quarantine(quarantine)
    unordered = sum(s.generation < 0 and s.kind != "tool" for s in streams)
    if unordered:
        text = f"{plural(unordered, 'stream')} of an unknown launch kept, not in the values shown"
        out.append(Problem("unordered", f"{text} (see query --attempts all)"))
    return tuple(out)


def _damage(about: About) -> Iterable[Problem]:
    if about.damage:
        where = "; ".join(about.damage)
        yield Problem("damaged", f"the journal is damaged: {where}; the good part is shown")


def _another_journal(about: About) -> Iterable[Problem]:
    streams = about.counters.get(ANOTHER_JOURNAL, 0)
    if streams:
        text = (
            f"journal changed: {plural(streams, 'process', 'processes')} had more acknowledged by "
            "another journal, or by a newer copy of this one; all that was kept was sent again"
        )
        yield Problem("journal", text)


def name_of(rank: Rank) -> str:
    return rank_name(rank.rank, rank.node, rank.local_rank)


def _one(kind: str, rank: Rank, text: str) -> Problem:
    return Problem(kind, f"{name_of(rank)} {text}", rank.rank, rank.node)


def _failures(about: About, ranks: Sequence[Rank]) -> Iterable[Problem]:
    failed = [r for r in ranks if r.state == "failed"]
    for rank in failed[:ALONE]:
        yield _one("failed", rank, f"failed{_at_step(rank.step)}: {_last_line(rank.text)}")
    if len(failed) > ALONE:
        rest = ranges(r.rank for r in failed[ALONE:])
        yield Problem("failed", f"{len(failed) - ALONE} more failed: {rest}")
    if about.state == "failed" and not failed:
        yield Problem("failed", clean(about.reason))
    dead = [r for r in ranks if r.state == "dead"]
    if dead:
        noun = "rank" if len(dead) == 1 else "ranks"
        text = f"{noun} {ranges(r.rank for r in dead)} died without a word"
        yield Problem("dead", f"{text}; the launcher has exited" if about.launchers else text)


def _last_line(text: str) -> str:
    """What a traceback says in the end."""
    lines = [line for line in text.splitlines() if line.strip()]
    return clean(lines[-1].strip())[:200] if lines else "no reason given"


def _at_step(step: int) -> str:
    return f" at step {count(step)}" if step >= 0 else ""


def _silences(ranks: Sequence[Rank]) -> Iterable[Problem]:
    """Of ranks that are not heard; when all wait for them, that others are stuck goes without
    saying."""
    silent = [r for r in ranks if r.state in ("silent", "gone")]
    waiting = [r for r in ranks if r.state in ("live", "stuck")]
    longest = max(silent, key=lambda r: r.silent_seconds, default=None)
    go_on = longest is not None and _others_go_on(silent, ranks)
    if longest and waiting and not go_on and longest.silent_seconds >= WAIT_SECONDS:
        where = _at_step(max(r.step for r in ranks))
        age = f"{longest.state} longest, {duration(longest.silent_seconds)}{_link(longest)}"
        text = f"all ranks wait{where}; {name_of(longest)} {age}"
        yield Problem(longest.state, text, longest.rank, longest.node)
        return
    tail = "; others go on" if go_on else ""
    for rank, who in _by_node(silent):
        where = f"{duration(rank.silent_seconds)}{_at_step(rank.step)}"
        text = f"{who} {rank.state} for {where}{_link(rank)}{tail}"
        yield Problem(rank.state, text, rank.rank if who == name_of(rank) else None, rank.node)
    yield from _hangs(ranks)


def _by_node(ranks: Sequence[Rank]) -> Iterable[tuple[Rank, str]]:
    """Each rank with its name, or where they are many, of each node and state the one that is
    silent or stuck for longest, with the names of all."""
    if len(ranks) <= ALONE:
        yield from ((rank, name_of(rank)) for rank in ranks)
        return
    for node, state in dict.fromkeys((r.node, r.state) for r in ranks):
        there = [r for r in ranks if (r.node, r.state) == (node, state)]
        longest = max(there, key=lambda r: r.silent_seconds + r.stuck_seconds)
        who = f"ranks {ranges(r.rank for r in there)} ({clean(node)})"
        yield longest, name_of(longest) if len(there) == 1 else who


def _link(rank: Rank) -> str:
    """What is known of a rank that is not heard."""
    if rank.state == "gone":
        return ": not connected any more, so its process or node is likely down or stopped"
    return ", still connected: stopped, or a C call keeps the GIL" if rank.connected else ""


def _hangs(ranks: Sequence[Rank]) -> Iterable[Problem]:
    """Of ranks that are heard and log nothing: they hang, or do something that takes long."""
    stuck = [r for r in ranks if r.state == "stuck"]
    if len(stuck) == len(ranks) > 1:
        yield _all_stuck(stuck)
        return
    tail = ""
    if stuck and _others_log(stuck, ranks):
        tail = "; others go on"
    elif all(r.state in ("stuck", "finished") for r in ranks) and len(stuck) < len(ranks):
        tail = "; the others have finished"
    for rank, who in _by_node(stuck):
        where = f"{_at_step(rank.step)} for {duration(rank.stuck_seconds)}"
        text = f"{who} stuck{where}: answers, but logs nothing{tail}"
        yield Problem("stuck", text, rank.rank if who == name_of(rank) else None, rank.node)


def _all_stuck(ranks: Sequence[Rank]) -> Problem:
    """Named is who is behind, else who logged nothing for longest: it may be what all wait for."""
    since = duration(min(r.stuck_seconds for r in ranks))
    step = max(r.step for r in ranks)
    first = min(ranks, key=lambda r: (r.step, -r.stuck_seconds))
    why = f"longest, {duration(first.stuck_seconds)}"
    if first.step < step:
        why = f"behind,{_at_step(first.step)}"
    text = f"all ranks stuck{_at_step(step)} for {since}: they answer, but log nothing"
    return Problem("stuck", f"{text}; {name_of(first)} {why}", first.rank, first.node)


def _others_log(stuck: Sequence[Rank], ranks: Sequence[Rank]) -> bool:
    """As `_others_go_on`, after the stuck ones last logged."""
    logged, step = max(r.logged_ns for r in stuck), max(r.step for r in stuck)
    live = [r for r in ranks if r.state == "live"]
    return any(r.logged_ns > logged + GOES_ON_NS or r.step > step + 1 for r in live)


def _others_go_on(silent: Sequence[Rank], ranks: Sequence[Rank]) -> bool:
    """Did some rank log well after the silent ones were heard, or pass their step by more than
    the one in which all would wait? Their clocks may differ, their steps do not."""
    heard, step = max(r.heard_ns for r in silent), max(r.step for r in silent)
    others = [r for r in ranks if r.state in ("live", "finished")]
    return any(r.logged_ns > heard + GOES_ON_NS or r.step > step + 1 for r in others)


def _gone(about: About, ranks: Sequence[Rank]) -> Iterable[Problem]:
    """Ranks that never said how they ended, in a run that is over."""
    gone = [r for r in ranks if r.state in ("silent", "gone", "unknown")]
    if about.state == "lost":
        step = max((r.step for r in ranks), default=-1)
        who = f"; silent: {ranges(r.rank for r in gone)}" if gone else ""
        yield Problem("silent", f"no rank was heard for 60 s{_at_step(step)}{who}")
    elif gone:
        who = name_of(gone[0]) if len(gone) == 1 else f"ranks {ranges(r.rank for r in gone)}"
        yield Problem("silent", f"{who} did not say how it ended", None, gone[0].node)


def _missing(ranks: Sequence[Rank]) -> Iterable[Problem]:
    missing = [r.rank for r in ranks if r.state == "missing"]
    if missing:
        text = f"{len(missing)} of {len(ranks)} ranks not heard of yet: {ranges(missing)}"
        yield Problem("missing", text, missing[0] if len(missing) == 1 else None)


def _losses(
    streams: Sequence[StreamRow], losses: Sequence[tuple[int, int, int, int, str]]
) -> Iterable[Problem]:
    sums: dict[tuple[int, str], int] = {}
    for stream, _, _, n, reason in losses:
        # A file whose bytes are lost is no lost record: its LOSS counts none.
        sums[stream, reason] = sums.get((stream, reason), 0) + (n or 1)
    for (stream, reason), n in sums.items():
        its = streams[stream]
        what = plural(n, "file") if reason.startswith("media lost") else plural(n, "record")
        who = rank_name(its.rank, its.node, its.local_rank)
        yield Problem("lost", f"{who} lost {what}: {clean(reason)}", its.rank, its.node)


def unreachable(stream: StreamRow, records: int, spooled_in: str, giving_up: str) -> Problem:
    """`spooled_in`: the spool that has holes, empty where there is none on this node; `giving_up`:
    the command that ships what is behind them."""
    who = rank_name(stream.rank, stream.node, stream.local_rank)
    what = plural(records, "record")
    if spooled_in:
        text = (
            f"{who}: {what} cannot be read in {spooled_in}, and those behind wait; to give them "
            f"up and ship the rest: {giving_up}"
        )
    else:
        text = f"{who} lost {what} logged but not stored, and its spool is not on this node"
    return Problem("lost", text, stream.rank, stream.node)


def twins(told: Iterable[Mapping[str, Any]]) -> tuple[Problem, ...]:
    """Ranks that two processes say they are, by what ingest tells of its streams now."""
    streams = {str(s.get("stream")): s for s in told}
    out = []
    for older in streams.values():
        newer, seconds = streams.get(str(older.get("superseded"))), older.get("both_seconds")
        if newer is None or not isinstance(seconds, int | float) or seconds <= TWINS_SECONDS:
            continue
        rank, who = newer.get("rank"), " and ".join(_process(s) for s in (older, newer))
        text = f"rank {rank} runs twice: {who} both log; both are kept"
        out.append(Problem("twins", text, rank if isinstance(rank, int) else None))
    return tuple(out)


def _process(told: Mapping[str, Any]) -> str:
    return clean(f"{told.get('node')} pid {told.get('pid')}")


def _memory(ranks: Sequence[Rank]) -> Iterable[Problem]:
    for rank in ranks:
        if rank.volatile:
            yield _one("memory", rank, f"keeps its log in memory only: {clean(rank.volatile)}")
        if rank.bad_values:
            values = plural(rank.bad_values, "value")
            yield _one("values", rank, f"logged {values} that are no numbers: left out")


def _quarantine(
    quarantine: Sequence[tuple[int, int | None, int, int, str]],
) -> Iterable[Problem]:
    sums: dict[str, int] = {}
    for _, _, _, n, reason in quarantine:
        sums[reason] = sums.get(reason, 0) + (n or 1)
    for reason, n in sums.items():
        yield Problem("quarantine", f"{plural(n, 'record')} set aside: {clean(reason)}")
