"""One sentence per problem of a run, with rank and node, worst first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..series.reader import About, StreamRow
from .words import clean, count, duration, plural, ranges, rank_name

ALONE = 3  #: so many silent ranks get a sentence each, more are told by node
GOES_ON_NS = 5 * 10**9  #: logged so long after another was last heard: not waiting for it


@dataclass(frozen=True, slots=True)
class Problem:
    """`kind`: failed | silent | dead | missing | lost | damaged | memory | values | quarantine |
    unordered; rank and node where it is one rank's."""

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
    out = [*_failures(about, ranks), *_damage(about)]
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
        text = f"{noun} {ranges(r.rank for r in dead)} died without a word; the launcher has exited"
        yield Problem("dead", text)


def _last_line(text: str) -> str:
    """What a traceback says in the end."""
    lines = [line for line in text.splitlines() if line.strip()]
    return clean(lines[-1].strip())[:200] if lines else "no reason given"


def _at_step(step: int) -> str:
    return f" at step {count(step)}" if step >= 0 else ""


def _silences(ranks: Sequence[Rank]) -> Iterable[Problem]:
    silent = [r for r in ranks if r.state == "silent"]
    if not silent:
        return
    if not _others_go_on(silent, ranks):
        longest = max(silent, key=lambda r: r.silent_seconds)
        step = max(r.step for r in ranks)
        where = f" at step {count(step)}" if step >= 0 else ""
        age = duration(longest.silent_seconds)
        text = f"all ranks wait{where}; {name_of(longest)} silent longest, {age}"
        yield Problem("silent", text, longest.rank, longest.node)
        return
    if len(silent) <= ALONE:
        for rank in silent:
            yield _one("silent", rank, _silent_for(rank))
        return
    for node in dict.fromkeys(r.node for r in silent):
        there = [r for r in silent if r.node == node]
        longest = max(there, key=lambda r: r.silent_seconds)
        if len(there) == 1:
            yield _one("silent", longest, _silent_for(longest))
        else:
            who = f"ranks {ranges(r.rank for r in there)} ({clean(node)})"
            yield Problem("silent", f"{who} {_silent_for(longest)}", None, node)


def _silent_for(rank: Rank) -> str:
    return f"silent for {duration(rank.silent_seconds)}{_at_step(rank.step)}; others go on"


def _others_go_on(silent: Sequence[Rank], ranks: Sequence[Rank]) -> bool:
    """Did some rank log well after the silent ones were heard, or pass their step by more than
    the one in which all would wait? Their clocks may differ, their steps do not."""
    heard, step = max(r.heard_ns for r in silent), max(r.step for r in silent)
    others = [r for r in ranks if r.state in ("live", "finished")]
    return any(r.logged_ns > heard + GOES_ON_NS or r.step > step + 1 for r in others)


def _gone(about: About, ranks: Sequence[Rank]) -> Iterable[Problem]:
    """Ranks that never said how they ended, in a run that is over."""
    gone = [r for r in ranks if r.state in ("silent", "unknown")]
    if about.state == "lost":
        step = max((r.step for r in ranks), default=-1)
        who = ranges(r.rank for r in gone)
        yield Problem("silent", f"no rank was heard for 60 s{_at_step(step)}; silent: {who}")
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


def unreachable(rank: Rank, records: int) -> Problem:
    text = f"{plural(records, 'record')} logged but not stored, and its spool is not on this node"
    return _one("lost", rank, f"lost {text}")


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
