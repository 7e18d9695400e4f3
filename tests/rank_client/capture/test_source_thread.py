"""The thread that finds out about the code, in processes that fork, are interrupted or end while it
works: it holds nobody up, prints nothing and leaves nothing behind."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.flow.job import wait_until

from .test_source import environ, fake_git, repository

__all__ = ["repository"]  # a fixture
START = "import rank_client\nrun = rank_client.init(run='r')\n"
ON = "print('ready', flush=True)\nimport time\nwhile True:\n    time.sleep(0.005)\n"
#: what any thread of ours imports or compiles is told at the end
HOOK = """
import sys, threading
found = []
def hook(event, arguments):
    name = threading.current_thread().name
    if event in ("import", "exec", "compile") and name.startswith("rankgate"):
        found.append(f"{name}: {event} {str(arguments[0])[:60]}")
sys.addaudithook(hook)
"""
FORKS = """
import importlib, os, threading, time
children = []
while any(thread.name == "rankgate-source" for thread in threading.enumerate()):
    time.sleep(0.005)
    children.append(os.fork())
    if children[-1] == 0:
        for name in ("platform", "psutil", "lzma", "socket", "json", "importlib.metadata"):
            importlib.import_module(name)
        os._exit(0)
deadline = time.monotonic() + 30
while children and time.monotonic() < deadline:
    children = [pid for pid in children if os.waitpid(pid, os.WNOHANG)[0] == 0]
    time.sleep(0.01)
for pid in children:
    os.kill(pid, 9)
raise SystemExit(f"{len(children)} children hang" if children else 0)
"""


def start(folder: Path, code: str, around: dict[str, str]) -> subprocess.Popen[str]:
    (folder / "train.py").write_text(code)
    words = [sys.executable, "-X", "dev", "-W", "error", "train.py"]
    return subprocess.Popen(
        words, cwd=folder, env=around, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def gone(pid: int) -> bool:
    """Ended; its parent, which adopted it, may not have noticed yet."""
    try:
        return b") Z " in Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return True


def hanging(tmp_path: Path) -> dict[str, str]:
    """An environment in which git tells its number, and then nothing more for a minute."""
    fake = fake_git(tmp_path, f"echo $$ > {tmp_path}/number; exec sleep 60")
    return environ(tmp_path, PATH=fake["PATH"])


def number(tmp_path: Path) -> int:
    path = tmp_path / "number"
    wait_until(lambda: path.exists() and path.read_text().strip(), 20, "git runs")
    return int(path.read_text())


def test_no_thread_imports(tmp_path: Path, repository: Path) -> None:
    """A child that is forked while a thread imports waits for that module for ever; and code that
    a thread compiles while Ctrl-C ends the process changes its exit code."""
    code = HOOK + START + "run.log({'x': 1.0})\nrun.finish()\nprint('\\n'.join(found))\n"
    process = start(repository / "src", code, environ(tmp_path))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out.strip()) == (0, ""), err


def test_forks_while_it_works(tmp_path: Path, repository: Path) -> None:
    """Children that are forked meanwhile import what they like."""
    process = start(repository / "src", START + FORKS, environ(tmp_path))
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0, err


def test_a_ctrl_c_at_any_moment(tmp_path: Path, repository: Path) -> None:
    """The process ends of the signal, with the trace of the script and not a word of ours."""
    seed = random.randrange(1 << 30)
    rng = random.Random(seed)
    for trial in range(8):
        process = start(repository / "src", START + ON, environ(tmp_path))
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.random() * 0.15)  # the moment is what is tried
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert process.returncode == -signal.SIGINT, (seed, trial, err)
        assert err.count("Traceback") == 1, err
        assert "KeyboardInterrupt" in err
        assert "rank_client" not in err
        assert "ignored" not in err


@pytest.mark.parametrize("how", ["its end", "Ctrl-C", "finish"])
def test_an_end_while_git_hangs(tmp_path: Path, repository: Path, how: str) -> None:
    """The process ends in its time, tells no error of ours, and git is gone too."""
    around = hanging(tmp_path)
    ends = {"its end": "", "Ctrl-C": ON, "finish": "run.finish(seconds=3)\n"}
    waits = f"import os, time\nwhile not os.path.exists({str(tmp_path / 'number')!r}):\n"
    code = START + waits + "    time.sleep(0.01)\n" + ends[how]
    process = start(repository / "src", code, around)
    pid = number(tmp_path)
    if how == "Ctrl-C":
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
    before = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - before < 10
    assert process.returncode == (-signal.SIGINT if how == "Ctrl-C" else 0), err
    assert err.count("Traceback") == (how == "Ctrl-C"), err
    assert "rank_client/" not in err
    wait_until(lambda: gone(pid), 10, "git is gone")


def test_a_second_ctrl_c(tmp_path: Path, repository: Path) -> None:
    """Who presses it again waits no longer, and git is gone even so."""
    process = start(repository / "src", START + ON, hanging(tmp_path))
    pid = number(tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    while "KeyboardInterrupt" not in process.stderr.readline():
        pass  # it is at its exit then
    process.send_signal(signal.SIGINT)
    before = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - before < 5, err
    assert "Traceback" not in err
    wait_until(lambda: gone(pid), 10, "git is gone")
