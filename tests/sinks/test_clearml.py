"""The ClearML sink and its offline export: the real package against a strict stand-in server."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

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
from gateway.sinks.clearml import ClearmlConfig, ClearmlSink
from gateway.sinks.clearml_events import public
from gateway.sinks.clearml_export import ClearmlExport
from gateway.sinks.clearml_records import configuration
from gateway.sinks.loop import KEEP_ALIVE_SECONDS
from gateway.sinks.naming import NOT_IN_ORIGINAL
from tests.servers.clearml import ClearmlServer
from tests.sinks.fakes import MemoryDict

pytest.importorskip("clearml")
pytestmark = [  # the vendor's configuration reader uses old names of pyparsing
    pytest.mark.filterwarnings("ignore::DeprecationWarning:clearml.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:pyparsing.*"),
]

STREAM = bytes(range(16))
START_NS = 1_790_000_000_000_000_000
RUN = RunInfo("run-1", "digits", "first run", ("nightly",), START_NS)
ADD = r"events\.add_batch"


@pytest.fixture
def vendor_env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """No setting of the user's and no file of theirs; what a child process needs."""
    for name in list(os.environ):
        if name.startswith(("CLEARML_", "TRAINS_")):
            monkeypatch.delenv(name)
    (tmp_path / "empty.conf").write_text("{}")
    (tmp_path / "home").mkdir()
    ours = {
        "CLEARML_CONFIG_FILE": str(tmp_path / "empty.conf"),
        "CLEARML_CACHE_DIR": str(tmp_path / "cache"),
        "HOME": str(tmp_path / "home"),
    }
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    return ours


@pytest.fixture
def server(vendor_env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[ClearmlServer]:
    with ClearmlServer() as running:
        for name, value in running.env.items():
            monkeypatch.setenv(name, value)
        yield running


@pytest.fixture
def sink(server: ClearmlServer) -> ClearmlSink:
    opened = ClearmlSink()
    opened.open(RUN, MemoryDict())
    return opened


def only_task(server: ClearmlServer) -> str:
    (task,) = server.tasks
    return task


def rows(columns: dict[str, Sequence[Any]], rank: int = 0, first: int = 0) -> Rows:
    count = len(next(iter(columns.values())))
    seq = np.arange(first, first + count, dtype=np.int64)
    arrays = {key: np.array(values) for key, values in columns.items()}
    return Rows(STREAM, rank, seq, seq * 10, START_NS + seq * 1_000_000_000, arrays)


def text(line: str, seq: int, rank: int = 0, after_ms: int = 0) -> Text:
    return Text(STREAM, rank, seq, START_NS + after_ms * 1_000_000, "info", line)


def media(
    folder: Path, what: str, key: str, name: str, content: bytes, rank: int = 0, **meta: Any
) -> Media:
    sha = hashlib.sha256(content).hexdigest()
    path = folder / sha
    path.write_bytes(content)
    return Media(STREAM, rank, 1, START_NS, what, key, name, 7, path, sha, len(content), meta)


def deliver(sink: ClearmlSink, batch: Sequence[Item]) -> tuple[int, list[Item]]:
    """As the loop does: halve what is refused; (delivered, the items to blame)."""
    try:
        return sink.send(batch, again=False).delivered, []
    except Refused:
        if len(batch) == 1:
            return 0, list(batch)
    half = len(batch) // 2
    left, right = deliver(sink, batch[:half]), deliver(sink, batch[half:])
    return left[0] + right[0], left[1] + right[1]


def child(code: str, env: dict[str, str], *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=100,
        cwd=Path(__file__).parents[2],
    )


class TestOpen:
    def test_makes_the_task(self, server: ClearmlServer) -> None:
        """Project, name, tags and the run id are on the task, which is in progress."""
        config = ClearmlConfig(project="a/b-c", task="v1", tags=("mine",))
        ClearmlSink(config).open(RUN, MemoryDict())
        task = server.tasks[only_task(server)]
        assert server.projects[task["project"]]["name"] == "a/b-c"
        assert task["name"] == "v1_"  # the server wants three characters
        assert task["tags"] == ["nightly", "mine", "rankgate:run-1"]
        assert task["runtime"] == {"rankgate_run": "run-1"}
        assert task["status"] == "in_progress"

    def test_remembers_the_task(self, server: ClearmlServer) -> None:
        """A second life goes on with the task whose id is in the memory."""
        memory = MemoryDict()
        ClearmlSink().open(RUN, memory)
        task = only_task(server)
        server.tasks[task]["runtime"], server.tasks[task]["tags"] = {}, []
        ClearmlSink().open(RUN, memory)
        assert memory.get("task") == only_task(server)

    @pytest.mark.parametrize("wiped", ["runtime", "tags"])
    def test_finds_the_task_without_memory(self, server: ClearmlServer, wiped: str) -> None:
        """Either mark of the run is enough to find a task whose id was never noted."""
        ClearmlSink().open(RUN, MemoryDict())
        server.tasks[only_task(server)][wiped] = {}
        memory = MemoryDict()
        ClearmlSink().open(RUN, memory)
        assert memory.get("task") == only_task(server)

    def test_killed_before_the_note(self, server: ClearmlServer, vendor_env: Any) -> None:
        """A process killed between creating the task and noting its id makes no second one."""
        code = (
            "import os, signal\n"
            "from gateway.sinks.base import RunInfo\n"
            "from gateway.sinks.clearml import ClearmlSink\n"
            "from tests.sinks.fakes import MemoryDict\n"
            "class Killed(MemoryDict):\n"
            "    def put_now(self, key, value): os.kill(os.getpid(), signal.SIGKILL)\n"
            f"ClearmlSink().open({RUN!r}, Killed())\n"
        )
        assert child(code, {}).returncode == -signal.SIGKILL
        task = only_task(server)
        memory = MemoryDict()
        ClearmlSink().open(RUN, memory)
        assert memory.get("task") == only_task(server) == task

    def test_lost_answer_to_create(self, server: ClearmlServer) -> None:
        """When the answer to the creation is lost, the next open finds the task."""
        server.fail(r"tasks\.create", mode="apply_then_cut")
        sink, memory = ClearmlSink(), MemoryDict()
        with pytest.raises(Unavailable):
            sink.open(RUN, memory)
        sink.open(RUN, memory)
        assert memory.get("task") == only_task(server)

    def test_other_runs_are_not_touched(self, server: ClearmlServer) -> None:
        """Another run id of the same name and project gets a task of its own."""
        ClearmlSink().open(RUN, MemoryDict())
        ClearmlSink().open(RunInfo("run-2", "digits", "first run", (), START_NS), MemoryDict())
        assert len(server.tasks) == 2
        assert len(server.projects) == 1

    def test_deleted_task(self, server: ClearmlServer) -> None:
        """A task deleted on the server turns the sink off rather than starting half a new one."""
        memory = MemoryDict()
        ClearmlSink().open(RUN, memory)
        server.tasks.clear()
        with pytest.raises(Off, match="deleted"):
            ClearmlSink().open(RUN, memory)

    def test_offline_variable_of_the_vendor(
        self, server: ClearmlServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """CLEARML_OFFLINE_MODE does not make the sink swallow what it is given."""
        monkeypatch.setenv("CLEARML_OFFLINE_MODE", "1")
        code = (
            "from gateway.sinks.clearml import ClearmlSink\n"
            "from gateway.sinks.base import RunInfo\n"
            "from tests.sinks.fakes import MemoryDict\n"
            f"ClearmlSink().open({RUN!r}, MemoryDict())\n"
        )
        assert child(code, {}).returncode == 0
        assert only_task(server)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://files.example.org/a", "https://files.example.org/a"),
        ("https://me:p%40ss@files.example.org:8081/a@b", "https://files.example.org:8081/a@b"),
        ("http://me@[::1]:1", "http://[::1]:1"),
        ("", ""),
    ],
)
def test_an_address_that_others_may_read(address: str, shown: str) -> None:
    """Without the password by which we reach the file server, which stands before its host."""
    assert public(address) == shown


class TestCannotWork:
    def test_missing_package(self, server: ClearmlServer, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without the package the sink is off and says what to install, in one line."""
        monkeypatch.setitem(sys.modules, "clearml.backend_api", None)
        with pytest.raises(Off, match=r"pip install 'rankgate\[clearml\]'") as caught:
            ClearmlSink().open(RUN, MemoryDict())
        assert "\n" not in str(caught.value)

    def test_another_version(self, server: ClearmlServer, monkeypatch: pytest.MonkeyPatch) -> None:
        """What no documentation promises is looked for at once: without the method that is
        replaced here, the vendor's own would repeat requests."""
        from clearml.backend_api import Session

        monkeypatch.delattr(Session, "_send_request")
        with pytest.raises(Off, match=r"no _send_request.*pip install 'rankgate\[clearml\]'"):
            ClearmlSink().open(RUN, MemoryDict())

    def test_missing_credentials(self, vendor_env: dict[str, str], tmp_path: Path) -> None:
        """Without credentials the sink is off, names the variables and writes no file at home."""
        code = (
            "from gateway.sinks.clearml import ClearmlSink\n"
            "from gateway.sinks.base import Off, RunInfo\n"
            "try:\n"
            f"    ClearmlSink().open({RUN!r}, None)\n"
            "except Off as off:\n"
            "    print('OFF', off)\n"
        )
        out = child(code, {}).stdout
        assert "OFF no ClearML credentials" in out
        assert "CLEARML_API_ACCESS_KEY" in out
        assert list((tmp_path / "home").iterdir()) == []

    def test_wrong_credentials(
        self, server: ClearmlServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Credentials the server does not know: the queue is kept, and no secret is told."""
        monkeypatch.setenv("CLEARML_API_SECRET_KEY", "sesame")
        with pytest.raises(Unavailable, match="does not accept the credentials") as caught:
            ClearmlSink().open(RUN, MemoryDict())
        assert "sesame" not in str(caught.value)

    def test_no_server(self, server: ClearmlServer, monkeypatch: pytest.MonkeyPatch) -> None:
        """An address where nobody listens is told at once."""
        monkeypatch.setenv("CLEARML_API_HOST", "http://127.0.0.1:9")
        start = time.monotonic()
        with pytest.raises(Unavailable, match="did not answer"):
            ClearmlSink().open(RUN, MemoryDict())
        assert time.monotonic() - start < 30  # the package alone would go on for minutes

    def test_offline_config(self, server: ClearmlServer) -> None:
        """Set to offline, the online sink sends nothing."""
        with pytest.raises(Off, match="offline"):
            ClearmlSink(ClearmlConfig(mode="offline")).open(RUN, MemoryDict())
        assert not server.requests


class TestScalars:
    def test_values(self, server: ClearmlServer, sink: ClearmlSink) -> None:
        """Each value arrives under title, series and step; ints and bools as numbers."""
        loss = [0.1, 1 / 3, -1e-300, 3e38]
        columns = {"train/loss": loss, "n": [1, 2, 3, 2**60], "ok": [True, False, True, False]}
        sent = sink.send([rows(columns)], again=False)
        assert sent == Sent(delivered=12)
        expected = {}
        for i in range(4):
            expected["train", "loss", i * 10] = loss[i]
            expected["n", "n", i * 10] = float(columns["n"][i])
            expected["ok", "ok", i * 10] = float(columns["ok"][i])
        assert server.scalars(only_task(server)) == expected

    def test_times(self, server: ClearmlServer, sink: ClearmlSink) -> None:
        """An event's timestamp is the rank's wall clock in milliseconds."""
        sink.send([rows({"a": [1.0, 2.0]})], again=False)
        times = sorted(event["timestamp"] for event in server.events.values())
        assert times == [START_NS // 10**6, START_NS // 10**6 + 1000]

    def test_ranks(self, server: ClearmlServer, sink: ClearmlSink) -> None:
        """Another rank's series has the rank in its name."""
        sink.send([rows({"a-x/b": [1.0]}), rows({"a-x/b": [2.0]}, rank=3)], again=False)
        assert server.scalars(only_task(server)) == {
            ("a_x", "b", 0): 1.0,
            ("a_x", "b (rank 3)", 0): 2.0,
        }

    def test_not_finite(self, server: ClearmlServer, sink: ClearmlSink) -> None:
        """What the index cannot hold is skipped and counted, the rest of its row is not."""
        bad = [float("nan"), float("inf"), -float("inf"), 1e39, 5.0]
        sent = sink.send([rows({"a": bad, "b": [1.0] * 5})], again=False)
        assert sent == Sent(delivered=6, skipped={"not finite": 4})
        assert server.scalars(only_task(server))["a", "a", 40] == 5.0
        assert len(server.scalars(only_task(server))) == 6

    def test_requests_are_cut(self, server: ClearmlServer, sink: ClearmlSink) -> None:
        """No request holds more than 500 events or 1 MB."""
        batch = [rows({"k" * 3000: [1.0] * 600}), rows({"b": [2.0] * 700})]
        sink.send(batch, again=False)
        assert len(server.scalars(only_task(server))) == 1300
        assert max(count for count, _ in server.batch_sizes) == 500
        assert max(size for _, size in server.batch_sizes) <= 1_000_000

    def test_lost_answer(self, server: ClearmlServer, sink: ClearmlSink) -> None:
        """A batch applied without an answer and sent again is there once."""
        server.fail(ADD, mode="apply_then_cut")
        batch = [rows({"a": [1.0, 2.0, 3.0]})]
        with pytest.raises(Unavailable):
            sink.send(batch, again=False)
        assert sink.send(batch, again=True) == Sent(delivered=3)
        assert server.scalars(only_task(server)) == {
            ("a", "a", 0): 1.0,
            ("a", "a", 10): 2.0,
            ("a", "a", 20): 3.0,
        }
        assert server.accepted_scalar_sends == 6

    def test_summary(self, server: ClearmlServer, sink: ClearmlSink) -> None:
        """Final numbers become single values; what is no number becomes a user property."""
        values = {"map": 0.5, "n": 3, "note": "good", "none": None, "loss": float("nan")}
        sent = sink.send([Summary(STREAM, 0, 1, START_NS, values)], again=False)
        assert sent == Sent(delivered=1)
        task = only_task(server)
        assert server.scalars(task) == {
            ("Summary", "map", -(2**31)): 0.5,
            ("Summary", "n", -(2**31)): 3.0,
        }
        properties = {"note": "good", "none": "", "loss": "nan"}
        assert server.params(task)["properties"] == properties

    def test_iteration_offset(self, server: ClearmlServer) -> None:
        """A run that comes back goes on with its own steps: the server's last iteration is not
        added to them."""
        memory = MemoryDict()
        for value in (1.0, 2.0):
            sink = ClearmlSink()
            sink.open(RUN, memory)
            sink.send([rows({"a": [value] * 26})], again=False)
            sink.close("completed", "")
        task = server.tasks[only_task(server)]
        assert task["last_iteration"] == 250
        assert server.scalars(task["id"]) == {("a", "a", i * 10): 2.0 for i in range(26)}

    def test_more_series_than_the_table_holds(
        self, server: ClearmlServer, sink: ClearmlSink
    ) -> None:
        """Of 2500 series all points arrive; the server's table of last values holds 2000."""
        keys = [f"layer{i}/norm" for i in range(2500)]
        assert sink.send([rows({key: [1.0] for key in keys})], again=False).delivered == 2500
        task = only_task(server)
        assert len(server.scalars(task)) == 2500
        assert sum(map(len, server.tasks[task]["last_metrics"].values())) == 2000

    def test_machine_metrics(self, server: ClearmlServer, sink: ClearmlSink) -> None:
        """A machine's metrics have the vendor's names, and do not count as iterations."""
        machine = {"system/cpu_percent": [5.0] * 9, "system/gpu/1/power_watts": [300.0] * 9}
        sink.send([rows(machine), rows({"system/network_sent_mbs": [1.0]}, rank=8)], again=False)
        sink.send([rows({"loss": [0.5, 0.4]})], again=False)
        task = only_task(server)
        assert {names[:2] for names in server.scalars(task)} == {
            (":monitor:machine", "cpu_usage"),
            (":monitor:gpu", "gpu_1_power_draw"),
            (":monitor:machine", "network_tx_mbs (rank 8)"),
            ("loss", "loss"),
        }
        assert server.tasks[task]["last_iteration"] == 10

    def test_names_of_ultralytics(self, server: ClearmlServer) -> None:
        """Points that Ultralytics' own callback does not send are skipped, and counted as that."""
        sink = ClearmlSink()
        sink.open(replace(RUN, source="ultralytics"), MemoryDict())
        sent = sink.send([rows({"train/box_loss": [1.0, 2.0], "fitness": [0.1, 0.2]})], False)
        assert sent == Sent(delivered=2, skipped={NOT_IN_ORIGINAL: 2})
        assert set(server.scalars(only_task(server))) == {
            ("train", "train/box_loss", 0),
            ("train", "train/box_loss", 10),
        }


class TestTrouble:
    def test_busy(self, server: ClearmlServer, sink: ClearmlSink) -> None:
        """A 503 is told with the time the server asks for, and the next send goes through."""
        server.fail(ADD, status=503, Retry_After="7")
        with pytest.raises(Unavailable, match="503") as caught:
            sink.send([rows({"a": [1.0]})], again=False)
        assert caught.value.after_seconds == 7.0
        assert sink.send([rows({"a": [1.0]})], again=True) == Sent(delivered=1)
        assert server.scalars(only_task(server)) == {("a", "a", 0): 1.0}

    @pytest.mark.parametrize("status", [403, 429, 502, 504])
    def test_not_the_batch(self, server: ClearmlServer, sink: ClearmlSink, status: int) -> None:
        """A status that says nothing about the batch is tried once and told as unavailable."""
        server.fail(ADD, status=status, times=2)
        before = len(server.requests)
        with pytest.raises(Unavailable):
            sink.send([rows({"a": [1.0]})], again=False)
        assert len(server.requests) == before + 1

    def test_token_revoked(self, server: ClearmlServer, sink: ClearmlSink) -> None:
        """When the token is no longer good the sink logs in again within the call."""
        server.tokens.clear()
        assert sink.send([rows({"a": [1.0]})], again=False) == Sent(delivered=1)

    def test_poison(self, server: ClearmlServer, sink: ClearmlSink) -> None:
        """An item the server cannot index is refused alone, all others arrive."""
        good = [rows({"a": [float(i)]}, first=i) for i in range(6)]
        bad = rows({"x" * 40_000: [1.0]}, first=9)
        delivered, blamed = deliver(sink, [*good[:3], bad, *good[3:], text("hi", 1)])
        assert blamed == [bad]
        assert delivered == 7
        task = only_task(server)
        assert server.scalars(task) == {("a", "a", i * 10): float(i) for i in range(6)}
        assert server.log_lines(task) == ["hi"]

    def test_sick_server(self, server: ClearmlServer, sink: ClearmlSink) -> None:
        """A server that fails on everything does not get the batch blamed."""
        sink.send([rows({"a": [1.0]})], again=False)
        server.fail(ADD, status=500, times=2)
        with pytest.raises(Unavailable, match="no events at all"):
            sink.send([rows({"a": [2.0]})], again=False)

    def test_published_task(self, server: ClearmlServer, sink: ClearmlSink) -> None:
        """Events to a task that became read-only are kept, not blamed one by one."""
        sink.send([rows({"a": [1.0]})], again=False)
        server.tasks[only_task(server)]["status"] = "published"
        with pytest.raises(Unavailable, match="no events at all"):
            sink.send([rows({"a": [2.0]})], again=False)


class TestText:
    def test_lines(self, server: ClearmlServer, sink: ClearmlSink) -> None:
        """Lines arrive in order as they are; another rank's has the rank before it."""
        lines = [text("a — “b”\n  c", 1), text("", 2, after_ms=1), text("d", 3, 3, after_ms=2)]
        assert sink.send(lines, again=False) == Sent(delivered=3)
        assert server.log_lines(only_task(server)) == ["a — “b”\n  c", "", "[rank 3] d"]

    def test_lost_answer(self, server: ClearmlServer, sink: ClearmlSink) -> None:
        """Of 1200 lines 500 arrive before the connection is cut; sent again, each is there once."""
        lines = [text(f"line {i}", i, after_ms=i // 3) for i in range(1200)]
        server.fail(ADD, mode="apply_then_cut")
        with pytest.raises(Unavailable):
            sink.send(lines, again=False)
        assert len(server.log_lines(only_task(server))) == 500
        assert sink.send(lines, again=True) == Sent(delivered=1200)
        got = server.log_lines(only_task(server))
        assert got == [f"line {i}" for i in range(1200)]

    def test_equal_lines(self, server: ClearmlServer, sink: ClearmlSink) -> None:
        """Equal lines of one millisecond are told apart: only the one already there is left out."""
        sink.send([text("same", 1)], again=False)
        sink.send([text("same", 1), text("same", 2)], again=True)
        assert server.log_lines(only_task(server)) == ["same", "same"]

    def test_new_process(self, server: ClearmlServer) -> None:
        """A new life of the sink that does not know what arrived reads back all pages of it."""
        memory = MemoryDict()
        first, second = ClearmlSink(), ClearmlSink()
        lines = [text(f"line {i}", i, after_ms=i // 3) for i in range(1200)]
        first.open(RUN, memory)
        first.send(lines, again=False)
        second.open(RUN, memory)
        second.send([*lines, text("new", 1200, after_ms=400)], again=True)
        got = server.log_lines(only_task(server))
        assert got == [*(f"line {i}" for i in range(1200)), "new"]

    def test_halves_after_a_refusal(self, server: ClearmlServer, sink: ClearmlSink) -> None:
        """Lines of an earlier request of a refused batch are not sent again with its halves."""
        lines = [text(f"line {i}", i, after_ms=i) for i in range(700)]
        requests: list[int] = []

        def refuse_second(batch: list[str], send: Any = sink._api.add_events) -> None:
            requests.append(len(batch))
            if len(requests) == 2:
                raise Refused("no")
            send(batch)

        sink._api.add_events = refuse_second  # type: ignore[method-assign, assignment]
        assert deliver(sink, lines) == (700, [])
        assert server.log_lines(only_task(server)) == [f"line {i}" for i in range(700)]
        assert sum(requests) == 700 + 200

    def test_console(self, server: ClearmlServer, sink: ClearmlSink) -> None:
        """What ranks print is told apart by rank, in the line and in its `worker`; stderr has the
        level that the vendor's own capture gives it."""
        out = [
            Text(STREAM, rank, 1, START_NS + rank * 10**6, level, "hi", console=True)
            for rank, level in ((0, "stdout"), (63, "stderr"))
        ]
        assert sink.send(out, again=False) == Sent(delivered=2)
        told = [(e["msg"], e["level"], e["worker"]) for e in server.events.values()]
        mark = STREAM.hex()[:16]
        assert told == [
            ("hi", "info", f"rank0/{mark}/1"),
            ("[rank 63] hi", "error", f"rank63/{mark}/1"),
        ]


class TestParams:
    def test_values(self, server: ClearmlServer, sink: ClearmlSink) -> None:
        """Parameters become text in their rank's section; a later call adds and replaces."""
        first = Params(STREAM, 0, 1, START_NS, {"lr": 0.01, "net/depth": 3, "name": None})
        later = Params(STREAM, 0, 2, START_NS, {"lr": 0.1, "flag": True})
        other = Params(STREAM, 2, 1, START_NS, {"lr": "x"})
        assert sink.send([first, later], again=False) == Sent(delivered=2)
        assert sink.send([other], again=False) == Sent(delivered=1)
        assert server.params(only_task(server)) == {
            "General": {"lr": "0.1", "net/depth": "3", "name": "", "flag": "True"},
            "Rank 2": {"lr": "x"},
        }
        types = {
            n: p["type"]
            for n, p in server.tasks[only_task(server)]["hyperparams"]["General"].items()
        }
        assert types == {"lr": "float", "net/depth": "int", "name": "", "flag": "bool"}

    def test_configuration(self, server: ClearmlServer, sink: ClearmlSink) -> None:
        """What hyperparameters flatten to text is there as it was in the configuration object,
        over all calls, for each rank."""
        first = {"lr": 0.1, "net/depth": 3, "net/freeze": None, "name": "1", "resume": False}
        sink.send([Params(STREAM, 0, 1, START_NS, first)], again=False)
        later = {"lr": 1e-5, "net/head/kind": "linear"}
        both = [Params(STREAM, 0, 2, START_NS, later), Params(STREAM, 2, 1, START_NS, {"lr": 3})]
        sink.send(both, again=False)
        sink.send(both, again=True)
        assert server.configuration(only_task(server)) == {
            "config": {
                "lr": 1e-5,
                "net": {"depth": 3, "freeze": None, "head": {"kind": "linear"}},
                "name": "1",
                "resume": False,
            },
            "config (rank 2)": {"lr": 3},
        }

    @pytest.mark.parametrize("first", [{"a": 1, "a/b": 2}, {"a/b": 2, "a": 1}])
    def test_a_key_and_a_folder(self, first: dict[str, int]) -> None:
        """Of a key that is also a folder of others nothing is lost, however often it is merged."""
        text = configuration("", first)
        again = configuration(text, {"c": 3})
        merged = json.loads(configuration(again, first))
        assert merged in ({"a": 1, "a/b/": 2, "c": 3}, {"a": {"b": 2}, "a/": 1, "c": 3})

    SOURCE: ClassVar[dict[str, Any]] = {
        "source/repository": "git@example.org:team/digits.git",
        "source/branch": "main",
        "source/commit": "c0ffee",
        "source/dirty": True,
        "source/entry_point": "train.py",
        "source/working_dir": "src",
        "source/python": "3.11.7",
        "source/packages": "numpy==1.26.4\ntorch==2.5.1",
        "source/cpu_count": 64,
    }

    def test_source(self, server: ClearmlServer, sink: ClearmlSink, tmp_path: Path) -> None:
        """Where the code comes from stands in the task's script and runtime, not among the
        hyperparameters; uncommitted changes go away with a launch that has none."""
        task = server.tasks[only_task(server)]
        mine = {**self.SOURCE, "source/of_mine": 1}
        diff = media(tmp_path, "file", "source.diff", "source.diff", b"+ a line\n")
        sink.send([Params(STREAM, 0, 1, START_NS, mine), diff], again=False)
        assert task["script"] == {
            "repository": "git@example.org:team/digits.git",
            "branch": "main",
            "version_num": "c0ffee",
            "entry_point": "train.py",
            "working_dir": "src",
            "binary": "python3.11",
            "requirements": {"pip": "numpy==1.26.4\ntorch==2.5.1"},
            "diff": "+ a line\n",
        }
        assert task["runtime"] == {
            "rankgate_run": "run-1",
            "python_version": "3.11.7",
            "cpu_cores": 64,
            "uncommitted_changes": True,
        }
        assert server.params(task["id"]) == {"General": {"source/of_mine": "1"}}
        assert server.artifacts(task["id"]) == {}
        clean = {"source/dirty": False, "source/commit": "beef"}
        sink.send([Params(STREAM, 0, 3, START_NS, clean)], again=False)
        assert (task["script"]["diff"], task["script"]["version_num"]) == ("", "beef")


class TestMedia:
    def test_image(self, server: ClearmlServer, sink: ClearmlSink, tmp_path: Path) -> None:
        """An image is a debug sample under its content; sent again it is still one."""
        item = media(tmp_path, "image", "val/pred", "p.png", b"pixels")
        sink.send([item], again=False)
        sink.send([item], again=True)
        (event,) = server.images(only_task(server))
        assert (event["metric"], event["variant"], event["iter"]) == ("val", "pred", 7)
        assert item.sha256[:32] in event["key"]
        assert server.file_at(event["url"]) == b"pixels"

    def test_figure_picture(self, server: ClearmlServer, sink: ClearmlSink, tmp_path: Path) -> None:
        """A figure that is a picture becomes a plot that shows it."""
        sink.send([media(tmp_path, "figure", "cm", "cm.png", b"png")], again=False)
        plot = server.plots(only_task(server))["cm", "cm", 7]
        assert server.file_at(plot["layout"]["images"][0]["source"]) == b"png"

    def test_figure_plotly(self, server: ClearmlServer, sink: ClearmlSink, tmp_path: Path) -> None:
        """A plotly figure becomes a plot as it is, nan as null."""
        content = b'{"data": [{"y": [1, NaN]}], "layout": {}}'
        sink.send([media(tmp_path, "figure", "a/b", "f.json", content)], again=False)
        plot = server.plots(only_task(server))["a", "b", 7]
        assert plot == {"data": [{"y": [1, None]}], "layout": {}}

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("t.csv", b"a,b\n1,x\n2,\n"),
            ("t.json", b'[{"a": "1", "b": "x"}, {"a": "2"}]'),
            ("t.json", b'[["a", "b"], ["1", "x"], ["2", ""]]'),
            ("t.json", b'{"columns": ["a", "b"], "rows": [["1", "x"], ["2"]]}'),
        ],
    )
    def test_table(
        self, server: ClearmlServer, sink: ClearmlSink, tmp_path: Path, name: str, content: bytes
    ) -> None:
        """A table in any of the forms becomes the same plot."""
        sink.send([media(tmp_path, "table", "t", name, content)], again=False)
        (trace,) = server.plots(only_task(server))["t", "t", 7]["data"]
        assert trace["header"]["values"] == ["a", "b"]
        assert trace["cells"]["values"] == [["1", "2"], ["x", ""]]

    def test_file(self, server: ClearmlServer, sink: ClearmlSink, tmp_path: Path) -> None:
        """A file is an artifact with size and hash; a later one of the key replaces it."""
        sink.send([media(tmp_path, "file", "out/r.csv", "r.csv", b"old")], again=False)
        new = media(tmp_path, "file", "out/r.csv", "r.csv", b"newer")
        other = media(tmp_path, "file", "out/r.csv", "r.csv", b"other", rank=3)
        sink.send([new, other], again=False)
        artifacts = server.artifacts(only_task(server))
        assert set(artifacts) == {"out/r.csv", "out/r.csv (rank 3)"}
        assert artifacts["out/r.csv"]["hash"] == new.sha256
        assert artifacts["out/r.csv"]["content_size"] == 5
        assert server.file_at(artifacts["out/r.csv"]["uri"]) == b"newer"
        assert server.file_at(artifacts["out/r.csv (rank 3)"]["uri"]) == b"other"

    def test_checkpoint(self, server: ClearmlServer, sink: ClearmlSink, tmp_path: Path) -> None:
        """A checkpoint is one output model per key, also when an answer is lost and it changes."""
        one = media(tmp_path, "checkpoint", "best.pt", "best.pt", b"w1", best=True, epoch=1)
        two = media(tmp_path, "checkpoint", "best.pt", "best.pt", b"w2", epoch=2, metrics={"m": 1})
        server.fail(r"models\.create", mode="apply_then_cut")
        with pytest.raises(Unavailable):
            sink.send([one], again=False)
        sink.send([one], again=True)
        assert server.output_models(only_task(server))["best.pt"]["tags"] == ["best"]
        sink.send([two], again=False)
        (model,) = server.models.values()
        assert server.output_models(only_task(server)) == {"best.pt": model}
        assert (model["name"], model["framework"]) == ("first run - best.pt", "PyTorch")
        assert (model["comment"], model["iteration"]) == ("epoch 2, m = 1", 7)
        assert server.file_at(model["uri"]) == b"w2"

    def test_file_server_down(
        self, server: ClearmlServer, sink: ClearmlSink, tmp_path: Path
    ) -> None:
        """While files cannot be uploaded nothing refers to them."""
        server.fail(r"^/files/$", status=503)
        item = media(tmp_path, "image", "a", "p.png", b"pixels")
        with pytest.raises(Unavailable, match="503"):
            sink.send([item], again=False)
        assert not server.events
        assert sink.send([item], again=True) == Sent(delivered=1)

    def test_file_gone(self, server: ClearmlServer, sink: ClearmlSink, tmp_path: Path) -> None:
        """A file that is no longer on the disk is refused."""
        item = media(tmp_path, "file", "a", "a.bin", b"x")
        item.path.unlink()
        with pytest.raises(Refused, match="gone"):
            sink.send([item], again=False)

    def test_preview(self, server: ClearmlServer, sink: ClearmlSink, tmp_path: Path) -> None:
        """The web page shows the beginning of a text file, and name and size of any other."""
        long = b"a,b\n" * 1000
        sink.send([media(tmp_path, "file", "t", "t.csv", long)], again=False)
        sink.send([media(tmp_path, "file", "w", "w.bin", b"\0\1")], again=False)
        found = server.artifacts(only_task(server))
        shown = found["t"]["type_data"]["preview"]
        assert shown.startswith("t.csv - 4000 bytes\na,b\na,b\n")
        assert len(shown) < 2100
        assert found["w"]["type_data"]["preview"] == "w.bin - 2 bytes"

    def test_model_metadata(self, server: ClearmlServer, sink: ClearmlSink, tmp_path: Path) -> None:
        """A checkpoint's metrics, step and checksum stand in the model's own table, and its classes
        are its labels."""
        item = media(
            tmp_path, "checkpoint", "last.pt", "last.pt", b"w", final=True, metrics={"map": 0.5}
        )
        names = Summary(STREAM, 0, 1, START_NS, {"model/names": '["cat", "dog"]'})
        sink.send([names], again=False)
        sink.send([item], again=False)
        (model,) = server.models.values()
        assert model["tags"] == ["final"]
        assert model["labels"] == {"cat": 0, "dog": 1}
        assert {k: (v["value"], v["type"]) for k, v in model["metadata"].items()} == {
            "map": ("0.5", "float"),
            "step": ("7", "int"),
            "sha256": (item.sha256, "str"),
        }


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


class TestSilence:
    def test_three_hours_without_anything(self, server: ClearmlServer) -> None:
        """A task whose run logs nothing for three hours is not stopped by the server's watchdog,
        as it is told each minute that the run lives."""
        clock = Clock()
        sink = ClearmlSink(monotonic=clock)
        sink.open(RUN, MemoryDict())
        for i in range(3 * 120):
            clock.seconds += 30
            server.seconds += 30
            assert sink.send([], again=False) == Sent()
            if i % 30 == 0:
                server.watchdog()
                assert server.tasks[only_task(server)]["status"] == "in_progress"
        pings = sum(action == "tasks.ping" for action, _ in server.calls)
        assert 170 <= pings <= 180
        assert sink.stop_asked == ""

    def test_stopped_by_the_watchdog(self, server: ClearmlServer) -> None:
        """A task that the server gave up while nobody could reach it is started again: no person
        has asked the training to stop."""
        clock = Clock()
        sink = ClearmlSink(monotonic=clock)
        sink.open(RUN, MemoryDict())
        server.seconds += 9000
        server.watchdog()
        assert server.tasks[only_task(server)]["status"] == "stopped"
        clock.seconds += KEEP_ALIVE_SECONDS
        sink.send([], again=False)
        assert server.tasks[only_task(server)]["status"] == "in_progress"
        assert sink.stop_asked == ""

    def test_a_busy_run_is_looked_at_too(self, server: ClearmlServer) -> None:
        """Between deliveries the status is read at most each 10 s, and a refusal of that does not
        blame the batch."""
        clock = Clock()
        sink = ClearmlSink(monotonic=clock)
        sink.open(RUN, MemoryDict())
        before = len(server.calls)
        for i in range(40):
            clock.seconds += 1
            sink.send([rows({"a": [1.0]}, first=i)], again=False)
        looks = [action for action, _ in server.calls[before:]].count("tasks.get_all")
        assert looks == 4
        clock.seconds += 100
        server.fail(r"tasks\.get_all", status=400)
        with pytest.raises(Unavailable, match="does not tell"):
            sink.send([rows({"a": [1.0]}, first=50)], again=False)


class TestAbort:
    def aborted(self, server: ClearmlServer, memory: MemoryDict) -> ClearmlSink:
        clock = Clock()
        sink = ClearmlSink(monotonic=clock)
        sink.open(RUN, memory)
        sink.send([rows({"a": [1.0]})], again=False)
        assert sink.stop_asked == ""
        server.abort(only_task(server))
        clock.seconds += KEEP_ALIVE_SECONDS
        sink.send([], again=False)
        return sink

    def test_asks_to_stop(self, server: ClearmlServer) -> None:
        """An abort in the web page is a wish to stop; what the ranks still log arrives."""
        sink = self.aborted(server, MemoryDict())
        assert sink.stop_asked == "in ClearML the task was set to stopped: Stopped by u"
        sink.send([rows({"a": [2.0]}, first=1)], again=False)
        task = only_task(server)
        assert server.tasks[task]["status"] == "stopped"
        assert len(server.scalars(task)) == 2

    @pytest.mark.parametrize(
        ("state", "status"), [("completed", "stopped"), ("lost", "stopped"), ("failed", "failed")]
    )
    def test_ending(self, server: ClearmlServer, state: str, status: str) -> None:
        """A training that ends after an abort is stopped, unless it failed."""
        sink = self.aborted(server, MemoryDict())
        sink.close(state, "why")
        task = server.tasks[only_task(server)]
        assert task["status"] == status
        assert task["status_reason"] == f"training {state}"
        assert task["status_message"].endswith("why")

    def test_outlives_the_process(self, server: ClearmlServer) -> None:
        """A new life of the sink asks on and leaves the task stopped; a new launch after the end
        opens it again."""
        memory = MemoryDict()
        first = self.aborted(server, memory)
        second = ClearmlSink()
        second.open(RUN, memory)
        assert second.stop_asked == first.stop_asked
        assert server.tasks[only_task(server)]["status"] == "stopped"
        second.close("completed", "")
        third = ClearmlSink()
        third.open(RUN, memory)
        assert third.stop_asked == ""
        assert server.tasks[only_task(server)]["status"] == "in_progress"

    def test_while_no_process_is_there(self, server: ClearmlServer) -> None:
        """A task aborted between two lives of the sink stays stopped, and the next life asks."""
        memory = MemoryDict()
        ClearmlSink().open(RUN, memory)
        server.abort(only_task(server))
        second = ClearmlSink()
        second.open(RUN, memory)
        assert second.stop_asked == "in ClearML the task was set to stopped: Stopped by u"
        assert server.tasks[only_task(server)]["status"] == "stopped"

    def test_an_end_without_a_receipt_is_no_abort(self, server: ClearmlServer) -> None:
        """A sink killed after it told the end, before that was noted, takes it for no wish."""
        memory = MemoryDict()
        first = ClearmlSink()
        first.open(RUN, memory)
        noted = dict(memory.data)
        first.close("completed", "")
        memory.data = noted
        second = ClearmlSink()
        second.open(RUN, memory)
        assert second.stop_asked == ""
        assert server.tasks[only_task(server)]["status"] == "in_progress"
        second.close("completed", "")
        assert server.tasks[only_task(server)]["status"] == "completed"

    def test_deleted_in_mid_run(self, server: ClearmlServer) -> None:
        """A task deleted while the run lives turns the sink off."""
        clock = Clock()
        sink = ClearmlSink(monotonic=clock)
        sink.open(RUN, MemoryDict())
        server.tasks.clear()
        clock.seconds += KEEP_ALIVE_SECONDS
        with pytest.raises(Off, match="deleted"):
            sink.send([], again=False)


READ = """
import json, sys
from clearml import Task
task = Task.get_task(task_id=sys.argv[1])
model = task.models["output"][0]
print("READ=" + json.dumps({
    "project": task.get_project_name(), "name": task.name, "tags": task.get_tags(),
    "status": str(task.status), "reason": task.data.status_message,
    "parameters": task.get_parameters(),
    "configuration": task.get_configuration_object_as_dict("config"),
    "repository": task.data.script.repository, "commit": task.data.script.version_num,
    "artifact": open(task.artifacts["out/r.csv"].get_local_copy(), "rb").read().decode(),
    "model": [model.name, model.framework, model.tags, model.url, model.get_all_metadata()],
}))
"""


class TestReadBack:
    def test_by_the_vendors_package(
        self, server: ClearmlServer, sink: ClearmlSink, tmp_path: Path
    ) -> None:
        """The vendor's own `Task` reads what was sent: names, parameters, configuration, script,
        artifact, model, status."""
        config = {"lr": 0.1, "net/freeze": None, "net/depth": 3, "source/commit": "c0ffee"}
        sink.send([*all_kinds(tmp_path), Params(STREAM, 0, 9, START_NS, config)], again=False)
        sink.close("failed", "boom")
        result = child(READ, {}, only_task(server))
        assert "READ=" in result.stdout, result.stderr
        read = json.loads(result.stdout.partition("READ=")[2].splitlines()[0])
        assert (read["project"], read["name"]) == ("digits", "first run")
        assert set(read["tags"]) == {"nightly", "rankgate:run-1"}
        assert (read["status"], read["reason"]) == ("failed", "boom")
        assert read["parameters"]["General/net/depth"] == "3"
        assert read["parameters"]["properties/note"] == "good"
        assert read["configuration"] == {
            "lr": 0.1,
            "none": None,
            "net": {"freeze": None, "depth": 3},
        }
        assert read["commit"] == "c0ffee"
        assert read["artifact"] == "file"
        name, framework, tags, url, metadata = read["model"]
        assert (name, framework, tags) == ("first run - best.pt", "PyTorch", ["best"])
        assert server.file_at(url) == b"weights"
        assert metadata["step"]["value"] == "7"


class TestClose:
    @pytest.mark.parametrize(
        ("state", "status"), [("completed", "completed"), ("failed", "failed"), ("lost", "stopped")]
    )
    def test_state(self, server: ClearmlServer, sink: ClearmlSink, state: str, status: str) -> None:
        """The run's end is the task's status with its reason, however often it is told."""
        sink.close(state, "why")
        sink.close(state, "why")
        task = server.tasks[only_task(server)]
        assert (task["status"], task["status_message"]) == (status, "why")

    def test_failed_and_reopened(self, server: ClearmlServer) -> None:
        """A new generation after a failure reopens the task and may complete it."""
        memory = MemoryDict()
        for state in ("failed", "completed"):
            sink = ClearmlSink()
            sink.open(RUN, memory)
            assert server.tasks[only_task(server)]["status"] == "in_progress"
            sink.close(state, "")
        assert server.tasks[only_task(server)]["status"] == "completed"


IMPORT = (
    "import sys\nfrom clearml import Task\n"
    "print('TASK=' + Task.import_offline_session(sys.argv[1]))"
)


def all_kinds(folder: Path) -> list[Item]:
    return [
        rows({"train/loss": [0.5, 1 / 3], "n": [1, 2]}),
        rows({"train/loss": [2.0]}, rank=3),
        text("hello — x", 1),
        text("from three", 2, rank=3, after_ms=5),
        Params(STREAM, 0, 1, START_NS, {"lr": 0.1, "none": None}),
        Summary(STREAM, 0, 2, START_NS, {"map": 0.5, "note": "good"}),
        media(folder, "image", "val/pred", "p.png", b"pixels"),
        media(folder, "figure", "cm", "cm.png", b"figure"),
        media(folder, "table", "t", "t.csv", b"a,b\n1,2\n"),
        media(folder, "file", "out/r.csv", "r.csv", b"file"),
        media(folder, "checkpoint", "best.pt", "best.pt", b"weights", best=True),
    ]


class TestExport:
    def export(self, folder: Path, items: list[Item], final: Path | None = None) -> None:
        sink = ClearmlExport(ClearmlConfig(mode="offline", tags=("mine",)), folder, final)
        sink.open(RUN, MemoryDict())
        assert sink.send(items, again=False).delivered == sum(item.items for item in items)
        sink.close("failed", "boom")

    def imported(self, server: ClearmlServer, folder: Path) -> str:
        result = child(IMPORT, {}, str(folder))
        assert "TASK=" in result.stdout, result.stderr
        return result.stdout.partition("TASK=")[2].split()[0]

    def test_import(self, server: ClearmlServer, tmp_path: Path) -> None:
        """The vendor's importer brings every kind to the server, also from a moved folder."""
        self.export(tmp_path / "new", all_kinds(tmp_path), tmp_path / "done")
        (tmp_path / "new").rename(tmp_path / "done")
        task = self.imported(server, tmp_path / "done")
        assert server.scalars(task) == {
            ("train", "loss", 0): 0.5,
            ("train", "loss", 10): 1 / 3,
            ("n", "n", 0): 1.0,
            ("n", "n", 10): 2.0,
            ("train", "loss (rank 3)", 0): 2.0,
            ("Summary", "map", -(2**31)): 0.5,
        }
        assert server.log_lines(task) == ["hello — x", "[rank 3] from three"]
        assert server.params(task)["General"] == {"lr": "0.1", "none": ""}
        assert server.configuration(task) == {"config": {"lr": 0.1, "none": None}}
        assert server.params(task)["properties"] == {"note": "good"}
        assert server.tasks[task]["tags"] == ["nightly", "mine", "rankgate:run-1"]
        assert "training failed: boom" in server.tasks[task]["comment"]
        self.check_files(server, task)

    def check_files(self, server: ClearmlServer, task: str) -> None:
        (image,) = server.images(task)
        assert server.file_at(image["url"]) == b"pixels"
        plots = server.plots(task)
        assert server.file_at(plots["cm", "cm", 7]["layout"]["images"][0]["source"]) == b"figure"
        assert plots["t", "t", 7]["data"][0]["cells"]["values"] == [["1"], ["2"]]
        assert server.file_at(server.artifacts(task)["out/r.csv"]["uri"]) == b"file"
        (model,) = server.output_models(task).values()
        assert model["tags"] == ["best"]
        assert server.file_at(model["uri"]) == b"weights"

    def test_unknown_file_server(
        self, server: ClearmlServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Exported without a known file server, a checkpoint still comes through as an artifact."""
        monkeypatch.delenv("CLEARML_FILES_HOST")
        self.export(tmp_path / "out", all_kinds(tmp_path)[-1:])
        monkeypatch.setenv("CLEARML_FILES_HOST", server.files_url)
        task = self.imported(server, tmp_path / "out")
        assert server.file_at(server.artifacts(task)["best.pt"]["uri"]) == b"weights"
        assert list(server.output_models(task)) == ["best"]

    def test_again(self, tmp_path: Path) -> None:
        """A batch written before, in this life or an earlier one cut short, is not doubled."""
        items = all_kinds(tmp_path)
        self.export(tmp_path / "out", items)
        log = tmp_path / "out" / "log.jsonl"
        whole = log.read_bytes()
        log.write_bytes(whole + b'[{"type": "lo')  # killed while it wrote
        sink = ClearmlExport(ClearmlConfig(), tmp_path / "out")
        sink.open(RUN, MemoryDict())
        sink.send(items, again=True)
        assert log.read_bytes() == whole
        task = json.loads((tmp_path / "out" / "task.json").read_text())
        assert len(task["execution"]["artifacts"]) == 2
        assert len(task["offline_output_models"]) == 1

    def test_needs_no_package(self, tmp_path: Path) -> None:
        """The export is written by a process that never imports the vendor's package."""
        code = (
            "import sys, pathlib\n"
            "from gateway.sinks.base import RunInfo\n"
            "from gateway.sinks.clearml import ClearmlConfig\n"
            "from gateway.sinks.clearml_export import ClearmlExport\n"
            "sink = ClearmlExport(ClearmlConfig(), pathlib.Path(sys.argv[1]))\n"
            f"sink.open({RUN!r}, None)\n"
            "sink.close('completed', '')\n"
            "print('clearml' in sys.modules)"
        )
        assert child(code, {}, str(tmp_path / "out")).stdout == "False\n"
