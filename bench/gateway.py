"""A live gateway for a benchmark: ingest and rules as the real processes, without supervisor."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apsw

from gateway.series.db import fetch, open_reader
from rank_client.rendezvous import ipc_address

from .measure import ROOT, cpu_seconds, rss_mb

RUN = "bench"
_INGEST = (
    "import sys, pathlib; from gateway.ingest.listener import serve; "
    "serve(pathlib.Path(sys.argv[1]), [sys.argv[2]])"
)
_RULES = (
    "import sys, pathlib; from gateway.rules.follow import follow; "
    "follow(pathlib.Path(sys.argv[1]))"
)


class Gateway:
    """Use as a context manager; `address` is where ranks connect."""

    def __init__(self, directory: Path, address: str = "") -> None:
        self.directory = directory
        self.address = address or ipc_address(directory)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Gateway:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._start("ingest", _INGEST, str(self.directory), self.address)
        self._start("rules", _RULES, str(self.directory))
        wait_for((self.directory / "gateway.json").exists, 20, "no gateway came up")
        return self

    def _start(self, name: str, code: str, *arguments: str) -> None:
        self._processes[name] = subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT)

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.send_signal(signal.SIGTERM)
        for process in self._processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self.address.startswith("ipc://"):
            Path(self.address.removeprefix("ipc://")).unlink(missing_ok=True)

    def memory(self) -> dict[str, dict[str, float]]:
        return {name: rss_mb(p.pid) for name, p in self._processes.items()}

    def cpu(self) -> dict[str, float]:
        return {name: cpu_seconds(p.pid) for name, p in self._processes.items()}

    def projected(self) -> tuple[int, int]:
        """(streams, records) that series.db holds."""
        try:
            db = open_reader(self.directory / "runs" / RUN / "series.db")
        except apsw.Error:
            return 0, 0
        try:
            [(streams, records)] = fetch(
                db, "SELECT count(*), coalesce(sum(projected), 0) FROM stream"
            )
        except apsw.SQLError:  # its tables are being made at this moment
            return 0, 0
        finally:
            db.close()
        return streams, records


def wait_for(condition: Callable[[], Any], seconds: float, problem: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{problem} within {seconds} s")
        time.sleep(0.02)
