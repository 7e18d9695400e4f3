"""Real torchrun, real torch, the real vendor packages, stand-in servers: value by value."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.servers.clearml import ClearmlServer
from tests.servers.hub_legacy import HubLegacyServer
from tests.servers.neptune import NeptuneServer, token
from tests.servers.platform import PlatformServer

from .job import Job

TRAIN = str(Path(__file__).with_name("train.py"))
UL_KEY = "ul_" + "0" * 40

pytestmark = [pytest.mark.torch, pytest.mark.timeout(300)]


@pytest.fixture
def servers() -> Iterator[dict[str, Any]]:
    with (
        ClearmlServer() as clearml,
        NeptuneServer() as neptune,
        PlatformServer(UL_KEY) as platform,
        HubLegacyServer("legacy-key") as legacy,
    ):
        yield {"clearml": clearml, "neptune": neptune, "platform": platform, "legacy": legacy}


def environment(servers: dict[str, Any]) -> dict[str, str]:
    return {
        **servers["clearml"].env,
        "NEPTUNE_API_TOKEN": token(servers["neptune"].url),
        "NEPTUNE_PROJECT": "team/digits",
        "OAUTHLIB_INSECURE_TRANSPORT": "1",
        "ULTRALYTICS_PLATFORM_URL": servers["platform"].url,
        "ULTRALYTICS_API_KEY": UL_KEY,
        "ULTRALYTICS_HUB_API": servers["legacy"].url,
        "HUB_API_KEY": "legacy-key",
        "OMP_NUM_THREADS": "1",
    }


CONFIG = """
[sinks.clearml]
[sinks.neptune]
[sinks.hub]
protocol = "{protocol}"
project = "team/digits"
"""


def rank_zero_truth(job: Job, run: str) -> list[dict[str, Any]]:
    ranks = {s.id.hex(): s.rank for s in job.streams(run)}
    [lines] = [t for stream, t in job.truth(run).items() if ranks[stream] == 0]
    return [line for line in lines if "step" in line]


def last_of_each_epoch(truth: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    epochs: dict[int, dict[str, float]] = {}
    current: dict[str, float] = {}
    for line in truth:
        current |= {k: v for k, v in line.items() if k != "step"}
        if "epoch" in line:
            epochs[line["epoch"]] = current
            current = {}
    return epochs


@pytest.mark.parametrize(("size", "protocol"), [(2, "platform"), (4, "legacy")])
def test_what_the_ranks_logged_is_what_every_backend_has(
    tmp_path: Path, servers: dict[str, Any], size: int, protocol: str
) -> None:
    """Every (rank, key, step, value) is in the series once; rank 0's once in ClearML and
    Neptune, and as the last value per key and epoch in HUB."""
    with Job(tmp_path, **environment(servers)) as job:
        config = tmp_path / "gateway.toml"
        config.write_text(CONFIG.format(protocol=protocol))
        code, out, err = job.cli(
            "run", "--config", str(config), "--run", "ddp1", "--",
            "torchrun", "--standalone", "--nproc-per-node", str(size), TRAIN, str(job.truth_dir),
            seconds=200,
        )  # fmt: skip
        assert code == 0, (out, err, job.log())
        job.assert_all_there("ddp1")
        assert sorted(s.rank for s in job.streams("ddp1") if s.kind == "live") == list(range(size))
        truth = rank_zero_truth(job, "ddp1")
        assert len(truth) == 40
        check_clearml(servers["clearml"], truth)
        check_neptune(servers["neptune"], truth)
        check_hub(servers[protocol], truth)
        best = hashlib.sha256((job.truth_dir / "best.pt").read_bytes()).hexdigest()
        assert best in {hashlib.sha256(f).hexdigest() for f in servers["clearml"].files.values()}
        assert job.log().count("Traceback") == 0, job.log()


def check_clearml(server: ClearmlServer, truth: list[dict[str, Any]]) -> None:
    [task] = server.tasks
    have = server.scalars(task)
    want = {}
    for line in truth:
        step = line["step"]
        want["train", "loss", step] = line["train/loss"]
        want |= {(k, k, step): line[k] for k in ("lr", "half", "epoch") if k in line}
    assert have.keys() == want.keys()
    assert all(math.isclose(have[k], want[k], rel_tol=1e-6) for k in want)
    assert any("rank 0 is done" in line for line in map(str, server.log_lines(task)))
    assert server.tasks[task]["status"] == "completed"


def check_neptune(server: NeptuneServer, truth: list[dict[str, Any]]) -> None:
    [run] = server.runs
    have = server.series(run)
    for key in ("train/loss", "lr", "half", "epoch"):
        want = [(line["step"], line[key]) for line in truth if key in line]
        assert [(step, value) for step, value, _ in have[key]] == want
    assert server.refused == []


def check_hub(server: Any, truth: list[dict[str, Any]]) -> None:
    model = server.only()
    have = server.epochs(model if isinstance(model, str) else model.id)
    want = last_of_each_epoch(truth)
    assert sorted(have) == sorted(want)
    for epoch, values in want.items():
        for key, value in values.items():
            if key != "epoch":
                assert math.isclose(have[epoch][key], value, rel_tol=1e-9), (epoch, key)
