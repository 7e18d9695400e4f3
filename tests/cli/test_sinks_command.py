"""`rankgate sinks`: what a backend would not take, seen, tried again and given up, while the run
goes on and after it."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.sinks import requests
from gateway.sinks.store import read_view, read_views
from tests.servers.clearml import ClearmlServer

from ..flow.job import Job, wait_until

EVERYTHING = str(Path(__file__).parents[1] / "flow" / "everything.py")
BAD = ("lr", "lr")


class Choosy(ClearmlServer):
    """Takes no value of `lr`, as long as it is choosy."""

    choosy = True

    def _event_problem(self, event: dict[str, Any]) -> str | None:
        if self.choosy and (event.get("metric"), event.get("variant")) == BAD:
            return "lr is not welcome"
        return super()._event_problem(event)


@pytest.fixture
def server() -> Iterator[Choosy]:
    with Choosy() as server:
        yield server


@pytest.fixture
def job(tmp_path: Path, server: Choosy) -> Iterator[Job]:
    with Job(tmp_path, **server.env) as job:
        yield job


def start(job: Job, steps: int, *gate: str) -> Any:
    words = (sys.executable, EVERYTHING, str(job.truth_dir), str(steps), *gate)
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return job.start(*words, **place, RANKGATE_RUN="r1")


def sinks(job: Job, *words: str) -> tuple[int, Any]:
    """(exit code, what --json gives); progress may be on stderr."""
    code, out, err = job.cli("sinks", *words, "--json")
    assert out, err
    return code, json.loads(out)


def told(job: Job) -> dict[str, Any]:
    """ClearML's object, with the sum that it must keep."""
    code, found = sinks(job, "status")
    [sink] = [s for s in found if s["sink"] == "clearml"]
    assert code == 0
    assert sink["feed"] == sum(
        sink[name] for name in ("delivered", "skipped", "quarantined", "waiting")
    )
    assert sum(item["items"] for item in sink["items"]) == sink["quarantined"]
    return dict(sink)


def there(server: Choosy) -> set[int]:
    """The steps of the key that was not welcome."""
    [task] = server.tasks
    return {step for (t, v, step) in server.scalars(task) if (t, v) == BAD}


@pytest.mark.timeout(180)
def test_while_the_run_goes_on(job: Job, server: Choosy, tmp_path: Path) -> None:
    """Two points of a live run stay aside, each with an id and the reason; tried again too early
    they stay, later they arrive once; the run's end closes the books."""
    gate = tmp_path / "gate"
    job.serve("--sink", "clearml")
    rank = start(job, 4, str(gate))
    run_dir = job.data / "runs/r1"
    aside = lambda: sum(v.quarantined for v in read_views(run_dir))  # noqa: E731
    wait_until(lambda: aside() == 3, 60, "three refusals")
    first = told(job)["items"][0]
    assert first["id"].startswith("r1/clearml/")
    assert first["what"] == "lr step 0 rank 0"
    assert "lr is not welcome" in first["reason"]
    assert sinks(job, "retry", first["id"]) == (
        1,
        {
            "action": "retry",
            "left": 1,
            "sinks": [{"run": "r1", "sink": "clearml", "items": 1, "left": 1}],
        },
    )
    server.choosy = False
    code, answer = sinks(job, "retry", first["id"])
    assert (code, answer["left"], there(server)) == (0, 0, {0})
    assert told(job)["quarantined"] == 2
    code, out, err = job.cli("sinks", "skip", told(job)["items"][0]["id"])
    assert (code, "1 item given up, 0 left" in out) == (0, True), (out, err)
    assert sinks(job, "retry", "--all")[0] == 0
    assert there(server) == {0, 2}
    gate.touch()
    rank.communicate(timeout=60)
    job.drain()
    assert there(server) == {0, 2, 3}
    assert told(job)["skipped_reasons"]["skipped by hand"] == 1
    job.assert_accounted()


@pytest.mark.timeout(180)
def test_after_the_run(job: Job, server: Choosy) -> None:
    """Without a gateway: a retry delivers here, and once; what is skipped is never sent. A gateway
    that comes later finds nothing left to do."""
    job.serve("--sink", "clearml")
    start(job, 4).communicate(timeout=60)
    job.drain()
    job.stop_gateway(signal.SIGTERM)
    code, out, err = job.cli("sinks", "status")
    assert (code, err) == (0, "")
    assert out.count("lr is not welcome") == 4
    assert all(len(line) <= 80 for line in out.splitlines()), out
    ids = [item["id"] for item in told(job)["items"]]
    assert sinks(job, "skip", ids[3])[0] == 0
    server.choosy = False
    assert sinks(job, "retry", ids[0], ids[1])[0] == 0
    assert there(server) == {0, 1}
    accepted = server.accepted_scalar_sends
    code, out, _ = job.cli("sinks", "retry", ids[0])
    assert code == 78, "it is not there any more"
    assert server.accepted_scalar_sends == accepted
    assert sinks(job, "retry", "r1/clearml", "--all")[0] == 0
    assert there(server) == {0, 1, 2}
    assert told(job)["state"] == "drained"
    assert sinks(job, "retry", "--all") == (0, {"action": "retry", "left": 0, "sinks": []})
    accepted = server.accepted_scalar_sends
    code, out, err = job.cli("drain", "--sink", "clearml")
    assert (code, server.accepted_scalar_sends) == (0, accepted), (out, err)
    job.assert_accounted()


@pytest.mark.timeout(120)
def test_a_request_left_for_a_gateway(job: Job, server: Choosy) -> None:
    """A request that nobody could do is done by the next gateway that has the sink."""
    job.serve("--sink", "clearml")
    start(job, 4).communicate(timeout=60)
    job.drain()
    job.stop_gateway(signal.SIGTERM)
    server.choosy = False
    run_dir = job.data / "runs/r1"
    requests.ask(run_dir, "clearml", requests.RETRY, None)
    code, out, err = job.cli("drain", "--sink", "clearml")
    assert code == 0, (out, err)
    assert read_view(run_dir / "sinks/clearml.db").quarantined == 0
    assert there(server) == {0, 1, 2, 3}
    job.assert_accounted()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["retry"], "which?"),
        (["retry", "r1"], "RUN/SINK/ID"),
        (["retry", "r1/clearml"], "RUN/SINK/ID"),
        (["skip", "r1/clearml/3", "--all"], "RUN/SINK/ID"),
        (["retry", "r1/neptune/1"], "nothing in quarantine of neptune"),
    ],
)
def test_what_makes_no_sense(words: list[str], says: str, job: Job) -> None:
    """Is said with an example, and changes nothing."""
    (job.data / "runs/r1/journal").mkdir(parents=True)
    code, _, err = job.cli("sinks", *words)
    assert code == 78
    assert says in " ".join(err.split())
