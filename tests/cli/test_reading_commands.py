"""The commands that look: what they print, how they fail, with which exit code."""

from __future__ import annotations

import csv
import ctypes
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from gateway.cli import main
from rank_client.identity import safe_run_id
from rank_client.rendezvous import gateway_command
from rank_client.spool import Spool

from ..build import RunBuilder

Say = pytest.CaptureFixture[str]
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data directory with a finished run of four ranks."""
    monkeypatch.setenv("COLUMNS", "80")
    root = tmp_path / "data"
    run = RunBuilder(root, "7f3a9c21d04e")
    for rank in run.ranks(4):
        for step in range(3):
            rank.log({"train/loss": rank.rank + step / 2, "lr": 0.1}, step)
        rank.text(f"hello from {rank.rank}", level="warning" if rank.rank == 1 else "info")
        rank.end()
    run.close()
    return root


def rankgate(say: Say, *words: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command line."""
    code = main.run(list(words))
    out, err = say.readouterr()
    return code, out, err


def as_owner(*words: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command line that must keep to modes, even as root."""

    def drop_override() -> None:
        for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
            ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability)  # without root an error, and fine

    done = subprocess.run(
        [sys.executable, "-m", "gateway", *words],
        preexec_fn=drop_override, env={**os.environ, "COLUMNS": "400"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def told(say: Say, *words: str) -> Any:
    code, out, err = rankgate(say, *words)
    assert (code, err) == (0, "")
    return json.loads(out)


class TestHelp:
    """What a person types first."""

    @pytest.mark.parametrize("name", ["status", "runs", "show", "tail", "query", "doctor"])
    def test_every_reading_command(self, name: str, capsys: Say) -> None:
        """Each has --dir, a documented --json, and examples that start with its name."""
        code, out, _ = rankgate(capsys, name, "--help")
        assert code == 0
        for part in (
            "--dir",
            "RANKGATE_DIR",
            "--json",
            "Examples:",
            f"rankgate {name}",
            "--json gives",
        ):
            assert part in out or (name == "query" and part == "--json gives")

    def test_no_arguments(self, capsys: Say) -> None:
        """Without arguments it shows what there is."""
        code, out, _ = rankgate(capsys)
        assert code == 0
        assert "status" in out

    def test_version(self, capsys: Say) -> None:
        """--version prints the version alone."""
        code, out, _ = rankgate(capsys, "--version")
        assert (code, out.split()[0]) == (0, "rankgate")


class TestShow:
    """`rankgate show`"""

    def test_text(self, data: Path, capsys: Say) -> None:
        """Head, values, next commands; no colour where it is piped."""
        code, out, err = rankgate(capsys, "show", "7f3a")
        assert (code, err) == (0, "")
        assert out.startswith("digits-7f3a  completed after ")
        assert "Values at step 2, the last that all 4 ranks have:" in out
        assert "\x1b" not in out

    def test_json(self, data: Path, capsys: Say) -> None:
        """The same as an object."""
        found = told(capsys, "show", "7f3a", "--json")
        assert (found["view"]["run"], found["view"]["state"]) == ("7f3a9c21d04e", "completed")
        assert (found["attempt"], found["step"]) == (1, 2)
        [loss] = [k for k in found["keys"] if k["key"] == "train/loss"]
        assert (loss["min"], loss["max_rank"], loss["ranks"]) == (1.0, 3, 4)

    def test_keys(self, data: Path, capsys: Say) -> None:
        """Globs choose what is shown; none that matches is an error."""
        assert [k["key"] for k in told(capsys, "show", "7f3a", "tr*", "--json")["keys"]] == [
            "train/loss"
        ]
        code, _, err = rankgate(capsys, "show", "7f3a", "nope")
        assert (code, "It has lr, train/loss." in " ".join(err.split())) == (66, True)

    def test_a_run_by_the_name_it_was_started_with(self, data: Path, capsys: Say) -> None:
        """`--run a/b` makes an id of it; `show a/b` finds that."""
        run = RunBuilder(data, safe_run_id("a/b"))
        run.rank(0).log({"x": 1.0})
        run.close()
        assert told(capsys, "show", "a/b", "--json")["view"]["run"] == safe_run_id("a/b")

    def test_a_copied_run(self, data: Path, tmp_path: Path, capsys: Say) -> None:
        """A run's folder alone is enough, wherever it was moved."""
        copy = tmp_path / "archive" / "7f3a9c21d04e"
        copy.parent.mkdir()
        (data / "runs" / "7f3a9c21d04e").rename(copy)
        assert rankgate(capsys, "show", str(copy))[1].startswith("digits-7f3a  completed")


class TestStatus:
    """`rankgate status`"""

    def test_text(self, data: Path, capsys: Say) -> None:
        """Without news, the newest run is told of, with its books."""
        code, out, _ = rankgate(capsys, "status")
        assert code == 0
        assert out.startswith("GATEWAY  not running")
        assert "LOGGED   20 = stored 20 + on the way 0 + lost 0" in out

    def test_json(self, data: Path, capsys: Say) -> None:
        """Gateway and runs, by stable names."""
        found = told(capsys, "status", "--json")
        assert found["gateway"]["state"] == "not running"
        [run] = found["runs"]
        assert run["accounting"] == {
            "logged": 20, "stored": 20, "on_the_way": 0, "lost": 0, "gaps": 0, "refused": 0,
            "unreachable": 0, "spooled_in": "",
        }  # fmt: skip

    def test_runs_with_news_first(self, data: Path, capsys: Say) -> None:
        """Runs that go on are shown, those that are over are not."""
        other = RunBuilder(data, "aaaa1c21d04e")
        other.rank(0).log({"x": 1.0})
        other.close()
        other.serve(time.time_ns())
        found = told(capsys, "status", "--json")
        assert [r["run"] for r in found["runs"]] == ["aaaa1c21d04e"]
        assert found["gateway"]["state"] == "serving"

    def test_a_damaged_run_beside(self, data: Path, capsys: Say) -> None:
        """One run that cannot be read does not hide the others."""
        bad = data / "runs" / "bad"
        bad.mkdir()
        (bad / "series.db").write_bytes(b"not a database, but long enough to be one" * 1000)
        code, out, _ = rankgate(capsys, "status")
        assert code == 0
        assert "RUN      7f3a digits" in out
        assert "is damaged" in out

    def test_empty(self, tmp_path: Path, capsys: Say) -> None:
        """An empty data directory is no error."""
        code, out, _ = rankgate(capsys, "status", "--dir", str(tmp_path / "none"))
        assert code == 0
        assert "none yet" in out


class TestRuns:
    """`rankgate runs`"""

    def test_text_and_json(self, data: Path, capsys: Say) -> None:
        """One row per run."""
        _, out, _ = rankgate(capsys, "runs")
        assert out.splitlines()[1].split()[:6] == [
            "7f3a", "digits-7f3a", "completed", "2", "4", "0",
        ]  # fmt: skip
        [run] = told(capsys, "runs", "--json")
        assert run["name"] == "digits-7f3a"


class TestQuery:
    """`rankgate query`"""

    def test_csv(self, data: Path, capsys: Say) -> None:
        """All ranks, sorted by rank and step."""
        _, out, _ = rankgate(capsys, "query", "7f3a", "train/loss", "--format", "csv")
        found = list(csv.DictReader(io.StringIO(out)))
        assert [(r["rank"], r["step"], r["value"]) for r in found][:4] == [
            ("0", "0", "0.0"), ("0", "1", "0.5"), ("0", "2", "1.0"), ("1", "0", "1.0"),
        ]  # fmt: skip
        assert len(found) == 12

    def test_options(self, data: Path, capsys: Say) -> None:
        """Ranks, steps and a reduction narrow it."""
        words = ("query", "7f3a", "train/*", "--rank", "1:3", "--steps", "1:", "--reduce", "sum")
        found = told(capsys, *words, "--json")
        assert [(r["rank"], r["reduction"], r["step"], r["value"]) for r in found] == [
            (None, "sum", 1, 4.0), (None, "sum", 2, 5.0),
        ]  # fmt: skip

    def test_to_a_file(self, data: Path, tmp_path: Path, capsys: Say) -> None:
        """--output writes there and prints nothing."""
        path = tmp_path / "x.csv"
        words = ("query", "7f3a", "lr", "--format", "csv", "-o", str(path))
        assert rankgate(capsys, *words) == (0, "", "")
        assert len(path.read_text().splitlines()) == 13

    @pytest.mark.parametrize(
        ("words", "text"),
        [
            (("--rank", "x"), "--rank takes 0,3 or 0:8 or all"),
            (("--steps", "x"), "--steps takes A:B"),
            (("--reduce", "median"), "--reduce is one of mean, min, max, sum, count"),
            (("--format", "xml"), "--format is one of table, csv, json, parquet"),
            (("--attempts", "3"), "--attempts is latest or all"),
            (("--format", "parquet"), "--output FILE"),
            (("--format", "csv", "-o", "/nonexistent/x"), "Cannot write /nonexistent/x"),
        ],
    )
    def test_bad_options(self, data: Path, words: tuple[str, ...], text: str, capsys: Say) -> None:
        """What makes no sense is told in one paragraph, exit code 78."""
        code, _, err = rankgate(capsys, "query", "7f3a", "lr", *words)
        assert code == 78
        assert text in " ".join(err.split())

    def test_unknown_key_names_those_there_are(self, data: Path, capsys: Say) -> None:
        """A key that is not there is answered with those that are."""
        code, _, err = rankgate(capsys, "query", "7f3a", "acc*")
        assert code == 66
        assert "It has lr, train/loss." in " ".join(err.split())


class TestTail:
    """`rankgate tail`"""

    def test_newest_lines(self, data: Path, capsys: Say) -> None:
        """The newest lines, oldest first, with rank and any level but info."""
        _, out, _ = rankgate(capsys, "tail", "7f3a", "--lines", "3")
        assert [x.split(None, 2)[2] for x in out.splitlines()] == [
            "1 WARNING hello from 1", "2 hello from 2", "3 hello from 3",
        ]  # fmt: skip

    def test_ranks(self, data: Path, capsys: Say) -> None:
        """--rank keeps to those ranks."""
        _, out, _ = rankgate(capsys, "tail", "7f3a", "--rank", "0,2", "--json")
        assert [json.loads(x)["rank"] for x in out.splitlines()] == [0, 2]

    def test_hostile_lines(self, tmp_path: Path, capsys: Say) -> None:
        """Logged text cannot control the terminal; its own lines stay lines."""
        run = RunBuilder(tmp_path / "data")
        run.rank(0).text("one\x1b[2J\r\ntwo\u202e")
        run.close()
        _, out, _ = rankgate(capsys, "tail", run.id)
        assert [x.split()[-1] for x in out.splitlines()] == ["one", "two"]
        assert "\x1b" not in out

    def test_follow_until_the_run_is_over(self, tmp_path: Path, capsys: Say) -> None:
        """--follow prints what comes, also from a clock that is behind, and ends with the run."""
        run = RunBuilder(tmp_path / "data")
        rank = run.rank(0).text("first")
        run.close()

        def go_on() -> None:
            time.sleep(0.3)
            run.wait(-3600)
            rank.text("late clock")
            run.close()
            time.sleep(0.4)
            rank.text("last").end()
            run.close()

        thread = threading.Thread(target=go_on)
        thread.start()
        code, out, _ = rankgate(capsys, "tail", run.id, "--follow", "--json")
        thread.join()
        assert code == 0
        assert [json.loads(x)["text"] for x in out.splitlines()] == ["first", "late clock", "last"]


class TestDoctor:
    """`rankgate doctor`"""

    def test_text(self, data: Path, capsys: Say) -> None:
        """Each finding has a line; nothing here is a failure."""
        code, out, _ = rankgate(capsys, "doctor")
        assert code == 0
        for part in ("fsync", "file system", "open files", "libzmq", "SQLite", "msgpack", "extras"):
            assert part in out

    def test_leaves_nothing_behind(self, data: Path, capsys: Say) -> None:
        """What it wrote to measure is gone."""
        before = sorted(data.rglob("*"))
        assert isinstance(told(capsys, "doctor", "--json"), list)
        assert sorted(data.rglob("*")) == before

    def test_spool_leftovers(self, data: Path, capsys: Say) -> None:
        """What a dead process left in the spool is told per run, with what to do."""
        stream = bytes(range(16))
        folder = Path(os.environ["RANKGATE_SPOOL"]) / "7f3a9c21d04e" / stream.hex()
        Spool(str(folder), {"stream": stream, "run": "7f3a9c21d04e"}).close()
        [check] = [c for c in told(capsys, "doctor", "--json") if c["name"] == "spool: leftovers"]
        assert check["state"] == "warn"
        assert check["text"].startswith("run 7f3a9c21d04e: 1 stream not shipped")
        assert check["advice"].startswith("rankgate drain")


class TestErrors:
    """One paragraph on stderr, an exit code, never a traceback."""

    def test_unknown_run(self, data: Path, capsys: Say) -> None:
        """A run that is not there is told with the nearest name, exit code 66."""
        code, out, err = rankgate(capsys, "show", "digits-7f3b")
        assert (code, out) == (66, "")
        assert "Nearest: 7f3a9c21d04e (digits-7f3a)" in " ".join(err.split())
        assert "Traceback" not in err

    @pytest.mark.parametrize("command", ["runs", "status", "show r1", "sinks status"])
    def test_what_cannot_be_read_is_not_empty(
        self, command: str, tmp_path: Path, capsys: Say
    ) -> None:
        """A --dir that is a file, or that cannot be listed, is told with its path and why."""
        (tmp_path / "file").write_text("")
        code, out, err = rankgate(capsys, *command.split(), "--dir", str(tmp_path / "file"))
        assert (code, out) == (1, "")
        assert f"{tmp_path}/file: it is a file" in " ".join(err.split())
        (tmp_path / "runs").symlink_to(tmp_path / "runs")
        code, out, err = rankgate(capsys, *command.split(), "--dir", str(tmp_path))
        assert (code, out) == (1, "")
        assert f"{tmp_path}/runs: Too many levels of symbolic links" in " ".join(err.split())

    @pytest.mark.parametrize("command", ["runs", "status", "sinks status"])
    def test_a_run_that_is_not_ours_to_enter(self, command: str, data: Path) -> None:
        """Is told of with its path, and hides no other."""
        (data / "runs" / "theirs").mkdir(mode=0)
        code, out, err = as_owner(*command.split(), "--dir", str(data))
        assert (code, err) == (0, "")
        assert "7f3a" in out or command == "sinks status"  # it has no sinks
        assert f"{data}/runs/theirs is not for this user to enter" in " ".join(out.split())

    def test_sinks_beside_runs_that_cannot_be_read(self, data: Path) -> None:
        """Their sinks are told, and the others with why: in words, as objects, and of `retry`."""
        run = RunBuilder(data, "aaaa1c21d04e")
        run.rank(0).log({"x": 1.0})
        run.sink("clearml", delivered=1)
        run.close()
        (data / "runs" / "theirs").mkdir(mode=0)
        (data / "runs" / "torn" / "sinks").mkdir(parents=True)
        (data / "runs" / "torn" / "sinks" / "clearml.db").touch()
        (data / "runs" / "torn" / "series.db").write_bytes(b"no database, but as long as one" * 999)
        code, out, err = as_owner("sinks", "status", "--dir", str(data))
        assert (code, err) == (0, "")
        assert "RUN      aaaa1c21d04e" in out
        assert "not for this user to enter" in out
        assert "is damaged" in out
        code, out, err = as_owner("sinks", "status", "--json", "--dir", str(data))
        assert (code, err) == (0, "")
        first, *others = json.loads(out)
        assert (first["run"], first["sink"], first["delivered"]) == ("aaaa1c21d04e", "clearml", 1)
        assert [(o["run"], "error" in o) for o in others] == [("theirs", True), ("torn", True)]
        code, _, err = as_owner("sinks", "retry", "--all", "--dir", str(data))
        assert (code, err) == (0, "")

    @pytest.mark.parametrize("command", ["show", "status", "sinks status"])
    def test_asking_for_a_run_that_is_not_ours_to_enter(self, command: str, data: Path) -> None:
        """By its name it is an error."""
        (data / "runs" / "theirs").mkdir(mode=0)
        code, out, err = as_owner(*command.split(), "theirs", "--dir", str(data))
        assert (code, out) == (1, "")
        assert f"{data}/runs/theirs is not for this user to enter" in " ".join(err.split())

    def test_a_directory_whose_name_is_no_text(self, capsys: Say) -> None:
        """It is refused by every command at once: nothing could tell of it."""
        code, out, err = rankgate(capsys, "runs", "--dir", os.fsdecode(b"/tmp/\xff"))
        assert (code, out) == (78, "")
        assert "not UTF-8" in " ".join(err.split())

    def test_usage(self, capsys: Say) -> None:
        """A command line that makes no sense says where to read on, exit code 2."""
        code, _, err = rankgate(capsys, "show")
        assert code == 2
        assert "rankgate show --help" in err

    def test_a_rank_that_took_no_part(self, data: Path, capsys: Say) -> None:
        """Is told with those that did; one of several is no error."""
        code, out, err = rankgate(capsys, "query", "7f3a", "lr", "--rank", "5")
        assert (code, out) == (66, "")
        assert "has no rank 5. It has 0–3." in " ".join(err.split())
        assert rankgate(capsys, "query", "7f3a", "lr", "--rank", "3:9")[0] == 0

    def test_two_formats(self, data: Path, capsys: Say) -> None:
        """--json beside another --format is refused, not chosen from."""
        code, _, err = rankgate(capsys, "query", "7f3a", "lr", "--format", "csv", "--json")
        assert code == 78
        assert "--json and --format csv" in err

    def test_a_keyfile_that_is_a_directory(self, tmp_path: Path, capsys: Say) -> None:
        """`keys new DIRECTORY` says what to type."""
        code, _, err = rankgate(capsys, "keys", "new", str(tmp_path))
        assert code == 78
        assert f"as in {tmp_path}/gateway.key" in " ".join(err.split())

    def test_a_closed_stdout(self, data: Path) -> None:
        """`>&-` is like >/dev/null, and no fault of ours."""
        line = f"{sys.executable} -m gateway status >&-"
        environ = {**os.environ, "PYTHONPATH": str(_ROOT)}
        done = subprocess.run(["bash", "-c", line], env=environ, capture_output=True, cwd=data)
        assert (done.returncode, done.stderr) == (0, b"")

    @pytest.mark.parametrize("name", main.COMMANDS)
    def test_help_fits_80_columns(self, name: str, data: Path, capsys: Say) -> None:
        """No line of a command's help is wider; what a person gives stands in capitals."""
        code, out, _ = rankgate(capsys, name, "--help")
        assert code == 0
        assert max(map(len, out.splitlines())) <= 80
        assert "{run}" not in out

    def test_a_fault_of_ours(
        self, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: Say
    ) -> None:
        """Even a bug is one paragraph; the variable that shows more is named."""
        monkeypatch.setattr("gateway.cli.show.shown", lambda *_: 1 / 0)
        code, _, err = rankgate(capsys, "show", "7f3a")
        assert code == 70
        assert "ZeroDivisionError" in err
        assert "RANKGATE_DEBUG=1" in " ".join(err.split())
        assert "Traceback" not in err

    def test_closed_pipe_is_quiet(self, data: Path) -> None:
        """Output cut off by `head` ends the command without a word."""
        line = f"{sys.executable} -m gateway query 7f3a lr --format csv | head -0"
        done = subprocess.run(
            ["bash", "-c", line], env={**os.environ, "PYTHONPATH": str(_ROOT)},
            capture_output=True, text=True, check=True, cwd=data,
        )  # fmt: skip
        assert done.stderr == ""

    def test_interrupt(self, tmp_path: Path) -> None:
        """Ctrl-C ends a live tail with 130 and no traceback."""
        run = RunBuilder(tmp_path / "data")
        run.rank(0).text("first")
        run.close()
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "gateway", "tail", run.id, "--follow"],
            env={**os.environ, "PYTHONPATH": str(_ROOT)}, cwd=tmp_path,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        assert "first" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
        assert (process.returncode, err) == (130, "")

    def test_interrupt_while_modules_are_imported(self, tmp_path: Path) -> None:
        """Ctrl-C in the first moments is as quiet; a child of the gateway does not heed it, as
        its parent ends it."""
        (tmp_path / "sitecustomize.py").write_text(
            "import os, signal, sys\n"
            "class Finder:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            "        if name in ('apsw', 'typer'):\n"
            "            os.kill(os.getpid(), signal.SIGINT)\n"
            "sys.meta_path.insert(0, Finder())\n"
        )
        environ = {**os.environ, "PYTHONPATH": f"{tmp_path}:{_ROOT}"}
        words = [sys.executable, "-m", "gateway", "status", "--dir", str(tmp_path)]
        done = subprocess.run(words, env=environ, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
        words = gateway_command("no-such-child")
        done = subprocess.run(words, env=environ, capture_output=True, text=True)
        assert (done.returncode, "No such command" in done.stderr) == (2, True)


_ROOT = Path(main.__file__).parents[2]
