"""The gateway's real processes under stress: floods, full disks, disks that fail, large files."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway.view.serving import gateway_of
from gateway.view.terminal import gateway_lines
from rank_client.link import Link
from rank_client.media import send_file
from rank_client.rendezvous import ipc_address
from rank_client.sender import Carrier
from rank_client.wire.records import Kind, pack
from rank_client.wire.session import ClientSession

from .job import ENDLESS, ROOT, Job, wait_until

MIB = 1 << 20
QUIET_P99_SECONDS = 0.05
FLOOD = Path(__file__).with_name("flood.py")

_INGEST = """
import pathlib, sys
from gateway.ingest.limits import Limits
from gateway.ingest.listener import serve
from rank_client.wire.disk import OsDisk
disk, fails = OsDisk(), pathlib.Path(sys.argv[1]) / "fails"
sync = disk.sync
def failing(fd):
    if fails.exists():
        raise OSError(5, "Input/output error")
    sync(fd)
disk.sync = failing
serve(pathlib.Path(sys.argv[1]), [sys.argv[2]], limits=Limits(int(sys.argv[3]), 0), disk=disk)
"""

_SEND = """
import os, pathlib, sys
from rank_client.link import Link
from rank_client.media import send_file
path, link = pathlib.Path(sys.argv[2]), Link(sys.argv[1])
link.near = sys.argv[3] == "near"
assert send_file(path, "quiet", os.urandom(16), 1, link, lambda: False)
"""


class Ingest:
    """Ingest alone, as its own process; `fails` makes each sync of its disk fail."""

    def __init__(self, directory: Path, reserve_bytes: int = 0) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.address = ipc_address(directory)
        self.fails = directory / "fails"
        words = (sys.executable, "-c", _INGEST, str(directory), self.address, str(reserve_bytes))
        self.process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        wait_until(lambda: self.told().get("pid") == self.process.pid, what="ingest answers")

    def __enter__(self) -> Ingest:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=20)

    def told(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.directory / "ingest.json").read_text())
        except (OSError, ValueError):
            return {}
        return found

    def rss_mib(self) -> float:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(n.split()[1]) / 1024 for n in lines if n.startswith("VmRSS"))


class Records:
    """A source of text records, each of which may be timed from being there to its ack."""

    first_kept = 1

    def __init__(self, size: int = 100) -> None:
        self.last = 0
        self._body = bytes(size)

    def read(self, first: int, max_bytes: int) -> tuple[int, bytes]:
        numbers = range(first, min(self.last, first + max(1, max_bytes // 200)) + 1)
        return len(numbers), b"".join(pack(Kind.TEXT, n, self._body) for n in numbers)


class Quiet:
    """A rank that logs one record at a time and waits for its acknowledgement."""

    def __init__(self, address: str, run: str = "quiet") -> None:
        self.source = Records()
        hello = {"run": run, "kind": "live", "rank": 0}
        self.session = ClientSession(os.urandom(16), lambda: hello, self.source, random.random)
        self.link = Link(address)
        self.carrier = Carrier(self.session, self.link)

    def until(self, condition: Callable[[], bool], seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"no answer within {seconds:g} s"
            self.link.wait(0.01)
            self.carrier.step(time.monotonic())

    def latencies(self, n: int, pause: float = 0.002) -> list[float]:
        """Seconds from a record to its acknowledgement, sorted."""
        self.until(lambda: self.session.state == "open")
        out = []
        for _ in range(n):
            start = time.monotonic()
            self.source.last += 1
            self.carrier.step(start)
            self.until(lambda: self.session.durable >= self.source.last)
            out.append(time.monotonic() - start)
            time.sleep(pause)
        return sorted(out)

    def close(self) -> None:
        self.link.close()


def allowed(alone: float) -> float:
    """50 ms, or more on a machine that is too busy for it without any stress."""
    return max(QUIET_P99_SECONDS, 3 * alone)


def p99(latencies: list[float]) -> float:
    return latencies[int(len(latencies) * 0.99)]


@contextmanager
def flooded(address: str, peers: int, frames_: str) -> Iterator[subprocess.Popen[str]]:
    """See flood.py."""
    words = (sys.executable, str(FLOOD), address, str(peers), frames_)
    flood = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert flood.stdout is not None
        assert flood.stdout.readline() == "ready\n"
        yield flood
    finally:
        out, _ = flood.communicate(timeout=20)
    assert int(out) > 1000, "no flood"


@pytest.mark.parametrize("frames_", ["in_order", "out_of_order", "no_frame"])
def test_a_flood_does_not_delay_a_quiet_rank(tmp_path: Path, frames_: str) -> None:
    """While one peer sends without end, the acknowledgements of another come within 50 ms, but
    for one in a hundred."""
    with Ingest(tmp_path / "data") as ingest:
        quiet = Quiet(ingest.address)
        alone = p99(quiet.latencies(100))
        with flooded(ingest.address, 1, frames_):
            rounds = [quiet.latencies(150) for _ in range(4)]
        alone = max(alone, p99(quiet.latencies(100)))
        quiet.close()
        found = min(rounds, key=p99)
        assert p99(found) < allowed(alone), (alone, [found[len(found) // 2], *found[-5:]])


def test_a_flood_of_many_does_not_grow_memory(tmp_path: Path) -> None:
    """Many peers that ignore credit and read no answer make the gateway hold some megabytes each
    in its sockets, and no more however long they go on; a good rank is served meanwhile."""
    peers = 16
    with Ingest(tmp_path / "data") as ingest:
        before = highest = ingest.rss_mib()
        with flooded(ingest.address, peers, "out_of_order"):
            quiet = Quiet(ingest.address)
            for _ in range(20):
                quiet.latencies(5)
                highest = max(highest, ingest.rss_mib())
            quiet.close()
        assert highest - before < peers * 4 + 16, (before, highest)


def test_a_peer_of_bad_frames_is_paused(tmp_path: Path) -> None:
    """A peer that sends what is no frame is soon dropped unread, which ingest.json counts."""
    dropped = "dropped: too many bad frames"
    with Ingest(tmp_path / "data") as ingest:
        with flooded(ingest.address, 1, "no_frame"):
            wait_until(lambda: ingest.told()["counts"].get(dropped, 0) > 1000)
        assert ingest.told()["counts"]["rejected: strikes"] == 1
        assert ingest.told()["counts"]["bad frame: no magic"] == 20


def test_a_disk_that_cannot_sync_stops_ingest(tmp_path: Path) -> None:
    """When fsync fails nothing is acknowledged and ingest ends with 74; the next one finds what
    was acknowledged, and the rank sends the rest again."""
    with Ingest(tmp_path / "data") as ingest:
        quiet = Quiet(ingest.address)
        quiet.latencies(3)
        ingest.fails.touch()
        quiet.source.last += 1
        quiet.carrier.step(time.monotonic())
        _, err = ingest.process.communicate(timeout=20)
        assert ingest.process.returncode == 74, err
        quiet.carrier.step(time.monotonic())
        assert quiet.session.durable == 3
        ingest.fails.unlink()
    with Ingest(tmp_path / "data"):
        quiet.until(lambda: quiet.session.durable == 4)
        assert not quiet.session.journal_changed
        quiet.close()


@pytest.mark.parametrize("how", ["near", "chunks"])
def test_a_large_file_does_not_delay_a_record(tmp_path: Path, how: str) -> None:
    """While a large file arrives, from this node's disk or in chunks, is hashed, synced and put in
    its place, records are acknowledged within 50 ms, but for one in a hundred."""
    with Ingest(tmp_path / "data") as ingest:
        quiet = Quiet(ingest.address)
        rounds, alone = [], 0.0
        for name in "abc":  # the disk is not ours alone: what we cause ourselves comes each time
            path = random_file(tmp_path / f"{name}.pt")
            alone = max(alone, p99(quiet.latencies(100)))
            rounds.append(while_it_arrives(quiet, ingest.address, path, how))
            alone = max(alone, p99(quiet.latencies(100)))
            if p99(rounds[-1]) < allowed(alone):
                break
        else:
            pytest.fail(f"alone {alone}, beside the file {[found[-5:] for found in rounds]}")
        quiet.close()


def random_file(path: Path) -> Path:
    with path.open("wb") as file:
        for _ in range(256):
            file.write(os.urandom(MIB))
    return path


def while_it_arrives(quiet: Quiet, address: str, path: Path, how: str) -> list[float]:
    """Seconds until an acknowledgement, sorted."""
    send = subprocess.Popen((sys.executable, "-c", _SEND, address, str(path), how), cwd=ROOT)
    found: list[float] = []
    while send.poll() is None:
        found += quiet.latencies(20)
    assert send.returncode == 0
    return sorted(found)


# --- a full disk ---------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MiB."""
    data = tmp_path / "data"
    data.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(data)]
    if os.geteuid() != 0 or subprocess.run(words, capture_output=True).returncode != 0:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield data
    finally:
        subprocess.run(["umount", "-l", str(data)], check=True)


def fill(directory: Path) -> Path:
    """A file that takes all the room there is."""
    path = directory / "filler"
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(64 << 10))
        except OSError as error:
            assert error.errno == errno.ENOSPC
    return path


def config_of(tmp_path: Path, text: str) -> str:
    path = tmp_path / "gateway.toml"
    path.write_text(f"[gateway]\n{text}\n")
    return str(path)


@pytest.mark.parametrize("reserve_mib", [0, 2])
def test_a_full_disk_stops_nothing_but_the_acknowledgements(
    tmp_path: Path, small_disk: Path, reserve_mib: int
) -> None:
    """While the gateway's disk is full, ranks train on, `status` says what is the matter, and when
    there is room everything is stored once, projected and exported."""
    with Job(tmp_path) as job:
        job.data = small_disk
        text = f"reserve_mib = {reserve_mib}\n[sinks.clearml]\nmode = 'offline'"
        job.serve("--config", config_of(tmp_path, text))
        ranks = [job.rank(r, 2, ENDLESS, "until", 0.005) for r in range(2)]
        wait_until(lambda: job.truth() and sum(map(len, job.truth().values())) > 40)
        filler = fill(small_disk)
        gateway = wait_until(lambda: _full(small_disk), what="the gateway says that it is full")
        assert gateway.state == "serving"
        assert any("full" in line.plain for line in gateway_lines(gateway))
        told = len(next(iter(job.truth().values())))
        wait_until(lambda: len(next(iter(job.truth().values()))) > told + 50, what="training")
        assert _full(small_disk), "it says so for as long as it lasts"
        filler.unlink()
        job.ask_stop()
        for rank in ranks:
            _, err = rank.communicate(timeout=60)
            assert rank.returncode == 0, err
        job.drain()
        job.assert_all_there()


def _full(data: Path) -> Any:
    gateway = gateway_of(data, time.time_ns())
    return gateway if gateway.full and gateway.state == "serving" else None


def test_a_file_on_a_full_disk_arrives_when_there_is_room(tmp_path: Path, small_disk: Path) -> None:
    """A file whose chunks find no room is not given up: with room again it is there, whole."""
    path = tmp_path / "model.pt"
    path.write_bytes(os.urandom(5 * MIB))
    with Ingest(small_disk) as ingest:
        filler = fill(small_disk)
        with filler.open("r+b") as file:
            file.truncate(filler.stat().st_size - 2 * MIB)  # the file begins, and does not fit
        sent = threading.Event()

        def send() -> None:
            link = Link(ingest.address)
            assert send_file(path, "r", os.urandom(16), 1, link, lambda: False)
            link.close()
            sent.set()

        thread = threading.Thread(target=send)
        thread.start()
        wait_until(lambda: ingest.told()["full"], what="full")
        assert not sent.is_set()
        filler.unlink()
        assert sent.wait(60)
        thread.join()
        [stored] = [p for p in (small_disk / "runs/r/media").rglob("*") if p.is_file()]
        assert stored.read_bytes() == path.read_bytes()


def test_a_run_over_its_quota_waits_and_others_go_on(tmp_path: Path) -> None:
    """A run that has filled its share keeps its logs at the ranks and is named by `status`; with
    a larger share everything is stored."""
    with Job(tmp_path) as job:
        job.serve("--config", config_of(tmp_path, "run_quota_gib = 0.0001"))  # 105 KiB
        big = job.rank(0, 1, 4000, "finish", 0.0, RANKGATE_RUN="r1")
        wait_until(lambda: _alarm(job, "run r1 has filled"), what="an alarm")
        big.communicate(timeout=60)
        job.rank(0, 1, 10, "finish", 0.0, RANKGATE_RUN="r2").communicate(timeout=60)
        wait_until(lambda: job.data.joinpath("runs/r2/series.db").exists())
        job.stop_gateway(signal.SIGTERM)
        job.drain()
        job.assert_all_there("r1")
        job.assert_all_there("r2")


def _alarm(job: Job, words: str) -> bool:
    return any(words in alarm for alarm in gateway_of(job.data, time.time_ns()).alarms)


def test_a_disk_smaller_than_the_reserve_is_said_at_once(tmp_path: Path, small_disk: Path) -> None:
    """A reserve that could never be kept is an error of the config, named with its key."""
    with Job(tmp_path) as job:
        config = config_of(tmp_path, "reserve_mib = 100")
        code, _, err = job.cli("serve", "--dir", str(small_disk), "--config", config)
        assert code != 0
        assert "gateway.reserve_mib is 100" in " ".join(err.split())


def test_few_descriptors_are_said_before_they_run_out(tmp_path: Path) -> None:
    """At four fifths of the descriptors there is an alarm; those that are connected go on."""
    with Ingest(tmp_path / "data") as ingest:
        used = len(os.listdir(f"/proc/{ingest.process.pid}/fd"))
        subprocess.run(
            ["prlimit", f"--pid={ingest.process.pid}", f"--nofile={used + 4}"], check=True
        )
        wait_until(lambda: any("descriptors" in a for a in ingest.told()["alarms"]))
