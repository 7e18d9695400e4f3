"""What the shell around `Peers` tells and watches; under load it is tests/flow/test_stress.py."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from gateway.ingest import journals, limits
from gateway.ingest.journals import RunStore
from gateway.ingest.limits import Limits, Watch, stored_bytes
from gateway.ingest.listener import Ingest
from gateway.ingest.media import Blob, Job
from gateway.ingest.peers import Peers
from gateway.ingest.telling import write_json
from gateway.ingest.worker import Worker
from gateway.view.problems import twins
from rank_client.wire import frames
from rank_client.wire.disk import OsDisk
from rank_client.wire.frames import Type

A, B = b"a" * 16, b"b" * 16
SECOND = 10**9


class NoSocket:
    """Takes every answer and has no message."""

    def poll(self, timeout: int) -> int:
        return 0

    def send_multipart(self, parts: Any, flags: int, copy: bool) -> None:
        pass


class Shell:
    """An Ingest without network, a tick at a time."""

    def __init__(self, root: Path, given: Limits | None = None) -> None:
        self.root = root
        self.now_ns = SECOND
        store, worker = RunStore(root), Worker()
        self.peers = Peers(5, store, 1 << 20, lambda run: False)
        socket: zmq.Socket[bytes] = NoSocket()  # type: ignore[assignment]
        watch = Watch(root, given or Limits(reserve_bytes=0))
        self.ingest = Ingest(store, self.peers, socket, [], watch, worker, lambda: self.now_ns)

    def hello(self, stream: bytes, **more: Any) -> None:
        body = {"v": [1, 1], "run": "r", "kind": "live", "first": 1, **more}
        self.peers.receive(self.now_ns, stream, frames.control(Type.HELLO, 0, stream, body), [])

    def ping(self, stream: bytes, **more: Any) -> None:
        self.peers.receive(self.now_ns, stream, frames.control(Type.PING, 5, stream, more), [])

    def tick(self) -> None:
        self.ingest._tick()

    def live(self) -> dict[str, dict[str, Any]]:
        told = json.loads((self.root / "runs/r/live.json").read_text())["streams"]
        return {s["stream"]: s for s in told}


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    made = Shell(tmp_path)
    yield made
    made.ingest.worker.start()
    made.ingest.worker.close()


# --- live.json -----------------------------------------------------------------------------------


def test_live_json_tells_of_each_stream(shell: Shell) -> None:
    """Who it is, what it told last and how far it is stored, each second."""
    shell.hello(A, rank=3, node="n1", pid=7)
    shell.ping(A, step=9, offset=0.25, last=12)
    shell.tick()
    told = shell.live()[A.hex()]
    names = ("rank", "node", "pid", "step", "offset", "last", "silent", "durable")
    assert [told[name] for name in names] == [3, "n1", 7, 9, 0.25, 12, False, 0]


@pytest.mark.parametrize(
    ("number", "link"), [(0, "up"), (errno.EAGAIN, "up"), (errno.EHOSTUNREACH, "gone")]
)
def test_the_connection_of_who_is_not_heard_is_tried(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, number: int, link: str
) -> None:
    """6 s after its last frame a stream is sent something; whether that goes out tells if it is
    connected. Heard again, it is. The journal is told nothing of it."""
    shell.hello(A)
    shell.ping(A)
    shell.now_ns += 5 * SECOND
    shell.tick()
    sent: list[bytes] = []

    def send(self: NoSocket, parts: Any, flags: int, copy: bool) -> None:
        sent.append(parts[0])
        if number:
            raise zmq.Again if number == errno.EAGAIN else zmq.ZMQError(number)

    monkeypatch.setattr(NoSocket, "send_multipart", send)
    before = shell.peers.streams[A].journal.durable_seq
    shell.tick()
    ticks = shell.peers.streams[A].journal.durable_seq - before
    assert (sent, shell.live()[A.hex()]["link"]) == ([], "up")
    shell.now_ns += 2 * SECOND
    shell.tick()
    assert (sent, shell.live()[A.hex()]["link"]) == ([A], link)
    assert shell.peers.streams[A].journal.durable_seq - before == 2 * ticks
    shell.ping(A)
    shell.tick()
    assert shell.live()[A.hex()]["link"] == "up"


def test_a_stream_from_before_a_restart_has_no_known_connection(tmp_path: Path) -> None:
    """Nobody knows which connection it had until it speaks again."""
    first = Shell(tmp_path)
    first.hello(A)
    first.tick()
    first.ingest.store.drop("r")
    again = Shell(tmp_path)
    again.peers.expect(again.now_ns, "r")
    again.now_ns += 10 * SECOND
    again.tick()
    assert again.live()[A.hex()]["link"] == ""
    for shell in (first, again):
        shell.ingest.worker.start()
        shell.ingest.worker.close()


def test_two_live_processes_of_one_rank_are_told_with_both_pids(shell: Shell) -> None:
    """The older stream is tagged with the newer one and with how long both have been heard; after
    ten seconds that is a problem of the run, with host and pid of both."""
    shell.hello(A, rank=0, node="n1", pid=1)
    shell.now_ns += 5 * SECOND
    shell.hello(B, rank=0, node="n2", pid=2)
    shell.tick()
    assert shell.live()[A.hex()]["superseded"] == B.hex()
    assert "superseded" not in shell.live()[B.hex()]
    assert twins(shell.live().values()) == ()
    shell.now_ns += 11 * SECOND
    for stream in (A, B):
        shell.ping(stream)
    shell.tick()
    [problem] = twins(shell.live().values())
    assert (problem.kind, problem.rank) == ("twins", 0)
    for words in ("rank 0", "n1 pid 1", "n2 pid 2"):
        assert words in problem.text


def test_an_old_process_that_ends_is_no_twin(shell: Shell) -> None:
    """An older life that is not heard any more once the newer has begun is no problem."""
    shell.hello(A, rank=0)
    shell.now_ns += 5 * SECOND
    shell.hello(B, rank=0)
    shell.now_ns += 9 * SECOND
    shell.ping(B)
    shell.tick()
    assert shell.live()[A.hex()]["both_seconds"] == 0
    assert twins(shell.live().values()) == ()


# --- a disk without room -------------------------------------------------------------------------


def test_status_files_are_written_on_a_full_disk_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no new file finds room, the old one is written over, so that it never looks as if
    the gateway were gone."""
    path = tmp_path / "ingest.json"
    write_json(path, {"at_ns": 1, "text": "x" * 100})

    def no_room(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", no_room)
    write_json(path, {"at_ns": 2})
    assert json.loads(path.read_text()) == {"at_ns": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["ingest.json"]


def test_the_reserve_is_kept_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full begins below the reserve and ends some megabytes above it; alarms say so, and are
    logged once at each end."""
    free = 100 << 20
    stats = os.statvfs(tmp_path)

    class Stats:
        f_frsize = stats.f_frsize

        @property
        def f_bavail(self) -> int:
            return free // stats.f_frsize

    monkeypatch.setattr(os, "statvfs", lambda path: Stats())
    watch = Watch(tmp_path, Limits(reserve_bytes=100 << 20))
    assert not watch.full(False)
    free -= 1 << 20
    assert watch.full(False)
    free += 2 << 20
    assert watch.full(True)
    free += limits.MORE_ROOM_BYTES
    assert not watch.full(True)


def test_alarms_are_logged_when_they_begin_and_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One line at each end, however long it lasts."""
    watch = Watch(tmp_path, Limits())
    with caplog.at_level(logging.INFO, "rankgate.ingest"):
        for full in (True, True, True, False, False):
            watch.look(full, ())
    told = [r.message for r in caplog.records]
    assert len(told) == 2
    assert "less than 256 MiB left" in told[0]
    assert told[1] == f"no more: {told[0]}"
    assert watch.alarms == []


def test_a_run_is_over_its_quota_by_journal_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ingest wrote of a run counts, not what others made of it; the alarm names the run."""
    monkeypatch.setattr(limits, "LOOK_SECONDS", 0.0)
    for name, size in (("journal/1.log", 600), ("media/ab/abc", 500), ("series.db", 9999)):
        path = tmp_path / "runs/r" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))
    assert stored_bytes(tmp_path / "runs/r") == 1100
    for quota, over in ((1101, set()), (1100, {"r"})):
        watch = Watch(tmp_path, Limits(0, quota))
        watch.look(False, ["r", "other"])
        assert watch.over_quota == over
        assert [("run r" in alarm) for alarm in watch.alarms] == [True] * len(over)


def test_descriptors_are_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From four fifths of the limit on there is an alarm, and close to it no new run is taken."""
    used = len(os.listdir("/dev/fd"))
    for limit, alarms, crowded in ((10 * used, 0, False), (used * 1.1, 1, False), (used, 1, True)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, n=limit: (int(n), int(n)))
        watch = Watch(tmp_path, Limits())
        watch.look(False, ())
        assert (len(watch.alarms), watch.crowded) == (alarms, crowded)


def test_a_journal_that_cannot_be_opened_is_not_read_for_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failure the next ones are told of it without another look, for a while."""
    tries = []

    def no_room(*arguments: object) -> None:
        tries.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(journals, "Journal", no_room)
    store = RunStore(tmp_path)
    for _ in range(5):
        with pytest.raises(OSError, match="No space"):
            store.journal("r")
    assert len(tries) == 1


# --- the thread for files ------------------------------------------------------------------------


def test_the_worker_does_jobs_in_order_and_wakes_its_owner(tmp_path: Path) -> None:
    """Jobs are done one after the other by another thread, whatever they end with."""
    worker = Worker()
    worker.start()
    blob = Blob.announced(OsDisk(), "r", tmp_path, "a" * 64, 3)
    jobs = [Job(A, blob, "open"), Job(A, blob, "write", 1, b"abc"), Job(A, blob, "finish")]
    for job in jobs:
        worker.put(job)
    done: list[Job] = []
    poller, deadline = zmq.Poller(), time.monotonic() + 20
    poller.register(worker.wake, zmq.POLLIN)
    while len(done) < 3:
        assert time.monotonic() < deadline
        if poller.poll(1000):
            done += worker.done()
    assert done == jobs
    assert [type(job.error).__name__ for job in jobs] == ["NoneType", "NoneType", "BadBlob"]
    assert not poller.poll(0)
    worker.close()
    assert worker.name not in {t.name for t in threading.enumerate()}
