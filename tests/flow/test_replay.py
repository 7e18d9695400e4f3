"""A backend that was away for a whole run, or was added after it: `rankgate replay` brings it all,
once, compared row by row with the servers' own record of a run that was online."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gateway.sinks.store import SinkView, read_views
from tests.servers.clearml import ClearmlServer
from tests.servers.hub_legacy import KEY as LEGACY_KEY
from tests.servers.hub_legacy import HubLegacyServer
from tests.servers.neptune import NeptuneServer, token
from tests.servers.platform import KEY as PLATFORM_KEY
from tests.servers.platform import PlatformServer

from .job import Job, wait_until
from .records import of_clearml, record

EVERYTHING = str(Path(__file__).with_name("everything.py"))
SERVERS = {
    "clearml": ClearmlServer,
    "neptune": NeptuneServer,
    "platform": PlatformServer,
    "legacy": HubLegacyServer,
}
SINK = {"clearml": "clearml", "neptune": "neptune", "platform": "hub", "legacy": "hub"}


def environment(server: Any) -> dict[str, str]:
    if isinstance(server, ClearmlServer):
        return server.env
    if isinstance(server, NeptuneServer):
        return {
            "NEPTUNE_API_TOKEN": token(server.url),
            "NEPTUNE_PROJECT": "team/digits",
            "OAUTHLIB_INSECURE_TRANSPORT": "1",
        }
    if isinstance(server, PlatformServer):
        return {"ULTRALYTICS_API_KEY": PLATFORM_KEY, "ULTRALYTICS_PLATFORM_URL": server.url}
    return {"HUB_API_KEY": LEGACY_KEY, "ULTRALYTICS_HUB_API": server.url}


def configure(job: Job, kind: str) -> None:
    """The HUB's settings, for whichever command comes."""
    job.data.mkdir(exist_ok=True)
    settings = {
        "platform": "[sinks.hub]\nproject = 'team/digits'\n",
        "legacy": "[sinks.hub]\nprotocol = 'legacy'\n",
    }
    (job.data / "hub.toml").write_text(settings.get(kind, ""))
    if kind in settings:
        job.environ["RANKGATE_CONFIG"] = str(job.data / "hub.toml")


def train(job: Job, ranks: int = 2, steps: int = 40, *gate: str) -> list[Any]:
    place = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "RANKGATE_RUN": "r1"}
    words = (sys.executable, EVERYTHING, str(job.truth_dir), str(steps), *gate)
    return [
        job.start(*words, **place, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(ranks)
    ]


def end(ranks: list[subprocess.Popen[str]]) -> None:
    for rank in ranks:
        out, err = rank.communicate(timeout=90)
        assert rank.returncode == 0, (out, err)


def view(job: Job, sink: str) -> SinkView | None:
    """None while the sink's file is being made."""
    return {v.name: v for v in read_views(job.data / "runs/r1")}.get(sink)


def state(job: Job, sink: str) -> str:
    found = view(job, sink)
    return found.state if found else ""


def trained(job: Job, **how: Any) -> None:
    """A whole run without any sink, and no gateway left."""
    end(train(job, **how))
    job.drain()
    job.stop_gateway(signal.SIGTERM)


def replay(job: Job, sink: str, *options: str) -> str:
    code, out, err = job.cli("replay", "r1", "--to", sink, *options)
    assert code == 0, (out, err)
    return out


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", SERVERS)
def test_away_for_the_whole_run_then_replayed(kind: str, tmp_path: Path, stack: ExitStack) -> None:
    """What a backend has after a replay is row by row what one has that was there all the time;
    another replay, and one of a rebuilt series, change nothing."""
    found = []
    for name in ("online", "away"):
        folder = tmp_path / name
        folder.mkdir()
        server = stack.enter_context(SERVERS[kind]())
        job = stack.enter_context(Job(folder, **environment(server)))
        configure(job, kind)
        if name == "away":
            server.fail(".", status=503, for_seconds=3600)
        gateway = job.serve("--sink", SINK[kind])
        end(train(job))
        if name == "online":
            job.drain()
        else:
            wait_until(lambda job=job: state(job, SINK[kind]) == "retrying", 60, "a refusal")
            gateway.terminate()
            gateway.wait(30)
            server.heal()
            replay(job, SINK[kind])
        job.assert_accounted()
        assert state(job, SINK[kind]) == "drained"
        found.append(record(server))
    assert found[0] == found[1]
    before, asked = view(job, SINK[kind]), len(server.requests)
    replay(job, SINK[kind])
    for path in (job.data / "runs/r1").glob("series.db*"):
        path.unlink()
    replay(job, SINK[kind])
    assert (job.data / "runs/r1/series.db").stat().st_mode & 0o077 == 0
    assert record(server) == found[1]
    job.assert_accounted()
    after = view(job, SINK[kind])
    assert before is not None
    assert after == replace(before, updated_ns=after.updated_ns if after else 0)
    assert len(server.requests) - asked < 60, server.requests[asked:]  # no data among them


@pytest.mark.timeout(180)
def test_killed_half_way_and_resumed(tmp_path: Path, stack: ExitStack) -> None:
    """SIGKILL of a replay, its process and all, when half is there: the same command brings the
    other half, and nothing twice."""
    whole = stack.enter_context(ClearmlServer())
    server = stack.enter_context(ClearmlServer())
    server.latency_seconds = 0.05
    job = stack.enter_context(Job(tmp_path))
    trained(job, ranks=1, steps=12_000)
    total = sum(n for name, n in job.reader().about().counters.items() if "passed " in name)
    words = ("replay", "r1", "--to", "clearml")
    process = job.start(sys.executable, "-m", "gateway", *words, **environment(server))
    wait_until(lambda: _delivered(job) >= total * 0.3, 60, "about half of it")
    child = job.child("sink")
    process.kill()
    wait_until(lambda: not Path(f"/proc/{child}").exists(), 20, "its process leaves with it")
    assert state(job, "clearml") == "delivering"
    assert _delivered(job) < total
    job.environ.update(environment(server))
    out = replay(job, "clearml", "--json")
    assert json.loads(out)["delivered"] + sum(json.loads(out)["skipped"].values()) == total
    resumed = record(server)
    job.assert_accounted()
    (tmp_path / "copy").mkdir()
    copy = stack.enter_context(Job(tmp_path / "copy", **environment(whole)))
    _copy_without_sinks(job, copy)
    replay(copy, "clearml")
    assert resumed == record(whole)


def _delivered(job: Job) -> int:
    seen = view(job, "clearml")
    return seen.delivered + sum(seen.skipped.values()) if seen else 0


def _copy_without_sinks(job: Job, copy: Job) -> None:
    copy.data.mkdir()
    subprocess.run(["cp", "-r", str(job.data / "runs"), str(copy.data)], check=True)
    subprocess.run(["rm", "-r", str(copy.data / "runs/r1/sinks")], check=True)


@pytest.mark.timeout(180)
def test_a_run_that_was_online_to_neptune_replayed_to_clearml(
    tmp_path: Path, stack: ExitStack
) -> None:
    """A backend that is added later gets what the first one got: as many items, the same
    losses."""
    neptune, clearml = stack.enter_context(NeptuneServer()), stack.enter_context(ClearmlServer())
    job = stack.enter_context(Job(tmp_path, **environment(neptune), **environment(clearml)))
    job.serve("--sink", "neptune")
    end(train(job))
    job.drain()
    job.stop_gateway(signal.SIGTERM)
    replay(job, "clearml")
    there, here = record(neptune)["series"]["train/loss"], record(clearml)["scalars"]
    losses = sorted((s, v) for (t, n, s), v in here.items() if (t, n) == ("train", "loss"))
    assert [(s, pytest.approx(v, rel=1e-6)) for s, v in there] == losses
    assert {v.name: v.state for v in read_views(job.data / "runs/r1")} == {
        "clearml": "drained", "neptune": "drained",
    }  # fmt: skip
    job.assert_accounted()


IMPORT = "import sys\nfrom clearml import Task\nTask.import_offline_session(sys.argv[1])"


@pytest.mark.timeout(240)
def test_an_export_sent_by_the_vendors_own_tool(tmp_path: Path, stack: ExitStack) -> None:
    """`Task.import_offline_session` and `neptune sync` bring of a run's export the same points,
    lines and files that a replay online brings to another server."""
    clearml = [stack.enter_context(ClearmlServer()) for _ in range(2)]
    neptune = [stack.enter_context(NeptuneServer()) for _ in range(2)]
    job = stack.enter_context(Job(tmp_path))
    trained(job)
    job.environ |= environment(clearml[0]) | environment(neptune[0])
    for name in ("clearml", "neptune"):
        replay(job, name)
    job.assert_accounted()
    job.environ |= environment(clearml[1]) | environment(neptune[1])
    for name in ("clearml", "neptune"):
        replay(job, f"{name}=offline")
    exports = job.data / "runs/r1/exports"
    sync = str(Path(sys.executable).with_name("neptune"))
    for words in (
        (sys.executable, "-c", IMPORT, str(exports / "clearml")),
        (sync, "sync", "-p", "team/digits", "--path", str(exports / "neptune")),
    ):
        process = job.start(*words)
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0, (out, err)
    replayed, imported = map(of_clearml, clearml)
    for kind in ("scalars", "lines", "plots", "images"):
        assert imported[kind].keys() == replayed[kind].keys(), kind
    assert imported["scalars"] == pytest.approx(replayed["scalars"], rel=1e-6)
    replayed, synced = map(record, neptune)
    for kind in ("series", "strings", "images", "files"):
        assert synced[kind] == replayed[kind], kind
    job.assert_accounted()


@pytest.mark.timeout(120)
def test_since_a_step(tmp_path: Path, stack: ExitStack) -> None:
    """`--since 20`: no point of an earlier step arrives, each is counted as skipped, params do;
    a second replay without it brings nothing more."""
    server = stack.enter_context(ClearmlServer())
    job = stack.enter_context(Job(tmp_path, **environment(server)))
    trained(job, ranks=1, steps=40)
    replay(job, "clearml", "--since", "20")
    found = record(server)
    assert {s for (t, _, s) in found["scalars"] if t == "train"} == set(range(20, 40))
    assert found["params"]
    seen = view(job, "clearml")
    assert seen is not None
    assert seen.skipped["before --since"] >= 20 * 3
    job.assert_accounted()
    replay(job, "clearml")
    assert record(server) == found


@pytest.mark.parametrize(
    ("text", "words"), [("yesterday", "takes a step"), ("1.5", "takes a step")]
)
def test_since_something_else(text: str, words: str, tmp_path: Path) -> None:
    """Neither a step nor a moment: said, with an example, before anything is delivered."""
    with Job(tmp_path) as job:
        trained(job, ranks=1, steps=2)
        code, _, err = job.cli("replay", "r1", "--to", "clearml=offline", "--since", text)
        assert (code, words in err) == (78, True), err
        job.assert_accounted()


@pytest.mark.timeout(120)
def test_a_run_that_goes_on_is_followed(tmp_path: Path, stack: ExitStack) -> None:
    """A replay of a live run, whose gateway has no such sink, brings what was and what comes, and
    ends with the run."""
    server = stack.enter_context(ClearmlServer())
    job = stack.enter_context(Job(tmp_path, **environment(server)))
    job.serve()
    gate = tmp_path / "gate"
    ranks = train(job, 1, 60, str(gate))
    wait_until(lambda: (job.data / "runs/r1/series.db").exists(), 30, "a series")
    words = ("replay", "r1", "--to", "clearml")
    process = job.start(sys.executable, "-m", "gateway", *words)
    server.wait_until(lambda: bool(server.scalars(next(iter(server.tasks), ""))), 30)
    assert ranks[0].poll() is None, "the run was over before its replay began"
    gate.touch()
    end(ranks)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, (out, err)
    steps = {s for (t, _, s) in record(server)["scalars"] if t == "train"}
    assert steps == set(range(60))
    job.assert_accounted()


@pytest.mark.timeout(120)
def test_a_sink_that_a_running_gateway_lacks(tmp_path: Path, stack: ExitStack) -> None:
    """`rankgate run --sink` and `drain --sink` beside a gateway without that sink: both say the
    command that delivers, and as it is typed it does."""
    server = stack.enter_context(ClearmlServer())
    job = stack.enter_context(Job(tmp_path, **environment(server)))
    job.serve()
    words = (sys.executable, EVERYTHING, str(job.truth_dir), "20")
    code, out, err = job.cli("run", "--run", "r1", "--sink", "clearml", "--", *words)
    assert code == 0, (out, err)
    [line] = [line for line in err.splitlines() if "rankgate replay" in line]
    code, out, _ = job.cli("drain", "--sink", "clearml")
    assert code == 1
    assert line.partition("rankgate replay")[2] in out
    typed = line[line.index("rankgate replay") :].split()[1:]
    code, out, err = job.cli(*typed)
    assert code == 0, (out, err)
    assert {s for (t, _, s) in record(server)["scalars"] if t == "train"} == set(range(20))
    code, out, _ = job.cli("drain", "--sink", "clearml")
    assert (code, "all is delivered" in out) == (0, True)
    job.assert_accounted()


@pytest.mark.timeout(120)
def test_progress_for_a_person(tmp_path: Path, stack: ExitStack) -> None:
    """On a terminal one line is written over: how many of how many, how fast, how long; stdout
    has the account alone."""
    server = stack.enter_context(ClearmlServer())
    server.latency_seconds = 0.3
    job = stack.enter_context(Job(tmp_path, **environment(server)))
    trained(job, ranks=1, steps=100)
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "gateway", "replay", "r1", "--to", "clearml", "--json"],
        env=job.environ, cwd=job.truth_dir, stdout=subprocess.PIPE, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    seen = _read_all(ours)
    out = process.communicate(timeout=60)[0]
    assert json.loads(out)["state"] == "drained"
    assert b"\r\x1b[Kclearml: " in seen
    assert b" items (" in seen
    assert seen.endswith(b"\r\x1b[K"), "the line is gone at the end"
    job.assert_accounted()


def _read_all(fd: int) -> bytes:
    out, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            out += os.read(fd, 4096)
        except OSError:  # the other end is closed
            break
    os.close(fd)
    return out
