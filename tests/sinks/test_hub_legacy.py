"""The legacy HUB sink against a stand-in that is strict about what HUB took."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from gateway.sinks.base import (
    Item,
    Media,
    Off,
    Params,
    Refused,
    Rows,
    RunInfo,
    Sent,
    Summary,
    Text,
    Unavailable,
)
from gateway.sinks.hub.config import HubConfig
from gateway.sinks.hub.export import HubExport, send_bundle
from gateway.sinks.hub.http import wait_seconds
from gateway.sinks.hub.legacy import LegacySink
from tests.servers.base import Reply
from tests.servers.hub_legacy import KEY, HubLegacyServer
from tests.sinks.fakes import MemoryDict

RUN = RunInfo("run-1", "digits", "Digits run", (), 1)
CONFIG = HubConfig(protocol="legacy")
STREAM = b"s" * 16
METRICS = r"^/v1/models/[^/]+$"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubLegacyServer]:
    with HubLegacyServer() as server:
        monkeypatch.delenv("ULTRALYTICS_API_KEY", raising=False)
        monkeypatch.setenv("HUB_API_KEY", KEY)
        monkeypatch.setenv("ULTRALYTICS_HUB_API", server.url)
        yield server


@pytest.fixture
def memory() -> MemoryDict:
    return MemoryDict()


def opened(memory: MemoryDict, config: HubConfig = CONFIG) -> LegacySink:
    sink = LegacySink(config)
    sink.open(RUN, memory)
    return sink


def rows(seq: int, rank: int = 0, **columns: Any) -> Rows:
    at = np.array([seq], dtype=np.int64)
    named = {name.replace("__", "/"): np.array([value]) for name, value in columns.items()}
    return Rows(STREAM, rank, at, at, at, named)


def params(seq: int, **values: Any) -> Params:
    return Params(STREAM, 0, seq, seq, values)


def summary(seq: int, **values: Any) -> Summary:
    return Summary(STREAM, 0, seq, seq, values)


def checkpoint(folder: Path, seq: int, body: bytes, **meta: Any) -> Media:
    path = folder / f"blob{seq}"
    path.write_bytes(body)
    return Media(STREAM, 0, seq, seq, "checkpoint", "k", "k.pt", None, path, "", len(body), meta)


def total(*parts: Sent) -> tuple[int, dict[str, int]]:
    skipped: Counter[str] = Counter()
    for part in parts:
        skipped.update(part.skipped)
    return sum(part.delivered for part in parts), dict(skipped)


def test_epochs_arrive_value_by_value(server: HubLegacyServer, memory: MemoryDict) -> None:
    """All epochs of a batch arrive with one request, each key with its last value."""
    sink = opened(memory)
    batch = [
        rows(1, train__loss=3.0),
        rows(2, train__loss=2.5),
        rows(3, epoch=0, val__loss=0.5),
        rows(4, train__loss=2.0),
        rows(5, epoch=1, val__loss=0.25),
    ]
    sent = sink.send(batch, again=False)
    model = server.only()
    assert server.epochs(model) == {
        0: {"train/loss": 2.5, "val/loss": 0.5},
        1: {"train/loss": 2.0, "val/loss": 0.25},
    }
    assert total(sent) == (6, {"not the last of its epoch": 1})
    assert sum(path == f"/v1/models/{model}" for _, path, _ in server.requests) == 1


def test_last_epoch_and_summary_are_sent(server: HubLegacyServer, memory: MemoryDict) -> None:
    """A short run's last epoch is there, and the summary beside its values, not over them."""
    sink = opened(memory)
    parts = [sink.send([rows(1, epoch=0, x=1.0), summary(2, x=0.5)], again=False)]
    parts.append(sink.close("completed", ""))
    assert server.epochs(server.only()) == {0: {"x": 1.0, "final/x": 0.5}}
    assert total(*parts) == (3, {})


def test_summary_without_an_epoch(server: HubLegacyServer, memory: MemoryDict) -> None:
    """A summary of a run without epochs has no place, and so have texts in it."""
    sink = opened(memory)
    parts = [sink.send([summary(1, x=0.5)], again=False), sink.close("completed", "")]
    assert total(*parts) == (0, {"no epoch": 1})
    sink.send([rows(2, epoch=0), summary(3, note="good", x=1)], again=False)
    assert total(sink.close("failed", "")) == (0, {"summary holds more than finite numbers": 1})
    assert server.epochs(server.only()) == {0: {"final/x": 1}}


def test_non_finite_values_are_left_out(server: HubLegacyServer, memory: MemoryDict) -> None:
    """HUB takes no NaN: the key is left out and the point counted."""
    sent = opened(memory).send([rows(1, epoch=0, a=math.nan, b=-math.inf, c=1.0)], again=False)
    assert server.epochs(server.only()) == {0: {"c": 1.0}}
    assert total(sent) == (2, {"not finite": 2})


def test_params_make_the_model(server: HubLegacyServer, memory: MemoryDict) -> None:
    """Params with a field in HUB's model arrive there, with the field's type."""
    values = {
        "batch": 16.0,
        "epochs": 3,
        "imgsz": "640",
        "patience": 50,
        "device": 0,
        "cache": True,
    }
    sent = opened(memory).send(
        [params(1, **values, data="coco8.yaml", model="yolov8n.pt")], again=False
    )
    (model,) = server.models.values()
    assert model.config == {
        "batchSize": 16,
        "epochs": 3,
        "imageSize": 640,
        "patience": 50,
        "device": "0",
        "cache": "True",
    }
    assert (model.dataset, model.meta) == ({"name": "coco8.yaml"}, {"name": "Digits run"})
    assert model.lineage == {"architecture": {"name": "yolov8n"}, "parent": {"name": "yolov8n.pt"}}
    assert total(sent) == (1, {})


def test_params_without_a_field_are_not_called_delivered(
    server: HubLegacyServer, memory: MemoryDict
) -> None:
    """A param set that HUB takes only in part is skipped by name, and its part is sent."""
    sink = opened(memory)
    sent = sink.send([params(1, lr=0.1)], again=False)
    assert total(sent) == (0, {"params without a field in hub legacy": 1})
    sink.send([params(2, epochs=5, momentum=0.9)], again=False)
    assert [model.config for model in server.models.values()] == [{"epochs": 5}]


def test_console_is_skipped(server: HubLegacyServer, memory: MemoryDict) -> None:
    """HUB had no console."""
    sent = opened(memory).send([Text(STREAM, 0, 1, 1, "info", "hello")], again=False)
    assert total(sent) == (0, {"hub legacy has no console": 1})


def test_checkpoints_and_the_final_one(
    server: HubLegacyServer, memory: MemoryDict, tmp_path: Path
) -> None:
    """Checkpoints arrive byte by byte with flags; only the final one makes a trained model."""
    sink = opened(memory)
    body = bytes(range(256)) * 3000 + b"\r\n--"
    sink.send([checkpoint(tmp_path, 1, body, best=True, epoch=3)], again=False)
    model = server.only()
    (one,) = server.checkpoints(model)
    assert (one.epoch, one.is_best, one.name, one.body) == (3, True, "last.pt", body)
    assert server.status(model) == "new"
    meta = {"final": True, "epoch": 9, "metrics": {"metrics/mAP50-95(B)": 0.75}}
    sink.send([checkpoint(tmp_path, 2, b"final", **meta)], again=False)
    (final,) = server.finals(model)
    assert (final.epoch, final.map, final.name, final.body) == (9, 0.75, "best.pt", b"final")
    assert server.status(model) == "trained"


def test_restart_with_an_open_epoch(server: HubLegacyServer, memory: MemoryDict) -> None:
    """Points of an open epoch survive the process, and so does the model's id."""
    before = opened(memory).send([rows(1, a=1.0), rows(2, epoch=0, b=1.0), rows(3, a=2.0)], False)
    after = opened(memory).send([rows(4, epoch=1)], again=False)
    assert server.epochs(server.only()) == {0: {"a": 1.0, "b": 1.0}, 1: {"a": 2.0}}
    assert total(before, after) == (5, {})


def test_a_late_rank_joins_an_epoch(server: HubLegacyServer, memory: MemoryDict) -> None:
    """Posting an epoch replaces it, so what rank 0 sent goes along with rank 3's values."""
    sink = opened(memory)
    sink.send([rows(1, epoch=0, x=1.0)], again=False)
    late = rows(1, rank=3, epoch=0, x=3.0)
    sink.send([Rows(b"t" * 16, 3, late.seq, late.step, late.wall_ns, late.columns)], False)
    assert server.epochs(server.only()) == {0: {"x": 1.0, "rank3/x": 3.0}}


def test_too_many_requests_tells_how_long(server: HubLegacyServer, memory: MemoryDict) -> None:
    """429 becomes Unavailable with the seconds of Retry-After."""
    sink = opened(memory)
    server.limit.calls = 1
    with pytest.raises(Unavailable) as caught:
        sink.send([rows(1, epoch=0)], again=False)
    assert caught.value.after_seconds == pytest.approx(3600, abs=5)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7", "X-RateLimit-Reset": "1060"}, 7.0),
        ({"X-RateLimit-Reset": "1060"}, 60.0),
        ({"X-RateLimit-Reset": "1970-01-01T00:17:40.500Z"}, 60.5),
        ({"Retry-After": "Thu, 01 Jan 1970 00:17:10 GMT"}, 30.0),
        ({"Retry-After": "-5"}, 0.0),
        ({"Retry-After": "1e12"}, 3600.0),
        ({"Retry-After": "nan"}, None),
        ({"Retry-After": "soon"}, None),
        ({}, None),
    ],
)
def test_forms_of_a_wish_to_wait(headers: dict[str, str], seconds: float | None) -> None:
    """Seconds, unix seconds, ISO times and HTTP dates are understood, nonsense is not."""
    assert wait_seconds(headers, now=1000.0) == seconds


def test_an_outage_loses_nothing(server: HubLegacyServer, memory: MemoryDict) -> None:
    """503 for a while, then the same call delivers all of it."""
    sink = opened(memory)
    batch = [params(1, epochs=1), rows(2, epoch=0, x=1.0)]
    server.fail("/v1/models", status=503, times=3)
    for _ in range(3):
        with pytest.raises(Unavailable):
            sink.send(batch, again=True)
    assert sink.send(batch, again=True).delivered == 3
    assert server.epochs(server.only()) == {0: {"x": 1.0}}


def test_html_is_not_an_answer(server: HubLegacyServer, memory: MemoryDict) -> None:
    """An HTML page with status 200 confirms nothing, neither metrics nor a checkpoint."""
    page = Reply(200, b"<html>log in</html>", "text/html")
    sink = opened(memory)
    sink.send([params(1, epochs=1)], again=False)
    server.fail(METRICS, status=200, body=page)
    with pytest.raises(Unavailable, match="not a JSON object"):
        sink.send([rows(2, epoch=0)], again=False)


def test_html_after_an_upload_is_not_an_answer(
    server: HubLegacyServer, memory: MemoryDict, tmp_path: Path
) -> None:
    """A login page in answer to an upload means that nothing was stored."""
    page = Reply(200, b"<html>log in</html>", "text/html")
    server.fail("/upload$", status=200, body=page)
    with pytest.raises(Unavailable, match="HTML"):
        opened(memory).send([checkpoint(tmp_path, 1, b"x", best=True)], again=False)


def test_a_redirect_is_not_followed(server: HubLegacyServer, memory: MemoryDict) -> None:
    """The key does not travel to wherever a redirect points."""
    server.fail("/v1/auth", status=307, Location=f"{server.url}/elsewhere")
    with pytest.raises(Unavailable, match="307"):
        opened(memory)
    assert len(server.requests) == 1


def test_refusal_carries_the_servers_words(server: HubLegacyServer, memory: MemoryDict) -> None:
    """400 becomes Refused with HUB's own message."""
    server.fail("^/v1/models$", status=400, body={"message": "config.epochs is too large"})
    with pytest.raises(Refused, match=r"config\.epochs is too large"):
        opened(memory).send([params(1, epochs=10**6)], again=False)


def test_a_deleted_model_makes_items_wait(server: HubLegacyServer, memory: MemoryDict) -> None:
    """404 for the model is no fault of the items: they wait instead of going to quarantine."""
    sink = opened(memory)
    sink.send([params(1, epochs=1)], again=False)
    server.models.clear()
    before = memory.get("model")
    with pytest.raises(Unavailable, match="Model not found"):
        sink.send([rows(2, epoch=0)], again=False)
    assert memory.get("model") == before  # it never answered: the address may be wrong


def test_a_model_deleted_later_is_replaced(server: HubLegacyServer, memory: MemoryDict) -> None:
    """A model that had answered and is gone gets a successor with every epoch so far."""
    sink = opened(memory)
    sink.send([rows(1, epoch=0, x=1.0)], again=False)
    server.models.clear()
    with pytest.raises(Unavailable, match="deleted"):
        sink.send([rows(2, epoch=1, x=2.0)], again=False)
    assert sink.send([rows(2, epoch=1, x=2.0)], again=True).delivered == 2
    assert server.epochs(server.only()) == {0: {"x": 1.0}, 1: {"x": 2.0}}


def test_an_ultralytics_run_keeps_its_names(server: HubLegacyServer, memory: MemoryDict) -> None:
    """Losses and results as its own callback posts them, with the model's figures at epoch 0."""
    sink = LegacySink(CONFIG)
    sink.open(replace(RUN, source="ultralytics"), memory)
    values = {"train__box_loss": 2.0, "lr__pg0": 0.1, "fitness": 0.5, "system__cpu_percent": 1.0}
    info = Summary(STREAM, 0, 2, 2, {"model/parameters": 100})
    args = Params(STREAM, 0, 9, 9, {"model": "weights/yolov8n.yaml", "epochs": 2})
    parts = [
        sink.send([args], again=False),
        sink.send([rows(1, epoch=0, **values)], again=False),
        sink.send([info, rows(3, epoch=1, **values)], again=False),
        sink.close("completed", ""),
    ]
    expected = {"train/box_loss": 2.0}
    epochs = {0: {**expected, "model/parameters": 100}, 1: expected}
    assert server.epochs(server.only()) == epochs
    assert server.models[server.only()].meta == {"name": "yolov8n.yaml"}
    skipped = {"not in the original": 4, "hub legacy has no machine metrics": 2}
    assert total(*parts) == (2 * 2 + 2, skipped)


def test_lost_answer_of_metrics(server: HubLegacyServer, memory: MemoryDict) -> None:
    """Metrics whose answer was lost are sent again and are there once."""
    sink = opened(memory)
    sink.send([params(1, epochs=1)], again=False)
    server.fail(METRICS, mode="apply_then_cut")
    with pytest.raises(Unavailable):
        sink.send([rows(2, epoch=0, x=1.0)], again=False)
    sent = sink.send([rows(2, epoch=0, x=1.0)], again=True)
    assert (sent.delivered, sent.maybe_duplicate) == (2, 0)
    assert server.epochs(server.only()) == {0: {"x": 1.0}}


def test_lost_answer_of_a_create_is_told(server: HubLegacyServer, memory: MemoryDict) -> None:
    """HUB cannot be asked for a model by name, so a second create counts as maybe a duplicate."""
    sink = opened(memory)
    server.fail("^/v1/models$", mode="apply_then_cut")
    with pytest.raises(Unavailable):
        sink.send([params(1, epochs=1)], again=False)
    assert opened(memory).send([params(1, epochs=1)], again=True).maybe_duplicate == 1
    assert len(server.models) == 2


def test_a_create_that_was_put_off_is_no_duplicate(
    server: HubLegacyServer, memory: MemoryDict
) -> None:
    """After a clear 429 the server surely made nothing."""
    sink = opened(memory)
    server.fail("^/v1/models$", status=429, Retry_After="1")
    with pytest.raises(Unavailable):
        sink.send([params(1, epochs=1)], again=False)
    assert sink.send([params(1, epochs=1)], again=True).maybe_duplicate == 0


def test_one_model_for_a_run(server: HubLegacyServer, memory: MemoryDict) -> None:
    """Opening again and again makes no second model."""
    for seq in range(3):
        opened(memory).send([rows(seq + 1, epoch=seq)], again=False)
    assert server.epochs(server.only()).keys() == {0, 1, 2}


def test_the_end_is_accounted_for(server: HubLegacyServer, memory: MemoryDict) -> None:
    """Points that no epoch took are counted at the end, once."""
    sink = opened(memory)
    sent = sink.send([rows(1, epoch=0, x=1.0), rows(2, x=2.0)], again=False)
    parts = [sent, sink.close("failed", "boom"), sink.close("failed", "boom")]
    assert total(*parts) == (2, {"no epoch": 1})


def test_heartbeats_go_along(server: HubLegacyServer, memory: MemoryDict) -> None:
    """A beat goes with a delivery once per interval, echoes the agent id, and may fail."""
    now = [0.0]
    sink = LegacySink(CONFIG, monotonic=lambda: now[0])
    sink.open(RUN, memory)
    sink.send([rows(1, epoch=0)], again=False)
    sink.send([rows(2, epoch=1)], again=False)
    now[0] = 301.0
    server.fail("heartbeat", status=503)
    assert sink.send([rows(3, epoch=2)], again=False).delivered == 1
    now[0] = 602.0
    sink.send([rows(4, epoch=3)], again=False)
    beats = server.models[server.only()].beats
    assert [beat["agentId"] for beat in beats] == ["agent-1", "agent-1"]


def test_a_bad_key_waits_for_a_new_one(
    server: HubLegacyServer, memory: MemoryDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """401 is Unavailable, names the variable and does not show the key."""
    monkeypatch.setenv("HUB_API_KEY", "expired-key")
    with pytest.raises(Unavailable, match="HUB_API_KEY") as caught:
        opened(memory)
    assert "expired-key" not in str(caught.value)


@pytest.mark.parametrize("name", ["HUB_API_KEY", "ULTRALYTICS_HUB_API"])
def test_missing_variable_is_off(
    server: HubLegacyServer, memory: MemoryDict, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Without a key or a server the sink is off and names the variable."""
    monkeypatch.delenv(name)
    with pytest.raises(Off, match=name):
        opened(memory)


def everything(folder: Path) -> Sequence[Sequence[Item]]:
    return [
        [params(1, epochs=2), rows(2, epoch=0, x=math.nan, y=2.0)],
        [checkpoint(folder, 3, b"weights" * 999, best=True), rows(4, epoch=1, y=3.0)],
        [params(5, batch=8), rows(6, y=4.0), summary(7, map=0.9)],
        [checkpoint(folder, 8, b"the end", final=True)],
    ]


def test_bundle_gives_the_same_record_as_online(
    server: HubLegacyServer, memory: MemoryDict, tmp_path: Path
) -> None:
    """A bundle that is sent later leaves at the server what an online run leaves."""
    sink = opened(memory)
    online = [sink.send(batch, again=False) for batch in everything(tmp_path)]
    online.append(sink.close("completed", ""))
    expected = server.models.pop(server.only())
    expected.beats.clear()
    export = HubExport(CONFIG, tmp_path / "bundle")
    export.open(RUN, MemoryDict())
    offline = [export.send(batch, again=False) for batch in everything(tmp_path)]
    offline.append(export.close("completed", ""))
    done = send_bundle(tmp_path / "bundle", CONFIG)
    assert server.models == {expected.id: expected}
    assert total(*offline) == total(*online)
    assert (done.refused, expected.status) == ([], "trained")


def test_a_bundle_of_the_other_protocol_is_refused(tmp_path: Path) -> None:
    """A legacy bundle is not sent to the platform."""
    export = HubExport(CONFIG, tmp_path)
    export.open(RUN, MemoryDict())
    export.close("completed", "")
    with pytest.raises(Refused, match="legacy"):
        send_bundle(tmp_path, HubConfig(project="o/p"))


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"metrics": {"0": {"x": 1.0}}, "type": "metrics"}, 400),  # not encoded twice
        ({"metrics": {"0": '{"x": NaN}'}, "type": "metrics"}, 400),
        ({"metrics": {"0": '{"x": 1.0}'}}, 400),
        ({"metrics": {"0": '{"x": 1.0}'}, "type": "metrics"}, 200),
    ],
)
def test_the_stand_in_is_strict(server: HubLegacyServer, body: Any, status: int) -> None:
    """The stand-in takes metrics only as HUB took them."""
    headers = {"x-api-key": KEY}
    create = {"config": {}, "dataset": {}, "lineage": {}, "meta": {"name": "n"}}
    with requests.Session() as session:
        session.post(f"{server.url}/v1/models", json=create, headers=headers, timeout=5)
        url = f"{server.url}/v1/models/{server.only()}"
        assert session.post(url, json=body, headers=headers, timeout=5).status_code == status


def test_the_stand_in_limits_as_hub_did() -> None:
    """The stand-in's 429 carries the reset as unix seconds, as HUB did."""
    with HubLegacyServer(calls=1) as server, requests.Session() as session:
        for _ in range(2):
            reply = session.post(f"{server.url}/v1/auth", headers={"x-api-key": KEY}, timeout=5)
    assert reply.status_code == 429
    wait = wait_seconds({"X-RateLimit-Reset": reply.headers["X-RateLimit-Reset"]}, time.time())
    assert wait is not None and wait <= 3600
