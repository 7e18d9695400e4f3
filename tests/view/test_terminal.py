"""What people see at 80 columns: words, widths, and nothing that a terminal would obey."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.view.lines import RANK_COLOURS, logged_lines, rank_style
from gateway.view.queries import run_view
from gateway.view.serving import gateway_of
from gateway.view.shown import shown
from gateway.view.summary import summary_lines
from gateway.view.terminal import gateway_lines, run_status_lines, runs_lines, show_lines
from gateway.view.words import (
    clean,
    count,
    duration,
    number,
    ranges,
    shorten,
    size,
    sparkline,
)

from ..build import RunBuilder, serve_dir


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell whose data directory is the one looked at."""
    monkeypatch.setenv("RANKGATE_DIR", str(tmp_path))


def show(run_dir: Path) -> list[str]:
    return [line.plain for line in show_lines(shown(run_dir, time.time_ns()))]


def status(run_dir: Path) -> list[str]:
    return [line.plain for line in run_status_lines(run_view(run_dir, time.time_ns()))]


def summary(run_dir: Path) -> list[str]:
    return summary_lines(shown(run_dir, time.time_ns()))


def job(tmp_path: Path, ranks: int, keys: int = 1, steps: int = 3) -> RunBuilder:
    run = RunBuilder(tmp_path, "7f3a9c21d04e")
    for rank in run.ranks(ranks, nodes=max(1, ranks // 8)):
        for step in range(steps):
            rank.log({f"k{i:02}/loss": rank.rank + step + i / 7 for i in range(keys)}, step)
        rank.end()
    return run


class TestWords:
    """Numbers, times and other people's text."""

    @pytest.mark.parametrize(
        ("text", "safe"),
        [
            ("plain text", "plain text"),
            ("\x1b[31mred\x1b[0m", "red"),
            ("\x1b]0;title\x07after", "after"),
            ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
            ("\x9b31mc1", "c1"),
            ("a\x1b(Bb\x1bcc", "abc"),
            ("c1\x84\x8d\x90", "c1"),
            ("bell\x07 null\x00 del\x7f", "bell null del"),
            ("two\r\nlines\tand", "two lines and"),
            ("\u202eevil\u2066\u200f", "evil"),
            ("\ud800half", "half"),
            ("naïve – 猫 ▇", "naïve – 猫 ▇"),
            ("open \x1b]0;never closed", "open "),
        ],
    )
    def test_clean(self, text: str, safe: str) -> None:
        """Sequences, controls and direction marks are taken out, text of any script stays."""
        assert clean(text) == safe

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [
            (0, "0 s"), (48.9, "48 s"), (60, "1 min"), (3599, "59 min"), (11_400, "3 h 10 min"),
            (86_400, "1 d 0 h"), (-5, "0 s"),
        ],
    )  # fmt: skip
    def test_duration(self, seconds: float, text: str) -> None:
        """Ages are text with units."""
        assert duration(seconds) == text

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (0.128374, "0.1284"), (0.00033, "0.00033"), (6.67e-05, "6.67e-5"), (41208, "41,208"),
            (2**60 + 1, "1,152,921,504,606,846,977"), (12345.6, "12,346"), (1234.5, "1,234.5"),
            (math.nan, "NaN"), (-math.inf, "-Inf"), (0.0, "0"), (True, "true"), (1e9, "1e9"),
            (None, "–"), (1e-300, "1e-300"),
        ],
    )  # fmt: skip
    def test_number(self, value: object, text: str) -> None:
        """Floats are shortened, whole numbers keep every digit."""
        assert number(value) == text

    def test_sizes_counts_ranges(self) -> None:
        """Units, thousands and spans of ranks."""
        assert (size(999), size(1_240_000_000), size(17_000)) == ("999 B", "1.2 GB", "17 kB")
        assert count(10_548_556) == "10,548,556"
        assert ranges([3, 8, 9, 10, 0, 1]) == "0, 1, 3, 8–10"

    def test_shorten_keeps_both_ends(self) -> None:
        """A long key loses its middle."""
        assert shorten("train/encoder/layer_11/loss", 13) == "train/…1/loss"

    def test_sparkline(self) -> None:
        """A shape from low to high; what is not finite is marked, what is flat is flat."""
        assert sparkline([0, 1, 2, 3, 4, 5, 6]) == "▁▂▃▄▅▆▇"
        assert sparkline([1.0, math.nan, 2.0]) == "▁×▇"
        assert sparkline([5.0] * 40) == "▂" * 12
        assert sparkline([]) == ""

    def test_rank_colours(self) -> None:
        """Up to eight ranks have a colour each; more have none, as no colour stands for two."""
        assert [rank_style(r, 8) for r in range(8)] == list(RANK_COLOURS)
        assert rank_style(3, 9) == ""
        assert rank_style(-1, 1) == ""


class TestShow:
    """One run."""

    def test_head_and_values(self, tmp_path: Path) -> None:
        """The head names run, state, step, attempt and ranks; values say which step they are of."""
        lines = show(job(tmp_path, 16).close())
        assert lines[0].startswith("digits-7f3a  completed after ")
        assert lines[0].endswith("step 2  attempt 1  16 ranks on 2 nodes")
        assert lines[1] == "✓ 16 of 16 ranks finished, lost 0"
        assert lines[2] == "Values at step 2, the last that all 16 ranks have:"
        assert "9.5  2 (0)       17 (15)     16/16" in lines[4]

    def test_next_commands(self, tmp_path: Path) -> None:
        """It ends with commands that can be typed as they are."""
        assert show(job(tmp_path, 2).close())[-2:] == [
            "Next: rankgate tail 7f3a",
            "      rankgate query 7f3a k00/loss --rank all",
        ]

    def test_next_commands_elsewhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the shell would look elsewhere they name the directory, and stay one command."""
        long = tmp_path / ("d" * 60)
        monkeypatch.setenv("RANKGATE_DIR", "/elsewhere")
        monkeypatch.chdir(tmp_path)
        lines = show(job(long, 2).close())
        assert lines[-2:] == ["Next: rankgate tail 7f3a \\", f"      --dir {long}"]
        monkeypatch.delenv("RANKGATE_DIR")
        lines = show(job(Path(".rankgate"), 2).close())
        assert lines[-2] == "Next: rankgate tail 7f3a"

    def test_what_waits_in_the_spool(self, tmp_path: Path) -> None:
        """The line names the directory to drain: another shell would drain its own."""
        run = RunBuilder(tmp_path)
        run.rank(0).log({"loss": 1.0}, 5)
        view = run_view(run.close(), time.time_ns())
        book = replace(view.accounting, on_the_way=3, spooled_in="/var/tmp/rankgate-0")
        lines = logged_lines(replace(view, accounting=book))
        text = " ".join(" ".join(line.plain for line in lines).split())
        assert f"rankgate drain --dir {tmp_path} ships it" in text

    def test_same_on_all_ranks(self, tmp_path: Path) -> None:
        """Equal values are one value with the words for it."""
        run = RunBuilder(tmp_path)
        for rank in run.ranks(4):
            rank.log({"lr": 0.00033}, 0)
        line = next(x for x in show(run.close()) if x.startswith("lr"))
        assert line.split(None, 2)[1] == "0.00033"
        assert "same on all ranks" in line

    def test_nan_line(self, tmp_path: Path) -> None:
        """NaN is told by key, rank and steps."""
        run = RunBuilder(tmp_path)
        for rank in run.ranks(4):
            for step in range(210):
                bad = rank.rank == 3 and 200 <= step <= 203
                rank.log({"train/loss": math.nan if bad else 1.0}, step)
        text = "NaN: train/loss on rank 3, steps 200–203 (4 values)"
        assert text in show(run.close())

    def test_a_process_on_its_own(self, tmp_path: Path) -> None:
        """Without ranks, the values stand alone."""
        run = RunBuilder(tmp_path)
        run.rank(-1).log({"loss": 0.25}, 3).end()
        lines = show(run.close())
        assert "KEY   VALUE  LAST 100 STEPS" in lines
        assert any(x.startswith("loss   0.25") for x in lines)

    def test_key_at_another_step(self, tmp_path: Path) -> None:
        """A key whose last common step is another says which."""
        run = RunBuilder(tmp_path)
        for rank in run.ranks(2):
            rank.log({"a": 1.0, "b": 1.0}, 1500).log({"a": 1.0, "c": 1.0}, 1600)
        assert any(x.startswith("b @1,500") for x in show(run.close()))

    def test_fits_80_columns(self, tmp_path: Path) -> None:
        """Long keys, names and problems are cut or wrapped, never wider than the terminal."""
        run = RunBuilder(tmp_path)
        for rank in run.ranks(64, nodes=8):
            rank.log({"a/very/long/key/" * 8 + "loss": -1.2345e-17 * rank.rank, "n": 10**15}, 10**9)
            rank.end("failed", "x" * 30 + " and so on" * 30)
        run_dir = run.close()
        run.sink("clearml", "delivering", delivered=10**9, sent_wall_ns=1)
        for lines in (show(run_dir), status(run_dir), summary(run_dir)):
            assert max(map(len, lines)) <= 80

    def test_hostile_text(self, tmp_path: Path) -> None:
        """No key, name, node or failure can reach the terminal's controls."""
        evil = "\x1b]0;x\x07\x1b[2J\u202e[bold]"
        run = RunBuilder(tmp_path, project=f"p{evil}", name=f"n{evil}")
        for i in range(2):
            rank = run.rank(i, 2, node=f"h{evil}").log({f"k{evil}": math.nan}, 0)
            rank.summary({f"s{evil}": f"v{evil}"}).refuse(1, f"r{evil}")
            rank.end("failed", f"Traceback\nE: {evil}oh")
        run_dir = run.close()
        run.sink("clearml", "off", reason=f"no key{evil}")
        text = "\n".join(show(run_dir) + status(run_dir) + summary(run_dir))
        assert not any(c in text for c in "\x1b\x07\u202e")
        assert "k[bold]" in text


class TestStatus:
    """The gateway, the books and the sinks."""

    def test_block(self, tmp_path: Path) -> None:
        """Run, problems, the sum, duplicates, then a row per sink."""
        run = RunBuilder(tmp_path)
        for rank in run.ranks(4):
            rank.log({"loss": 1.0}, 5 if rank.rank == 3 else 1500)
        run.tick(duplicates=4128)
        run_dir = run.close()
        run.sink("clearml", "delivering", delivered=1)
        run.sink("hub", "retrying", reason="HTTP 503")
        run.serve(time.time_ns(), silent={3: 48.5}, behind={0: 192})
        lines = status(run_dir)
        assert lines[0].startswith("RUN      7f3a digits  running ")
        assert lines[0].endswith("  step 1,500  3 of 4 ranks live")
        assert lines[1] == "  ! rank 3 (node-0, local 3) silent for 48 s at step 5; others go on"
        assert lines[2] == "LOGGED   196 = stored 4 + on the way 192 + lost 0"
        assert lines[3] == "         4,128 duplicates dropped"
        assert lines[4].split() == [
            "SINK", "STATE", "FEED", "DELIVERED", "SKIPPED", "QUARANTINED", "WAITING", "LAG",
        ]  # fmt: skip
        assert lines[5].split() == ["clearml", "delivering", "1", "1", "0", "0", "0", "0", "s"]
        assert "  hub: HTTP 503" in lines
        assert lines[-1] == "neptune  off  not in the config: add [sinks.neptune]"

    def test_why_items_were_skipped(self, tmp_path: Path) -> None:
        """Each reason with its number, most first, in status and in the summary, beside where an
        export is; and what shows the items that a backend would not take."""
        run = job(tmp_path, 2)
        run_dir = run.close()
        reasons = {"not finite": 2, "step not rising": 40, "x" * 70: 1}
        run.sink("clearml", "exported", skipped=reasons, export="/exports/clearml")
        run.sink("hub", "drained", quarantined=3, reason="3 refused")
        text = " ".join(" ".join(status(run_dir)).split())
        assert f"clearml skipped: 40 step not rising, 2 not finite, 1 {'x' * 70}" in text
        assert max(map(len, status(run_dir))) <= 80
        assert status(run_dir)[-1] == "Next: rankgate sinks status 7f3a"
        lines = summary(run_dir)
        assert "         clearml: offline export in /exports/clearml" in lines
        assert any(line.startswith("         clearml: skipped: 40 step not") for line in lines)
        assert "      rankgate sinks status 7f3a" in lines

    def test_no_sinks(self, tmp_path: Path) -> None:
        """With no sink in the config, one line says how to turn one on."""
        line = "SINKS    off; to turn on, add [sinks.clearml] or [sinks.hub] or [sinks.neptune]"
        assert status(job(tmp_path, 1).close())[-1] == line

    def test_gateway_serving(self, tmp_path: Path) -> None:
        """A gateway that answers gives address, pid, age and size."""
        serve_dir(tmp_path, time.time_ns())
        text = "\n".join(x.plain for x in gateway_lines(gateway_of(tmp_path, time.time_ns(), True)))
        assert "serving" in text
        assert "tcp://10.0.0.4:5717" in text

    def test_old_run(self, tmp_path: Path) -> None:
        """A run that nobody serves is `as of` a time; nothing in it is live."""
        run = RunBuilder(tmp_path)
        run.rank(0).log({"loss": 1.0}, 5)
        text = "\n".join(status(run.close()) + show(tmp_path / "runs" / run.id))
        assert "running as of 2026-" in text
        assert " live" not in text
        assert "training is not affected" in text

    def test_one_row_per_run(self, tmp_path: Path) -> None:
        """A list has one row per run, never one per rank; one that cannot be read says why."""
        run_dir = job(tmp_path, 16).close()
        view = run_view(run_dir, time.time_ns())
        lines = [x.plain for x in runs_lines([view, ("bad", "it is damaged")], time.time_ns())]
        assert len(lines) == 4
        assert lines[1].split()[:6] == ["7f3a", "digits-7f3a", "completed", "2", "16", "0"]
        assert lines[3] == "! it is damaged"


class TestSummary:
    """The block at the end of a job."""

    def test_ranks_side_by_side(self, tmp_path: Path) -> None:
        """Up to eight ranks have a column each, with their own value."""
        run = job(tmp_path, 8)
        lines = summary(run.close())
        head = next(i for i, x in enumerate(lines) if x.startswith("AT STEP 2"))
        assert lines[head].split()[3:] == [w for r in range(8) for w in ("RANK", str(r))]
        assert lines[head + 1].split() == ["k00/loss", *(str(r + 2) for r in range(8))]

    def test_many_ranks(self, tmp_path: Path) -> None:
        """More than eight are told as mean, minimum and maximum with their ranks."""
        lines = summary(job(tmp_path, 16).close())
        assert any(x.split() == ["k00/loss", "9.5", "2", "(0)", "17", "(15)", "16"] for x in lines)

    def test_says_what_became_of_it(self, tmp_path: Path) -> None:
        """Id, ranks, nodes, the sum with lost 0, duplicates, rules, sinks, next commands."""
        run = job(tmp_path, 4)
        run_dir = run.close()
        run.sink("clearml", "drained", delivered=3)
        text = "\n".join(summary(run_dir))
        for part in (
            "RUN      7f3a9c21d04e  completed after", "RANKS    4 ranks on 1 node (node-0)",
            "all finished", "LOGGED   16 events = stored 16 + on the way 0 + lost 0",
            "0 duplicates dropped", "RULES    3 items for the sinks (3 metric); 9 kept here",
            "clearml  drained     3          3", "Next: rankgate tail 7f3a",
        ):  # fmt: skip
            assert part in text

    @pytest.mark.parametrize("ranks", [1, 4, 8, 64])
    def test_at_most_30_lines(self, tmp_path: Path, ranks: int) -> None:
        """However many keys, problems and sinks, it is 30 lines of 80 columns at most."""
        run = RunBuilder(tmp_path)
        for rank in run.ranks(ranks, nodes=max(1, ranks // 8)):
            rank.log({f"key-{i:03}": math.nan for i in range(300)}, 3)
            rank.refuse(2, "not a dict").refuse(1, "bad step").end("failed", "Error: " + "x " * 100)
        run_dir = run.close()
        for name in ("clearml", "hub", "neptune"):
            skipped = {"not finite": 7}
            run.sink(name, "retrying", reason="HTTP 503", skipped=skipped, quarantined=1)
        lines = summary(run_dir)
        assert len(lines) <= 30
        assert max(map(len, lines)) <= 80
        assert any("more keys: rankgate show 7f3a" in x for x in lines)

    def test_final_values(self, tmp_path: Path) -> None:
        """What was given to log_summary stands beside the metrics."""
        run = RunBuilder(tmp_path)
        for rank in run.ranks(2):
            rank.log({"loss": 1.0}, 1).summary({"best/acc": 0.5 + rank.rank / 10}).end()
        assert any(x.split() == ["best/acc", "0.5", "0.6"] for x in summary(run.close()))

    def test_nothing_logged(self, tmp_path: Path) -> None:
        """A run without values says so, and does not fail."""
        run = RunBuilder(tmp_path)
        run.rank(0).end()
        assert "No values were logged" in summary(run.close())
