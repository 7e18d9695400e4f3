"""What terminal output is made of: columns, hanging sentences, lines said in several places."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.style import Style
from rich.text import Text

from rank_client.rendezvous import data_dir

from .points import NotFinite
from .queries import RunView
from .shown import Shown
from .sinks import SinkRow
from .typed import typed
from .words import clean, count, duration, moment, plural, shorten

WIDTH = 80
GAP = "  "
SHOWN_LINES = 6  #: of problems or of not-finite values

#: of ranks 0 to 7, in every surface the same; 4 is ink
RANK_COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "default", "#E69F00", "#56B4E9", "#882255",
)  # fmt: skip
STATE_STYLES = {"running": "green", "completed": "green", "failed": "bold red", "lost": "bold red"}
HEADER = Style(dim=True)


def console(to_stderr: bool = False) -> Console:
    """Prints lines as they are: no markup, no wrapping; colour only on a terminal without
    NO_COLOR."""
    stream = sys.stderr if to_stderr else sys.stdout
    return Console(file=stream, markup=False, highlight=False, emoji=False, soft_wrap=True)


def width_of(out: Console) -> int:
    """The columns there are, 80 where nobody says."""
    return max(60, out.width) if out.is_terminal else out.width or WIDTH


def rank_style(rank: int, ranks: int) -> str:
    """A rank's colour where there are at most eight; more would share colours."""
    return RANK_COLOURS[rank] if ranks <= len(RANK_COLOURS) and 0 <= rank < 8 else ""


# --- lines -------------------------------------------------------------------


def columns(
    header: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    right: str = "",
    flex: int = -1,
    width: int = WIDTH,
) -> list[Text]:
    """Rows under a header. `right` has one character per column: `>` stands right."""
    table = [[Text(h, HEADER) for h in header]]
    table += [[c if isinstance(c, Text) else Text(c) for c in row] for row in rows]
    widths = [max((row[i].cell_len for row in table if i < len(row)), default=0)
              for i in range(len(header))]  # fmt: skip
    over = sum(widths) + len(GAP) * (len(widths) - 1) - width
    if flex >= 0 and over > 0:
        widths[flex] = max(8, widths[flex] - over)
    return [_joined(row, widths, right, flex) for row in table]


def _joined(row: list[Text], widths: list[int], right: str, flex: int) -> Text:
    line = Text()
    for i, cell in enumerate(row):
        cut = i == flex and cell.cell_len > widths[i]
        fits = Text(shorten(cell.plain, widths[i]), cell.style) if cut else cell
        pad = " " * max(0, widths[i] - fits.cell_len)
        stands_right = right[i : i + 1] == ">"
        line.append(GAP if i else "")
        line.append(pad if stands_right else "")
        line.append_text(fits)
        line.append("" if stands_right or i == len(row) - 1 else pad)
    return line


def wrapped(text: str, first: str, rest: str, width: int, style: str = "") -> list[Text]:
    """A sentence over as many lines as it needs, hanging under its first."""
    lines: list[Text] = []
    line, lead = "", first
    for word in text.split(" "):
        if line and len(lead) + len(line) + 1 + len(word) > width:
            lines.append(Text(lead).append(line, style))
            line, lead = word, rest
        else:
            line = f"{line} {word}" if line else word
    lines.append(Text(lead).append(line, style))
    return lines


def problem_lines(view: RunView, width: int = WIDTH, indent: str = "") -> list[Text]:
    out: list[Text] = []
    for problem in view.problems[:SHOWN_LINES]:
        out += wrapped(problem.text, f"{indent}! ", f"{indent}  ", width, "red")
    more = len(view.problems) - SHOWN_LINES
    if more > 0:
        out.append(Text(f"{indent}! and {plural(more, 'more problem')}: rankgate show --json"))
    return out


def state_text(view: RunView) -> Text:
    """The state, and since when or until when."""
    text = Text().append(view.state, STATE_STYLES.get(view.state, ""))
    if view.state == "running" and not view.live:
        return text.append(f" as of {moment(view.as_of_ns)}", "")
    return text.append(f"{' ' if view.live else ' after '}{duration(view.seconds)}", "")


def step_text(step: int) -> str:
    return f"step {count(step)}" if step >= 0 else "no step yet"


def ranks_text(view: RunView) -> str:
    """`63 of 64 ranks live`; without a gateway that says so, how many there are."""
    if view.live:
        return f"{view.live_ranks} of {plural(view.world_size, 'rank')} live"
    finished = sum(r.state == "finished" for r in view.ranks)
    if view.state != "running" and finished:
        return f"{finished} of {plural(view.world_size, 'rank')} finished"
    return plural(view.world_size, "rank")


def logged_lines(view: RunView) -> list[Text]:
    book = view.accounting
    line = Text("LOGGED   ").append(
        f"{count(book.logged)} = stored {count(book.stored)} + on the way {count(book.on_the_way)}"
        " + "
    )
    line.append(f"lost {count(book.lost)}", "bold red" if book.lost else "")
    out = [line]
    if book.on_the_way and book.spooled_in:
        out += wrapped(
            f"on the way: spooled in {clean(book.spooled_in)}; {_drain(view)} ships it",
            " " * 9, " " * 9, WIDTH,
        )  # fmt: skip
    if view.duplicates:
        out.append(Text(f"         {plural(view.duplicates, 'duplicate')} dropped"))
    return out


def _drain(view: RunView) -> str:
    return clean(typed(_root(view), "drain"))


def _root(view: RunView) -> Path:
    """The data directory that a run lies in."""
    return Path(view.path).absolute().parent.parent


def all_well(view: RunView) -> Text:
    """In place of problems; without a gateway nobody can say that all is well."""
    text = f"{ranks_text(view)}, lost {count(view.accounting.lost)}"
    known = view.live or view.state == "completed"
    return Text().append("✓ " if known else "  ", "green").append(text)


def not_finite_lines(found: Sequence[NotFinite]) -> list[Text]:
    out = []
    for n in found[:SHOWN_LINES]:
        on = f" on rank {n.rank}" if n.rank >= 0 else ""
        steps = f"step {count(n.first_step)}"
        if n.first_step != n.last_step:
            steps = f"steps {count(n.first_step)}–{count(n.last_step)}"
        line = Text().append(f"{n.what}: ", "red")
        out.append(line.append(f"{clean(n.key)}{on}, {steps} ({plural(n.values, 'value')})", ""))
    more = len(found) - SHOWN_LINES
    if more > 0:
        out.append(Text(f"and {more} more key and rank with NaN or Inf: rankgate show --json"))
    return out


def next_lines(shown: Shown) -> list[Text]:
    view = shown.view
    odd = next((p.rank for p in view.problems if p.rank is not None), None)
    tail = f"rankgate tail {view.short}"
    tail += f" --rank {odd}" if odd is not None else " --follow" if view.live else ""
    there = _dir_option(view)
    out = [Text(f"Next: {tail}{there}")]
    if out[0].cell_len > WIDTH:  # still one command for a shell
        out = [Text(f"Next: {tail} \\"), Text(f"     {there}")]
    if line := quarantine_line(view):
        out.append(Text(f"      {line}"))
    for row in shown.keys:
        line = f"      rankgate query {view.short} {_quoted(row.key)} --rank all{there}"
        if len(line) <= WIDTH:  # a command that is cut cannot be pasted
            return [*out, Text(line)]
    return out


def quarantine_line(view: RunView) -> str:
    """The command that shows what a backend would not take; nothing where it took all."""
    if not any(s.quarantined for s in view.sinks):
        return ""
    return f"rankgate sinks status {view.short}{_dir_option(view)}"


def skipped_text(sink: SinkRow) -> str:
    """Why items are skipped, the reason of most of them first."""
    reasons = sorted(sink.skipped_reasons.items(), key=lambda kv: -kv[1])
    return "skipped: " + ", ".join(f"{count(n)} {clean(reason)}" for reason, n in reasons)


def _dir_option(view: RunView) -> str:
    """What this very shell needs to find the run's data directory."""
    root = _root(view)
    if root == data_dir(os.environ) or Path(view.path).parent.name != "runs":
        return ""
    return f" --dir {_quoted(str(root))}"


def _quoted(key: str) -> str:
    key = clean(key)
    plain = all(c.isalnum() or c in "/_-.:=+@%," for c in key)
    return key if plain else "'" + key.replace("'", "'\\''") + "'"
