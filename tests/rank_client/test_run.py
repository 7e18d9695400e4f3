"""`init` and `Run`: wrong arguments are told, nothing else ever raises, children do nothing."""

from __future__ import annotations

import copy
import logging
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rank_client
from rank_client import exits
from rank_client.run import FINISH_SECONDS, NullRun, Run
from rank_client.wire.records import Kind
from tests.rank_client.read import Written, on_disk

HERE = Path(rank_client.__file__).parents[1]


@pytest.fixture(autouse=True)
def a_rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A process on its own whose logs stay in its spool."""
    for name in list(os.environ):
        if name.startswith(("RANK", "SLURM_", "TORCHELASTIC_", "OMPI_")) or name.endswith("_RANK"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("RANKGATE_SPOOL", str(tmp_path / "spool"))
    monkeypatch.setenv("RANKGATE_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("RANKGATE_MODE", "offline")
    monkeypatch.setenv("RANKGATE_CAPTURE_SOURCE", "0")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    yield
    for run in list(exits.live):
        run.finish()


@pytest.fixture
def run() -> Run:
    return rank_client.init(run="r", rank=0)


def written(run: Run) -> list[Written]:
    directory = Path(os.environ["RANKGATE_SPOOL"]) / run.id / run.stream
    return on_disk(directory)


# --- init ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"project": 5},
        {"name": b"x"},
        {"run": "a/b"},
        {"run": ""},
        {"run": ".."},
        {"run": 7},
        {"config": [1]},
        {"tags": "one"},
        {"tags": [1]},
        {"tags": 5},
        {"gateway": 5717},
        {"rank": "0"},
        {"rank": True},
        {"rank": 0, "world_size": 1.0},
        {"rank": 0, "local_rank": "x"},
    ],
)
def test_wrongly_typed_arguments_are_told(arguments: dict[str, Any], tmp_path: Path) -> None:
    """A wrong argument is a ValueError that names it, before anything is written."""
    with pytest.raises(ValueError, match=r"must"):
        rank_client.init(**arguments)
    assert not (tmp_path / "spool").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", "abc"),
        ("RANKGATE_RUN", "no/run id"),
        ("RANKGATE_SPOOL", "/proc/nowhere"),
        ("RANKGATE_DIR", "/proc/nowhere"),
        ("RANKGATE_ADDR", "nonsense"),
        ("RANKGATE_PROJECT", "\udcff"),
    ],
)
def test_a_strange_environment_raises_nothing(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """Whatever the environment says, init gives a run that can be logged to."""
    monkeypatch.setenv(name, value)
    run = rank_client.init()
    run.log({"a": 1.0})
    assert run.finish(seconds=0.1) in (True, False)


def test_config_is_logged_as_params() -> None:
    """The config given to init is the first record."""
    run = rank_client.init(run="r", config={"lr": 0.1, "model": {"layers": 3}})
    [params] = written(run)
    assert (params.kind, params.values["v"]) == (Kind.PARAMS, {"lr": 0.1, "model/layers": 3})


def test_a_disabled_run_does_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With RANKGATE_MODE=disabled nothing is written, and every method can be called."""
    monkeypatch.setenv("RANKGATE_MODE", "disabled")
    run = rank_client.init(run="r", config={"a": 1})
    use_everything(run, tmp_path)
    assert run.finish() is True
    assert not run.should_stop()
    assert not (tmp_path / "spool").exists()


def use_everything(run: Run, tmp_path: Path) -> None:
    (tmp_path / "f.txt").write_text("x")
    run.log({"a": 1.0}, step=1)
    run.log_text("hello")
    run.log_params({"p": 1})
    run.log_summary({"best": 2.0})
    run.log_image("im", np.zeros((2, 2)))
    run.log_table("t", [[1]])
    run.log_file(tmp_path / "f.txt")
    run.log_checkpoint(tmp_path / "f.txt", best=True, metrics={"a": 1})


def test_every_kind_of_record(run: Run, tmp_path: Path) -> None:
    """Each method writes its kind of record, and finish writes how it ended."""
    use_everything(run, tmp_path)
    run.finish("completed")
    found = written(run)
    assert [w.kind for w in found] == [
        Kind.ROW, Kind.TEXT, Kind.PARAMS, Kind.SUMMARY,
        Kind.MEDIA, Kind.MEDIA, Kind.MEDIA, Kind.MEDIA, Kind.END,
    ]  # fmt: skip
    assert [w.values["what"] for w in found if w.kind == Kind.MEDIA] == [
        "image", "table", "file", "checkpoint",
    ]  # fmt: skip
    assert found[-1].values["status"] == "completed"


# --- nothing escapes -----------------------------------------------------------------------------


class Hostile:
    """An object all of whose questions raise."""

    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__

    def __iter__(self) -> Any:
        raise RuntimeError("no items")

    def __hash__(self) -> int:
        return 1


@pytest.mark.parametrize(
    "call",
    [
        lambda run: run.log({Hostile(): 1.0}),
        lambda run: run.log({"a": Hostile()}),
        lambda run: run.log(Hostile()),
        lambda run: run.log(None, step=Hostile()),
        lambda run: run.log({"a": 1.0}, step="x"),
        lambda run: run.log_text(Hostile()),
        lambda run: run.log_text("x", level=Hostile()),
        lambda run: run.log_text("x", step=Hostile()),
        lambda run: run.log_params(5),
        lambda run: run.log_params({"a": Hostile()}),
        lambda run: run.log_summary(None),
        lambda run: run.log_image("k", "/no/such/file.png"),
        lambda run: run.log_image("k", object()),
        lambda run: run.log_image(Hostile(), np.zeros((2, 2))),
        lambda run: run.log_figure("k", None),
        lambda run: run.log_table("k", 5),
        lambda run: run.log_file("/no/such/file"),
        lambda run: run.log_file("/"),
        lambda run: run.log_file(None),
        lambda run: run.log_checkpoint("/no/such/file", metrics=5),
    ],
)
def test_no_exception_reaches_the_training(run: Run, call: Any, caplog: Any) -> None:
    """A call that cannot be logged raises nothing, is counted or left out, warned of the
    first time only, and the next call is logged as ever."""
    with caplog.at_level(logging.WARNING, "rankgate"):
        call(run)
        told = len(caplog.records)
        call(run)
    assert 1 <= told == len(caplog.records)
    lost = sum(run._spool.refused.values()) + run._spool.bad_values
    assert lost >= 2
    run.log({"after": 1.0})
    assert written(run)[-1].values == {"after": 1.0}


def test_a_broken_inside_does_not_reach_the_training(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even a defect of our own is counted instead of raised."""

    def broken(*_: object) -> None:
        raise AssertionError("defect")

    monkeypatch.setattr(run._rows, "log", broken)
    run.log({"a": 1.0})
    assert run._spool.refused == {"log failed": 1}


def test_an_exception_in_a_with_block_marks_the_run_failed() -> None:
    """Leaving a with block by an exception ends the stream as failed, with its text; the
    exception goes on."""
    with pytest.raises(KeyError, match="lost it"), rank_client.init(run="r") as run:
        raise KeyError("lost it")
    end = written(run)[-1].values
    assert end["status"] == "failed"
    assert "lost it" in end["text"]


def test_leaving_a_with_block_finishes() -> None:
    """A with block that ends well ends the stream as completed."""
    with rank_client.init(run="r") as run:
        run.log({"a": 1.0})
    assert written(run)[-1].values["status"] == "completed"


def test_finish_twice_and_log_after_finish_do_nothing(run: Run, tmp_path: Path) -> None:
    """After finish everything is quietly ignored."""
    run.finish()
    before = written(run)
    use_everything(run, tmp_path)
    assert run.finish() is True
    assert written(run) == before


def test_finish_without_a_gateway_is_quick(run: Run) -> None:
    """Offline there is nobody to wait for."""
    run.log({"a": 1.0})
    before = time.monotonic()
    run.finish()
    assert time.monotonic() - before < FINISH_SECONDS / 2


def test_long_text_is_written_in_pieces(run: Run) -> None:
    """A text beyond one record's size is written whole, in several of one time."""
    text = "ü" * 40_000
    run.log_text(text)
    pieces = written(run)
    assert "".join(w.values["t"] for w in pieces) == text
    assert len({w.values["w"] for w in pieces}) == 1


def test_a_long_parameter_is_cut(run: Run) -> None:
    """A parameter's text, or the text of what is no text, is kept up to 64 Ki characters."""
    run.log_params({"text": "x" * 100_000, "list": [1] * 100_000})
    found = {k: v for record in written(run) for k, v in record.values["v"].items()}
    assert found == {"text": "x" * (64 << 10), "list": str([1] * 100_000)[: 64 << 10]}


def test_many_params_are_written_in_pieces(run: Run) -> None:
    """Params beyond one record's size are all written."""
    params = {f"p{i}": "x" * 1000 for i in range(100)}
    run.log_params(params)
    found: dict[str, Any] = {}
    for record in written(run):
        found |= record.values["v"]
    assert found == params


# --- children ------------------------------------------------------------------------------------


def child_init(queue: Any) -> None:
    run = rank_client.init(run="r")
    run.log({"a": 1.0})
    explicit = rank_client.init(run="r", rank=1)
    queue.put((type(run) is NullRun, type(explicit) is Run))
    explicit.finish()


def test_a_worker_of_multiprocessing_does_nothing(tmp_path: Path) -> None:
    """In a child of multiprocessing init gives a run that does nothing, unless a rank is given."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=child_init, args=(queue,))
    child.start()
    assert queue.get() == (True, True)
    child.join(10)


def test_a_forked_child_does_nothing(run: Run) -> None:
    """After os.fork the child's calls write nothing, its exit ends nothing, and the parent goes
    on."""
    run.log({"a": 1.0}, step=0)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run.log({"child": 1.0})
            run.log_text("child")
            assert run.finish() is True
            exits.end_all()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    run.log({"a": 2.0}, step=1)
    run.finish()
    found = written(run)
    assert [w.values for w in found[:-1]] == [{"a": 1.0}, {"a": 2.0}]
    assert found[-1].kind == Kind.END


def test_a_pickled_or_copied_run_does_nothing(run: Run) -> None:
    """A run that reaches another process by pickle, or is copied, becomes one that does nothing."""
    for other in (pickle.loads(pickle.dumps(run)), copy.deepcopy(run), copy.copy(run)):
        assert type(other) is NullRun
        assert other.id == "r"
        other.log({"a": 1.0})
        other.finish()
    again = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(run))))
    assert type(again) is NullRun
    assert written(run) == []


# --- what a process sees -------------------------------------------------------------------------


def script(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(HERE), **environ},
        timeout=60,
    )


def test_importing_is_light() -> None:
    """Importing imports neither torch nor numpy and starts no thread."""
    code = (
        "import sys, threading, rank_client\n"
        "heavy = {'torch', 'numpy', 'multiprocessing.pool', 'asyncio'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert threading.active_count() == 1\n"
    )
    out = script(code)
    assert out.returncode == 0, out.stderr


def test_a_run_needs_neither_numpy_nor_torch() -> None:
    """A whole run of plain numbers imports neither of them."""
    code = (
        "import sys, rank_client\n"
        "run = rank_client.init(run='r')\n"
        "run.log({'a': 1.0, 'b': 2}); run.log_table('t', [[1]]); run.finish()\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
    )
    out = script(code)
    assert out.returncode == 0, out.stderr


@pytest.mark.parametrize(
    ("ending", "code", "status"),
    [
        ("", 0, "ended"),
        ("raise ValueError('boom')", 1, "failed"),
        ("sys.exit(3)", 3, "ended"),
        ("run.finish()", 0, "completed"),
    ],
)
def test_exits_keep_their_code(ending: str, code: int, status: str, tmp_path: Path) -> None:
    """However a script ends, its exit code is its own and the END record says how it was."""
    out = script(
        "import sys, rank_client\n"
        "run = rank_client.init(run='r')\n"
        f"run.log({{'a': 1.0}})\n{ending}\n"
    )
    assert out.returncode == code, out.stderr
    [directory] = (tmp_path / "spool" / "r").iterdir()
    row, *printed, end = on_disk(directory)
    assert row.values == {"a": 1.0}
    assert {w.values["l"] for w in printed} <= {"stderr"}
    assert end.values["status"] == status
    assert ("boom" in end.values["text"]) == ("boom" in ending)


def test_what_was_logged_survives_a_kill(tmp_path: Path) -> None:
    """Every record whose log() returned is in the spool after SIGKILL."""
    out = script(
        "import os, signal, rank_client\n"
        "run = rank_client.init(run='r')\n"
        "for i in range(500): run.log({'a': float(i)}, step=i)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert out.returncode == -9
    [directory] = (tmp_path / "spool" / "r").iterdir()
    assert [w.step for w in on_disk(directory)] == list(range(500))


@pytest.mark.parametrize("call", ["log", "log_text", "log_params", "log_table"])
def test_what_is_logged_after_finish_is_said(
    call: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every kind of call after `finish` says, once, that it does nothing; none raises."""
    monkeypatch.setenv("RANKGATE_MODE", "offline")
    run = rank_client.init(run="late")
    run.finish()
    for _ in range(2):
        getattr(run, call)(*(("t", [[1]]) if call == "log_table" else ({"a": 1},)))
    assert caplog.text.count("log after finish does nothing") == 1


def test_calls_after_finish_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    """How many came is in the books as long as the process lives, and said at its exit."""
    run = rank_client.init(run="late")
    run.finish()
    for _ in range(3):
        run.log({"a": 1.0})
    exits.end_all()
    assert run._spool.refused == {"after finish": 3}
    assert "3 calls came after finish; none is logged" in caplog.text


def test_an_interrupt_at_exit_ends_the_wait(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who presses Ctrl-C while an exit waits is not kept, and no trace of ours is printed."""

    def interrupted(*_: object) -> bool:
        raise KeyboardInterrupt

    run.log({"a": 1.0})
    monkeypatch.setattr(run._sender, "finish", interrupted)
    exits.end_all()
    assert [w.kind for w in written(run)] == [Kind.ROW, Kind.END]


def test_secrets_do_not_reach_the_spool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts, params and the config are written with the mark in the place of a secret."""
    monkeypatch.setenv("SERVICE_TOKEN", "plain-secret-value")
    monkeypatch.setattr(sys, "argv", ["/x/train-plain-secret-value.py"])
    run = rank_client.init(run="r", tags=["plain-secret-value"], config={"password": "x", "lr": 1})
    run.log_text("token=abcdef123456 and plain-secret-value")
    run.log_summary({"note": "plain-secret-value"})
    params, text, summary = written(run)
    assert params.values["v"] == {"password": "[redacted]", "lr": 1}
    assert text.values["t"] == "token=[redacted] and [redacted]"
    assert summary.values["v"] == {"note": "[redacted]"}
    segment = (
        Path(os.environ["RANKGATE_SPOOL"]) / run.id / run.stream / "00000001.log"
    ).read_bytes()
    assert b"plain-secret" not in segment
