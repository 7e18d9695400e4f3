"""Driving real processes: ranks, gateways, the command line; and the sums that must hold."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gateway.attach import served
from gateway.series.reader import Reader
from gateway.series.tables import StreamRow
from gateway.sinks.store import read_views
from rank_client import orphans
from rank_client.capture.console import LATE
from rank_client.rendezvous import LOCK_GATEWAY, locked

ENDLESS = 100_000  #: steps of a rank that is asked to stop long before
RANKS = Path(__file__).with_name("ranks.py")
ROOT = Path(__file__).parents[2]


def wait_until(condition: Callable[[], Any], seconds: float = 30.0, what: str = "") -> Any:
    """Poll until true; the value. Fails loudly, naming what it waited for."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what or condition}")
        time.sleep(0.02)
    return found


def free_port() -> int:
    """A port of this machine that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Job:
    """One data directory, one spool; use as a context manager, which leaves no process behind."""

    def __init__(self, tmp_path: Path, **environ: str) -> None:
        self.data = tmp_path / "data"
        self.spool = tmp_path / "spool"
        self.truth_dir = tmp_path / "truth"
        self.truth_dir.mkdir()
        self.environ = {
            **os.environ,
            "RANKGATE_DIR": str(self.data),
            "RANKGATE_SPOOL": str(self.spool),
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "NO_COLOR": "1",
            "COLUMNS": "80",
            "RANKGATE_CAPTURE_SOURCE": "0",
            **environ,
        }
        self.processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.communicate()
        self.stop_gateway(signal.SIGTERM)

    # --- processes -------------------------------------------------------------------------------

    def start(self, *words: str, **environ: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            words,
            env={**self.environ, **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.truth_dir,
        )
        self.processes.append(process)
        return process

    def rank(
        self, rank: int, size: int, steps: int, end: str, pause: float = 0.0, **environ: str
    ) -> subprocess.Popen[str]:
        """One rank as torchrun would start it, without torch."""
        place = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
        }
        words = (sys.executable, str(RANKS), str(self.truth_dir), str(steps), end, str(pause))
        return self.start(*words, **{"RANKGATE_RUN": "r1", **place, **environ})

    def ask_stop(self, run: str = "r1") -> None:
        """Leave the wish to stop in the folder of the run."""
        requests = self.data / f"runs/{run}/requests"
        requests.mkdir(exist_ok=True)
        (requests / "stop").write_text("enough")

    def cli(self, *words: str, seconds: float = 120, **environ: str) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) of `rankgate …`."""
        process = self.start(sys.executable, "-m", "gateway", *words, **environ)
        out, err = process.communicate(timeout=seconds)
        return process.returncode, out, err

    def drain(self) -> None:
        code, out, err = self.cli("drain", "--seconds", "60")
        assert code == 0, (out, err, self.log())

    def log(self) -> str:
        path = self.data / "gateway.log"
        return path.read_text() if path.exists() else ""

    # --- the gateway -----------------------------------------------------------------------------

    def serve(self, *options: str) -> subprocess.Popen[str]:
        process = self.start(sys.executable, "-m", "gateway", "serve", *options)
        wait_until(lambda: served(self.data), what="the gateway answers")
        return process

    def gateway_pids(self) -> list[int]:
        """The supervisor and its children, found by the data directory they were given."""
        found = []
        for proc in Path("/proc").glob("[0-9]*"):
            try:
                words = (proc / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            names = {b"detached", b"ingest", b"rules", b"sink", b"serve"}
            ours = any(w.startswith(os.fsencode(self.data)) for w in words)
            environ_ours = b"serve" in words and self._in_environ(proc)
            if names & set(words) and (ours or environ_ours):
                found.append(int(proc.name))
        return found

    def _in_environ(self, proc: Path) -> bool:
        try:
            return os.fsencode(self.data) in (proc / "environ").read_bytes()
        except OSError:
            return False

    def child(self, name: str) -> int:
        """The pid of one of the gateway's children: ingest, rules, or a sink by its name."""

        def find() -> int:
            for pid in self.gateway_pids():
                try:
                    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if name.encode() in words and not {b"serve", b"detached"} & set(words):
                    return pid
            return 0

        return int(wait_until(find, what=f"a process {name}"))

    def stop_gateway(self, number: int = signal.SIGKILL) -> None:
        """Signal all of it, and wait until these processes are gone, and the directory is free or
        another gateway's: a rank may have started one already."""
        told = set(self.gateway_pids())
        for pid in told:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass
        for process in self.processes:
            if process.poll() is None and "serve" in process.args:
                process.wait(20)
        wait_until(lambda: not told & set(self.gateway_pids()), 20, "the gateway is gone")
        lock = self.data / "gateway.lock"
        free = lambda: bool(self.gateway_pids()) or not locked(lock, LOCK_GATEWAY)  # noqa: E731
        wait_until(free, 20, "the data directory is free")

    # --- what arrived ----------------------------------------------------------------------------

    def reader(self, run: str = "r1") -> Reader:
        return Reader(self.data / "runs" / run)

    def truth(self, run: str = "r1") -> dict[str, list[dict[str, Any]]]:
        """stream → what its calls returned for."""
        found = {}
        for path in self.truth_dir.glob("*.jsonl"):
            lines = path.read_text().splitlines()
            parsed = [json.loads(line) for line in lines if line.endswith("}")]
            if parsed and parsed[0]["run"] == run:
                found[parsed[0]["stream"]] = parsed[1:]
        return found

    def points(self, run: str = "r1") -> Counter[tuple[str, int, str, int, Any]]:
        """How often each (stream, rank, key, step, value) is in the series."""
        out: Counter[tuple[str, int, str, int, Any]] = Counter()
        with self.reader(run) as reader:
            streams = {s.index: s for s in reader.streams()}
            for key in {name for _, name, _ in reader.keys() if not name.startswith("system/")}:
                points = reader.points(key)
                for index, step, value in zip(
                    points.stream.tolist(), points.step.tolist(), points.value.tolist(), strict=True
                ):
                    stream = streams[index]
                    out[stream.id.hex(), stream.rank, key, step, value] += 1
        return out

    def assert_all_there(self, run: str = "r1", extra_allowed: int = 0) -> None:
        """Every point that `log` returned for is in the series once. A rank that was killed may
        have written one more than it could note down (`extra_allowed`)."""
        have = self.points(run)
        truth = self.truth(run)
        assert truth
        with self.reader(run) as reader:
            ranks = {s.id.hex(): s.rank for s in reader.streams()}
        want = Counter(
            (stream, ranks[stream], key, line["step"], value)
            for stream, lines in truth.items()
            for line in lines
            if "step" in line
            for key, value in line.items()
            if key != "step"
        )
        assert not want - have, f"lost: {list((want - have).items())[:5]}"
        assert (have - want).total() <= extra_allowed, list((have - want).items())[:5]
        with self.reader(run) as reader:
            assert reader.quarantine() == []
            # Printed lines are not in the truth; LATE says that there may have been one more.
            assert [loss for loss in reader.losses() if loss[4] != LATE] == []
        self.assert_accounted(run)

    def assert_accounted(self, run: str = "r1") -> None:
        """The sums of the accounting identity, per stream and per sink."""
        run_dir = self.data / "runs" / run
        with self.reader(run) as reader:
            about, streams = reader.about(), reader.streams()
        for stream in streams:
            assert stream.last_seq == stream.stored + stream.gaps, stream
            assert stream.stored == stream.projected + stream.quarantined + stream.control, stream
        passed = sum(n for name, n in about.counters.items() if name.startswith("passed "))
        for view in read_views(run_dir):
            if view.state in ("drained", "exported"):
                done = view.delivered + sum(view.skipped.values()) + view.quarantined
                assert done == passed, (view, passed)

    def streams(self, run: str = "r1") -> list[StreamRow]:
        with self.reader(run) as reader:
            return reader.streams()

    def orphans(self) -> list[orphans.Orphan]:
        return orphans.find(self.spool, self.data, lambda _: True)
