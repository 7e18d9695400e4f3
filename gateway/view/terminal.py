"""A run in the terminal, at 80 columns: lines of rich text, of what queries.py and shown.py say."""

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
    quarantine_line,
    ranks_text,
    skipped_text,
    state_text,
    step_text,
    wrapped,
)
from .media import FileRow
from .points import KeyRow
from .queries import RunView
from .serving import Gateway
from .shown import Shown
from .sinks import SinkRow
from .words import clean, clock, count, duration, moment, number, plural, shorten, size, sparkline

SHOWN_KEYS = 20
SHOWN_FILES = 8
NAME_CHARACTERS = 28


# --- show --------------------------------------------------------------------


def show_lines(shown: Shown, width: int = WIDTH) -> list[Text]:
    view = shown.view
    nodes = plural(len(view.nodes) or 1, "node")
    head = Text().append(view.name, "bold").append(GAP).append_text(state_text(view))
    where = f"{plural(view.world_size, 'rank')} on {nodes}"
    head.append(f"  {step_text(view.step)}")
    more = f"attempt {shown.attempt}  {where}"
    fits = head.cell_len + len(GAP) + len(more) <= width
    lines = [head.append(f"{GAP}{more}")] if fits else [head, Text(f"{GAP}{more}")]
    lines += gateway_gone_lines(view)
    lines += problem_lines(view, width) or [all_well(view)]
    lines += key_lines(shown, width)
    lines += not_finite_lines([n for row in shown.keys for n in row.not_finite])
    lines += _not_looked_at(shown)
    lines += file_lines(shown.files, width)
    lines += logged_lines(view)
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
    who = "" if one else f", the last that all {count(view.world_size)} ranks have"
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
    """MIN and MAX are one column, so that `same on all ranks` may stand in both."""
    ends = [_ends(row) for row in rows]
    low = max([len("MIN (RANK)"), *(len(e[0]) for e in ends if len(e) == 2)])
    header = ["KEY", "MEAN", f"{'MIN (RANK)':<{low}}  MAX (RANK)", "RANKS", "LAST 100 STEPS"]
    cells = []
    for row, parts in zip(rows, ends, strict=True):
        middle = GAP.join([parts[0].ljust(low), *parts[1:]]) if len(parts) == 2 else parts[0]
        ranks = f"{row.ranks}/{row.expected}"
        value = row.mean if len(parts) == 2 else row.values[0][1]
        cells.append([_key_text(row, step), number(value), middle, ranks, sparkline(row.spark)])
    lines = columns(header, cells, "<><<<", flex=0, width=width)
    if max(line.cell_len for line in lines) > width:  # long numbers: the shapes give way
        return columns(header[:-1], [c[:-1] for c in cells], "<><<", flex=0, width=width)
    return lines


def _ends(row: KeyRow) -> tuple[str, ...]:
    """Minimum and maximum with their ranks, or one text that says why there are no two."""
    if row.ranks == 1:
        return (f"on rank {row.values[0][0]} only",)
    if row.same:
        return ("same on all ranks" if row.ranks == row.expected else f"same on {row.ranks} ranks",)
    if row.min_rank is None or row.max_rank is None:
        return ("–", "–")
    return f"{number(row.min)} ({row.min_rank})", f"{number(row.max)} ({row.max_rank})"


def _not_looked_at(shown: Shown) -> list[Text]:
    if shown.all_keys <= len(shown.keys) or len(shown.keys) <= SHOWN_KEYS:
        return []
    return [Text(f"(NaN and Inf looked for in {len(shown.keys)} of {shown.all_keys:,} keys)")]


def file_lines(files: Sequence[FileRow], width: int) -> list[Text]:
    """The newest checkpoints, else the newest files, with the beginning of their checksum."""
    if not files:
        return []
    chosen = [file for file in files if file.what == "checkpoint"] or list(files)
    cells = [
        (
            shorten(clean(file.name), NAME_CHARACTERS),
            clean(file.what),
            "" if file.step is None else count(file.step),
            str(file.rank),
            "" if file.size_bytes is None else size(file.size_bytes),
            clean(file.lost) or file.sha256[:12] or "on its way",
        )
        for file in chosen[-SHOWN_FILES:]
    ]
    out = columns(("FILE", "KIND", "STEP", "RANK", "SIZE", "SHA256"), cells, "<<>>><", 0, width)
    more = len(files) - len(cells)
    if more > 0:
        out.append(Text(f"and {plural(more, 'more file')}: rankgate show RUN --json"))
    return out


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
        for text in gateway.alarms:
            out += wrapped(clean(text), "       ! ", "         ", WIDTH, "red")
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
    lines += logged_lines(view)
    lines += sink_lines(view.sinks)
    if line := quarantine_line(view):
        lines.append(Text(f"Next: {line}"))
    return lines


def sink_lines(sinks: Sequence[SinkRow]) -> list[Text]:
    if all(s.state == "off" and "not in the config" in s.reason for s in sinks):
        names = " or ".join(f"[sinks.{clean(s.sink)}]" for s in sinks)
        return [Text(f"SINKS    off; to turn on, add {names}")]
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
        if s.skipped:
            lines += wrapped(f"{s.sink} {skipped_text(s)}", "  ", "    ", WIDTH)
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
