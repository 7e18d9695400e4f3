"""The block a training job prints at its end: once per job, at most 30 lines of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .lines import (
    GAP,
    WIDTH,
    columns,
    next_lines,
    not_finite_lines,
    problem_lines,
    skipped_text,
    state_text,
    step_text,
    wrapped,
)
from .queries import RunView
from .shown import Shown
from .sinks import SinkRow
from .words import clean, count, number, plural, ranges, shorten

MAX_LINES = 30
SIDE_BY_SIDE = 8  #: so many ranks get a column each
PROBLEM_LINES = 5
NOT_FINITE_LINES = 3
MIN_METRICS = 4
RULE = "─"


def summary_lines(shown: Shown, width: int = WIDTH, max_lines: int = MAX_LINES) -> list[str]:
    """What became of a run: who took part, what was logged, where it went, how it ended."""
    view = shown.view
    head = [_title(view, width), *_facts(shown, width)]
    problems = _cut(_texts(problem_lines(view, width)), PROBLEM_LINES)
    odd = _texts(not_finite_lines([n for row in shown.keys for n in row.not_finite]))
    books = [*_logged(view, width), *_passed(view, width), *_sinks(view.sinks, width)]
    tail = [*_texts(next_lines(shown)), RULE * width]
    odd = _cut(odd, NOT_FINITE_LINES)
    room = max_lines - len(head) - len(problems) - len(books) - len(odd) - len(tail)
    if room < MIN_METRICS:
        problems = _cut(problems, max(1, len(problems) - MIN_METRICS + room))
    metrics = _metrics(shown, max(room, MIN_METRICS), width)
    return [*head, *problems, *books, *metrics, *odd, *tail]


def _texts(lines: Sequence[Any]) -> list[str]:
    return [line.plain for line in lines]


def _cut(lines: list[str], limit: int) -> list[str]:
    return lines if len(lines) <= limit else [*lines[: limit - 1], "  … more: rankgate show"]


def _title(view: RunView, width: int) -> str:
    title = f"{RULE * 2} rankgate {RULE * 2} {shorten(view.name, 40)} "
    return title + RULE * max(0, width - len(title))


def _facts(shown: Shown, width: int) -> list[str]:
    view = shown.view
    first = f"{state_text(view).plain}  {step_text(view.step)}"
    if shown.attempt > 1:
        first += f"  attempt {shown.attempt}"
    on = f"{plural(view.world_size, 'rank')} on {plural(len(view.nodes) or 1, 'node')}"
    names = f" ({', '.join(clean(n) for n in view.nodes)})" if view.nodes else ""
    ends = _ends(view)
    if len(on) + len(names) + len(ends) + 11 > width:
        names = ""
    return [f"RUN      {view.run}  {first}", shorten(f"RANKS    {on}{names}  {ends}", width)]


def _ends(view: RunView) -> str:
    """How the ranks ended: `all finished`, or each state with its ranks."""
    states: dict[str, list[int]] = {}
    for rank in view.ranks:
        states.setdefault(rank.state, []).append(rank.rank)
    if len(states) == 1:
        [state] = states
        return f"all {state}" if len(view.ranks) > 1 else state
    return "; ".join(f"{state}: {ranges(ranks)}" for state, ranks in states.items())


def _logged(view: RunView, width: int) -> list[str]:
    book = view.accounting
    line = f"LOGGED   {count(book.logged)} events = stored {count(book.stored)}"
    line += f" + on the way {count(book.on_the_way)} + lost {count(book.lost)}"
    out = [line if len(line) <= width else line.replace(" events", "", 1)]
    if book.on_the_way and book.spooled_in:
        out.append(f"         on the way: spooled in {shorten(clean(book.spooled_in), 48)}")
    set_aside = f", {plural(view.quarantined, 'record')} set aside" if view.quarantined else ""
    return [*out, f"         {plural(view.duplicates, 'duplicate')} dropped{set_aside}"]


def _passed(view: RunView, width: int) -> list[str]:
    """What the rules let through, and what they keep."""
    passed, held = sum(view.passed.values()), sum(view.held.values())
    kinds = ", ".join(f"{count(n)} {kind}" for kind, n in view.passed.items())
    line = f"RULES    {plural(passed, 'item')} for the sinks"
    line += f" ({kinds})" if kinds else ""
    kept = f"{count(held)} kept here, not sent"
    if len(line) + len(kept) + 2 <= width:
        return [f"{line}; {kept}"]
    return [shorten(line, width), f"         {kept}"]


def _sinks(sinks: Sequence[SinkRow], width: int) -> list[str]:
    """A row per sink that is on; one line names those that are off."""
    on = [s for s in sinks if s.state != "off" or "not in the config" not in s.reason]
    if not on:
        return ["SINKS    none configured; everything stays here"]
    header = ("SINK   ", "STATE", "FEED", "DELIVERED", "SKIPPED", "QUARANTINED", "WAITING")
    rows = []
    for s in on:
        numbers = (s.feed, s.delivered, s.skipped, s.quarantined, s.waiting)
        rows.append((s.sink, s.state, *(count(n) for n in numbers)))
    lines = _texts(columns(header, rows, "<<>>>>>"))
    for s in on:
        note = clean(s.reason) or (f"offline export in {_near(s.export)}" if s.export else "")
        if note:
            lines.append(shorten(f"         {s.sink}: {note}", width))
        if s.skipped:
            text = f"{s.sink}: {skipped_text(s)}"
            lines += _texts(wrapped(text, " " * 9, " " * 11, width))
    return lines


# --- final values ------------------------------------------------------------


def _near(path: str) -> str:
    """A path as one would type it here."""
    try:
        return clean(str(Path(path).relative_to(Path.cwd())))
    except (ValueError, OSError):
        return clean(path)


def _metrics(shown: Shown, room: int, width: int) -> list[str]:
    """Each key's last value on every rank, at the step that all have; then what was given to
    `log_summary`."""
    rows = [(_name(row.key, row.step, shown.step), dict(row.values)) for row in shown.keys]
    known = {row.key for row in shown.keys}
    rows += [(clean(k), v) for k, v in shown.summary.items() if k not in known]
    if not rows:
        return ["No values were logged"]
    ranks = [r.rank for r in shown.view.ranks]
    hidden = shown.all_keys - len(shown.keys)
    shown_rows = rows if len(rows) + 1 + bool(hidden) <= room else rows[: max(room - 2, 1)]
    if len(ranks) <= SIDE_BY_SIDE:
        lines = _side_by_side(shown_rows, ranks, shown.step, width)
    else:
        lines = _mean_min_max(shown_rows, shown.step, width)
    more = len(rows) - len(shown_rows) + hidden
    if more > 0:
        lines.append(f"and {plural(more, 'more key')}: rankgate show {shown.view.short}")
    return lines


def _name(key: str, step: int, shared: int) -> str:
    return clean(key) if step == shared else f"{clean(key)} @{count(step)}"


def _side_by_side(
    rows: Sequence[tuple[str, dict[int, Any]]], ranks: Sequence[int], step: int, width: int
) -> list[str]:
    heads = [f"RANK {r}" if r >= 0 else "VALUE" for r in ranks]
    cells = [[_short(values.get(r)) for r in ranks] for _, values in rows]
    gap = GAP if len(ranks) <= 4 else " "
    widths = [max(len(h), *(len(c[i]) for c in cells)) for i, h in enumerate(heads)]
    left = width - sum(widths) - len(gap) * len(widths)
    title = f"AT {step_text(step).upper()}" if step >= 0 else "FINAL"
    key = max(8, min(left, max(len(title), *(len(name) for name, _ in rows))))

    def line(name: str, parts: Sequence[str]) -> str:
        values = gap.join(f"{p:>{w}}" for p, w in zip(parts, widths, strict=True))
        return f"{shorten(name, key):<{key}}{gap}{values}".rstrip()

    return [line(title, heads), *(line(n, c) for (n, _), c in zip(rows, cells, strict=True))]


def _short(value: Any) -> str:
    """A value in at most seven characters, where that loses nothing but digits."""
    text = number(value)
    if len(text) <= 7:
        return text
    if isinstance(value, float):
        return f"{value:.2g}"
    if isinstance(value, int):
        return text if len(text) <= 9 else f"{value:.2g}"
    return shorten(text, 7)


def _mean_min_max(rows: Sequence[tuple[str, dict[int, Any]]], step: int, width: int) -> list[str]:
    title = f"AT {step_text(step).upper()}" if step >= 0 else "FINAL"
    cells: list[tuple[str, ...]] = []
    for name, values in rows:
        numbers = {r: v for r, v in values.items() if isinstance(v, int | float)}
        if not numbers:
            text = shorten(number(next(iter(values.values()), None)), 30)
            cells.append((name, text, "", "", str(len(values))))
            continue
        mean = sum(float(v) for v in numbers.values()) / len(numbers)
        finite = [r for r in numbers if numbers[r] == numbers[r]]
        low = min(finite, key=lambda r: (numbers[r], r), default=None)
        high = max(finite, key=lambda r: (numbers[r], -r), default=None)
        if low is None or high is None or numbers[low] == numbers[high]:
            same = "same on all" if len(numbers) > 1 else f"on rank {next(iter(numbers))} only"
            cells.append((name, number(next(iter(numbers.values()))), same, "", str(len(numbers))))
            continue
        ends = [f"{number(numbers[r])} ({r})" for r in (low, high)]
        cells.append((name, number(mean), *ends, str(len(numbers))))
    header = (title, "MEAN", "MIN (RANK)", "MAX (RANK)", "RANKS")
    return [line[:width] for line in _texts(columns(header, cells, "<><<>", flex=0))]
