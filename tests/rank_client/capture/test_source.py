"""What a run tells of its code: from real repositories, in real processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rank_client.capture import git as calls
from rank_client.capture import source
from rank_client.redact import Redactor
from rank_client.wire.records import Kind
from tests.flow.job import wait_until
from tests.rank_client.read import Written, on_disk

ROOT = Path(__file__).parents[3]
TOKEN = "ghp_" + "a1B2c3D4e5F6g7H8i9J0k1L2"
SCRIPT = "import rank_client\nrun = rank_client.init(run='r', {})\nrun.finish()\n"


def git(folder: Path, *words: str) -> str:
    person = ("-c", "user.name=n", "-c", "user.email=e@example.org")
    command = ["git", *person, "-C", str(folder), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    (folder / "src").mkdir(parents=True)
    git(folder, "init", "-q", "-b", "trunk")
    git(folder, "remote", "add", "origin", f"https://me:{TOKEN}@example.org/team/digits.git")
    (folder / "src" / "train.py").write_text(SCRIPT.format(""))
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def environ(tmp_path: Path, **more: str) -> dict[str, str]:
    ours = {
        "RANKGATE_SPOOL": str(tmp_path / "spool"),
        "RANKGATE_DIR": str(tmp_path / "data"),
        "RANKGATE_MODE": "offline",
        "RANKGATE_CAPTURE_SOURCE": "1",
        "PYTHONPATH": str(ROOT),
    }
    return {**os.environ, **ours, **more}


def train(tmp_path: Path, folder: Path, script: str = "train.py", **more: str) -> list[Written]:
    """Run the script; the parameters and files that it wrote into its spool."""
    words = [sys.executable, script]
    done = subprocess.run(
        words, cwd=folder, env=environ(tmp_path, **more), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") <= 1, done.stderr
    [stream] = [path for path in (tmp_path / "spool" / "r").iterdir() if path.is_dir()]
    return [record for record in on_disk(stream) if record.kind in (Kind.PARAMS, Kind.MEDIA)]


def facts_of(records: list[Written]) -> dict[str, Any]:
    [params] = [r for r in records if r.kind == Kind.PARAMS]
    return dict(params.values["v"])


def test_a_repository(tmp_path: Path, repository: Path) -> None:
    """Repository, branch, commit, entry point and packages of a clean tree; no file."""
    records = train(tmp_path, repository / "src")
    facts = facts_of(records)
    assert facts["source/branch"] == "trunk"
    assert facts["source/commit"] == git(repository, "rev-parse", "HEAD")
    assert facts["source/commit_message"] == "first"
    assert facts["source/dirty"] is False
    assert (facts["source/working_dir"], facts["source/entry_point"]) == ("src", "train.py")
    assert facts["source/repository"] == "https://[redacted]@example.org/team/digits.git"
    assert "msgpack==" in facts["source/packages"]
    assert [r.kind for r in records] == [Kind.PARAMS]


def test_uncommitted_changes(tmp_path: Path, repository: Path) -> None:
    """Changes are a file, without the secrets in it."""
    script = repository / "src" / "train.py"
    script.write_text(script.read_text() + f"api_key = '{TOKEN}'\n# changed\n")
    records = train(tmp_path, repository / "src")
    assert facts_of(records)["source/dirty"] is True
    [media] = [r for r in records if r.kind == Kind.MEDIA]
    assert (media.values["key"], media.values["name"]) == ("source.diff", "source.diff")
    [snapshot] = (tmp_path / "spool" / "r").glob("*/media/*")
    text = snapshot.read_text()
    assert "+# changed" in text
    assert TOKEN not in text


def test_outside_a_repository(tmp_path: Path) -> None:
    """Without a repository the rest is told all the same."""
    (tmp_path / "train.py").write_text(SCRIPT.format(""))
    facts = facts_of(train(tmp_path, tmp_path, GIT_CEILING_DIRECTORIES=str(tmp_path.parent)))
    assert facts["source/entry_point"] == "train.py"
    assert "source/commit" not in facts


def test_a_working_directory_that_was_deleted(tmp_path: Path, repository: Path) -> None:
    """The rest is told: where the script stands, its commit, the packages."""
    script, folder = repository / "src" / "train.py", tmp_path / "deleted"
    script.write_text("import os; os.rmdir(os.getcwd())\n" + script.read_text())
    folder.mkdir()
    facts = facts_of(train(tmp_path, folder, str(script)))
    assert facts["source/commit"] == git(repository, "rev-parse", "HEAD")
    assert facts["source/dirty"] is True
    assert facts["source/entry_point"] == "src/train.py"
    assert "msgpack==" in facts["source/packages"]


@pytest.mark.parametrize(("script", "switch"), [("rank=1, world_size=2", "1"), ("rank=0", "0")])
def test_one_process_tells(tmp_path: Path, script: str, switch: str) -> None:
    """Rank 1 tells nothing, and nobody does when it is switched off."""
    (tmp_path / "train.py").write_text(SCRIPT.format(script))
    records = train(tmp_path, tmp_path, RANKGATE_CAPTURE_SOURCE=switch)
    assert records == []


def fake_git(tmp_path: Path, code: str) -> dict[str, str]:
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "git"
    fake.write_text(f"#!/bin/sh\n{code}\n")
    fake.chmod(0o755)
    return {**os.environ, "PATH": f"{fake.parent}:{os.environ['PATH']}"}


def test_git_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that does not come back is ended, and what it would have told is left out."""
    monkeypatch.setattr(calls, "GIT_SECONDS", 0.2)
    facts, diff = source.collect(calls.Git(fake_git(tmp_path, "exec sleep 60")))
    assert "source/commit" not in facts
    assert "source/python" in facts
    assert diff == ""


def test_git_that_never_ends_its_diff(tmp_path: Path) -> None:
    """Of a diff without an end so much is kept, and it says so."""
    code = f'case "$*" in *diff*) exec yes "+ line";; *) echo {tmp_path};; esac'
    _, diff = source.collect(calls.Git(fake_git(tmp_path, code)))
    assert len(diff) <= source.MAX_DIFF_BYTES + len(source.CUT)
    assert diff.endswith(source.CUT)


def test_git_that_closes_its_answer_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer whose end was read is not waited for any longer than one that does not come."""
    monkeypatch.setattr(calls, "GIT_SECONDS", 0.2)
    git = calls.Git(fake_git(tmp_path, "echo said; exec >&-; exec sleep 60"))
    before = time.monotonic()
    assert git.ask(tmp_path, "any") == ""
    assert time.monotonic() - before < 5


def test_git_after_the_end(tmp_path: Path) -> None:
    """A call that is being made is ended at once, and none is begun."""
    git = calls.Git(fake_git(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 60"))
    asking = threading.Thread(target=git.ask, args=(tmp_path, "any"))
    asking.start()
    wait_until(lambda: (tmp_path / "pid").exists(), 10, "git runs")
    git.stop()
    asking.join(4)
    assert not asking.is_alive()
    (tmp_path / "pid").unlink()
    assert git.ask(tmp_path, "any") == ""
    assert not (tmp_path / "pid").exists()


def test_a_command_is_cut_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a secret would have no shape any more."""
    monkeypatch.setattr(sys, "orig_argv", ["python", "x" * 4070, TOKEN, "more"])
    assert source._command() == f"python {'x' * 4070}"
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "train"])
    assert source._command() == "python -m train"


def test_a_diff_is_cut_between_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with a diff that is too long: its last line is left out."""
    monkeypatch.setattr(source, "MAX_DIFF_BYTES", 60)
    code = f'case "$*" in *diff*) echo "+ one"; echo "+ {TOKEN * 3}";; *) echo {tmp_path};; esac'
    _, diff = source.collect(calls.Git(fake_git(tmp_path, code)))
    assert diff == f"+ one\n{source.CUT}"


def test_a_secret_across_pieces() -> None:
    """A private key that lies where a long text is cut into pieces is taken out whole."""
    line = "x" * 79 + "\n"
    before = line * (source.REDACT_CHARACTERS // 80)
    key = "-----BEGIN RSA PRIVATE KEY-----\n" + "QUJD" * 16 + "\n-----END RSA PRIVATE KEY-----\n"
    for lead in range(-3, 3):
        text = before[: 80 * (len(before) // 80 + lead)] + key + before
        assert "QUJD" not in source.redacted(text, Redactor({}))
