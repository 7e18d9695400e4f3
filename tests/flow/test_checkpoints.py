"""Checkpoints that policy drops: after the sinks have them, said, and their record kept."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from gateway.series.tables import MediaRow
from gateway.sinks.store import read_views
from tests.servers.platform import KEY, PlatformServer

from .job import Job, wait_until

DROPPED = 'media dropped by policy (checkpoints = "last")'

_RANK = """
import os, sys, pathlib
import rank_client
run = rank_client.init(project="flow", run="r1", capture_console=False)
for n in range(int(sys.argv[1])):
    path = pathlib.Path("last.pt")
    path.write_bytes(os.urandom(300_000))
    run.log_checkpoint(path, step=n, wait=True)
    run.log({"epoch": n, "loss": 1.0 / (n + 1)}, step=n)
run.finish(seconds=60)
"""


@pytest.fixture
def server() -> Iterator[PlatformServer]:
    with PlatformServer() as server:
        yield server


def config(tmp_path: Path, sinks: str) -> str:
    path = tmp_path / "gateway.toml"
    path.write_text(f'[gateway]\ncheckpoints = "last"\n{sinks}\n')
    return str(path)


def train(job: Job, checkpoints: int) -> None:
    process = job.start("python", "-c", _RANK, str(checkpoints))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, (out, err)


def rows(job: Job) -> list[MediaRow]:
    """What the series tells of files; nothing while it is being made."""
    try:
        with job.reader() as reader:
            return sorted(reader.media(), key=lambda row: row.seq)
    except apsw.Error:
        return []


def files(job: Job) -> set[str]:
    return {path.name for path in (job.data / "runs" / "r1" / "media").glob("*/*")}


def test_only_the_newest_stays(tmp_path: Path) -> None:
    """Of three checkpoints of a name two are removed; their records tell of it, with checksum."""
    with Job(tmp_path) as job:
        job.serve("--config", config(tmp_path, ""))
        train(job, 3)
        wait_until(lambda: len(files(job)) == 1, what="one file is left")
        wait_until(lambda: rows(job)[1].lost, what="the series tells of it")
        found = rows(job)
        assert [row.lost for row in found] == [DROPPED, DROPPED, None]
        assert all(row.sha256 and row.size_bytes == 300_000 for row in found)
        assert files(job) == {found[2].sha256}
        code, out, _ = job.cli("show", "r1", "--json")
        told = json.loads(out)["files"]
        assert code == 0
        assert [(one["sha256"], one["lost"] or "") for one in told] == [
            (row.sha256, row.lost or "") for row in found
        ]
        job.assert_accounted()


def test_a_sink_has_them_first_and_one_that_comes_later_skips_them(
    tmp_path: Path, server: PlatformServer
) -> None:
    """While the backend is away nothing is dropped; what a sink has held back stays too."""
    table = '[sinks.hub]\nproject = "owner/digits"\ncheckpoint_interval_seconds = 0'
    environ = {"ULTRALYTICS_API_KEY": KEY, "ULTRALYTICS_PLATFORM_URL": server.url}
    server.fail(".", for_seconds=600)
    with Job(tmp_path, **environ) as job:
        job.serve("--config", config(tmp_path, table))
        train(job, 3)
        wait_until(lambda: server.requests, what="the sink tries")
        assert len(files(job)) == 3
        server.heal()
        wait_until(lambda: len(files(job)) == 1, 60, "all but the newest are dropped")
        assert len(server.checkpoints(server.only())) == 3
        drained = lambda: [v.state for v in read_views(job.data / "runs" / "r1")] == ["drained"]  # noqa: E731
        wait_until(drained, 60, "the sink is done")
        job.assert_accounted()
        job.stop_gateway()
        for path in (job.data / "runs" / "r1" / "sinks").glob("hub.db*"):
            path.unlink()
        server.models.clear()
        job.serve("--config", config(tmp_path, table))
        job.drain()
        [view] = read_views(job.data / "runs" / "r1")
        assert view.skipped == {"media dropped by policy": 2}
        assert len(server.checkpoints(server.only())) == 1
        job.assert_accounted()


def test_a_dropped_file_that_is_logged_again_is_there_again(tmp_path: Path) -> None:
    """The same bytes as a later record are brought anew."""
    script = """
import pathlib, sys, time
import rank_client
run = rank_client.init(project="flow", run="r1", capture_console=False)
path = pathlib.Path("last.pt")
for n, byte in enumerate(b"aba"):
    path.write_bytes(bytes([byte]) * 300_000)
    run.log_checkpoint(path, step=n, wait=True)
    if n == 1:
        sys.stdout.write("two\\n"); sys.stdout.flush(); sys.stdin.readline()
run.finish(seconds=60)
"""
    with Job(tmp_path) as job:
        job.serve("--config", config(tmp_path, ""))
        process = subprocess.Popen(
            (sys.executable, "-c", script),
            env=job.environ,
            cwd=job.truth_dir,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        job.processes.append(process)
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "two\n"
        wait_until(
            lambda: [row.lost for row in rows(job)][:1] == [DROPPED], what="the first is dropped"
        )
        process.stdin.write("go on\n")
        process.stdin.flush()
        assert process.wait(60) == 0
        wait_until(lambda: rows(job)[1].lost, 15, f"the second is dropped: {rows(job)}")
        found = rows(job)
        assert [row.lost for row in found] == [DROPPED, DROPPED, None]
        assert files(job) == {found[2].sha256} == {found[0].sha256}
