"""`rankgate run`: the command is what it would be without us, whatever happens to the gateway."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest

from .job import RANKS, Job, wait_until

PLACE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}


def rank_words(job: Job, steps: int, end: str) -> list[str]:
    return [sys.executable, str(RANKS), str(job.truth_dir), str(steps), end]


@pytest.mark.parametrize("code", [0, 7])
def test_the_exit_code_is_the_commands(tmp_path: Path, code: int) -> None:
    """A command that ends with 7 makes `rankgate run` end with 7."""
    with Job(tmp_path) as job:
        words = [sys.executable, "-c", f"import sys; print('out'); sys.exit({code})"]
        got, out, _ = job.cli("run", "--", *words)
        assert (got, out) == (code, "out\n")


def test_death_by_signal_is_passed_on_as_a_shell_does(tmp_path: Path) -> None:
    """A command killed by SIGKILL gives 137."""
    with Job(tmp_path) as job:
        words = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
        code, _, _ = job.cli("run", "--", *words)
        assert code == 137


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    """An unknown command gives 127 and its name, as a shell does."""
    with Job(tmp_path) as job:
        code, _, err = job.cli("run", "--", "no-such-command")
        assert code == 127
        assert "no-such-command" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_the_command(tmp_path: Path, number: signal.Signals) -> None:
    """SIGTERM and SIGINT sent to the wrapper end the training, whose logs arrive."""
    with Job(tmp_path) as job:
        words = ["run", "--run", "r1", "--", *rank_words(job, 30, "hang")]
        process = job.start(sys.executable, "-m", "gateway", *words, **PLACE)
        wait_until(lambda: (job.truth_dir / "0.ready").exists(), what="the rank hangs")
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 128 + number, err
        job.assert_all_there()
        with job.reader() as reader:
            assert reader.about().state == "failed"


def test_the_summary_is_one_block_of_thirty_lines_at_eighty_columns(tmp_path: Path) -> None:
    """At the end: run, ranks, sums, sinks, values, next commands; nothing wider than 80."""
    with Job(tmp_path) as job:
        words = [
            "run",
            "--run",
            "r1",
            "--sink",
            "clearml=offline",
            "--",
            *rank_words(job, 30, "exit"),
        ]
        code, _, err = job.cli(*words, **PLACE)
        assert code == 0
        block = err[err.index("──") :].splitlines()
        assert len(block) <= 30
        assert max(map(len, block)) <= 80
        text = "\n".join(block)
        for word in (
            "r1",
            "completed",
            "lost 0",
            "duplicates",
            "clearml",
            "exported",
            "train/loss",
        ):
            assert word in text, (word, text)


@pytest.mark.parametrize("trouble", ["config", "directory"])
def test_a_gateway_that_cannot_start_changes_nothing(tmp_path: Path, trouble: str) -> None:
    """The command runs, its code is kept, the trouble is said, and the spool is shipped later."""
    with Job(tmp_path) as job:
        config = tmp_path / "gateway.toml"
        config.write_text("[gateway]\nbnd = 1\n" if trouble == "config" else "")
        words = ["run", "--run", "r1", "--config", str(config)]
        if trouble == "directory":
            (tmp_path / "file").write_text("")
            words += ["--dir", str(tmp_path / "file" / "data")]
        code, _, err = job.cli(*words, "--", *rank_words(job, 30, "finish"), **PLACE)
        assert code == 0, err
        assert "NO GATEWAY" in err
        assert "Traceback" not in err
        if trouble == "config":
            job.drain()
        else:
            [head] = job.spool.glob("r1/*")
            assert head.is_dir()
            (tmp_path / "file").unlink()
            moved = Job.__new__(Job)
            moved.__dict__ = {**job.__dict__, "data": tmp_path / "file" / "data", "processes": []}
            moved.environ = {**job.environ, "RANKGATE_DIR": str(moved.data)}
            with moved:
                moved.drain()
                moved.assert_all_there()
            return
        job.assert_all_there()


def test_json_of_drain(tmp_path: Path) -> None:
    """`drain --json` names each run and what it still waits for."""
    with Job(tmp_path) as job:
        job.rank(0, 1, 10, "finish")
        job.processes[-1].communicate(timeout=60)
        code, out, _ = job.cli("drain", "--json")
        assert code == 0
        runs = {"r1": {"done": True, "waiting": []}}
        assert json.loads(out) == {"done": True, "runs": runs, "replay": []}
