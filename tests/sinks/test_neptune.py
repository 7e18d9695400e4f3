"""The Neptune sink and export, through the real package, against the stand-in server."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gateway.sinks.base import (
    Item,
    Media,
    Off,
    Params,
    Refused,
    Rows,
    RunInfo,
    Summary,
    Text,
    Unavailable,
)
from gateway.sinks.neptune import Ear, NeptuneConfig, NeptuneSink, custom_run_id
from gateway.sinks.neptune_export import NeptuneExport
from gateway.sinks.neptune_plan import cut, seconds
from tests.servers.neptune import CHUNK_BYTES, NeptuneServer, token
from tests.sinks.fakes import MemoryDict

STREAM = b"s" * 16
START_MS = 1_700_000_000_000
OPERATIONS = r"/attributes/operations$"
RUN = RunInfo("run-1", "digits", "first try", ("blue", "small"), START_MS * 1_000_000)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[NeptuneServer]:
    with NeptuneServer() as found:
        monkeypatch.setenv("NEPTUNE_API_TOKEN", token(found.url))
        monkeypatch.setenv("NEPTUNE_PROJECT", "team/digits")
        monkeypatch.setenv("OAUTHLIB_INSECURE_TRANSPORT", "1")
        yield found


Make = Callable[..., NeptuneSink]


@pytest.fixture
def make(server: NeptuneServer, tmp_path: Path) -> Iterator[Make]:
    """Opens sinks, and lets go of them at the end."""
    made: list[NeptuneSink] = []

    def open_one(
        memory: MemoryDict | None = None, run: RunInfo = RUN, **config: Any
    ) -> NeptuneSink:
        sink = NeptuneSink(NeptuneConfig(**config), tmp_path / uuid.uuid4().hex)
        made.append(sink)
        sink.open(run, memory if memory is not None else MemoryDict())
        return sink

    yield open_one
    server.heal()
    for sink in made:
        sink._drop(1.0)


def rows(
    steps: Sequence[int], rank: int = 0, at_ms: Sequence[int] | None = None, **columns: Any
) -> Rows:
    step = np.array(steps, np.int64)
    wall = np.array(at_ms, np.int64) if at_ms is not None else START_MS + np.arange(len(steps)) * 7
    arrays = {key.replace("__", "/"): np.array(values) for key, values in columns.items()}
    return Rows(STREAM, rank, np.arange(len(steps)) + 1, step, wall * 1_000_000, arrays)


def line(text: str, seq: int = 1, rank: int = 0, level: str = "info") -> Text:
    return Text(STREAM, rank, seq, (START_MS + seq) * 1_000_000, level, text)


def media(path: Path, what: str, key: str, name: str, step: int | None = None) -> Media:
    size = path.stat().st_size
    return Media(STREAM, 0, 1, START_MS * 10**6, what, key, name, step, path, "", size, {})


def picture(folder: Path, shade: int) -> Path:
    """A PNG in a file without an ending, as the gateway keeps them."""
    path = folder / f"{shade:064x}"
    Image.new("L", (4, 4), shade).save(path, format="PNG")
    return path


def params(values: dict[str, Any], rank: int = 0) -> Params:
    return Params(STREAM, rank, 1, START_MS * 10**6, values)


def ramp(count: int, start: int = 0) -> Rows:
    steps = range(start, start + count)
    return rows(steps, loss=[s / 3 for s in steps], train__acc=[s / 7 for s in steps])


def holds_ramp(server: NeptuneServer, count: int) -> None:
    """The server has the ramp from 0, each point once, with its own value."""
    series = server.series("run-1")
    assert [(s, v) for s, v, _ in series["loss"]] == [(n, n / 3) for n in range(count)]
    assert [(s, v) for s, v, _ in series["train/acc"]] == [(n, n / 7) for n in range(count)]


# ---------------------------------------------------------------------- what arrives


def test_points_arrive_one_by_one_as_logged(server: NeptuneServer, make: Make) -> None:
    """Steps, values and milliseconds of every point are on the server once `send` returns."""
    rng = np.random.default_rng(5)
    loss, stamps = rng.normal(size=300), START_MS + np.sort(rng.integers(0, 10**9, 300))
    sent = make().send([rows(range(300), at_ms=stamps.tolist(), train__loss=loss)], False)
    assert (sent.delivered, sent.skipped) == (300, {})
    want = list(zip(range(300), loss.tolist(), stamps.tolist(), strict=True))
    assert server.series("run-1")["train/loss"] == want


def test_integers_and_bools_become_numbers(server: NeptuneServer, make: Make) -> None:
    """Columns of whole numbers and of truth values are float series too."""
    make().send([rows([1, 2], epoch=np.array([3, 4]), done=np.array([False, True]))], False)
    found = {k: [v for _, v, _ in p] for k, p in server.series("run-1").items()}
    assert found == {"epoch": [3.0, 4.0], "done": [0.0, 1.0]}


def test_other_ranks_have_their_own_paths(server: NeptuneServer, make: Make) -> None:
    """Rank 3 writes below `ranks/3`, in the same run."""
    make().send([rows([1], loss=[0.5]), rows([1], 3, loss=[0.6]), line("hi", rank=3)], False)
    assert server.series("run-1")["ranks/3/loss"][0][1] == 0.6
    assert list(server.string_series("run-1")) == ["ranks/3/logs"]
    assert len(server.runs) == 1


def test_values_that_are_not_finite_are_skipped(server: NeptuneServer, make: Make) -> None:
    """NaN and infinities are counted, and do not take the points around them along."""
    values = np.array([1, np.nan, np.inf, -np.inf, 5], np.float32).astype(np.float64)
    sent = make().send([rows(range(5), loss=values)], False)
    assert (sent.delivered, sent.skipped) == (2, {"not finite": 3})
    assert [(s, v) for s, v, _ in server.series("run-1")["loss"]] == [(0, 1.0), (4, 5.0)]


def test_steps_that_do_not_rise_are_skipped(server: NeptuneServer, make: Make) -> None:
    """Neptune takes no step twice: those are counted here, in a batch and across batches."""
    sink = make()
    first = sink.send([rows([1, 2, 2, 1, 5], loss=[1.0, 2.0, 3.0, 4.0, 5.0])], False)
    second = sink.send([rows([4, 5, 6], loss=[6.0, 7.0, 8.0])], False)
    assert (first.delivered, first.skipped) == (3, {"step not rising": 2})
    assert (second.delivered, second.skipped) == (1, {"step not rising": 2})
    found = [(s, v) for s, v, _ in server.series("run-1")["loss"]]
    assert found == [(1, 1.0), (2, 2.0), (5, 5.0), (6, 8.0)]
    assert server.refused == []


def test_a_clock_that_goes_back_loses_no_value(server: NeptuneServer, make: Make) -> None:
    """Neptune refuses a time that goes back: the last one is kept instead."""
    sink = make()
    sink.send([rows([1, 2], at_ms=[5000, 4000], loss=[1.0, 2.0])], False)
    sink.send([rows([3, 4], at_ms=[3000, 6000], loss=[3.0, 4.0])], False)
    want = [(1, 1.0, 5000), (2, 2.0, 5000), (3, 3.0, 5000), (4, 4.0, 6000)]
    assert server.series("run-1")["loss"] == want
    assert server.refused == []


def test_text_keeps_order_and_length(server: NeptuneServer, make: Make) -> None:
    """Lines share one series; what is longer than Neptune takes is cut and loses nothing."""
    long = "".join(f"line {n} of many\n" for n in range(200))
    sent = make().send([line("first"), line(long, 2), line("bad", 3, level="error")], False)
    values = [v for _, v, _ in server.string_series("run-1")["logs"]]
    assert sent.delivered == 3
    assert values[0] == "first"
    assert "".join(values[1:-1]) == long
    assert values[-1] == "[error] bad"


def test_params_have_types_that_last(server: NeptuneServer, make: Make) -> None:
    """Numbers are floats, so that a field that began with 1 takes 0.5; the rest stays readable."""
    sink = make()
    values = {"lr": 1, "model/name": "tiny", "amp": True, "none": None, "seed": 2**62, "x": np.inf}
    sink.send([params(values), params({"lr": 0.5, "model/name": 3}), params({"lr": 2}, 3)], False)
    sink.send([Summary(STREAM, 0, 9, START_MS, {"best": 0.25})], False)
    atoms = server.atoms("run-1")
    found = {k: v for k, v in atoms.items() if k.split("/")[0] in ("parameters", "summary")}
    assert found == {
        "parameters/lr": 0.5,
        "parameters/model/name": 3.0,
        "parameters/amp": True,
        "parameters/none": "None",
        "parameters/seed": str(2**62),
        "parameters/x": "inf",
        "summary/best": 0.25,
    }
    assert atoms["ranks/3/parameters/lr"] == 2
    assert server.refused == []


def test_images_are_a_series_with_steps(server: NeptuneServer, make: Make, tmp_path: Path) -> None:
    """Images of one key are shown with a slider over their steps."""
    shots = [picture(tmp_path, n) for n in range(3)]
    batch = [media(p, "image", "val/pred", "a.png", n * 10) for n, p in enumerate(shots)]
    assert make().send(batch, False).delivered == 3
    found = [(s, v) for s, v, _ in server.image_series("run-1")["val/pred"]]
    assert found == [(n * 10, p.read_bytes()) for n, p in enumerate(shots)]


def test_what_is_no_image_is_uploaded(server: NeptuneServer, make: Make, tmp_path: Path) -> None:
    """An image that the package cannot read goes to the files instead of being refused."""
    drawing = tmp_path / "d"
    drawing.write_bytes(b"<svg/>")
    make().send([media(drawing, "image", "val/pred", "a.svg", 1)], False)
    assert server.files("run-1") == {"files/val/pred/a.svg": b"<svg/>"}


def test_files_arrive_whole_with_their_endings(
    server: NeptuneServer, make: Make, tmp_path: Path
) -> None:
    """Figures and tables go under their key, files and checkpoints under their name."""
    small, large = tmp_path / "0a", tmp_path / "0b"
    small.write_bytes(b"a,b\n1,2\n")
    large.write_bytes(os.urandom(2 * CHUNK_BYTES + 17))
    batch = [
        media(small, "table", "eval/table", "table.csv", 1),
        media(small, "figure", "eval/plot", "plot.png"),
        media(small, "file", "results.csv", "results.csv"),
        media(large, "checkpoint", "best.pt", "best.pt"),
    ]
    assert make().send(batch, False).delivered == 4
    content = small.read_bytes()
    assert server.files("run-1") == {
        "eval/table": content,
        "eval/plot": content,
        "files/results.csv": content,
        "checkpoints/best.pt": large.read_bytes(),
    }
    endings = {"csv", "png", "pt"}
    assert set(server.extensions("run-1").values()) == endings


def test_a_path_of_another_type_is_skipped(
    server: NeptuneServer, make: Make, tmp_path: Path
) -> None:
    """The first write fixes a path's type; what does not fit is counted, the rest arrives."""
    shot = picture(tmp_path, 1)
    batch: list[Item] = [
        rows([1], loss=[0.5]),
        media(shot, "image", "loss", "a.png", 1),
        media(shot, "figure", "loss/curve", "a.png"),
        rows([2], loss=[0.4]),
    ]
    sent = make().send(batch, False)
    assert (sent.delivered, sent.skipped) == (2, {"type conflict": 2})
    assert len(server.series("run-1")["loss"]) == 2


def test_the_run_says_where_it_comes_from(server: NeptuneServer, make: Make) -> None:
    """Name, tags, the full run id, and at the end its state are fields of the run."""
    sink = make()
    sink.send([rows([1], loss=[0.5])], False)
    assert server.atoms("run-1")["rankgate/state"] == "running"
    sink.close("failed", "out of memory")
    sink.close("failed", "out of memory")
    atoms = server.atoms("run-1")
    assert server.tags("run-1") == {"blue", "small"}
    assert atoms["sys/name"] == "first try"
    assert atoms["sys/failed"] is True
    assert atoms["rankgate/run_id"] == "run-1"
    assert (atoms["rankgate/state"], atoms["rankgate/reason"]) == ("failed", "out of memory")


def test_nothing_is_captured_and_no_hook_is_left(server: NeptuneServer, make: Make) -> None:
    """The package's own capturing is off, and the process's hooks are as before."""
    hooks = (sys.excepthook, threading.excepthook)
    sink = make()
    sink.send([rows([1], loss=[0.5])], False)
    sink.close("completed", "")
    folders = {path.split("/")[0] for path in server.run("run-1").attributes}
    assert folders <= {"sys", "rankgate", "loss", "source_code"}
    assert "source_code/files" not in server.run("run-1").attributes
    assert (sys.excepthook, threading.excepthook) == hooks
    assert not any(isinstance(h, Ear) for h in logging.getLogger("neptune").handlers)


# ---------------------------------------------------------------------- once and only once


def test_a_restart_goes_on_in_the_same_run(server: NeptuneServer, make: Make) -> None:
    """The same run id and memory: the next points follow, and no second run is made."""
    memory = MemoryDict()
    first = make(memory)
    first.send([ramp(10)], False)
    first.close("lost", "")
    sent = make(memory).send([ramp(20)], False)
    assert (sent.delivered, sent.skipped) == (20, {"step not rising": 20})
    holds_ramp(server, 20)
    assert len(server.runs) == 1


def test_a_replay_without_memory_adds_only_what_is_missing(
    server: NeptuneServer, make: Make, tmp_path: Path
) -> None:
    """With the sink's memory lost, the server's own points decide."""
    shots = [media(picture(tmp_path, n), "image", "val", "a.png", n) for n in range(3)]
    make().send([ramp(1500), line("a"), line("a", 2), line("b", 3), *shots[:2]], False)
    again = make(MemoryDict())
    part = again.send([ramp(700), line("a")], False)
    rest = again.send([ramp(2000, 700), line("a", 2), line("b", 3), line("b", 4), *shots], False)
    assert (part.skipped, rest.skipped) == ({}, {})
    assert rest.delivered == 4000 + 6
    holds_ramp(server, 2700)
    assert [v for _, v, _ in server.string_series("run-1")["logs"]] == ["a", "a", "b", "b"]
    assert [s for s, _, _ in server.image_series("run-1")["val"]] == [0, 1, 2]
    assert server.refused == []


def test_a_repeated_batch_adds_nothing_and_loses_nothing(
    server: NeptuneServer, make: Make, tmp_path: Path
) -> None:
    """The process died after half a batch: all of it again, with the memory from before."""
    memory = MemoryDict()
    make(memory).send([ramp(100), line("zero")], False)
    shots = [media(picture(tmp_path, n), "image", "val", "a.png", n) for n in range(4)]
    before = dict(memory.data)
    make(memory).send([ramp(50, 100), line("one"), line("one", 2), *shots[:2]], False)
    memory.data = before
    whole = [ramp(100, 100), line("one"), line("one", 2), line("two", 3), *shots]
    sent = make(memory).send(whole, True)
    assert (sent.delivered, sent.skipped) == (200 + 3 + 4, {})
    holds_ramp(server, 200)
    lines = [v for _, v, _ in server.string_series("run-1")["logs"]]
    assert lines == ["zero", "one", "one", "two"]
    assert [s for s, _, _ in server.image_series("run-1")["val"]] == [0, 1, 2, 3]
    assert server.refused == []


def test_a_lost_answer_neither_loses_nor_doubles(server: NeptuneServer, make: Make) -> None:
    """The package sends the request again, the server refuses it, and all counts as delivered."""
    sink = make(confirm_seconds=30.0)
    sink.send([ramp(10), line("a")], False)
    server.fail(OPERATIONS, mode="apply_then_cut")
    sent = sink.send([ramp(10, 10), line("b")], False)
    assert (sent.delivered, sent.skipped) == (21, {})
    assert server.refused != []
    holds_ramp(server, 20)
    assert [v for _, v, _ in server.string_series("run-1")["logs"]] == ["a", "b"]


def test_steps_that_another_writer_took_are_skipped(server: NeptuneServer, make: Make) -> None:
    """Points that are refused after all are read back, told apart and counted."""
    sink = make()
    sink.send([rows([1], loss=[1.0])], False)
    server.run("run-1").attributes["loss"].points.append((3, 9.0, START_MS))
    sent = sink.send([rows([2, 3, 4], loss=[2.0, 3.0, 4.0])], False)
    assert (sent.delivered, sent.skipped) == (2, {"step not rising": 1})
    assert [s for s, _, _ in server.series("run-1")["loss"]] == [1, 3, 4]


# ---------------------------------------------------------------------- failures


def test_a_short_outage_only_delays(server: NeptuneServer, make: Make) -> None:
    """Errors of the server that pass within the limit are not even seen."""
    sink = make(confirm_seconds=30.0)
    server.fail(OPERATIONS, status=503, times=2)
    assert sink.send([ramp(50)], False).delivered == 100
    holds_ramp(server, 50)


def test_an_outage_is_unavailable_and_then_delivered_once(
    server: NeptuneServer, make: Make
) -> None:
    """Beyond the limit `send` gives up waiting; the same batch again finds what had been queued."""
    sink = make(confirm_seconds=0.5)
    server.fail(OPERATIONS, status=503, times=1000)
    for again in (False, True):
        began = time.monotonic()
        with pytest.raises(Unavailable, match="has not confirmed"):
            sink.send([ramp(50)], again)
        assert time.monotonic() - began < 5
    server.heal()
    deadline = time.monotonic() + 60
    while True:
        try:
            sent = sink.send([ramp(50)], True)
            break
        except Unavailable:
            assert time.monotonic() < deadline
    assert (sent.delivered, sent.skipped) == (100, {})
    holds_ramp(server, 50)
    assert server.refused == []


def test_a_stuck_connection_is_given_up(
    server: NeptuneServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new connection beside one that may still deliver: each point is there once all the same."""
    monkeypatch.setattr("gateway.sinks.neptune.STUCK_SECONDS", 0.2)
    sink = make(confirm_seconds=0.1)
    server.fail(OPERATIONS, status=503, for_seconds=2.0)
    deadline = time.monotonic() + 30
    while True:
        try:
            sent = sink.send([ramp(50), line("a")], True)
            break
        except Unavailable:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    time.sleep(2.0)  # what the connections given up still had, they have delivered by now
    assert (sent.delivered, sent.skipped) == (101, {})
    holds_ramp(server, 50)
    assert [v for _, v, _ in server.string_series("run-1")["logs"]] == ["a"]
    assert len(server.runs) == 1


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.sinks.test_neptune import *
sink = NeptuneSink(NeptuneConfig(), Path(sys.argv[2]))
sink.open(RUN, MemoryDict())
for n in range(1000):
    sink.send([ramp(20, n * 20), line(f"line {n}")], False)
"""


def test_a_killed_process_leaves_nothing_out(server: NeptuneServer, tmp_path: Path) -> None:
    """SIGKILL at any moment: all of it again, without memory, makes the run whole."""
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", KILLED, root, str(tmp_path / "data")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        server.wait_until(lambda: server.operation_requests > 12, 60)
        process.kill()
    sink = NeptuneSink(NeptuneConfig(), tmp_path / "data")
    sink.open(RUN, MemoryDict())
    had = len(server.series("run-1")["loss"])
    assert 0 < had < 20_000
    whole = had // 20 + 10
    batch: list[Item] = [i for n in range(whole) for i in (ramp(20, n * 20), line(f"line {n}"))]
    sent = sink.send(batch, True)
    sink.close("completed", "")
    assert (sent.delivered, sent.skipped) == (whole * 41, {})
    holds_ramp(server, whole * 20)
    lines = [v for _, v, _ in server.string_series("run-1")["logs"]]
    assert lines == [f"line {n}" for n in range(whole)]


@pytest.mark.parametrize("status", [400, 401, 409, 422])
def test_a_dead_sync_thread_is_replaced(server: NeptuneServer, make: Make, status: int) -> None:
    """Any 4xx ends the package's thread for good: a new connection reads back and goes on."""
    sink = make()
    sink.send([ramp(10)], False)
    server.fail(OPERATIONS, status=status)
    with pytest.raises(Unavailable):
        sink.send([ramp(10, 10)], False)
    sent = sink.send([ramp(10, 10)], True)
    assert (sent.delivered, sent.skipped) == (20, {})
    holds_ramp(server, 20)
    assert len(server.runs) == 1
    assert server.refused == []


def test_a_batch_that_is_refused_twice_is_refused(server: NeptuneServer, make: Make) -> None:
    """The same 4xx for the same batch is believed, so that the loop can look for the bad item."""
    sink = make()
    sink.send([ramp(10)], False)
    server.fail(OPERATIONS, status=400, times=2)
    with pytest.raises(Unavailable):
        sink.send([ramp(10, 10)], False)
    with pytest.raises(Refused, match="400"):
        sink.send([ramp(10, 10)], True)
    assert sink.send([ramp(5, 10)], True).delivered == 10
    assert sink.send([ramp(5, 15)], False).delivered == 10
    holds_ramp(server, 20)


def test_too_many_fields_are_refused(server: NeptuneServer, make: Make) -> None:
    """A run may have so many fields: new ones are refused, points of the old ones go on."""
    sink = make()
    sink.send([ramp(10)], False)
    server.max_fields = len(server.run("run-1").attributes)
    with pytest.raises(Refused, match="NeptuneFieldCountLimitExceed"):
        sink.send([rows([1], new=[1.0])], False)
    assert sink.send([ramp(10, 10)], True).delivered == 20
    holds_ramp(server, 20)


def test_what_the_server_refuses_for_good_is_refused(server: NeptuneServer, make: Make) -> None:
    """A refusal that no reading back explains reaches the loop, with the server's words."""
    sink = make()
    with pytest.raises(Refused, match="read-only"):
        sink.send([rows([1], sys__owner=[1.0])], False)


def test_a_full_workspace_is_waited_for(server: NeptuneServer, make: Make) -> None:
    """A limit of the workspace is nobody's bad item: all is kept, and tried again later."""
    sink = make()
    body = {"errorType": "PROJECT_LIMITS_EXCEEDED", "title": "storage is full", "code": 422}
    server.fail(OPERATIONS, status=422, body=body, times=3)
    for _ in range(3):
        with pytest.raises(Unavailable, match="storage is full") as caught:
            sink.send([ramp(10)], True)
        assert caught.value.after_seconds == 60
    assert sink.send([ramp(10)], True).delivered == 20
    holds_ramp(server, 10)


def test_leftovers_of_the_package_are_never_sent(
    server: NeptuneServer, make: Make, tmp_path: Path
) -> None:
    """What a killed process left in the package's queue would come out of order: it goes."""
    folder = tmp_path / "data"
    left = folder / "neptune-old" / "async" / "run__x__1__abcdefgh"
    left.mkdir(parents=True)
    (left / "data-1.log").write_text("{}")
    sink = NeptuneSink(NeptuneConfig(), folder)
    sink.open(RUN, MemoryDict())
    assert not left.exists()
    sink.close("completed", "")
    assert list(folder.iterdir()) == []


# ---------------------------------------------------------------------- cannot work here


def open_plain(**config: Any) -> None:
    NeptuneSink(NeptuneConfig(**config)).open(RUN, MemoryDict())


def test_a_missing_token_is_named(server: NeptuneServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the vendor's own variable nothing can be sent, and the text says which."""
    monkeypatch.delenv("NEPTUNE_API_TOKEN")
    with pytest.raises(Off, match="NEPTUNE_API_TOKEN"):
        open_plain()


def test_a_missing_project_is_named(server: NeptuneServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The project may come from the config or from the vendor's variable."""
    monkeypatch.delenv("NEPTUNE_PROJECT")
    with pytest.raises(Off, match="NEPTUNE_PROJECT"):
        open_plain()


def test_an_unknown_project_is_off(server: NeptuneServer) -> None:
    """A project that is not there does not come by trying again."""
    with pytest.raises(Off, match="ProjectNotFound"):
        open_plain(project="team/other")


def test_a_wrong_token_is_off(server: NeptuneServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that the server does not know is said once, and never shown."""
    wrong = token(server.url, "another")
    monkeypatch.setenv("NEPTUNE_API_TOKEN", wrong)
    with pytest.raises(Off) as caught:
        open_plain()
    assert wrong not in str(caught.value)


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is an extra; without it there is one line on how to get it."""
    monkeypatch.setitem(sys.modules, "neptune", None)
    with pytest.raises(Off, match=r"pip install 'rankgate\[neptune\]'") as caught:
        open_plain()
    assert "\n" not in str(caught.value)


def test_a_server_that_is_down_is_unavailable(
    monkeypatch: pytest.MonkeyPatch, server: NeptuneServer
) -> None:
    """An answer that is not Neptune's says nothing about tomorrow."""
    server.fail("swagger", status=404, times=100)
    with pytest.raises(Unavailable):
        open_plain()


def test_a_long_run_id_is_hashed(server: NeptuneServer, make: Make) -> None:
    """The package ignores ids beyond 36 characters: a hash of it resumes the same run."""
    run = RunInfo("r" * 64, "digits", "", (), 0)
    other = RunInfo("r" * 63 + "s", "digits", "", (), 0)
    for info in (run, run, other):
        sink = make(run=info)
        sink.close("completed", "")
    assert len(server.runs) == 2
    found = server.run(custom_run_id(run.run_id))
    assert found.attributes["rankgate/run_id"].value == run.run_id
    assert len(found.custom_id or "") == 36


# ---------------------------------------------------------------------- offline


def export_all(folder: Path, tmp_path: Path) -> list[Path]:
    """An export with something of everything; the files it was given are gone afterwards."""
    shots = [picture(tmp_path, n) for n in range(2)]
    weights = tmp_path / "0c"
    weights.write_bytes(bytes(range(256)) * 30_000)
    export = NeptuneExport(NeptuneConfig(mode="offline"), folder)
    export.open(RUN, MemoryDict())
    batch: list[Item] = [ramp(2500), line("one"), line("two", 2), params({"lr": 0.1})]
    batch += [media(p, "image", "val", "a.png", n) for n, p in enumerate(shots)]
    batch += [media(weights, "checkpoint", "best.pt", "best.pt")]
    sent = export.send(batch, False)
    assert (sent.delivered, sent.skipped) == (5000 + 3 + 3, {})
    export.close("completed", "all done")
    return [*shots, weights]


def test_an_export_is_sent_by_the_real_command(server: NeptuneServer, tmp_path: Path) -> None:
    """`neptune sync` sends a moved export whole, even when the original files are gone."""
    given = export_all(tmp_path / "export", tmp_path)
    shutil.move(tmp_path / "export", tmp_path / "moved")
    bodies = [path.read_bytes() for path in given]
    for path in given:
        path.unlink()
    command = [str(Path(sys.executable).with_name("neptune")), "sync", "-p", "team/digits"]
    done = subprocess.run(
        [*command, "--path", str(tmp_path / "moved")], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = server.runs.values()
    for key, part in (("loss", 3), ("train/acc", 7)):
        points = [(n, n / part, START_MS + n * 7) for n in range(2500)]
        assert server.series(run.id)[key] == points
    assert [v for _, v, _ in server.string_series(run.id)["logs"]] == ["one", "two"]
    assert [v for _, v, _ in server.image_series(run.id)["val"]] == bodies[:2]
    assert server.files(run.id) == {"checkpoints/best.pt": bodies[2]}
    assert server.atoms(run.id)["rankgate/run_id"] == "run-1"
    assert server.atoms(run.id)["rankgate/state"] == "completed"
    assert server.refused == []


def test_an_export_is_whole_on_disk(tmp_path: Path) -> None:
    """Without a server, a token or a project, the documented files hold every operation."""
    export_all(tmp_path / "export", tmp_path)
    (run,) = (tmp_path / "export" / ".neptune" / "offline").iterdir()
    entries = [json.loads(text) for text in (run / "data-1.log").read_text().splitlines()]
    assert int((run / "last_put_version").read_text()) == entries[-1]["version"]
    operations = [entry["obj"] for entry in entries]
    loss = [
        (value["step"], value["value"])
        for op in operations
        if op["type"] == "LogFloats" and op["path"] == ["loss"]
        for value in op["value" if "value" in op else "values"]
    ]
    assert loss == [(n, n / 3) for n in range(2500)]
    (upload,) = [op for op in operations if op["type"] == "UploadFile"]
    assert upload["file_path"] is None
    assert (run / "upload_path" / upload["tmp_file_name"]).stat().st_size == 256 * 30_000


def test_an_export_is_not_added_to_another(tmp_path: Path) -> None:
    """An export is made anew, never on top of an older or broken one."""
    export_all(tmp_path / "export", tmp_path)
    with pytest.raises(Off, match="empty folder"):
        NeptuneExport(NeptuneConfig(mode="offline"), tmp_path / "export").open(RUN, MemoryDict())


def test_an_export_skips_what_neptune_would_refuse(tmp_path: Path) -> None:
    """`neptune sync` ignores refusals, so nothing refusable may be written."""
    export = NeptuneExport(NeptuneConfig(mode="offline"), tmp_path / "export")
    export.open(RUN, MemoryDict())
    sent = export.send([rows([1, 1, 2], loss=[1.0, 2.0, np.nan])], False)
    export.close("completed", "")
    assert (sent.delivered, sent.skipped) == (1, {"not finite": 1, "step not rising": 1})


# ---------------------------------------------------------------------- data alone


@pytest.mark.parametrize(
    "text", ["", "a", "x" * 2500, "line\n" * 700, "y" * 1000, "z" * 999 + "\n\n"]
)
def test_pieces_join_to_the_text(text: str) -> None:
    """Cutting loses no character, and no piece is longer than Neptune takes."""
    pieces = cut(text)
    assert "".join(pieces) == text
    assert all(len(piece) <= 1000 for piece in pieces)
    assert pieces


def test_milliseconds_survive_the_client() -> None:
    """The package multiplies seconds by 1000 and cuts: every millisecond comes out as it was."""
    at_ms = np.random.default_rng(1).integers(0, 2_000_000_000_000, 100_000)
    assert [int(s * 1000) for s in seconds(at_ms)] == at_ms.tolist()
