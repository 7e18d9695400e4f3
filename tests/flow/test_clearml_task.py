"""All that `Task.init` shows of one process, here of every rank, read back from the server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gateway.sinks.store import read_views
from tests.servers.clearml import ClearmlServer

from .job import Job

SIZE = 3
TOKEN = "ghp_" + "a1B2c3D4e5F6g7H8i9J0k1L2"

TRAIN = """
import os, sys
import numpy as np
import rank_client
config = {"lr": 0.1, "net": {"depth": 3, "freeze": None}, "api_key": "%(token)s"}
run = rank_client.init(project="vision/digits", name="one", run="r1", tags=["ci"], config=config)
for step in range(20):
    run.log({"train/loss": 1.0 / (step + 1) + run.rank, "lr": 0.1}, step=step)
run.log({"bad": float("nan")}, step=0)
print("printed by rank", run.rank, "%(token)s", flush=True)
os.write(2, b"a warning of rank %%d\\n" %% run.rank)
run.log_text(f"said by rank {run.rank}", level="warning")
run.log_image("val/first", np.zeros((4, 4), np.uint8), step=3)
run.log_table("confusion", [{"a": 1, "b": run.rank}], step=3)
with open(f"notes{run.rank}.txt", "w") as file:
    file.write("some notes")
run.log_file(f"notes{run.rank}.txt", name="notes.txt")
run.log_summary({"map": 0.5, "model/names": '["cat", "dog"]'})
run.log_checkpoint(f"notes{run.rank}.txt", best=True, final=True, metrics={"map": 0.5}, step=19)
run.finish(seconds=60)
"""


def git(folder: Path, *words: str) -> str:
    person = ("-c", "user.name=n", "-c", "user.email=e@example.org")
    command = ["git", *person, "-C", str(folder), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """One commit, and a change that is not committed, with a secret in it."""
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "trunk")
    git(folder, "remote", "add", "origin", f"https://me:{TOKEN}@example.org/digits.git")
    (folder / "train.py").write_text("# first\n")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    (folder / "train.py").write_text(TRAIN % {"token": TOKEN})
    return folder


def carried(tmp_path: Path, repository: Path, server: ClearmlServer) -> dict[str, Any]:
    """The whole job; the server's record of its one task."""
    with Job(tmp_path, **server.env, RANKGATE_CAPTURE_SOURCE="1") as job:
        job.serve("--sink", "clearml")
        for rank in range(SIZE):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(SIZE)}
            environ = {**job.environ, **place, "LOCAL_WORLD_SIZE": str(SIZE)}
            job.processes.append(
                subprocess.Popen(
                    [sys.executable, "train.py"],
                    env=environ, cwd=repository, text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                )
            )  # fmt: skip
        for process in job.processes[-SIZE:]:
            _, err = process.communicate(timeout=100)
            assert process.returncode == 0, err
        job.drain()
        [view] = read_views(job.data / "runs/r1")
        assert (view.state, view.quarantined) == ("drained", 0), (view, job.log())
        job.assert_accounted()
        for path in job.data.rglob("*"):
            assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    [task] = server.tasks
    return server.tasks[task]


def test_every_kind_of_every_rank(tmp_path: Path, repository: Path) -> None:
    """Names, values, parameters, configuration, console, machine, code, files and status of three
    ranks are on the server, and a planted token is nowhere."""
    with ClearmlServer() as server:
        task = carried(tmp_path, repository, server)
        check_about(server, task)
        check_numbers(server, task["id"])
        check_console(server, task["id"])
        check_files(server, task["id"])
        stored = repr((server.tasks, server.events, server.models, server.files))
        assert TOKEN not in stored
        assert os.environ.get("HOME", "/root") not in repr(server.files)


def check_about(server: ClearmlServer, task: dict[str, Any]) -> None:
    assert server.projects[task["project"]]["name"] == "vision/digits"
    assert (task["name"], task["status"]) == ("one", "completed")
    assert task["tags"] == ["ci", "rankgate:r1"]
    assert task["last_iteration"] == 19
    general = server.params(task["id"])["General"]
    assert general == {
        "lr": "0.1", "net/depth": "3", "net/freeze": "", "api_key": "[redacted]",
    }  # fmt: skip
    config = {"lr": 0.1, "net": {"depth": 3, "freeze": None}, "api_key": "[redacted]"}
    assert server.configuration(task["id"]) == {"config": config}
    script = task["script"]
    assert script["repository"] == "https://[redacted]@example.org/digits.git"
    assert (script["branch"], script["entry_point"]) == ("trunk", "train.py")
    assert len(script["version_num"]) == 40
    assert "+import rank_client" in script["diff"]
    assert "numpy==" in script["requirements"]["pip"]
    assert task["runtime"]["cpu_cores"] == os.cpu_count()


def check_numbers(server: ClearmlServer, task: str) -> None:
    scalars = server.scalars(task)
    for step in range(20):
        assert abs(scalars["train", "loss", step] - 1.0 / (step + 1)) < 1e-6
    assert scalars["Summary", "map", -(2**31)] == 0.5
    titles = {title for title, _, _ in scalars}
    assert titles - {":monitor:machine", ":monitor:gpu"} == {"train", "lr", "Summary"}


def check_console(server: ClearmlServer, task: str) -> None:
    lines = {(e["msg"], e["level"]) for e in server.events.values() if e["type"] == "log"}
    for rank in range(SIZE):
        before = f"[rank {rank}] " if rank else ""
        assert (f"{before}printed by rank {rank} [redacted]", "info") in lines, lines
        assert (f"{before}a warning of rank {rank}", "error") in lines, lines
    assert ("said by rank 0", "warning") in lines


def check_files(server: ClearmlServer, task: str) -> None:
    [image] = server.images(task)
    assert (image["metric"], image["variant"], image["iter"]) == ("val", "first", 3)
    assert server.file_at(image["url"]).startswith(b"\x89PNG")
    [trace] = server.plots(task)["confusion", "confusion", 3]["data"]
    assert trace["header"]["values"] == ["a", "b"]
    notes = server.artifacts(task)["notes.txt"]
    assert server.file_at(notes["uri"]) == b"some notes"
    assert notes["type_data"]["preview"].endswith("some notes")
    [model] = server.output_models(task).values()
    assert model["tags"] == ["best", "final"]
    assert model["labels"] == {"cat": 0, "dog": 1}
    assert model["metadata"]["map"]["value"] == "0.5"
