"""The Platform sink against a stand-in that is strict about the platform's rules."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

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
from gateway.sinks.hub import http, pace, platform, results
from gateway.sinks.hub.config import HubConfig
from gateway.sinks.hub.export import HubExport, send_bundle
from gateway.sinks.hub.platform import PlatformSink
from gateway.sinks.store import Store
from tests.servers.base import Reply
from tests.servers.platform import EVENTS, KEY, PlatformServer
from tests.sinks.fakes import MemoryDict

RUN = RunInfo("run-1", "digits", "Digits run", ("tag",), 1)
CONFIG = HubConfig(project="owner/digits")
STREAM = b"s" * 16


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlatformServer]:
    with PlatformServer() as server:
        monkeypatch.setenv("ULTRALYTICS_API_KEY", KEY)
        monkeypatch.setenv("ULTRALYTICS_PLATFORM_URL", server.url)
        yield server


@pytest.fixture
def memory() -> MemoryDict:
    return MemoryDict()


def opened(memory: MemoryDict, config: HubConfig = CONFIG) -> PlatformSink:
    sink = PlatformSink(config)
    sink.open(RUN, memory)
    return sink


def rows(seq: int, rank: int = 0, **columns: Any) -> Rows:
    at = np.array([seq], dtype=np.int64)
    named = {name.replace("__", "/"): np.array([value]) for name, value in columns.items()}
    return Rows(STREAM, rank, at, at, at, named)


def text(seq: int, line: str, rank: int = 0) -> Text:
    return Text(STREAM, rank, seq, seq * 1_000_000, "info", line)


def params(seq: int, **values: Any) -> Params:
    return Params(STREAM, 0, seq, seq, values)


def summary(seq: int, **values: Any) -> Summary:
    return Summary(STREAM, 0, seq, seq, values)


def media(
    folder: Path, seq: int, body: bytes, what: str = "checkpoint", minute: float = 0.0, **meta: Any
) -> Media:
    path = folder / f"blob{seq}"
    path.write_bytes(body)
    wall_ns = int(minute * 60e9)
    return Media(
        STREAM, 0, seq, wall_ns, what, "best.pt", "best.pt", None, path, "", len(body), meta
    )


def total(*parts: Sent) -> tuple[int, dict[str, int]]:
    skipped: Counter[str] = Counter()
    for part in parts:
        skipped.update(part.skipped)
    return sum(part.delivered for part in parts), dict(skipped)


def test_epochs_arrive_value_by_value(server: PlatformServer, memory: MemoryDict) -> None:
    """Each epoch has each key's last value, under the user's names."""
    sink = opened(memory)
    batch = [
        rows(1, train__loss=3.0),
        rows(2, train__loss=2.5),
        rows(3, epoch=0, val__loss=0.5),
        rows(4, train__loss=2.0),
        rows(5, epoch=1, val__loss=0.25),
    ]
    sent = sink.send(batch, again=False)
    assert server.epochs(server.only()) == {
        0: {"train/loss": 2.5, "val/loss": 0.5},
        1: {"train/loss": 2.0, "val/loss": 0.25},
    }
    assert total(sent) == (6, {"not the last of its epoch": 1})


def test_last_epoch_and_final_record_are_sent(server: PlatformServer, memory: MemoryDict) -> None:
    """The end of a short run is not lost: last epoch, summary and state are at the platform."""
    sink = opened(memory)
    sent = sink.send([rows(1, epoch=0, x=1.0), summary(2, map=0.9, note="ok")], again=False)
    assert sent.delivered == 2
    closed = sink.close("completed", "")
    model = server.only()
    assert server.epochs(model) == {0: {"x": 1.0}}
    assert server.finals(model) == {"metrics": {"x": 1.0, "map": 0.9, "note": "ok"}}
    assert (server.status(model), total(sent, closed)) == ("completed", (3, {}))


def test_points_without_an_epoch_are_counted_at_the_end(
    server: PlatformServer, memory: MemoryDict
) -> None:
    """What no epoch took is skipped by name, and never called delivered."""
    sink = opened(memory)
    sent = sink.send([rows(1, a=1.0, b=2.0), rows(2, a=3.0)], again=False)
    assert total(sent) == (0, {"not the last of its epoch": 1})
    assert total(sink.close("completed", "")) == (0, {"no epoch": 2})


def test_params_become_strings(server: PlatformServer, memory: MemoryDict) -> None:
    """All trainArgs are strings; epochs and device are also told on their own."""
    opened(memory).send([params(1, lr=0.1, epochs=3, amp=True, none=None)], again=False)
    (model,) = server.models.values()
    assert model.train_args == {"lr": "0.1", "epochs": "3", "amp": "True", "none": "None"}
    assert (model.start["epochs"], model.project, model.slug) == (3, "owner/digits", "digits-run")


def test_later_params_do_not_make_a_second_model(
    server: PlatformServer, memory: MemoryDict
) -> None:
    """Params that come after the start go to the same model, together with the first."""
    sink = opened(memory)
    sink.send([params(1, lr=0.1)], again=False)
    sink.send([params(2, wd=0.0)], again=False)
    (model,) = server.models.values()
    assert model.train_args == {"lr": "0.1", "wd": "0.0"}


def test_a_taken_name_keeps_the_ids(server: PlatformServer, memory: MemoryDict) -> None:
    """A second run of the same name gets -2 and its own epochs."""
    opened(memory).send([rows(1, epoch=0, x=1.0)], again=False)
    opened(MemoryDict()).send([rows(1, epoch=0, x=2.0)], again=False)
    one, two = server.models.values()
    assert (one.slug, two.slug) == ("digits-run", "digits-run-2")
    assert (one.metrics, two.metrics) == ({0: {"x": 1.0}}, {0: {"x": 2.0}})


def test_non_finite_becomes_null(server: PlatformServer, memory: MemoryDict) -> None:
    """NaN and infinity are null at the platform and count as delivered."""
    sent = opened(memory).send([rows(1, epoch=0, a=math.nan, b=math.inf, c=1.0)], again=False)
    assert server.epochs(server.only()) == {0: {"a": None, "b": None, "c": 1.0}}
    assert sent.delivered == 4


def test_rank_is_in_the_key(server: PlatformServer, memory: MemoryDict) -> None:
    """Rank 3's late epoch joins rank 0's values instead of replacing them."""
    sink = opened(memory)
    sink.send([rows(1, epoch=0, x=1.0)], again=False)
    other = rows(1, rank=3, epoch=0, x=3.0)
    sink.send([Rows(b"t" * 16, 3, other.seq, other.step, other.wall_ns, other.columns)], False)
    assert server.epochs(server.only()) == {0: {"x": 1.0, "rank3/x": 3.0}}


def test_fitness_and_model_info(server: PlatformServer, memory: MemoryDict) -> None:
    """Ultralytics' fitness and model figures stand where the platform looks for them."""
    sink = opened(memory)
    first = {"model__parameters": 3_000_000, "model__GFLOPs": 8.1, "fitness": 0.5}
    sink.send([rows(1, epoch=0, **first), rows(2, epoch=1, fitness=0.25)], again=False)
    events = server.models[server.only()].events
    assert events[0]["modelInfo"] == {"parameters": 3_000_000, "gflops": 8.1}
    assert (events[1]["fitness"], events[1]["best_fitness"]) == (0.25, 0.5)
    sink.close("completed", "")
    results = server.finals(server.only())
    assert results and (results["bestEpoch"], results["bestFitness"]) == (0, 0.5)


def test_console_goes_in_large_chunks(server: PlatformServer, memory: MemoryDict) -> None:
    """2,500 lines take 3 requests and arrive in order, those of other ranks marked."""
    lines: list[Item] = [text(seq, f"line {seq}", rank=seq % 2) for seq in range(1, 2501)]
    sent = opened(memory).send(lines, again=False)
    expected = [("[rank 1] " if seq % 2 else "") + f"line {seq}" for seq in range(1, 2501)]
    model = server.only()
    assert server.console(model) == expected
    assert len(server.models[model].chunks) == 3
    assert sent.delivered == 2500


def test_too_many_requests_tells_how_long(server: PlatformServer, memory: MemoryDict) -> None:
    """429 becomes Unavailable with the seconds of Retry-After."""
    sink = opened(memory)
    server.fail(EVENTS, status=429, Retry_After="7")
    with pytest.raises(Unavailable) as caught:
        sink.send([rows(1, epoch=0)], again=False)
    assert caught.value.after_seconds == 7.0


def test_a_low_limit_is_got_through(
    server: PlatformServer, memory: MemoryDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of more requests than the limit goes on where it stopped, each epoch once."""
    monkeypatch.setattr(pace.Pace, "hold", lambda *_: None)  # the minute is not waited for
    server.limit.calls = 4
    batch: list[Item] = [rows(seq, epoch=seq, x=float(seq)) for seq in range(10)]
    sink = opened(memory)
    calls = 0
    while True:
        try:
            sent = sink.send(batch, again=calls > 0)
            break
        except Unavailable as error:
            assert error.after_seconds is not None and error.after_seconds > 0
            calls += 1
            server.limit.window_seconds = 0.0
            server.limit.take()
            server.limit.window_seconds = 60.0
            server.limit._taken.clear()
    accepted = [r for r in server.requests if r[2] == 200]
    assert (len(accepted), calls, sent.delivered) == (11, 2, 20)
    assert server.epochs(server.only()) == {seq: {"x": float(seq)} for seq in range(10)}


def test_refusal_after_503_is_retried(server: PlatformServer, memory: MemoryDict) -> None:
    """A 503 loses nothing: the same call again delivers."""
    sink = opened(memory)
    server.fail(EVENTS, status=503)
    batch = [rows(1, epoch=0, x=1.0)]
    with pytest.raises(Unavailable):
        sink.send(batch, again=False)
    assert sink.send(batch, again=True).delivered == 2
    assert server.epochs(server.only()) == {0: {"x": 1.0}}


def test_html_is_not_an_answer(server: PlatformServer, memory: MemoryDict) -> None:
    """A proxy's login page with status 200 is not taken for a confirmation."""
    page = Reply(200, b"<html>log in</html>", "text/html")
    server.fail(EVENTS, status=200, body=page)
    with pytest.raises(Unavailable, match="not a JSON object"):
        opened(memory).send([rows(1, epoch=0)], again=False)


def test_refusal_carries_the_servers_words(server: PlatformServer, memory: MemoryDict) -> None:
    """400 becomes Refused with the platform's own message."""
    server.fail(EVENTS, status=400, body={"error": "metrics too large"})
    with pytest.raises(Refused, match="metrics too large"):
        opened(memory).send([rows(1, epoch=0)], again=False)


def test_a_bad_key_waits_for_a_new_one(
    server: PlatformServer, memory: MemoryDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """401 is Unavailable, names the variable and does not show the key."""
    wrong = "ul_" + "f" * 40
    monkeypatch.setenv("ULTRALYTICS_API_KEY", wrong)
    with pytest.raises(Unavailable, match="ULTRALYTICS_API_KEY") as caught:
        opened(memory).send([rows(1, epoch=0)], again=False)
    assert wrong not in str(caught.value)


def test_missing_key_is_off(
    server: PlatformServer, memory: MemoryDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a key the sink is off, and says which variable and where to get one."""
    monkeypatch.delenv("ULTRALYTICS_API_KEY")
    with pytest.raises(Off, match=r"ULTRALYTICS_API_KEY.*platform\.ultralytics\.com"):
        opened(memory)


def test_missing_project_is_off(server: PlatformServer, memory: MemoryDict) -> None:
    """Without owner/project the sink is off and names the setting."""
    with pytest.raises(Off, match="project"):
        opened(memory, HubConfig())


def test_nobody_there(memory: MemoryDict, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that is down is Unavailable, and surely took nothing."""
    monkeypatch.setenv("ULTRALYTICS_API_KEY", KEY)
    monkeypatch.setenv("ULTRALYTICS_PLATFORM_URL", "http://127.0.0.1:9")
    with pytest.raises(Unavailable) as caught:
        opened(memory).send([rows(1, epoch=0)], again=False)
    assert not isinstance(caught.value, http.NoAnswer)
    assert memory.get("creating") == 0


def test_a_silent_host_is_not_waited_for(
    server: PlatformServer, memory: MemoryDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call has a time-out."""
    monkeypatch.setattr(http, "CALL_TIMEOUT_SECONDS", 0.1)
    server.fail(EVENTS, mode="delay", seconds=0.5)
    with pytest.raises(http.NoAnswer):
        opened(memory).send([rows(1, epoch=0)], again=False)


def test_lost_answer_of_an_epoch(server: PlatformServer, memory: MemoryDict) -> None:
    """An epoch whose answer was lost is sent again and is there once."""
    sink = opened(memory)
    sink.send([params(1, a=1)], again=False)
    batch = [rows(2, epoch=0, x=1.0)]
    server.fail(EVENTS, mode="apply_then_cut")
    with pytest.raises(Unavailable):
        sink.send(batch, again=False)
    assert sink.send(batch, again=True).delivered == 2
    assert server.epochs(server.only()) == {0: {"x": 1.0}}


def test_lost_answer_of_a_start_is_told(server: PlatformServer, memory: MemoryDict) -> None:
    """A start without an answer may leave a second model, and that is counted."""
    sink = opened(memory)
    server.fail(EVENTS, mode="apply_then_cut")
    with pytest.raises(Unavailable):
        sink.send([params(1, a=1)], again=False)
    assert sink.send([params(1, a=1)], again=True).maybe_duplicate == 1
    assert [model.slug for model in server.models.values()] == ["digits-run", "digits-run-2"]


def test_pieces_of_a_batch_outlive_a_death_before_their_receipt(
    server: PlatformServer, tmp_path: Path
) -> None:
    """A batch that is sent in halves has one receipt: a sink that dies before it knows what each
    half brought there, and how much of it was in doubt."""
    store = Store(tmp_path / "hub.db")
    sink = PlatformSink(CONFIG)
    sink.open(RUN, store)
    sink.send([params(9, a=1)], again=False)
    server.fail(EVENTS, mode="apply_then_cut")
    with pytest.raises(Unavailable):
        sink.send([text(1, "one"), text(2, "two")], False)
    store.forget_puts()
    sink.send([text(1, "one"), text(2, "two")], True)
    sink.send([text(3, "three")], True)
    store.close()  # no receipt
    store = Store(tmp_path / "hub.db")
    sink = PlatformSink(CONFIG)
    sink.open(RUN, store)
    sent = sink.send([text(1, "one"), text(2, "two"), text(3, "three")], True)
    assert Counter(server.console(server.only())) == {"one": 2, "two": 2, "three": 1}
    assert (sent.delivered, sent.maybe_duplicate) == (3, 2)
    store.close()


def test_confirmed_lines_are_not_sent_twice(
    server: PlatformServer, memory: MemoryDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a lost answer only the chunk in flight is sent again, and counted as maybe twice."""
    monkeypatch.setattr(platform, "CHUNK_LINES", 2)
    sink = opened(memory)
    sink.send([params(1, a=1)], again=False)
    batch: list[Item] = [text(seq, f"l{seq}") for seq in range(2, 8)]
    original, seen = sink._wire.call, []

    def cut_second(method: str, path: str, body: Any = None) -> dict[str, Any]:
        seen.append(body)
        if len(seen) == 2:
            server.fail(EVENTS, mode="apply_then_cut")
        return original(method, path, body)

    monkeypatch.setattr(sink._wire, "call", cut_second)
    with pytest.raises(Unavailable):
        sink.send(batch, again=False)
    sent = opened(memory).send(batch, again=True)
    assert server.console(server.only()) == ["l2", "l3", "l4", "l5", "l4", "l5", "l6", "l7"]
    assert (sent.delivered, sent.maybe_duplicate) == (6, 2)


def test_halves_of_a_batch_do_not_repeat_lines(
    server: PlatformServer, memory: MemoryDict, tmp_path: Path
) -> None:
    """When a refused item halves a batch, the lines that were confirmed before stay confirmed."""
    sink = opened(memory)
    poison = media(tmp_path, 9, b"bytes")
    server.fail("models/upload", status=400, times=3)
    with pytest.raises(Refused):
        sink.send([text(1, "a"), text(2, "b"), poison], again=False)
    assert sink.send([text(1, "a")], again=True).delivered == 1
    with pytest.raises(Refused):
        sink.send([text(2, "b"), poison], again=True)
    assert sink.send([text(2, "b")], again=True).delivered == 1
    assert server.console(server.only()) == ["a", "b"]


def test_restart_with_an_open_epoch(server: PlatformServer, memory: MemoryDict) -> None:
    """Points of an open epoch survive the process, and the epoch is whole."""
    before = opened(memory).send([rows(1, a=1.0, b=2.0)], again=False)
    after = opened(memory).send([rows(2, b=3.0), rows(3, epoch=0)], again=False)
    assert server.epochs(server.only()) == {0: {"a": 1.0, "b": 3.0}}
    assert total(before, after) == (3, {"not the last of its epoch": 1})


def test_a_failed_send_leaves_no_trace(server: PlatformServer, memory: MemoryDict) -> None:
    """Open points are not taken twice when a call fails and comes again."""
    sink = opened(memory)
    batch = [rows(1, a=1.0), rows(2, epoch=0), rows(3, a=2.0)]
    server.fail(EVENTS, status=503, times=2)
    for _ in range(2):
        with pytest.raises(Unavailable):
            sink.send(batch, again=True)
    parts = sink.send(batch, again=True), sink.close("completed", "")
    assert total(*parts) == (2, {"no epoch": 1})


def test_checkpoint_bytes_are_equal(
    server: PlatformServer, memory: MemoryDict, tmp_path: Path
) -> None:
    """A checkpoint arrives byte by byte and is promoted; the empty file too."""
    body = bytes(range(256)) * 5000
    files: list[Item] = [
        media(tmp_path, 1, body, best=True),
        media(tmp_path, 2, b"", final=True),
    ]
    sent = opened(memory).send(files, again=False)
    assert server.checkpoints(server.only()) == [("best.pt", body), ("best.pt", b"")]
    assert sent.delivered == 2


def test_netrc_adds_no_credential(
    server: PlatformServer, memory: MemoryDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry in ~/.netrc neither replaces the key nor goes to the storage host."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    sent = opened(memory).send([media(tmp_path, 1, b"x", best=True)], again=False)
    assert sent.delivered == 1


def test_failed_upload_is_done_again(
    server: PlatformServer, memory: MemoryDict, tmp_path: Path
) -> None:
    """Storage that fails once gets the whole file the second time; the signature is not shown."""
    sink = opened(memory)
    server.fail("/storage/", mode="cut")
    item = media(tmp_path, 1, b"weights" * 1000, best=True)
    with pytest.raises(Unavailable) as caught:
        sink.send([item], again=False)
    assert "s3cret" not in str(caught.value)
    assert sink.send([item], again=True).delivered == 1
    assert server.checkpoints(server.only()) == [("best.pt", b"weights" * 1000)]


def test_checkpoints_within_the_interval(
    server: PlatformServer, memory: MemoryDict, tmp_path: Path
) -> None:
    """Of checkpoints in quick order the first, each best one and the newest go out."""
    sink = opened(memory)
    parts = [
        sink.send([media(tmp_path, 1, b"1", minute=0)], again=False),
        sink.send([media(tmp_path, 2, b"2", minute=1)], again=False),
        sink.send([media(tmp_path, 3, b"3", minute=2, best=True)], again=False),
        sink.send([media(tmp_path, 4, b"4", minute=3)], again=False),
    ]
    parts.append(opened(memory).close("completed", ""))
    bodies = [body for _, body in server.checkpoints(server.only())]
    assert bodies == [b"1", b"3", b"4"]
    assert total(*parts) == (3, {"a newer checkpoint within the interval": 1})


def test_what_has_no_place_is_skipped(
    server: PlatformServer, memory: MemoryDict, tmp_path: Path
) -> None:
    """Images, figures, tables and files are skipped with the reason."""
    kinds = ("image", "figure", "table", "file")
    batch: list[Item] = [media(tmp_path, seq, b"", what) for seq, what in enumerate(kinds)]
    sent = opened(memory).send(batch, again=False)
    assert total(sent) == (0, {f"no place in HUB ({what})": 1 for what in kinds})


def test_failed_state_is_told(server: PlatformServer, memory: MemoryDict) -> None:
    """A failed run is failed at the platform with its reason; its summary joins the last epoch."""
    sink = opened(memory)
    parts = [sink.send([rows(1, epoch=0, x=1.0), summary(2, m=0.5)], again=False)]
    parts.append(sink.close("failed", "RuntimeError: out of memory"))
    model = server.models[server.only()]
    assert (model.status, model.error) == ("failed", "failed: RuntimeError: out of memory")
    assert (model.metrics, model.results) == ({0: {"x": 1.0, "final/m": 0.5}}, None)
    assert total(*parts) == (3, {})


def test_close_is_idempotent(server: PlatformServer, memory: MemoryDict) -> None:
    """Closing twice counts once and tells once; a run that goes on is opened and closed again."""
    sink = opened(memory)
    sink.send([rows(1, x=1.0)], again=False)
    assert total(sink.close("lost", "")) == (0, {"no epoch": 1})
    requests = len(server.requests)
    assert total(opened(memory).close("lost", "")) == (0, {})
    assert len(server.requests) == requests
    sink = opened(memory)
    sink.send([rows(2, epoch=0, x=2.0)], again=False)
    assert server.status(server.only()) == "running"
    sink.close("completed", "")
    assert server.status(server.only()) == "completed"


def test_close_after_an_unanswered_close(server: PlatformServer, memory: MemoryDict) -> None:
    """A close that failed comes again and still accounts for everything."""
    sink = opened(memory)
    sent = sink.send([rows(1, epoch=0, x=1.0), summary(2, m=1)], again=False)
    server.fail(EVENTS, mode="apply_then_cut")
    with pytest.raises(Unavailable):
        sink.close("completed", "")
    assert total(sent, sink.close("completed", "")) == (3, {})


def test_a_stop_over_there_is_noticed(server: PlatformServer, memory: MemoryDict) -> None:
    """`cancelled` in an answer is kept for whoever may stop the training."""
    sink = opened(memory)
    sink.send([params(1, a=1)], again=False)
    assert sink.stop_asked == ""
    server.cancel(server.only(), "stopped by owner")
    sink.send([rows(2, epoch=0)], again=False)
    assert sink.stop_asked == "stopped by owner"


def test_ignored_is_not_delivered(server: PlatformServer, memory: MemoryDict) -> None:
    """What the platform says it ignored is counted as skipped."""
    sink = opened(memory)
    sink.send([params(1, a=1)], again=False)
    server.models[server.only()].ignored = "stale_instance"
    sent = sink.send([rows(2, epoch=0, x=1.0), text(3, "l")], again=False)
    assert total(sent) == (0, {"ignored by the platform": 3})


SYSTEM = {
    "system__cpu_percent": 12.5,
    "system__memory_percent": 40.0,
    "system__disk_read_mbs": 1.0,
    "system__network_sent_mbs": 2.0,
    "system__gpu__0__percent": 90.0,
    "system__gpu__0__temperature_celsius": math.nan,
}
SHOWN = {
    "cpu": 12.5,
    "ram": 40.0,
    "disk_io": {"read_mbs": 1.0},
    "network": {"sent_mbs": 2.0},
    "gpus": {"0": {"usage": 90.0, "temp": None}},
}


def test_machine_metrics_go_to_their_own_place(server: PlatformServer, memory: MemoryDict) -> None:
    """The newest sample of one node is shown, also beside each epoch; no epoch waits for it."""
    sink = opened(memory)
    sink.send([params(1, a=1)], again=False)
    other = rows(3, rank=8, **SYSTEM)
    batch = [rows(2, **{**SYSTEM, "system__cpu_percent": 1.0}), rows(3, **SYSTEM), other]
    parts = [sink.send(batch, again=False), sink.send([rows(4, epoch=0, x=1.0)], again=False)]
    parts.append(sink.close("completed", ""))
    model = server.models[server.only()]
    assert model.system == [SHOWN]
    assert (model.metrics, model.events[0]["system"]) == ({0: {"x": 1.0}}, SHOWN)
    expected = {
        "machine metrics: only the newest are shown": 6,
        "machine metrics: one node is shown": 6,
    }
    assert total(*parts) == (6 + 2, expected)


def test_the_last_row_of_a_stretch_is_the_newest(
    server: PlatformServer, memory: MemoryDict
) -> None:
    """After an outage samples come many at once; what is shown is how the machine is now."""
    sink = opened(memory)
    sink.send([params(1, a=1)], again=False)
    at = np.array([2, 3], dtype=np.int64)
    stretch = Rows(STREAM, 0, at, at, at, {"system/cpu_percent": np.array([1.0, 99.0])})
    sent = sink.send([stretch], again=False)
    assert server.models[server.only()].system == [{"cpu": 99.0}]
    assert total(sent) == (1, {"machine metrics: only the newest are shown": 1})


def test_a_sample_whose_answer_was_lost_is_told_of(
    server: PlatformServer, memory: MemoryDict
) -> None:
    """Nobody can ask for it, so its second copy is counted; one that was put off is not."""
    sink = opened(memory)
    sink.send([params(1, a=1)], again=False)
    batch = [rows(2, **SYSTEM)]
    server.fail(EVENTS, status=429)
    with pytest.raises(Unavailable):
        sink.send(batch, again=False)
    server.fail(EVENTS, mode="apply_then_cut")
    with pytest.raises(Unavailable):
        sink.send(batch, again=True)
    sent = sink.send(batch, again=True)
    assert (sent.delivered, sent.maybe_duplicate) == (6, 6)
    assert server.models[server.only()].system == [SHOWN, SHOWN]


def test_a_quiet_run_shows_that_it_lives(server: PlatformServer, memory: MemoryDict) -> None:
    """While nothing is logged, signs of life go out, and bring the wish to stop."""
    clock = [0.0]
    sink = PlatformSink(CONFIG, monotonic=lambda: clock[0])
    sink.open(RUN, memory)
    sink.send([rows(1, epoch=0, x=1.0)], again=False)
    model = server.models[server.only()]
    for clock[0] in (10.0, 50.0, 60.0, 100.0):
        sink.send([], again=False)
    assert (model.beats, sink.stop_asked) == (2, "")
    server.cancel(model.id, "stopped by owner")
    clock[0] = 200.0
    sink.send([], again=False)
    assert sink.stop_asked == "stopped by owner"


def test_a_sign_of_life_that_fails_holds_nothing_up(
    server: PlatformServer, memory: MemoryDict
) -> None:
    """There is no item in it: what follows goes on."""
    clock = [0.0]
    sink = PlatformSink(CONFIG, monotonic=lambda: clock[0])
    sink.open(RUN, memory)
    sink.send([params(1, a=1)], again=False)
    clock[0] = 100.0
    server.fail(EVENTS, status=400)
    assert sink.send([], again=False).delivered == 0
    assert sink.send([rows(2, epoch=0)], again=False).delivered == 1


def test_a_deleted_model_is_replaced(server: PlatformServer, memory: MemoryDict) -> None:
    """A model that somebody deleted gets a successor with every epoch so far."""
    sink = opened(memory)
    sink.send([params(1, a=1), rows(2, epoch=0, x=1.0)], again=False)
    sink.send([rows(3, epoch=1, x=2.0)], again=False)
    del server.models[server.only()]
    batch = [rows(4, epoch=2, x=3.0), text(5, "after")]
    with pytest.raises(Unavailable, match="deleted"):
        sink.send(batch, again=False)
    sent = opened(memory).send(batch, again=True)
    model = server.models[server.only()]
    assert model.metrics == {0: {"x": 1.0}, 1: {"x": 2.0}, 2: {"x": 3.0}}
    assert model.train_args == {"a": "1"}
    assert total(sent) == (3, {})


def test_a_wrong_address_makes_no_models(server: PlatformServer, memory: MemoryDict) -> None:
    """404 without the platform's own words, or before a model ever answered, is waited for."""
    sink = opened(memory)
    server.fail(EVENTS, status=404)
    with pytest.raises(Unavailable):
        sink.send([params(1, a=1)], again=False)
    sink.send([params(1, a=1)], again=True)
    sink.send([rows(2, epoch=0, x=1.0)], again=False)
    page = Reply(404, b"<html>no such page</html>", "text/html")
    server.fail(EVENTS, status=404, body=page)
    with pytest.raises(Unavailable):
        sink.send([rows(3, epoch=1, x=1.0)], again=False)
    sink.send([rows(3, epoch=1, x=1.0)], again=True)
    assert server.epochs(server.only()) == {0: {"x": 1.0}, 1: {"x": 1.0}}


def test_a_cancelled_run_that_goes_on_gets_another_model(
    server: PlatformServer, memory: MemoryDict
) -> None:
    """Else the resumed training would be stopped at once."""
    sink = opened(memory)
    sink.send([rows(1, epoch=0, x=1.0)], again=False)
    first = server.only()
    server.cancel(first, "stopped by owner")
    sink.send([text(2, "l")], again=False)
    sink.close("completed", "")
    resumed = opened(memory)
    resumed.send([rows(3, epoch=1, x=2.0)], again=False)
    [second] = [model for model in server.models.values() if model.id != first]
    assert second.metrics == {0: {"x": 1.0}, 1: {"x": 2.0}}
    assert resumed.stop_asked == ""


def test_lines_that_were_put_off_are_no_duplicates(
    server: PlatformServer, memory: MemoryDict
) -> None:
    """A limit or a refused key is an answer: nothing was done, nothing is there twice."""
    sink = opened(memory)
    sink.send([params(1, a=1)], again=False)
    for status in (429, 401):
        server.fail(EVENTS, status=status)
        with pytest.raises(Unavailable):
            sink.send([text(2, "once")], again=False)
    assert sink.send([text(2, "once")], again=True).maybe_duplicate == 0
    assert server.console(server.only()) == ["once"]


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        ("rank 2: RuntimeError: out of memory", "RuntimeError"),
        ("the launcher exited with 137", "exit 137"),
        ("rank 0, 1 ended without a word", "lost"),
    ],
)
def test_a_crash_is_told_with_a_code(
    server: PlatformServer, memory: MemoryDict, reason: str, code: str
) -> None:
    """training_failed carries the reason in words and in one word."""
    sink = opened(memory)
    sink.send([params(1, a=1)], again=False)
    sink.close("lost" if code == "lost" else "failed", reason)
    model = server.models[server.only()]
    assert model.error is not None and model.error.endswith(reason)
    assert (model.status, model.code) == ("failed", code)


def test_every_line_of_a_rank_is_marked(server: PlatformServer, memory: MemoryDict) -> None:
    """A text of several lines carries its rank on each of them."""
    opened(memory).send([text(1, "a\nb\n", rank=3)], again=False)
    assert server.console(server.only()) == ["[rank 3] a", "[rank 3] b"]


def test_source_goes_to_the_environment(server: PlatformServer, memory: MemoryDict) -> None:
    """What code ran is told apart from the training's arguments."""
    values = {"source/commit": "c0ffee", "source/packages": "a==1\nb==2", "lr": 0.1}
    values["source/branch"] = "HEAD"  # none is checked out
    opened(memory).send([Params(STREAM, 0, 1, 1, values)], again=False)
    model = server.models[server.only()]
    assert model.train_args == {"lr": "0.1"}
    assert model.start["environment"] == {"hostname": "", "gitCommit": "c0ffee"}


def test_the_environment_has_the_originals_fields(
    server: PlatformServer, memory: MemoryDict
) -> None:
    """Numbers are numbers there, and a commit is as short as in the original."""
    values = {
        "source/commit": "0123456789abcdef0123456789abcdef01234567",
        "source/commit_message": "Learn more slowly",
        "source/cpu": "AMD EPYC",
        "source/cpu_count": 64,
        "source/memory_gib": 503.5,
        "source/disk_gib": 252.0,
        "source/gpu": "NVIDIA H200, 143156MiB",
        "source/gpu_count": 2,
        "source/ultralytics": "8.4.190",
        "source/environment": "Docker",
    }
    opened(memory).send([Params(STREAM, 0, 1, 1, values)], again=False)
    model = server.models[server.only()]
    assert model.train_args == {}
    assert model.start["environment"] == {
        "hostname": "",
        "gitCommit": "0123456789ab",
        "gitCommitMessage": "Learn more slowly",
        "cpu": "AMD EPYC",
        "cpuCount": 64,
        "totalRamGb": 503.5,
        "totalDiskGb": 252.0,
        "gpuType": "NVIDIA H200, 143156MiB",
        "gpuCount": 2,
        "ultralyticsVersion": "8.4.190",
        "environment": "Docker",
    }


def test_a_text_in_a_numbers_place_is_told_as_it_is(
    server: PlatformServer, memory: MemoryDict
) -> None:
    opened(memory).send([Params(STREAM, 0, 1, 1, {"source/cpu_count": "many"})], again=False)
    assert server.models[server.only()].start["environment"]["cpuCount"] == "many"


def test_a_second_end_tells_the_first_one_too(
    server: PlatformServer, memory: MemoryDict, tmp_path: Path
) -> None:
    """The platform keeps the last word: results, class names and curves stay when a late line
    makes the run end again, and are counted once."""
    sink = opened(memory)
    columns = b'{"columns": ["x", "a", "b"], "rows": [[0, 1, 2], [1, 0, 2]]}'
    curve = replace(media(tmp_path, 9, columns, "table"), key="Curves/f1_curve")
    batch = [rows(1, epoch=0, x=1.0), summary(2, **{"m": 0.5, "model/names": '["cat"]'}), curve]
    parts = [sink.send(batch, again=False), sink.close("completed", "")]
    model = server.models[server.only()]
    first = model.complete
    again = opened(memory)
    parts += [again.send([text(10, "late")], again=False), again.close("completed", "")]
    assert model.complete == first
    assert (first["classNames"], first["results"]["metrics"]) == (["cat"], {"x": 1.0, "m": 0.5})
    assert first["plots"] == [{"type": "f1_curve", "x": [0, 1], "y": [[1, 0], [2, 2]]}]
    assert total(*parts) == (5, {})


def test_a_curve_is_thinned_evenly(tmp_path: Path) -> None:
    """Of 1,001 points 101 are left, on a grid from the first to the last."""
    table = {"columns": ["x", "y"], "rows": [[i / 1000, i] for i in range(1001)]}
    (tmp_path / "table").write_text(json.dumps(table))
    found = results.curve(tmp_path / "table", "pr_curve")
    assert found is not None
    assert found["x"] == pytest.approx([i / 100 for i in range(101)])
    assert found["y"] == [pytest.approx([10 * i for i in range(101)])]


def table(folder: Path, seq: int, key: str, columns: list[str], table_rows: list[Any]) -> Media:
    body = json.dumps({"columns": columns, "rows": table_rows}).encode()
    return replace(media(folder, seq, body, "table"), key=key)


CURVE = ("Curves/pr_curve", ["x", "cat", "owl"], [[0, 1.0, 0.5], [1, 0.5, 0.0]])
PRECISION = (
    "Results/average_precision",
    ["class", "name", "0.50", "0.95"],
    [[0, "cat", 0.5, "nan"], [2, "owl", 0.25, 0.125]],
)
MATRIX = (
    "Results/confusion_matrix",
    ["predicted", "cat", "background"],
    [["cat", 3.0, 1.0], ["background", 2.0, 0.0]],
)
IMAGES = (
    "Results/images",
    ["image", "f1", "tp", "fp", "fn"],
    [["b_7.jpg", 0.5, 1, 1, 1], ["a.jpg", 1.0, 2, 0, 0], ["a_1.jpg", 0.5, 2, 2, 2]],
)


def test_what_a_validation_found_is_in_the_results(
    server: PlatformServer, memory: MemoryDict, tmp_path: Path
) -> None:
    """Average precisions beside their curve, with the numbers of its classes where some had no
    labels; the confusion matrix without its names; pictures by their F1, the worst first."""
    sink = opened(memory)
    names = summary(2, **{"model/names": '["cat", "dog", "owl"]'})
    tables = [
        table(tmp_path, seq, *one)
        for seq, one in enumerate((PRECISION, CURVE, IMAGES, MATRIX), start=3)
    ]
    parts = [sink.send([rows(1, epoch=0, x=1.0), names, *tables], False)]
    parts.append(sink.close("completed", ""))
    found = server.models[server.only()].complete
    assert found["plots"] == [
        {
            "type": "pr_curve",
            "x": [0, 1],
            "y": [[1.0, 0.5], [0.5, 0.0]],
            "ap": [[0.5, None], [0.25, 0.125]],
            "classes": [0, 2],
        },
        {"type": "confusion_matrix", "matrix": [[3.0, 1.0], [2.0, 0.0]]},
    ]
    ranked = [["a", 2, 2, 2], ["b", 1, 1, 1], ["a", 2, 0, 0]]
    assert found["results"]["validation"] == {
        "population": 3,
        "sampling": "f1_rank",
        "rows": ranked,
        "extremes": {"worst": ranked, "best": ranked[::-1]},
    }
    assert total(*parts) == (2 + 1 + 4, {})


def test_every_class_seen_needs_no_numbers(
    server: PlatformServer, memory: MemoryDict, tmp_path: Path
) -> None:
    """Where the validation had labels of all classes, the curve does not say which they are."""
    sink = opened(memory)
    names = summary(2, **{"model/names": '["cat", "owl"]'})
    tables = [table(tmp_path, 3, *CURVE), table(tmp_path, 4, *PRECISION)]
    sink.send([rows(1, epoch=0, x=1.0), names, *tables], False)
    sink.close("completed", "")
    [plot] = server.models[server.only()].complete["plots"]
    assert (len(plot["ap"]), "classes" in plot) == (2, False)


@pytest.mark.parametrize(
    "one",
    [
        PRECISION,
        ("Results/confusion_matrix", ["predicted", "cat"], [["cat", 1, 2]]),
        ("Results/confusion_matrix", ["predicted", "cat"], [["cat", "many"]]),
        ("Results/images", ["image", "f1"], [["a.jpg", "good"]]),
        ("Results/images", ["image"], [["a.jpg"]]),
    ],
)
def test_a_table_of_a_results_name_and_another_form_is_skipped(
    server: PlatformServer, memory: MemoryDict, tmp_path: Path, one: tuple[str, Any, Any]
) -> None:
    """Precisions without their curve, a matrix that is not square, texts for numbers."""
    sink = opened(memory)
    parts = [sink.send([rows(1, epoch=0, x=1.0), table(tmp_path, 2, *one)], False)]
    parts.append(sink.close("completed", ""))
    found = server.models[server.only()].complete
    assert "plots" not in found and "validation" not in found["results"]
    assert total(*parts) == (2, {platform.NO_CURVE: 1})


def test_of_many_pictures_a_sample_is_told() -> None:
    """Of 12,001 pictures 5,000 at equal distances, the worst and the best hundred whole."""
    found = results.validation([[f"{i}.jpg", i / 12_000, i, 0, 0] for i in range(12_001)])
    hits = [row[1] for row in found["rows"]]
    assert (found["population"], len(hits), hits[0], hits[-1]) == (12_001, 5_000, 0, 12_000)
    assert {b - a for a, b in itertools.pairwise(hits)} == {2, 3}
    worst, best = found["extremes"]["worst"], found["extremes"]["best"]
    assert [row[1] for row in worst] == list(range(100))
    assert [row[1] for row in best] == list(range(12_000, 11_900, -1))


ULTRALYTICS = RunInfo("run-1", "digits", "Digits run", (), 1, source="ultralytics")


def test_an_ultralytics_run_keeps_its_names(
    server: PlatformServer, memory: MemoryDict, tmp_path: Path
) -> None:
    """Metrics, model info, final results, class names and curves stand where its own callback puts
    them."""
    sink = PlatformSink(CONFIG)
    sink.open(ULTRALYTICS, memory)
    curve = media(tmp_path, 9, b'{"columns": ["x", "y"], "rows": [[0, 1], [0.5, 0.5]]}', "table")
    curve = replace(curve, key="Curves/PR_curve")
    values = {"train__box_loss": 2.0, "lr__pg0": 0.1, "lr__pg1": 0.1, "fitness": 0.5}
    info = {"model/parameters": 100, "model/GFLOPs": 8.1, "model/speed_PyTorch(ms)": 1.5}
    final = {"final/metrics/mAP50(B)": 0.9, "model/names": '["cat", "dog"]'}
    parts = [
        sink.send([rows(1, epoch=0, **values), Summary(STREAM, 0, 2, 2, info)], again=False),
        sink.send([rows(3, epoch=1, **values), Summary(STREAM, 0, 4, 4, final), curve], False),
        sink.close("completed", ""),
    ]
    model = server.models[server.only()]
    assert model.metrics == {
        0: {"train/box_loss": 2.0, "lr": 0.1},
        1: {"train/box_loss": 2.0, "lr": 0.1},
    }
    figures = {"parameters": 100, "gflops": 8.1, "speedMs": 1.5}
    assert (model.events[0]["modelInfo"], model.events[1].get("modelInfo")) == (figures, None)
    assert (model.events[1]["fitness"], model.events[1]["best_fitness"]) == (0.5, 0.5)
    results = server.finals(model.id)
    assert results and results["metrics"]["metrics/mAP50(B)"] == 0.9
    assert model.complete["classNames"] == ["cat", "dog"]
    assert model.complete["plots"] == [{"type": "PR_curve", "x": [0, 0.5], "y": [[1, 0.5]]}]
    assert total(*parts) == (2 * 4 + 3, {"not in the original": 2})


def everything(folder: Path) -> Sequence[Sequence[Item]]:
    return [
        [params(1, lr=0.1), text(2, "{rankgate:model}"), rows(3, epoch=0, x=math.nan, y=2.0)],
        [media(folder, 4, b"best bytes" * 999, best=True, epoch=0), rows(5, epoch=1, y=3.0)],
        [rows(6, y=4.0), summary(7, map=0.9)],
    ]


def record(server: PlatformServer) -> dict[str, Any]:
    (model,) = server.models.values()
    results = {k: v for k, v in (model.results or {}).items() if k != "modelPath"}
    return {
        "args": model.train_args,
        "epochs": model.metrics,
        "chunks": model.chunks,
        "checkpoints": model.checkpoints,
        "results": results,
        "status": model.status,
    }


def export(folder: Path, blobs: Path) -> tuple[HubExport, list[Sent]]:
    sink = HubExport(CONFIG, folder)
    sink.open(RUN, MemoryDict())
    parts = [sink.send(batch, again=False) for batch in everything(blobs)]
    return sink, [*parts, sink.close("completed", "")]


def test_bundle_gives_the_same_record_as_online(
    server: PlatformServer, memory: MemoryDict, tmp_path: Path
) -> None:
    """A bundle that is sent later leaves at the platform what an online run leaves."""
    sink = opened(memory)
    online = [sink.send(batch, again=False) for batch in everything(tmp_path)]
    online.append(sink.close("completed", ""))
    expected = record(server)
    _, offline = export(tmp_path / "bundle", tmp_path)
    server.models.clear()
    done = send_bundle(tmp_path / "bundle", CONFIG)
    assert record(server) == expected
    assert total(*offline) == total(*online)
    assert done.refused == []


def test_bundle_holds_no_key(server: PlatformServer, tmp_path: Path) -> None:
    """No file of a bundle has the key in it, and exporting sends nothing."""
    export(tmp_path / "bundle", tmp_path)
    files = [path for path in (tmp_path / "bundle").rglob("*") if path.is_file()]
    assert len(files) == 3
    assert not any(KEY.encode() in path.read_bytes() for path in files)
    assert server.requests == []


def test_bundle_goes_on_after_an_outage(server: PlatformServer, tmp_path: Path) -> None:
    """Sending a bundle waits when asked to, and goes on where it stopped."""
    export(tmp_path / "bundle", tmp_path)
    waits: list[float] = []
    server.fail(EVENTS, status=429, times=2, Retry_After="3")
    server.fail("/storage/", status=503)
    with pytest.raises(Unavailable):
        send_bundle(tmp_path / "bundle", CONFIG, waits.append)
    send_bundle(tmp_path / "bundle", CONFIG, waits.append)
    send_bundle(tmp_path / "bundle", CONFIG, waits.append)
    assert waits == [3.0, 3.0]
    assert server.status(server.only()) == "completed"
    assert server.console(server.only()) == ["{rankgate:model}"]


def test_an_unfinished_bundle_is_refused(server: PlatformServer, tmp_path: Path) -> None:
    """A bundle without its last file was not closed and is not sent."""
    sink = HubExport(CONFIG, tmp_path)
    sink.open(RUN, MemoryDict())
    sink.send([params(1, a=1)], again=False)
    with pytest.raises(Refused, match="not a whole bundle"):
        send_bundle(tmp_path, CONFIG)


def test_export_cuts_what_a_dead_process_wrote(tmp_path: Path, memory: MemoryDict) -> None:
    """Requests without a receipt are cut off when the batch comes again."""
    sink = HubExport(CONFIG, tmp_path)
    sink.open(RUN, memory)
    sink.send([params(1, a=1)], again=False)
    receipt = dict(memory.data)
    sink.send([text(2, "once")], again=False)
    memory.data = receipt
    again = HubExport(CONFIG, tmp_path)
    again.open(RUN, memory)
    again.send([text(2, "once")], again=True)
    again.close("completed", "")
    assert (tmp_path / "requests.jsonl").read_text().count("once") == 1
