"""Runs of several ranks to HUB's two protocols, with real processes and strict stand-ins."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.sinks.store import read_views
from tests.servers import hub_legacy, platform

from .job import Job, wait_until


@pytest.fixture
def server() -> Iterator[platform.PlatformServer]:
    with platform.PlatformServer() as server:
        yield server


def config(tmp_path: Path, table: str) -> str:
    path = tmp_path / "gateway.toml"
    path.write_text(f"[sinks.hub]\n{table}\n")
    return str(path)


def environment(server: platform.PlatformServer) -> dict[str, str]:
    return {"ULTRALYTICS_API_KEY": platform.KEY, "ULTRALYTICS_PLATFORM_URL": server.url}


def test_a_stop_on_platform_reaches_every_rank(
    tmp_path: Path, server: platform.PlatformServer
) -> None:
    """Somebody cancels the model there: every rank is told, ends by itself, and the books close."""
    with Job(tmp_path, **environment(server)) as job:
        job.serve("--config", config(tmp_path, 'project = "owner/digits"'))
        ranks = [job.rank(rank, 2, 20, "stop", pause=0.01) for rank in range(2)]
        wait_until(lambda: server.models, what="the model is made")
        server.cancel(server.only(), "stopped by owner")
        for rank in ranks:
            _, err = rank.communicate(timeout=90)
            assert rank.returncode == 0, err
        job.drain()
        model = server.models[server.only()]
        assert (model.status, sorted(model.metrics)) == ("completed", [0, 1])
        job.assert_all_there()


def test_two_ranks_are_one_model_of_hub(tmp_path: Path) -> None:
    """Epochs, the last one included, and a model that is trained by its final checkpoint."""
    with hub_legacy.HubLegacyServer() as server:
        environ = {"HUB_API_KEY": hub_legacy.KEY, "ULTRALYTICS_HUB_API": server.url}
        with Job(tmp_path, **environ) as job:
            job.serve("--config", config(tmp_path, 'protocol = "legacy"'))
            for rank in [job.rank(rank, 2, 30, "finish") for rank in range(2)]:
                _, err = rank.communicate(timeout=90)
                assert rank.returncode == 0, err
            job.drain()
            record = server.epochs(server.only())
            assert sorted(record) == [0, 1, 2]
            assert record[2]["train/loss"] == pytest.approx(1 / 30)
            [view] = read_views(job.data / "runs" / "r1")
            assert (view.state, view.quarantined, view.maybe_duplicate) == ("drained", 0, 0)
            job.assert_all_there()
