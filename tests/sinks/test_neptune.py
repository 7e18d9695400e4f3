"""The Neptune sink and export, through the real package, against the stand-in server."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gateway.sinks.base import (
    RECEIPTS,
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
from gateway.sinks.neptune import NeptuneConfig, NeptuneSink
from gateway.sinks.neptune_export import NeptuneExport
from gateway.sinks.neptune_plan import VALUE_CHARACTERS, cut, seconds
from gateway.sinks.neptune_run import OnlineRun, Package, custom_run_id
from gateway.sinks.pieces import split
from tests.flow.job import wait_until
from tests.servers.base import Reply
from tests.servers.neptune import CHUNK_BYTES, NeptuneServer, token
from tests.sinks import minfx
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
        sink._drop()


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
    """The batch comes again, what the server has of it is read back, and all is delivered."""
    sink = make()
    sink.send([ramp(10), line("a")], False)
    server.fail(OPERATIONS, mode="apply_then_cut")
    with pytest.raises(Unavailable):
        sink.send([ramp(10, 10), line("b")], False)
    sent = sink.send([ramp(10, 10), line("b")], True)
    assert (sent.delivered, sent.skipped) == (21, {})
    assert server.refused == []
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


# ---------------------------------------------------------------------- attempts


OTHER = b"t" * 16  #: the stream of a rank's second life


def later(steps: Sequence[int], stream: bytes = OTHER, **columns: Any) -> Rows:
    return replace(rows(steps, **columns), stream=stream)


def values_of(server: NeptuneServer, path: str) -> list[tuple[float, float]]:
    return [(s, v) for s, v, _ in server.series("run-1")[path]]


def test_a_second_life_goes_on_where_it_is_new_and_stands_beside_where_it_is_not(
    server: NeptuneServer, make: Make
) -> None:
    """A training that went back to a checkpoint: what it logs again is in `attempts/2`, what is
    beyond goes on in the series. All of it again, with the memory from before each batch and
    without any, changes nothing."""
    batches = [
        rows(range(10), loss=[float(s) for s in range(10)]),
        later(range(7, 14), loss=[s + 0.5 for s in range(7, 14)]),
        later([13, 14], b"u" * 16, loss=[1.0, 2.0]),
    ]
    memory, sink = MemoryDict(), None
    for _ in range(2):
        for batch in batches:
            before = dict(memory.data)
            sink = sink or make(memory)
            assert sink.send([batch], False).delivered == len(batch.seq)
            memory.data = before
            assert make(memory).send([batch], True).delivered == len(batch.seq)
        assert values_of(server, "loss") == [
            *((s, float(s)) for s in range(10)),
            *((s, s + 0.5) for s in range(10, 14)),
            (14, 2.0),
        ]
        assert values_of(server, "attempts/2/loss") == [(s, s + 0.5) for s in (7, 8, 9)]
        assert values_of(server, "attempts/3/loss") == [(13, 1.0)]
        memory, sink = MemoryDict(), None
    assert server.refused == []


def test_a_second_life_repeats_images_beside(
    server: NeptuneServer, make: Make, tmp_path: Path
) -> None:
    """An image of a step that the first life has logged stands in `attempts/2` too."""
    shots = [media(picture(tmp_path, n), "image", "val", "a.png", n) for n in range(3)]
    again = [replace(s, stream=OTHER) for s in shots[1:]]
    sink = make()
    sink.send([rows([1], loss=[1.0]), *shots], False)
    assert sink.send([later([2], loss=[1.0]), *again], False).delivered == 3
    assert [s for s, _, _ in server.image_series("run-1")["attempts/2/val"]] == [1, 2]


def test_a_failed_plan_leaves_the_lives_as_they_were(server: NeptuneServer, make: Make) -> None:
    """A life is counted once, however often its first batch comes."""
    sink, memory = make(), MemoryDict()
    sink = make(memory)
    sink.send([rows([1], loss=[1.0])], False)
    server.fail(OPERATIONS, status=401)
    with pytest.raises(Unavailable):
        sink.send([later([1], loss=[2.0])], False)
    sink.send([later([1], loss=[2.0])], True)
    assert memory.get("lives:0") == [STREAM, OTHER]
    assert values_of(server, "attempts/2/loss") == [(1, 2.0)]


# ---------------------------------------------------------------------- names


def test_where_not_finite_values_begin_is_said(server: NeptuneServer, make: Make) -> None:
    """Neptune cannot hold them: the first one is told beside the series, once."""
    sink = make()
    sink.send([rows([1, 2, 3], loss=[0.1, np.nan, np.inf])], False)
    sink.send([rows([4], loss=[np.inf])], False)
    assert server.atoms("run-1")["rankgate/not_finite/loss"] == "nan first at step 2"


def test_console_machine_and_source_have_neptunes_places(
    server: NeptuneServer, make: Make, tmp_path: Path
) -> None:
    """What Neptune's own client captures stands where it puts it, of each rank apart."""
    diff = tmp_path / "0d"
    diff.write_bytes(b"--- a")
    batch: list[Item] = [
        line("epoch 1", level="console"),
        line("oh", 2, level="console-err"),
        line("hi", 3, rank=2, level="console"),
        rows([0], system__gpu__0__percent=[50.0]),
        rows([0], 8, system__cpu_percent=[7.0]),
        params({"source/branch": "main", "source/dirty": True, "source/mine": 1}),
        media(diff, "file", "source.diff", "source.diff"),
    ]
    assert make().send(batch, False).skipped == {}
    lines = {p: [v for _, v, _ in s] for p, s in server.string_series("run-1").items()}
    assert lines == {
        "monitoring/stdout": ["epoch 1"],
        "monitoring/stderr": ["oh"],
        "ranks/2/monitoring/stdout": ["hi"],
    }
    assert set(server.series("run-1")) == {
        "monitoring/gpu/0/percent",
        "ranks/8/monitoring/cpu_percent",
    }
    atoms = server.atoms("run-1")
    assert (atoms["source/branch"], atoms["source/dirty"]) == ("main", True)
    assert atoms["parameters/source/mine"] == 1
    assert server.files("run-1") == {"source/diff": b"--- a"}


def test_an_ultralytics_run_has_its_own_names(
    server: NeptuneServer, make: Make, tmp_path: Path
) -> None:
    """Steps from 1, `Configuration/…`, an image is a file of the newest, weights by run's name."""
    shots = [picture(tmp_path, n) for n in (1, 2)]
    batch: list[Item] = [
        rows([0, 1], train__box_loss=[0.5, 0.4], fitness=[0.1, 0.2]),
        params({"lr0": 0.01, "cfg": None}),
        Summary(STREAM, 0, 9, START_MS, {"model/parameters": 7}),
        *(media(p, "image", "Mosaic/train_batch0", "a.jpg", n) for n, p in enumerate(shots)),
        media(shots[0], "checkpoint", "best.pt", "best.pt"),
    ]
    sent = make(run=replace(RUN, source="ultralytics")).send(batch, False)
    assert (sent.delivered, sent.skipped) == (2 + 2 + 2 + 1, {"not in the original": 2})
    assert values_of(server, "train/box_loss") == [(1, 0.5), (2, 0.4)]
    atoms = server.atoms("run-1")
    assert atoms["Configuration/Hyperparameters/lr0"] == 0.01
    assert atoms["Configuration/Hyperparameters/cfg"] == ""
    assert atoms["Configuration/Model/model/parameters"] == 7
    assert server.files("run-1") == {
        "Mosaic/train_batch0": shots[1].read_bytes(),
        "weights/first try/best.pt": shots[0].read_bytes(),
    }


def test_a_text_too_long_for_a_field_is_whole_in_a_file(server: NeptuneServer, make: Make) -> None:
    """The field says that it is cut, and where the rest is."""
    text = "é" * (VALUE_CHARACTERS + 1)
    make().send([params({"note": text, "just": text[:-1]})], False)
    atoms = server.atoms("run-1")
    assert len(atoms["parameters/note"]) == VALUE_CHARACTERS
    assert atoms["parameters/note"].endswith("(cut; the whole text is under files/)")
    assert atoms["parameters/just"] == text[:-1]
    assert server.files("run-1") == {"files/parameters/note": text.encode()}


# ---------------------------------------------------------------------- failures


@pytest.mark.parametrize("mode", ["status", "cut"])
def test_an_outage_is_unavailable_and_then_delivered_once(
    server: NeptuneServer, make: Make, mode: str
) -> None:
    """After one try `send` gives up; the same batch again finds what was applied."""
    sink = make()
    sink.send([ramp(10), line("a")], False)
    server.fail(OPERATIONS, mode=mode, times=1000)
    for again in (False, True):
        with pytest.raises(Unavailable, match="NeptuneConnectionLost"):
            sink.send([ramp(50, 10), line("b")], again)
    server.heal()
    sent = sink.send([ramp(50, 10), line("b")], True)
    assert (sent.delivered, sent.skipped) == (101, {})
    holds_ramp(server, 60)
    assert [v for _, v, _ in server.string_series("run-1")["logs"]] == ["a", "b"]
    assert len(server.runs) == 1


def test_a_server_that_hangs_is_unavailable(
    server: NeptuneServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No answer within the package's limit for one request; what it applied late is there once."""
    sink = make()
    client = importlib.import_module("neptune.internal.backends.hosted_client")
    monkeypatch.setitem(client.DEFAULT_REQUEST_KWARGS["_request_options"], "timeout", 0.3)
    server.fail(OPERATIONS, mode="delay", seconds=1.0)
    with pytest.raises(Unavailable):
        sink.send([ramp(50)], False)
    server.wait_until(lambda: not server.answering)
    assert sink.send([ramp(50)], True).delivered == 100
    holds_ramp(server, 50)


def test_a_part_of_a_file_is_tried_again(server: NeptuneServer, make: Make, tmp_path: Path) -> None:
    """One bad answer of many costs a part, not the whole upload."""
    large = tmp_path / "0f"
    large.write_bytes(os.urandom(2 * CHUNK_BYTES + 17))
    sink = make()
    server.fail(r"upload/part$", status=503, times=2)
    assert sink.send([media(large, "checkpoint", "best.pt", "best.pt")], False).delivered == 1
    assert server.files("run-1") == {"checkpoints/best.pt": large.read_bytes()}
    assert sum(path.endswith("upload/start") for _, path, _ in server.requests) == 1


def test_the_wait_a_server_asks_for_is_kept(server: NeptuneServer, make: Make) -> None:
    """The whole of Retry-After, of which the package itself reads the first digit."""
    sink = make()
    server.fail(OPERATIONS, status=429, Retry_After="120")
    with pytest.raises(Unavailable) as caught:
        sink.send([ramp(5)], False)
    assert caught.value.after_seconds == 120
    assert sink.send([ramp(5)], True).delivered == 10


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


@pytest.mark.parametrize("status", [400, 404, 409, 413])
def test_a_refusal_that_passes_is_not_believed(
    server: NeptuneServer, make: Make, status: int
) -> None:
    """One 4xx may come from a proxy in between: read back, and sent anew in the same call."""
    sink = make()
    sink.send([ramp(10)], False)
    server.fail(OPERATIONS, status=status)
    again = status == 404  # of the run itself: with a new connection, in the next call
    if again:
        with pytest.raises(Unavailable):
            sink.send([ramp(10, 10)], False)
    sent = sink.send([ramp(10, 10)], again)
    assert (sent.delivered, sent.skipped) == (20, {})
    holds_ramp(server, 20)
    assert len(server.runs) == 1
    assert server.refused == []


@pytest.mark.parametrize("status", [401, 403])
def test_a_lost_permission_takes_a_new_connection(
    server: NeptuneServer, make: Make, status: int
) -> None:
    """That says nothing about the batch: all of it comes again, and is there once."""
    sink = make()
    sink.send([ramp(10)], False)
    server.fail(OPERATIONS, status=status)
    with pytest.raises(Unavailable):
        sink.send([ramp(10, 10)], False)
    assert sink.send([ramp(10, 10)], True).delivered == 20
    holds_ramp(server, 20)
    assert len(server.runs) == 1


def test_a_token_that_expires_is_renewed(server: NeptuneServer, make: Make) -> None:
    """Within the call, or with a new connection; nothing is lost or doubled."""
    sink = make()
    sink.send([ramp(10)], False)
    server.revoke()
    with pytest.raises(Unavailable):
        sink.send([ramp(10, 10)], False)
    assert sink.send([ramp(10, 10)], True).delivered == 20
    holds_ramp(server, 20)


def test_a_page_instead_of_an_answer_is_unavailable(server: NeptuneServer, make: Make) -> None:
    """HTML with status 200 comes from something in between, and confirms nothing."""
    sink = make()
    page = Reply(body=b"<html>log in first</html>", content_type="text/html")
    server.fail(OPERATIONS, body=page, status=200)
    with pytest.raises(Unavailable):
        sink.send([ramp(10)], False)
    assert sink.send([ramp(10)], True).delivered == 20
    holds_ramp(server, 10)


def test_a_batch_that_is_refused_twice_is_refused(server: NeptuneServer, make: Make) -> None:
    """The same 4xx for the same batch is believed, so that the loop can look for the bad item."""
    sink = make()
    sink.send([ramp(10)], False)
    server.fail(OPERATIONS, status=400, times=2)
    with pytest.raises(Refused, match="400"):
        sink.send([ramp(10, 10)], False)
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


def test_stopping_the_run_in_the_app_ends_no_process(server: NeptuneServer, make: Make) -> None:
    """The package would end this process and its children: instead the training is asked to
    stop, and what it logs until then arrives."""
    sink = make()
    sink.send([ramp(10)], False)
    assert sink._run is not None
    jobs = sink._run._run._bg_job._jobs
    (thread,) = [job._thread for job in jobs if type(job).__name__.startswith("Websocket")]
    thread._handler_message(json.dumps({"type": "neptune/abort", "body": {"seconds": 5}}))
    assert sink.send([], False).delivered == 0
    assert sink.stop_asked == "stopped in Neptune"
    assert sink.send([ramp(10, 10)], False).delivered == 20
    sink.close("completed", "")
    holds_ramp(server, 20)
    assert server.atoms("run-1")["sys/failed"] is False
    assert len(server.runs) == 1


def test_one_bad_item_is_found_among_good_ones(server: NeptuneServer, make: Make) -> None:
    """Halved as the loop does it, a batch loses only what the server never takes."""
    sink = make()
    sink.send([ramp(1)], False)
    server.max_fields = len(server.run("run-1").attributes)
    bad: list[list[Item]] = []

    def deliver(batch: list[Item]) -> int:
        try:
            return sink.send(batch, True).delivered
        except Refused:
            halves = list(split(batch))
            if not halves:
                bad.append(batch)
            return sum(deliver(half) for half in halves)

    batch: list[Item] = [ramp(5, 1), rows([1], new=[1.0]), ramp(5, 6)]
    assert deliver(batch) == 20
    assert [list(rows.columns) for (rows,) in bad if isinstance(rows, Rows)] == [["new"]]
    holds_ramp(server, 11)


# ---------------------------------------------------------------------- minfx


@pytest.fixture
def minfx_package(monkeypatch: pytest.MonkeyPatch) -> str:
    """The real package, of which a copy is installed on first use where there is an index."""
    try:
        monkeypatch.syspath_prepend(str(minfx.folder()))
    except subprocess.CalledProcessError:
        pytest.skip("minfx cannot be installed here")
    return "minfx"


def test_minfx_carries_the_same(
    server: NeptuneServer, make: Make, tmp_path: Path, minfx_package: str
) -> None:
    """Points, lines, values, images, files, what is skipped and the end: as by `neptune`."""
    weights = tmp_path / "0e"
    weights.write_bytes(os.urandom(CHUNK_BYTES + 17))
    shots = [media(picture(tmp_path, n), "image", "val", "a.png", n) for n in range(2)]
    batch: list[Item] = [ramp(300), line("one"), params({"lr": 0.1, "none": None}), *shots]
    batch += [media(weights, "checkpoint", "best.pt", "best.pt"), rows([0], odd=[np.nan])]
    sink = make(package=minfx_package)
    sent = sink.send(batch, False)
    assert (sent.delivered, sent.skipped) == (600 + 2 + 3, {"not finite": 1})
    assert sink.send([ramp(10)], False).skipped == {"step not rising": 20}
    sink.close("failed", "out of memory")
    holds_ramp(server, 300)
    assert [v for _, v, _ in server.string_series("run-1")["logs"]] == ["one"]
    assert [s for s, _, _ in server.image_series("run-1")["val"]] == [0, 1]
    assert server.files("run-1") == {"checkpoints/best.pt": weights.read_bytes()}
    atoms = server.atoms("run-1")
    assert (atoms["parameters/lr"], atoms["parameters/none"]) == (0.1, "None")
    assert (atoms["sys/failed"], atoms["rankgate/state"]) == (True, "failed")
    assert server.tags("run-1") == {"blue", "small"}
    # It writes that field itself, which a server of Neptune keeps.
    assert [path for path, _ in server.refused] == ["sys/state"]


def test_minfx_reads_back_and_hears_refusals(
    server: NeptuneServer, make: Make, minfx_package: str
) -> None:
    """A lost answer, a dead process and a refused point end as they do with `neptune`."""
    sink = make(package=minfx_package)
    sink.send([ramp(10), line("a")], False)
    server.fail(OPERATIONS, mode="apply_then_cut")
    with pytest.raises(Unavailable):
        sink.send([ramp(10, 10), line("b")], False)
    assert sink.send([ramp(10, 10), line("b")], True).delivered == 21
    server.run("run-1").attributes["loss"].points.append((21, 9.0, START_MS * 2))
    again = make(MemoryDict(), package=minfx_package)
    sent = again.send([ramp(21), line("a"), line("b")], True)
    assert (sent.delivered, sent.skipped) == (43, {"step not rising": 1})
    with pytest.raises(Refused, match="read-only"):
        again.send([rows([1], sys__owner=[1.0])], False)
    assert [v for _, v, _ in server.string_series("run-1")["logs"]] == ["a", "b"]


def test_several_servers_at_once_are_off(
    server: NeptuneServer, make: Make, minfx_package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several tokens `minfx` answers as soon as one server has it: that confirms nothing."""
    one = token(server.url)
    monkeypatch.setenv("NEPTUNE_API_TOKEN", f"{one},{one}")
    with pytest.raises(Off, match="several tokens"):
        make(package=minfx_package)


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


def test_a_token_that_was_good_may_be_good_again(
    server: NeptuneServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that begins while the server takes no token waits, if the run was delivered to
    before; without a token it is off all the same."""
    memory = MemoryDict()
    memory.put(RECEIPTS, 1)
    server.fail(OPERATIONS, status=401)
    with pytest.raises(Unavailable, match="Unauthorized"):
        NeptuneSink(NeptuneConfig()).open(RUN, memory)
    monkeypatch.delenv("NEPTUNE_API_TOKEN")
    with pytest.raises(Off, match="NEPTUNE_API_TOKEN"):
        NeptuneSink(NeptuneConfig()).open(RUN, memory)


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is an extra; without it there is one line on how to get it."""
    monkeypatch.setitem(sys.modules, "neptune", None)
    with pytest.raises(Off, match=r"pip install 'rankgate\[neptune\]'") as caught:
        open_plain()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("module", "of", "name"),
    [
        ("neptune.internal.operation", "", "LogFloats"),
        ("neptune.common.backends.utils", "", "retries_timeout"),
        ("neptune.internal.backends.hosted_neptune_backend", "HostedNeptuneBackend",
         "get_float_series_values"),
    ],
)  # fmt: skip
def test_another_version_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, server: NeptuneServer, module: str, of: str, name: str
) -> None:
    """What no documentation promises is looked for at once, not when the first point fails."""
    Package.load("neptune")  # in its own way: its dependencies warn when imported
    found = importlib.import_module(module)
    for place in getattr(found, of).__mro__ if of else [found]:
        if name in vars(place):
            monkeypatch.delattr(place, name)
    with pytest.raises(Off, match=rf"no {name}.*pip install 'rankgate\[neptune\]'"):
        open_plain()


def test_a_connection_that_fails_half_way_leaves_no_threads(
    server: NeptuneServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would go on beside those of the next try, in an outage for as long as it lasts."""

    def own() -> set[threading.Thread]:
        return {t for t in threading.enumerate() if type(t).__module__.startswith("neptune")}

    before = own()
    monkeypatch.setattr(OnlineRun, "refresh", lambda self: 1 / 0)
    with pytest.raises(Unavailable):
        open_plain()
    wait_until(lambda: own() <= before, 20, "the package's threads end")


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
