"""A run in the terminal, at 80 columns: lines of rich text made of the values of queries.py."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from .lines import (
    GAP,
    HEADER,
    STATE_STYLES,
    WIDTH,
    all_well,
    columns,
    logged_lines,
    next_lines,
    not_finite_lines,
    problem_lines,
    ranks_text,
    state_text,
    step_text,
    wrapped,
)
from .points import KeyRow
from .queries import Gateway, RunView, Shown, SinkRow
from .words import clean, clock, count, duration, moment, number, plural, shorten, size, sparkline

SHOWN_KEYS = 20


# --- show --------------------------------------------------------------------


def show_lines(shown: Shown, width: int = WIDTH) -> list[Text]:
    view = shown.view
    nodes = plural(len(view.nodes) or 1, "node")
    head = Text(view.name, "bold").append(GAP).append_text(state_text(view))
    where = f"{plural(view.world_size, 'rank')} on {nodes}"
    head.append(f"  {step_text(view.step)}  attempt {shown.attempt}  {where}")
    lines = [head, *gateway_gone_lines(view)]
    lines += problem_lines(view, width) or [all_well(view)]
    lines += key_lines(shown, width)
    lines += not_finite_lines([n for row in shown.keys for n in row.not_finite])
    lines += _not_looked_at(shown)
    lines += logged_lines(view.accounting, view.duplicates)
    return lines + next_lines(shown)


def gateway_gone_lines(view: RunView) -> list[Text]:
    if view.state != "running" or view.live:
        return []
    return [Text("No gateway answers for it now; training is not affected, ranks keep their logs")]


def key_lines(shown: Shown, width: int = WIDTH) -> list[Text]:
    """The table of keys; for a process on its own, its values."""
    if not shown.keys:
        return [Text("No values yet")]
    view, rows = shown.view, shown.keys[:SHOWN_KEYS]
    one = len(view.ranks) <= 1
    who = "" if one else f", the last that all {view.world_size} ranks have"
    if any(row.ranks < row.expected and row.ranks > 1 for row in rows if row.step == shown.step):
        who = ""
    out = [Text(f"Values at {step_text(shown.step)}{who}:")]
    out += _single_rows(rows, shown.step) if one else _group_rows(rows, shown.step, width)
    more = shown.all_keys - len(rows)
    if more > 0:
        out.append(Text(f"and {plural(more, 'more key')}: rankgate show {view.short} 'glob*'"))
    return out


def _key_text(row: KeyRow, step: int) -> str:
    return clean(row.key) if row.step == step else f"{clean(row.key)} @{count(row.step)}"


def _single_rows(rows: Sequence[KeyRow], step: int) -> list[Text]:
    cells = [(_key_text(r, step), number(r.values[0][1]), sparkline(r.spark)) for r in rows]
    return columns(("KEY", "VALUE", "LAST 100 STEPS"), cells, "<><", flex=0)


def _group_rows(rows: Sequence[KeyRow], step: int, width: int) -> list[Text]:
    header = ("MEAN", "MIN (RANK)", "MAX (RANK)", "RANKS", "LAST 100 STEPS")
    cells = [_group_cells(row) for row in rows]
    low, high = (max([len(header[i]), *(len(c[i]) for c in cells if not c[5])]) for i in (1, 2))
    same = max((len(c[1]) for c in cells if c[5]), default=0)
    high = max(high, same - low - len(GAP))
    mean = max(len("MEAN"), *(len(c[0]) for c in cells))
    ranks = max(len("RANKS"), *(len(c[3]) for c in cells))
    fixed = mean + low + high + ranks + len(header[4]) + 5 * len(GAP)
    longest = max(len("KEY"), *(len(_key_text(r, step)) for r in rows))
    key = max(8, min(longest, width - fixed))

    def line(*parts: str) -> Text:
        name, avg, least, most, n, spark, is_same = parts
        middle = (
            least.ljust(low + len(GAP) + high) if is_same else f"{least:<{low}}  {most:<{high}}"
        )
        return Text(f"{name:<{key}}  {avg:>{mean}}  {middle}  {n:<{ranks}}  {spark}".rstrip())

    out = [line("KEY", *header, "")]
    out[0].stylize(HEADER)
    for row, parts in zip(rows, cells, strict=True):
        out.append(line(shorten(_key_text(row, step), key), *parts))
    return out


def _group_cells(row: KeyRow) -> tuple[str, str, str, str, str, str]:
    """MEAN, MIN, MAX, RANKS, the shape, and whether MIN stands for both."""
    ranks, spark = f"{row.ranks}/{row.expected}", sparkline(row.spark)
    if row.same and row.ranks == row.expected:
        return number(row.values[0][1]), "same on all ranks", "", ranks, spark, "same"
    if row.ranks == 1:
        rank, value = row.values[0]
        return number(value), f"on rank {rank} only", "", ranks, spark, "same"
    low = "–" if row.min_rank is None else f"{number(row.min)} ({row.min_rank})"
    high = "–" if row.max_rank is None else f"{number(row.max)} ({row.max_rank})"
    if row.same:
        return number(row.values[0][1]), f"same on {row.ranks} ranks", "", ranks, spark, "same"
    return number(row.mean), low, high, ranks, spark, ""


def _not_looked_at(shown: Shown) -> list[Text]:
    if shown.all_keys <= len(shown.keys) or len(shown.keys) <= SHOWN_KEYS:
        return []
    return [Text(f"(NaN and Inf looked for in {len(shown.keys)} of {shown.all_keys:,} keys)")]


# --- status ------------------------------------------------------------------


def gateway_lines(gateway: Gateway) -> list[Text]:
    head = Text("GATEWAY  ")
    if gateway.state == "serving":
        address = ", ".join(clean(a) for a in gateway.addresses)
        facts = f"pid {gateway.pid}  up {duration(gateway.up_seconds)}"
        line = Text("GATEWAY  ").append("serving", "green").append(f"  {facts}")
        line.append(f"  {clean(gateway.dir)} {size(gateway.bytes)}")
        out = [line, Text(f"         {address}")]
        if line.cell_len + len(address) + 2 <= WIDTH:
            out = [line.append(f"  {address}")]
        if gateway.full:
            text = "the disk is full: ranks keep their logs until there is room"
            out.append(Text("       ! ").append(text, "red"))
        return out
    if gateway.state == "not answering":
        since = f" since {clock(gateway.answered_ns)}" if gateway.answered_ns else ""
        head.append(f"not answering{since}", "bold red")
        return [head, Text("         training is not affected, ranks keep their logs")]
    last = f", last heard {clock(gateway.answered_ns)}" if gateway.answered_ns else ""
    head.append(f"not running{last}")
    return [head.append(f"  {clean(gateway.dir)} {size(gateway.bytes)}")]


def run_status_lines(view: RunView, width: int = WIDTH) -> list[Text]:
    """One run's block of `status`."""
    head = Text("RUN      ").append(f"{view.short} {view.project}", "bold").append(GAP)
    if view.name not in (f"{view.project}-{view.short}", view.short):
        head = Text("RUN      ").append(view.name, "bold").append(f" {view.short}").append(GAP)
    head.append_text(state_text(view)).append(f"  {step_text(view.step)}  {ranks_text(view)}")
    lines = [head, *problem_lines(view, width, "  ")]
    lines += logged_lines(view.accounting, view.duplicates)
    return lines + sink_lines(view.sinks)


def sink_lines(sinks: Sequence[SinkRow]) -> list[Text]:
    header = ("SINK   ", "STATE", "FEED", "DELIVERED", "SKIPPED", "QUARANTINED", "WAITING", "LAG")
    rows, after = [], {}
    for s in sinks:
        if s.state == "off":
            after[s.sink] = f"{s.sink:<7}  off  {clean(s.reason)}"
            continue
        numbers = (s.feed, s.delivered, s.skipped, s.quarantined, s.waiting)
        rows.append((s.sink, s.state, *(count(n) for n in numbers), duration(s.lag_seconds)))
    lines = columns(header, rows, "<<>>>>>>") if rows else [Text("SINK     STATE", HEADER)]
    for s in sinks:
        if s.state != "off" and s.reason:
            lines.append(Text(f"  {s.sink}: {clean(s.reason)}"))
    return [*lines, *(Text(line) for line in after.values())]


# --- runs --------------------------------------------------------------------


def runs_lines(views: Sequence[RunView | tuple[str, str]], now_ns: int) -> list[Text]:
    """One row per run; a run that cannot be read says why."""
    header = ("RUN", "NAME", "STATE", "STEP", "RANKS", "LOST", "LAST RECORD")
    rows: list[Sequence[str | Text]] = []
    notes: list[Text] = []
    for view in views:
        if not isinstance(view, RunView):
            rows.append((view[0], "", Text("unreadable", "red")))
            notes += wrapped(view[1], "! ", "  ", WIDTH, "red")
            continue
        rows.append(_run_row(view, now_ns))
    return columns(header, rows, "<<<>>><", flex=1) + notes


def _run_row(view: RunView, now_ns: int) -> Sequence[str | Text]:
    last = moment(view.last_record_ns)
    ranks = str(view.world_size)
    if view.live:
        last = f"{duration((now_ns - view.last_record_ns) / 1e9)} ago"
        ranks = f"{view.live_ranks}/{view.world_size} live"
    step = count(view.step) if view.step >= 0 else "–"
    state = Text(view.state, STATE_STYLES.get(view.state, ""))
    lost = Text(count(view.accounting.lost), "bold red" if view.accounting.lost else "")
    return view.short, view.name, state, step, ranks, lost, last
