"""`rankgate run`: the command is what it would be without us, whatever happens to the gateway."""

from __future__ import annotations

import json
import signal
import stat
import sys
import threading
import time
from pathlib import Path

import pytest

from gateway import attach
from gateway.cli.run import Launch
from gateway.nodes import nodes_of
from gateway.supervise import write_json
from rank_client import orphans
from rank_client.spool import Spool
from rank_client.wire.records import Kind

from ..build import RunBuilder
from .job import RANKS, ROOT, Job, wait_until

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
        for path in (job.data, job.data / "holds"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o700


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


def slow(tmp_path: Path, child: str, seconds: float) -> str:
    """A PYTHONPATH with which that child of the gateway starts so much later."""
    place = tmp_path / "slow"
    place.mkdir()
    lines = ["import sys, time", f"if {child!r} in sys.orig_argv: time.sleep({seconds})"]
    (place / "sitecustomize.py").write_text("\n".join(lines))
    return f"{place}:{ROOT}"


def test_a_command_that_is_over_before_its_gateway_answers(tmp_path: Path) -> None:
    """What a process left that went without a word is stored, with how the command ended, before
    `run` leaves; that a gateway takes its time is no alarm."""
    with Job(tmp_path) as job:
        words = ["run", "--run", "r1", "--", *rank_words(job, 30, "os_exit")]
        late = slow(tmp_path, "ingest", 4.0)
        code, _, err = job.cli(*words, **PLACE, PYTHONPATH=late)
        assert code == 7
        assert "logged nothing" not in err
        assert "NO GATEWAY" not in err
        assert "RUN      r1  failed" in err, err
        job.assert_all_there()
        with job.reader() as reader:
            assert reader.about().state == "failed"


def test_run_waits_until_what_was_shipped_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last orphan is shipped a moment before ingest tells of its run: that is waited for."""
    root, spool = tmp_path / "data", tmp_path / "spool"
    root.mkdir()
    monkeypatch.setenv("RANKGATE_SPOOL", str(spool))
    launch = Launch(root, nodes_of([], {}), "r1", True)
    hello = {"stream": bytes(16), "launch": launch.launch, "dir": str(root)}
    left = spool / "r1" / bytes(16).hex()
    left.parent.mkdir(parents=True, mode=0o700)
    dead = Spool(str(left), hello)
    dead.append_map(Kind.SUMMARY, {"v": {"x": 1.0}})
    dead.close()
    write_json(root / "ingest.json", {"at_ns": time.time_ns(), "journals": {}})

    def ship() -> None:
        write_json(root / "ingest.json", {"at_ns": time.time_ns(), "journals": {}})
        time.sleep(0.3)
        orphans.write_note(left, "done", f"{'00' * 16} 2")
        time.sleep(0.5)
        run = RunBuilder(root, "r1")
        run.rank(0).log({"x": 1.0})
        run.close()
        write_json(root / "ingest.json", {"at_ns": time.time_ns(), "journals": {"r1": 1}})

    gateway = threading.Thread(target=ship)
    gateway.start()
    try:
        assert launch._settle() == ["r1"]
        assert attach.progress(root, "r1").projected
    finally:
        gateway.join()


def test_a_gateway_that_has_not_answered_for_long_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not while it may be starting; and without last words where it had none."""
    launch = Launch(tmp_path, nodes_of([], {}), "r1", False)
    monkeypatch.setattr(launch, "_start_again", lambda: None)
    launch._told_at -= 6.0
    launch._tell()
    assert capsys.readouterr().err == ""
    for _ in range(2):
        launch._told_at -= 6.0
        launch._answered_at -= attach.START_SECONDS
        launch._tell()
    said = "rankgate: NO GATEWAY ANSWERS; training goes on, its logs wait in the spool.\n"
    assert capsys.readouterr().err == said


def test_what_no_gateway_took_in_time_was_still_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream of this launch that still lies in the spool counts; that of another launch, or for
    another directory, does not."""
    root, spool = tmp_path / "data", tmp_path / "spool"
    root.mkdir()
    for i, (launch, directory) in enumerate([("a", root), ("b", root), ("a", tmp_path)]):
        left = spool / f"r{i}" / f"{i:032x}"
        left.parent.mkdir(parents=True, mode=0o700)
        hello = {"stream": i.to_bytes(16, "big"), "launch": launch, "dir": str(directory)}
        Spool(str(left), hello).close()
    assert attach.spooled_runs(root, "a", spool) == ["r0"]


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
        again = (
            f"rankgate drain --dir {job.data if trouble == 'config' else tmp_path / 'file/data'}"
        )
        assert f"wait in the spool for: {again} --config {config}" in err
        if trouble == "config":
            assert not list(job.data.glob("runs/*"))  # no rank started one with other settings
            assert job.orphans()
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
        assert json.loads(out) == {"done": True, "runs": runs, "replay": [], "elsewhere": []}


def test_a_drain_in_the_wrong_place_says_where_the_logs_belong(tmp_path: Path) -> None:
    """It makes no directory, and does not say that all is delivered; nor is it silent about them
    where there is one."""
    with Job(tmp_path) as job:
        left = job.spool / "r1" / bytes(16).hex()
        left.parent.mkdir(parents=True, mode=0o700)
        Spool(str(left), {"stream": bytes(16), "dir": "/else where"}).close()
        line = (f"1 stream in the spool {job.spool} belongs to the data directory /else where: "
                "rankgate drain --dir '/else where'")  # fmt: skip
        for command in ("drain", "sweep"):
            code, out, err = job.cli(command)
            assert (code, out) == (78, "")
            said = " ".join(err.split())
            assert f"there is no data directory {job.data}" in said
            assert line in said
            assert not job.data.exists()
        job.data.mkdir(mode=0o700)
        code, out, err = job.cli("drain")
        assert (code, out.splitlines()) == (0, [f"all of {job.data} is delivered", line]), err
