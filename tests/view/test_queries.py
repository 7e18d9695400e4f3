"""What a run is made of: finding it, its attempts and reductions, its ranks, its books."""

from __future__ import annotations

import math
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gateway import view
from gateway.errors import AmbiguousRun, Damaged, NotServed, UnknownRun
from gateway.view.finding import find_run, reading, short_id
from gateway.view.points import Answer, KeyRow, lives_of, matching_keys, query_key
from gateway.view.problems import find_problems
from gateway.view.queries import RunView, run_view
from gateway.view.serving import gateway_of
from gateway.view.shown import shown
from rank_client.spool import Spool
from rank_client.wire.records import Kind

from ..build import RunBuilder, serve_dir

ALL = (None, None)


def ask(
    run_dir: Path,
    key: str,
    ranks: frozenset[int] | None = None,
    steps: tuple[int | None, int | None] = ALL,
    all_attempts: bool = False,
    reduction: str = "",
) -> Answer:
    with reading(run_dir) as reader:
        lives = lives_of(reader, reader.about(), reader.streams())
        return query_key(reader, lives, key, ranks, steps, all_attempts, reduction)


def rows(answer: Answer) -> list[tuple[Any, ...]]:
    """(rank, attempt, step, value) of each point."""
    assert answer.rank is not None
    columns = (answer.rank, answer.attempt, answer.step, answer.value)
    return list(zip(*(c.tolist() for c in columns), strict=True))


def look(run_dir: Path, spool: Path | None = None) -> RunView:
    return run_view(run_dir, time.time_ns(), spool)


def key(run_dir: Path, name: str) -> KeyRow:
    [found] = [row for row in shown(run_dir, time.time_ns()).keys if row.key == name]
    return found


def texts(run: RunView) -> list[str]:
    return [p.text for p in run.problems]


class TestFinding:
    """A run by what people call it."""

    @pytest.fixture
    def data(self, tmp_path: Path) -> Path:
        for id_, project in (("7f3a9c21d04e", "digits"), ("7f3b0c21d04e", "digits"),
                             ("99.0", "slurm")):  # fmt: skip
            run = RunBuilder(tmp_path, id_, project)
            run.rank(0).log({"loss": 1.0})
            run.close()
        return tmp_path

    @pytest.mark.parametrize("text", ["7f3a9c21d04e", "7f3a", "digits-7f3a", "digits-7f3a9c"])
    def test_names_of_one_run(self, data: Path, text: str) -> None:
        """An id, a unique prefix of it and the display name find the same run."""
        assert find_run(data, text).name == "7f3a9c21d04e"

    def test_exact_id_before_prefix(self, data: Path) -> None:
        """An id that is also the start of another one means itself."""
        RunBuilder(data, "99.01").close()
        assert find_run(data, "99.0").name == "99.0"

    def test_own_name(self, tmp_path: Path) -> None:
        """A name given by the user is what the run is called, and found by."""
        run = RunBuilder(tmp_path, "aa11bb22cc33", name="my best run")
        run.rank(0)
        assert look(run.close()).name == "my best run"
        assert find_run(tmp_path, "my best run").name == "aa11bb22cc33"

    def test_path(self, data: Path) -> None:
        """The path of a run's folder finds it without any data directory."""
        path = data / "runs" / "99.0"
        assert find_run(Path("/nonexistent"), str(path)) == path

    def test_ambiguous_prefix_lists_runs(self, data: Path) -> None:
        """A prefix of two runs is refused with both of their names."""
        with pytest.raises(AmbiguousRun, match=r"7f3a9c21d04e \(digits-7f3a\).*7f3b0c21d04e"):
            find_run(data, "7f3")

    def test_unknown_run_names_the_nearest(self, data: Path) -> None:
        """A typing error is answered with the run that was probably meant."""
        with pytest.raises(UnknownRun, match=r"Nearest: .*digits-7f3"):
            find_run(data, "digits-7f4a")

    def test_no_runs_at_all(self, tmp_path: Path) -> None:
        """An empty data directory is told as such, with how to name another."""
        with pytest.raises(UnknownRun, match=r"holds no runs.*--dir or RANKGATE_DIR"):
            find_run(tmp_path, "x")

    def test_short_id_grows_until_unique(self) -> None:
        """Four characters of a hash, or as many as tell it from the others."""
        assert short_id("7f3a9c21d04e", ["7f3a9c21d04e", "aaaa"]) == "7f3a"
        assert short_id("7f3a9c21d04e", ["7f3a9c21d04e", "7f3a9d"]) == "7f3a9c"
        assert short_id("12345678", ["12345678"]) == "12345678"

    def test_missing_series(self, data: Path) -> None:
        """A run that nobody projected yet asks for a gateway."""
        (data / "runs" / "99.0" / "series.db").unlink()
        with pytest.raises(NotServed, match="rankgate serve"):
            look(data / "runs" / "99.0")

    def test_damaged_series(self, data: Path) -> None:
        """A damaged series.db is told in one paragraph, with what to do."""
        path = data / "runs" / "99.0" / "series.db"
        path.write_bytes(b"not a database, but long enough to be one" * 1000)
        with pytest.raises(Damaged, match=r"Nothing is lost.*Delete it") as caught:
            look(path.parent)
        assert "\n" not in caught.value.text

    def test_damaged_journal(self, data: Path) -> None:
        """Without a series, an unreadable journal is told apart from a missing gateway."""
        run = data / "runs" / "99.0"
        (run / "series.db").unlink()
        (run / "journal" / "00000001.log").write_bytes(b"x" * 100)
        with pytest.raises(Damaged, match="no readable journal"):
            look(run)


class TestAttempts:
    """Which of several values of one (rank, key, step) counts."""

    @pytest.fixture
    def restarted(self, tmp_path: Path) -> Path:
        """Two ranks log steps 0–5, are restarted and log 3 and 4 again."""
        run = RunBuilder(tmp_path)
        for rank in run.ranks(2):
            for step in range(6):
                rank.log({"loss": 10.0 * rank.rank + step}, step)
        for rank in run.ranks(2, restart=1):
            for step in (3, 4):
                rank.log({"loss": 100.0 + 10 * rank.rank + step}, step)
        return run.close()

    def test_newest_generation_wins(self, restarted: Path) -> None:
        """Per (rank, step) the newest launch's value is given, older ones where it has none."""
        found = [r for r in rows(ask(restarted, "loss")) if r[0] == 1]
        assert found == [
            (1, 1, 0, 10.0), (1, 1, 1, 11.0), (1, 1, 2, 12.0),
            (1, 2, 3, 113.0), (1, 2, 4, 114.0), (1, 1, 5, 15.0),
        ]  # fmt: skip

    def test_all_attempts(self, restarted: Path) -> None:
        """With all attempts every value is given, the older attempt first."""
        found = rows(ask(restarted, "loss", frozenset({0}), (3, 5), all_attempts=True))
        assert found == [(0, 1, 3, 3.0), (0, 2, 3, 103.0), (0, 1, 4, 4.0), (0, 2, 4, 104.0)]

    def test_glance_leaves_ghosts_out(self, restarted: Path) -> None:
        """At a glance, steps that only an older attempt reached do not count."""
        assert key(restarted, "loss").step == 4

    def test_last_take_wins(self, tmp_path: Path) -> None:
        """A step that one stream logs twice counts with its later value, as another attempt."""
        run = RunBuilder(tmp_path)
        rank = run.rank(0)
        for value in (1.0, 2.0, 3.0):
            rank.log({"loss": value, "n": 1}, 7)
        rank.log({"loss": 4.0}, 7).log({"other": 0.5}, 7)
        run_dir = run.close()
        assert rows(ask(run_dir, "loss")) == [(0, 4, 7, 4.0)]
        assert [r[1] for r in rows(ask(run_dir, "loss", all_attempts=True))] == [1, 2, 3, 4]
        assert rows(ask(run_dir, "other")) == [(0, 1, 7, 0.5)]

    def test_numbers_are_dense_over_generations_and_takes(self, tmp_path: Path) -> None:
        """The attempts of a later generation follow all takes of the earlier one."""
        run = RunBuilder(tmp_path)
        run.rank(0).log({"loss": 1.0}, 0).log({"loss": 2.0}, 0)
        run.rank(0, restart=1).log({"loss": 3.0}, 0)
        run_dir = run.close()
        assert rows(ask(run_dir, "loss")) == [(0, 3, 0, 3.0)]
        assert shown(run_dir, time.time_ns()).attempt == 3

    def test_unordered_never_wins(self, tmp_path: Path) -> None:
        """A life of an unknown launch is kept as attempt 0, and never wins."""
        run = RunBuilder(tmp_path)
        run.rank(0).log({"loss": 1.0}, 0)
        run.rank(0, kind="replay", launch="unknown").log({"loss": 9.0}, 0).log({"loss": 9.0}, 1)
        run_dir = run.close()
        assert rows(ask(run_dir, "loss")) == [(0, 1, 0, 1.0)]
        assert rows(ask(run_dir, "loss", all_attempts=True)) == [
            (0, 0, 0, 9.0), (0, 1, 0, 1.0), (0, 0, 1, 9.0),
        ]  # fmt: skip
        assert "1 stream of an unknown launch" in texts(look(run_dir))[0]

    def test_orphan_of_an_older_launch_stays_older(self, tmp_path: Path) -> None:
        """A life adopted later takes the place of its own launch, before the newest."""
        run = RunBuilder(tmp_path)
        run.rank(0).log({"loss": 1.0}, 0)
        run.rank(0, restart=1).log({"loss": 2.0}, 0)
        run.rank(1, kind="replay", restart=0).log({"loss": 3.0}, 0)
        run.rank(1, restart=1).log({"loss": 4.0}, 0)
        assert rows(ask(run.close(), "loss"))[1] == (1, 2, 0, 4.0)

    def test_order_of_key_sets_does_not_matter(self, tmp_path: Path) -> None:
        """A key in two key sets is put in order by number, not by where its rows lie."""
        run = RunBuilder(tmp_path)
        rank = run.rank(0)
        rank.log({"a": 1.0, "b": 0.0}, 0).log({"a": 2.0}, 1).log({"a": 3.0, "b": 0.0}, 1)
        assert rows(ask(run.close(), "a")) == [(0, 1, 0, 1.0), (0, 2, 1, 3.0)]

    def test_many_rows(self, tmp_path: Path) -> None:
        """Sealed segments and the tail together give each rank's rows in order."""
        run = RunBuilder(tmp_path)
        ranks = run.ranks(3)
        for step in range(3000):
            for rank in ranks:
                rank.log({"loss": float(step * 3 + rank.rank)}, step)
        found = ask(run.close(), "loss")
        assert found.rank is not None
        assert found.rank.tolist() == [0] * 3000 + [1] * 3000 + [2] * 3000
        assert np.array_equal(found.step, np.tile(np.arange(3000), 3))
        assert np.array_equal(found.value, found.step * 3.0 + found.rank)


class TestQuery:
    """Keys, selection, reduction."""

    @pytest.fixture
    def run_dir(self, tmp_path: Path) -> Path:
        run = RunBuilder(tmp_path)
        for rank in run.ranks(4):
            for step in range(5):
                if rank.rank != 3 or step < 3:
                    value = {"train/loss": float(step + rank.rank), "train/n": step * 2**60}
                    rank.log({**value, "train/ok": step > 2}, step)
        return run.close()

    def test_exact_match_stands_for_itself(self, tmp_path: Path) -> None:
        """A key that looks like a glob is taken as itself when it is one of the keys."""
        run = RunBuilder(tmp_path)
        run.rank(0).log({"a": 1.0, "a*": 2.0, "ab": 3.0})
        with reading(run.close()) as reader:
            assert matching_keys(reader, ["a*"]) == ["a*"]
            assert matching_keys(reader, ["ab", "a?"]) == ["ab", "a*"]
            assert matching_keys(reader, ["x*"]) == []

    def test_ranks_and_steps(self, run_dir: Path) -> None:
        """Ranks are chosen by number, steps by a half-open span."""
        found = rows(ask(run_dir, "train/loss", frozenset({0, 2}), (1, 3)))
        assert [(r, s) for r, _, s, _ in found] == [(0, 1), (0, 2), (2, 1), (2, 2)]

    @pytest.mark.parametrize(
        ("how", "values"),
        [
            ("mean", [1.5, 2.5, 3.5, 4.0, 5.0]),
            ("min", [0.0, 1.0, 2.0, 3.0, 4.0]),
            ("max", [3.0, 4.0, 5.0, 5.0, 6.0]),
            ("sum", [6.0, 10.0, 14.0, 12.0, 15.0]),
            ("count", [4, 4, 4, 3, 3]),
        ],
    )
    def test_reduction_over_ranks(self, run_dir: Path, how: str, values: list[float]) -> None:
        """Each step is reduced over the ranks that have it."""
        found = ask(run_dir, "train/loss", reduction=how)
        assert found.rank is None
        assert (found.step.tolist(), found.value.tolist()) == ([0, 1, 2, 3, 4], values)

    def test_integer_sums_are_exact(self, run_dir: Path) -> None:
        """A sum of integers past 64 bits is exact, not a float and not wrapped."""
        found = ask(run_dir, "train/n", reduction="sum")
        assert [int(v) for v in found.value.tolist()] == [0, 2**62, 2**63, 9 * 2**60, 12 * 2**60]

    def test_bools(self, run_dir: Path) -> None:
        """True counts as one where it is summed, and stays true where it is not."""
        assert ask(run_dir, "train/ok", reduction="sum").value.tolist() == [0, 0, 0, 3, 3]
        assert ask(run_dir, "train/ok", frozenset({0})).value.tolist()[3] is True

    def test_nan_is_not_reduced_away(self, tmp_path: Path) -> None:
        """A rank's NaN makes the mean and the maximum NaN."""
        run = RunBuilder(tmp_path)
        for rank in run.ranks(2):
            rank.log({"loss": math.nan if rank.rank else 1.0}, 0)
        run_dir = run.close()
        assert math.isnan(ask(run_dir, "loss", reduction="mean").value[0])
        assert math.isnan(ask(run_dir, "loss", reduction="max").value[0])

    def test_key_that_changed_its_type(self, tmp_path: Path) -> None:
        """Values of a key logged as integer and as float keep their types."""
        run = RunBuilder(tmp_path)
        run.rank(0).log({"x": 2**60 + 1}, 0).log({"x": 0.5}, 1)
        run_dir = run.close()
        assert ask(run_dir, "x").value.tolist() == [2**60 + 1, 0.5]
        assert ask(run_dir, "x", reduction="max").value.tolist() == [float(2**60 + 1), 0.5]

    def test_map_rows(self, tmp_path: Path) -> None:
        """Values written as a map are found like any other."""
        run = RunBuilder(tmp_path)
        run.rank(0).log({"x": 1.0}, 0).log_map({"x": 2.0, "y": 3}, 1)
        assert rows(ask(run.close(), "x")) == [(0, 1, 0, 1.0), (0, 1, 1, 2.0)]

    def test_from_python(self, run_dir: Path) -> None:
        """`gateway.view.open` gives keys, points and the run's state."""
        run = view.open(run_dir)
        assert run.keys() == ["train/loss", "train/n", "train/ok"]
        assert len(run.points("train/loss", ranks=[0], steps=(0, 2))) == 2
        assert run.state().world_size == 4


class TestGlance:
    """A key at the last step that all ranks have."""

    def test_last_step_that_all_have(self, tmp_path: Path) -> None:
        """Values are those of the last step that every rank logged, each with its rank."""
        run = RunBuilder(tmp_path)
        for rank in run.ranks(3):
            for step in range(10 if rank.rank else 8):
                rank.log({"loss": [0.3, 0.1, 0.2][rank.rank] + step}, step)
        row = key(run.close(), "loss")
        assert (row.step, row.ranks, row.expected) == (7, 3, 3)
        assert (row.min_rank, row.max_rank, row.mean) == (1, 0, pytest.approx(7.2))
        assert [r for r, _ in row.values] == [0, 1, 2]

    def test_common_step_where_ranks_skip(self, tmp_path: Path) -> None:
        """Ranks that log different steps are shown at the last one they share."""
        run = RunBuilder(tmp_path)
        for rank in run.ranks(2):
            for step in range(0, 20, 2 + rank.rank):
                rank.log({"loss": 1.0}, step)
        assert key(run.close(), "loss").step == 18

    def test_same_on_all_ranks(self, tmp_path: Path) -> None:
        """Equal values are said to be, also when the mean would round."""
        run = RunBuilder(tmp_path)
        for rank in run.ranks(3):
            rank.log({"lr": 0.1}, 0)
        row = key(run.close(), "lr")
        assert (row.same, row.mean) == (True, 0.1)

    def test_key_of_one_rank(self, tmp_path: Path) -> None:
        """A key that one rank logs is shown at that rank's step, 1 of 3."""
        run = RunBuilder(tmp_path)
        ranks = run.ranks(3)
        for rank in ranks:
            rank.log({"loss": 1.0}, 9)
        ranks[0].log({"val/acc": 0.5}, 5)
        row = key(run.close(), "val/acc")
        assert (row.step, row.ranks, row.expected, row.same) == (5, 1, 3, False)

    def test_not_finite_values(self, tmp_path: Path) -> None:
        """NaN and Inf are told by rank with their steps."""
        run = RunBuilder(tmp_path)
        for rank in run.ranks(2):
            for step in range(10):
                bad = rank.rank == 1 and 3 <= step <= 5
                rank.log({"loss": math.nan if bad else math.inf if step == 8 else 1.0}, step)
        found = key(run.close(), "loss").not_finite
        assert [(n.what, n.rank, n.first_step, n.last_step, n.values) for n in found] == [
            ("NaN", 1, 3, 5, 3), ("Inf", 0, 8, 8, 1), ("Inf", 1, 8, 8, 1),
        ]  # fmt: skip

    def test_nan_at_the_shown_step(self, tmp_path: Path) -> None:
        """Beside a NaN, minimum and maximum are those of the other ranks; the mean is NaN."""
        run = RunBuilder(tmp_path)
        for rank in run.ranks(3):
            rank.log({"loss": math.nan if rank.rank == 1 else float(rank.rank)}, 0)
        row = key(run.close(), "loss")
        assert (row.min, row.max, row.same) == (0.0, 2.0, False)
        assert row.mean is not None and math.isnan(row.mean)

    def test_spark_is_the_last_hundred_steps(self, tmp_path: Path) -> None:
        """The shape holds the mean of each of the last hundred steps that all ranks have."""
        run = RunBuilder(tmp_path)
        for rank in run.ranks(2):
            for step in range(150 + rank.rank):
                rank.log({"loss": float(step)}, step)
        assert key(run.close(), "loss").spark == tuple(float(s) for s in range(50, 150))

    def test_losses_come_first(self, tmp_path: Path) -> None:
        """Keys that end in `loss` open the list, then compute times."""
        run = RunBuilder(tmp_path)
        run.rank(0).log({"a": 1.0, "perf/compute_seconds": 1.0, "z/loss": 1.0}, 0)
        keys = [row.key for row in shown(run.close(), time.time_ns()).keys]
        assert keys == ["z/loss", "perf/compute_seconds", "a"]

    def test_summary_values(self, tmp_path: Path) -> None:
        """Final values are kept per rank, the last one given wins."""
        run = RunBuilder(tmp_path)
        for rank in run.ranks(2):
            rank.summary({"best": 0.1}).summary({"best": 0.5 + rank.rank})
        assert shown(run.close(), time.time_ns()).summary == {"best": {0: 0.5, 1: 1.5}}


class TestRun:
    """State, ranks and problems."""

    def test_completed(self, tmp_path: Path) -> None:
        """A run whose ranks all ended is completed, without problems, nothing lost."""
        run = RunBuilder(tmp_path)
        for rank in run.ranks(2, nodes=2):
            rank.log({"loss": 1.0}, 4).end()
        found = look(run.close())
        assert (found.state, found.live, found.step, found.problems) == ("completed", False, 4, ())
        assert [r.state for r in found.ranks] == ["finished", "finished"]
        assert found.nodes == ("node-0", "node-1")

    def test_duration(self, tmp_path: Path) -> None:
        """A run lasts from its first rank's start to its last rank's end; the launcher's own
        stream, which tells no start, changes nothing."""
        run = RunBuilder(tmp_path)
        rank = run.rank(0)
        run.wait(11_400)
        rank.end()
        run.wait(50).launcher(0)
        run.rank(-1, kind="tool", started=0)
        assert look(run.close()).seconds == pytest.approx(11_400, abs=1)

    def test_failed_rank_is_named(self, tmp_path: Path) -> None:
        """A failure names rank and node, and says the last line of the traceback."""
        run = RunBuilder(tmp_path)
        good, bad = run.ranks(2)
        good.end("ended")
        bad.log({"loss": 1.0}, 7).end("failed", "Traceback\n  File\nValueError: no \x1b[31mdata")
        found = look(run.close())
        assert found.state == "failed"
        assert texts(found) == ["rank 1 (node-0, local 1) failed at step 7: ValueError: no data"]

    def test_launcher_that_failed(self, tmp_path: Path) -> None:
        """Ranks without a word are dead once the launcher's exit is known."""
        run = RunBuilder(tmp_path)
        first, _ = run.ranks(2)
        first.end("ended")
        run.launcher(137)
        found = look(run.close())
        assert [r.state for r in found.ranks] == ["finished", "dead"]
        assert texts(found)[0] == "the launcher exited with 137"

    def test_live_ranks(self, tmp_path: Path) -> None:
        """While a gateway serves the run, ranks it hears are live."""
        run = RunBuilder(tmp_path)
        for rank in run.ranks(3):
            rank.log({"loss": 1.0}, 5)
        run_dir = run.close()
        run.serve(time.time_ns())
        found = look(run_dir)
        assert (found.live, found.live_ranks, found.world_size) == (True, 3, 3)

    def test_silent_rank_others_go_on(self, tmp_path: Path) -> None:
        """One silent rank is named with its step while the others log on."""
        run = RunBuilder(tmp_path)
        for rank in run.ranks(4, nodes=2):
            rank.log({"loss": 1.0}, 5 if rank.rank == 3 else 50)
        run_dir = run.close()
        run.serve(time.time_ns(), silent={3: 48.5})
        assert texts(look(run_dir)) == [
            "rank 3 (node-1, local 1) silent for 48 s at step 5; others go on"
        ]

    def test_silent_rank_all_stopped(self, tmp_path: Path) -> None:
        """When nobody logs on, all wait, and the rank silent longest is named."""
        run = RunBuilder(tmp_path)
        for rank in run.ranks(3):
            rank.log({"loss": 1.0}, 41)
        run_dir, now = run.close(), time.time_ns()
        stopped = {r: {"logged": now - 60 * 10**9} for r in range(3)}
        run.serve(now, silent={1: 30.5, 2: 48.5}, told=stopped)
        assert texts(look(run_dir)) == [
            "all ranks wait at step 41; rank 2 (node-0, local 2) silent longest, 48 s"
        ]

    def test_silent_node(self, tmp_path: Path) -> None:
        """Many silent ranks of one node are one problem, not one each."""
        run = RunBuilder(tmp_path)
        for rank in run.ranks(16, nodes=2):
            rank.log({"loss": 1.0}, 5 if rank.rank >= 8 else 50)
        run_dir = run.close()
        run.serve(time.time_ns(), silent=dict.fromkeys(range(8, 16), 20.5))
        [text] = texts(look(run_dir))
        assert text == "ranks 8–15 (node-1) silent for 20 s at step 5; others go on"

    def test_missing_ranks(self, tmp_path: Path) -> None:
        """Ranks that never said hello are expected, and named."""
        run = RunBuilder(tmp_path)
        run.rank(0, world_size=4).log({"loss": 1.0})
        found = look(run.close())
        assert [r.state for r in found.ranks][1:] == ["missing"] * 3
        assert texts(found) == ["3 of 4 ranks not heard of yet: 1–3"]

    def test_lost(self, tmp_path: Path) -> None:
        """A run whose ranks were all silent for a minute of ticks is lost."""
        run = RunBuilder(tmp_path)
        ranks = run.ranks(2)
        ranks[0].log({"loss": 1.0}, 3)
        run.tick(quiet=ranks).wait(61).tick()
        found = look(run.close())
        assert found.state == "lost"
        assert texts(found) == ["no rank was heard for 60 s at step 3; silent: 0, 1"]

    def test_lost_with_nobody_to_name(self, tmp_path: Path) -> None:
        """Where every rank said how it ended, no list of silent ones is begun."""
        run = RunBuilder(tmp_path)
        run.rank(0).log({"loss": 1.0}, 3).end()
        run_dir = run.close()
        with reading(run_dir) as reader:
            about, streams = reader.about(), reader.streams()
        ranks = look(run_dir).ranks
        problems = find_problems(replace(about, state="lost"), streams, ranks, [], [])
        assert [p.text for p in problems] == ["no rank was heard for 60 s at step 3"]

    def test_gateway_gone(self, tmp_path: Path) -> None:
        """Without an answer for 3 s nothing is called live."""
        run = RunBuilder(tmp_path)
        run.rank(0).log({"loss": 1.0})
        run_dir = run.close()
        run.serve(time.time_ns() - 4 * 10**9)
        found = look(run_dir)
        assert (found.live, found.live_ranks, found.ranks[0].state) == (False, 0, "unknown")

    def test_restart_shows_the_newest_launch(self, tmp_path: Path) -> None:
        """Ranks are those of the newest launch; the older one's losses still count."""
        run = RunBuilder(tmp_path)
        run.rank(0).log({"loss": 1.0}, 9).gap(4)
        run.rank(0, restart=1).log({"loss": 1.0}, 2).end()
        found = look(run.close())
        assert [(r.rank, r.step) for r in found.ranks] == [(0, 2)]
        assert (found.state, found.accounting.lost) == ("completed", 4)


def paced(run: RunBuilder, n: int = 3, steps: int = 6, seconds: float = 0.1) -> Path:
    """So many ranks, each with a row every so many seconds; rank 0 is a step behind the others."""
    ranks = run.ranks(n)
    for step in range(steps):
        run.wait(seconds)
        for rank in ranks:
            if rank.rank or step < steps - 1:
                rank.log({"loss": 1.0}, step)
    return run.close()


def idle(run: RunBuilder, seconds: dict[int, float], **told: Any) -> None:
    """Serve a run whose ranks are heard, and last logged so many seconds ago."""
    now = time.time_ns()
    logged = {r: {"logged": now - int(s * 1e9), **told} for r, s in seconds.items()}
    run.serve(now, told=logged)


class TestStuckSilentGone:
    """Heard but without progress, connected but not heard, not connected: three states."""

    @pytest.fixture
    def run(self, tmp_path: Path) -> RunBuilder:
        return RunBuilder(tmp_path)

    def test_stuck_others_go_on(self, run: RunBuilder) -> None:
        """A rank that is heard and logs nothing is stuck, with its step; it counts as live."""
        run_dir = paced(run)
        idle(run, {1: 14.5})
        found = look(run_dir)
        assert [r.state for r in found.ranks] == ["live", "stuck", "live"]
        assert (found.live_ranks, found.state) == (3, "running")
        [problem] = found.problems
        assert (problem.kind, problem.rank) == ("stuck", 1)
        assert problem.text == (
            "rank 1 (node-0, local 1) stuck at step 5 for 14 s: answers, but logs nothing; "
            "others go on"
        )

    def test_all_stuck_names_who_is_behind(self, run: RunBuilder) -> None:
        """When all are stuck, the one whose step is lower may be what all wait for."""
        run_dir = paced(run)
        idle(run, {0: 20.5, 1: 21.5, 2: 22.5})
        assert texts(look(run_dir)) == [
            "all ranks stuck at step 5 for 20 s: they answer, but log nothing; "
            "rank 0 (node-0, local 0) behind, at step 4"
        ]

    def test_all_stuck_at_one_step_names_the_longest(self, run: RunBuilder) -> None:
        """Without a lower step, named is the rank that logged nothing for longest."""
        run_dir = paced(run)
        idle(run, {0: 20.5, 1: 21.5, 2: 22.5}, step=5)
        [text] = texts(look(run_dir))
        assert text.endswith("; rank 2 (node-0, local 2) longest, 22 s")

    def test_shown_within_fifteen_seconds(self, run: RunBuilder) -> None:
        """A rank that made steps quickly is stuck 10 s after its last one, and not before."""
        run_dir = paced(run)
        idle(run, {1: 9.0})
        assert look(run_dir).ranks[1].state == "live"
        idle(run, {1: 11.0})
        assert look(run_dir).ranks[1].state == "stuck"

    def test_many_stuck_are_told_by_node(self, run: RunBuilder) -> None:
        """Many stuck ranks of one node are one problem."""
        ranks = run.ranks(16, nodes=2)
        for step in range(6):
            for rank in ranks:
                rank.log({"loss": 1.0}, step)
        run_dir = run.close()
        idle(run, dict.fromkeys(range(8, 16), 20.5))
        [text] = texts(look(run_dir))
        assert text.startswith("ranks 8–15 (node-1) stuck at step 5 for 20 s: answers, but")

    def test_slow_but_regular(self, run: RunBuilder) -> None:
        """A step every 4 s may be late by several of its pauses."""
        run_dir = paced(run, seconds=4)
        idle(run, dict.fromkeys(range(3), 15.0))
        assert [r.state for r in look(run_dir).ranks] == ["live"] * 3
        idle(run, {1: 17.0})
        assert look(run_dir).ranks[1].state == "stuck"

    def test_several_rows_of_a_step_are_one_step(self, run: RunBuilder) -> None:
        """What counts is the time between steps, not between the calls within one."""
        rank = run.rank(0)
        for step in range(6):
            run.wait(4)
            for key in ("loss", "lr", "seconds"):
                rank.log({key: 1.0}, step)
        run_dir = run.close()
        idle(run, {0: 15.0})
        assert look(run_dir).ranks[0].state == "live"

    def test_a_long_pause_that_was_before(self, run: RunBuilder) -> None:
        """Where evaluations took a minute, the next one is no hang either."""
        rank = run.rank(0)
        for step in range(100):
            run.wait(60 if step == 50 else 0.1)
            rank.log({"loss": 1.0}, step)
        run_dir = run.close()
        idle(run, {0: 80.0})
        assert look(run_dir).ranks[0].state == "live"
        idle(run, {0: 100.0})
        assert look(run_dir).ranks[0].state == "stuck"

    def test_the_first_steps_tell_nothing(self, run: RunBuilder) -> None:
        """A rank that made too few steps to have a pace is never stuck."""
        run_dir = paced(run, steps=2)
        idle(run, dict.fromkeys(range(3), 900.0))
        assert [r.state for r in look(run_dir).ranks] == ["live"] * 3

    def test_a_clock_that_is_wrong(self, run: RunBuilder) -> None:
        """A rank whose clock is an hour behind the gateway's is judged by the gateway's."""
        run_dir = paced(run)
        idle(run, dict.fromkeys(range(3), 3601.0), offset=3600.0)
        assert [r.state for r in look(run_dir).ranks] == ["live"] * 3

    def test_before_the_first_ping(self, run: RunBuilder) -> None:
        """A backlog that is still on its way, as after an outage, is no hang."""
        run_dir = paced(run)
        idle(run, dict.fromkeys(range(3), 0.0), logged=None)
        assert [r.state for r in look(run_dir).ranks] == ["live"] * 3

    def test_a_missed_ping_is_not_called_stuck(self, run: RunBuilder) -> None:
        """Of a rank that was last heard longer ago than a ping takes, nothing is known yet."""
        run_dir = paced(run)
        idle(run, {1: 14.0}, heard_ns=time.time_ns() - 8 * 10**9)
        assert [r.state for r in look(run_dir).ranks] == ["live"] * 3

    def test_work_after_the_last_step(self, run: RunBuilder) -> None:
        """A rank that still saves when the others have finished is warned of as what is known,
        and has not failed."""
        run_dir = paced(run)
        for life in run.lives[1:]:
            life.end()
        run.close()
        idle(run, {0: 30.5})
        found = look(run_dir)
        assert found.state == "running"
        assert texts(found) == [
            "rank 0 (node-0, local 0) stuck at step 4 for 30 s: answers, but logs nothing; "
            "the others have finished"
        ]

    def test_silent_but_connected(self, run: RunBuilder) -> None:
        """A rank whose connection answers for it is stopped, or keeps the GIL."""
        run_dir = paced(run)
        run.serve(time.time_ns(), silent={1: 20.5}, told={1: {"link": "up"}})
        found = look(run_dir)
        assert [r.state for r in found.ranks] == ["live", "silent", "live"]
        assert texts(found) == [
            "rank 1 (node-0, local 1) silent for 20 s at step 5, still connected: stopped, or a C "
            "call keeps the GIL; others go on"
        ]

    def test_not_connected_is_gone_at_once(self, run: RunBuilder) -> None:
        """Without its connection a rank is gone, before three pings were missed."""
        run_dir = paced(run)
        told = {1: {"link": "gone", "silent": False}}
        run.serve(time.time_ns(), silent={1: 7.5}, told=told)
        found = look(run_dir)
        assert [r.state for r in found.ranks] == ["live", "gone", "live"]
        assert texts(found) == [
            "rank 1 (node-0, local 1) gone for 7 s at step 5: not connected any more, so its "
            "process or node is likely down or stopped; others go on"
        ]

    def test_all_wait_for_the_one_that_is_gone(self, run: RunBuilder) -> None:
        """When the others are stuck behind a rank that is gone, that is one problem."""
        run_dir = paced(run)
        now = time.time_ns()
        logged = {"logged": now - 30 * 10**9}
        told = {0: logged, 1: {**logged, "link": "gone"}, 2: logged}
        run.serve(now, silent={1: 28.5}, told=told)
        [text] = texts(look(run_dir))
        assert text.startswith(
            "all ranks wait at step 5; rank 1 (node-0, local 1) gone longest, 28"
        )

    def test_nobody_is_left_to_wait(self, run: RunBuilder) -> None:
        """Of ranks that are all gone none is said to wait."""
        run_dir = paced(run)
        told = {rank: {"link": "gone"} for rank in range(3)}
        run.serve(time.time_ns(), silent=dict.fromkeys(range(3), 20.5), told=told)
        found = look(run_dir)
        assert [p.kind for p in found.problems] == ["gone"] * 3
        assert not any("wait" in text or "go on" in text for text in texts(found))


class TestGateway:
    """Does it answer?"""

    def test_serving(self, tmp_path: Path) -> None:
        """A fresh word of a living process means serving, with addresses and pid."""
        serve_dir(tmp_path, time.time_ns())
        found = gateway_of(tmp_path, time.time_ns())
        assert (found.state, found.pid) == ("serving", os.getpid())
        assert found.addresses == ("tcp://10.0.0.4:5717",)

    def test_not_running(self, tmp_path: Path) -> None:
        """A directory that nobody locks and nobody speaks for has no gateway."""
        assert gateway_of(tmp_path, time.time_ns()).state == "not running"

    def test_dead_process(self, tmp_path: Path) -> None:
        """A fresh word of a process that is gone does not count."""
        serve_dir(tmp_path, time.time_ns())
        told = (tmp_path / "ingest.json").read_text().replace(str(os.getpid()), "4194303")
        (tmp_path / "ingest.json").write_text(told)
        assert gateway_of(tmp_path, time.time_ns()).state == "not running"


class TestAccounting:
    """logged = stored + on the way + lost, per stream and for the run."""

    @staticmethod
    def whole(run: RunView) -> None:
        for book in (run.accounting, *run.streams.values()):
            assert book.logged == book.stored + book.on_the_way + book.lost
            assert book.lost == book.gaps + book.refused + book.unreachable

    def test_all_stored(self, tmp_path: Path) -> None:
        """At the end of a good run everything is stored."""
        run = RunBuilder(tmp_path)
        for rank in run.ranks(2):
            rank.log({"loss": 1.0}).text("x").end()
        found = look(run.close())
        self.whole(found)
        book = found.accounting
        assert (book.logged, book.stored, book.lost) == (6, 6, 0)

    def test_gaps_and_refusals(self, tmp_path: Path) -> None:
        """Gaps and refused calls are lost, each told with rank, kind and reason."""
        run = RunBuilder(tmp_path)
        first, second = run.ranks(2)
        first.log({"loss": 1.0}).gap(5).log({"loss": 1.0}).end()
        second.log({"loss": 1.0}).refuse(3, "not a dict").end()
        found = look(run.close())
        self.whole(found)
        book = found.accounting
        assert (book.gaps, book.refused, book.lost, book.logged) == (5, 3, 8, 14)
        assert "rank 1 (node-0, local 1) lost 3 records: not a dict" in texts(found)

    def test_on_the_way(self, tmp_path: Path) -> None:
        """What a served rank has logged beyond what is stored is on the way."""
        run = RunBuilder(tmp_path)
        for rank in run.ranks(2):
            rank.log({"loss": 1.0})
        run_dir = run.close()
        run.serve(time.time_ns(), behind={1: 192})
        found = look(run_dir)
        self.whole(found)
        assert (found.accounting.on_the_way, found.accounting.lost) == (192, 0)

    def test_refusals_not_told_of_yet(self, tmp_path: Path) -> None:
        """Refusals that only a ping told of count as lost at once."""
        run = RunBuilder(tmp_path)
        run.rank(0).log({"loss": 1.0})
        run_dir = run.close()
        run.serve(time.time_ns(), told={0: {"refused": 7}})
        found = look(run_dir)
        self.whole(found)
        assert (found.accounting.refused, found.accounting.logged) == (7, 8)

    def test_unreachable(self, tmp_path: Path) -> None:
        """What a dead rank was heard to have logged, and is in no spool here, is lost."""
        run = RunBuilder(tmp_path)
        run.rank(0).log({"loss": 1.0})
        run.close()
        run.serve(time.time_ns() - 60 * 10**9, behind={0: 9})
        run.launcher(137)
        found = look(run.close(), tmp_path / "no-spool")
        self.whole(found)
        assert (found.accounting.unreachable, found.accounting.lost) == (9, 9)
        assert "9 records logged but not stored" in texts(found)[-1]

    def test_spooled(self, tmp_path: Path) -> None:
        """What a dead rank left in its spool on this node is on the way, named with its place."""
        run = RunBuilder(tmp_path)
        rank = run.rank(0).log({"loss": 1.0})
        run.launcher(137)
        folder = tmp_path / "spool" / run.id / rank.stream.hex()
        spool = Spool(str(folder), {"stream": rank.stream})
        for _ in range(5):
            spool.append_map(Kind.TEXT, {"t": "x", "l": "info", "w": 0, "s": None})
        spool.refuse("test", 2)
        spool.close()
        found = look(run.close(), tmp_path / "spool")
        self.whole(found)
        book = found.accounting
        assert (book.on_the_way, book.refused, book.unreachable) == (4, 2, 0)
        assert book.spooled_in == str(folder)

    def test_duplicates(self, tmp_path: Path) -> None:
        """Dropped duplicates are counted beside the sum, not in it."""
        run = RunBuilder(tmp_path)
        run.rank(0).log({"loss": 1.0})
        run.tick(duplicates=41)
        found = look(run.close())
        assert (found.duplicates, found.accounting.logged) == (41, 1)

    def test_lost_media(self, tmp_path: Path) -> None:
        """A file whose bytes never came is a problem, and no lost record."""
        run = RunBuilder(tmp_path)
        rank = run.rank(0).media("best.pt", b"weights", arrives=False)
        rank.lose_media(rank.last)
        found = look(run.close())
        assert texts(found) == ["rank 0 (node-0, local 0) lost 1 file: media lost (rewritten)"]
        assert found.accounting.lost == 0


class TestSinks:
    """What passed, and what became of it."""

    def test_books_of_a_sink(self, tmp_path: Path) -> None:
        """feed = delivered + skipped + quarantined + waiting, in items."""
        run = RunBuilder(tmp_path)
        for rank in run.ranks(2):
            for step in range(10):
                rank.log({"a": 1.0, "b": 2.0}, step)
        run_dir = run.close()
        run.sink("clearml", delivered=11, skipped={"no epoch": 3}, quarantined=2)
        found = look(run_dir)
        row = found.sinks[0]
        assert (row.feed, row.delivered, row.skipped, row.quarantined) == (20, 11, 3, 2)
        assert row.feed == row.delivered + row.skipped + row.quarantined + row.waiting
        assert sum(found.held.values()) == 20

    def test_sinks_that_are_off_say_how_to_turn_them_on(self, tmp_path: Path) -> None:
        """Each known sink without a file is off, with the line that turns it on."""
        run = RunBuilder(tmp_path)
        run.rank(0)
        found = look(run.close())
        assert {s.sink: s.reason for s in found.sinks}[
            "hub"
        ] == "not in the config: add [sinks.hub]"

    def test_lag(self, tmp_path: Path) -> None:
        """The lag of a sink is how much older its newest delivery is than the newest record."""
        run = RunBuilder(tmp_path)
        rank = run.rank(0).log({"a": 1.0}, 0)
        sent = run.now_ns
        run.wait(41)
        rank.log({"a": 1.0}, 1)
        run_dir = run.close()
        run.sink("hub", "retrying", delivered=1, sent_wall_ns=sent)
        assert look(run_dir).sinks[0].lag_seconds == pytest.approx(41, abs=0.1)
