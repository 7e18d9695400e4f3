"""Questions to git, each with a limit to its time and to what is read of its answer."""

from __future__ import annotations

import os
import select
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path

GIT_SECONDS = 5.0  #: the most that one call of git may take
MAX_ANSWER_BYTES = 4096  #: unless told otherwise
READ_BYTES = 64 << 10
#: no lock on the index, no question to a person, nothing fetched
GIT_ENVIRON = {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}


class Git:
    """`ask` and `output` in one thread; `stop` in any, after which no call of git is left."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = {**environ, **GIT_ENVIRON}
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def stop(self) -> None:
        """End the call that is being made; every other one gets an empty answer."""
        with self._lock:
            self._stopped = True
            if self._child is not None:
                self._child.kill()

    def ask(self, folder: Path, *words: str) -> str:
        """The answer's text, empty when git has none to give."""
        return self.output(folder, *words).strip()

    def output(self, folder: Path, *words: str, most_bytes: int = MAX_ANSWER_BYTES) -> str:
        """What a call of git prints, up to `most_bytes`; empty when it fails or takes too long."""
        child = self._start(folder, words)
        if child is None:
            return ""
        deadline = time.monotonic() + GIT_SECONDS
        with child:
            data, ended = _read(child, most_bytes, deadline)
            try:
                child.wait(max(0.0, deadline - time.monotonic()) if ended else 0.0)
            except subprocess.TimeoutExpired:
                child.kill()  # it takes too long, or this is enough of it
        whole = child.returncode == 0 or len(data) == most_bytes
        return data.decode(errors="replace") if whole else ""

    def _start(self, folder: Path, words: tuple[str, ...]) -> subprocess.Popen[bytes] | None:
        command = ["git", "-c", "core.fsmonitor=false", "-C", str(folder), *words]
        with self._lock:
            if self._stopped:
                return None
            try:
                self._child = subprocess.Popen(
                    command,
                    env=self._environ,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                )
            except OSError:  # no git, or no process to be had
                return None
            return self._child


def _read(child: subprocess.Popen[bytes], most_bytes: int, deadline: float) -> tuple[bytes, bool]:
    """(what it has printed by then, up to so many bytes; is that all of it?)"""
    assert child.stdout is not None
    fd, data = child.stdout.fileno(), b""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while len(data) < most_bytes and (left := deadline - time.monotonic()) > 0:
        if not poll.poll(left * 1000):
            break
        more = os.read(fd, min(READ_BYTES, most_bytes - len(data)))
        if not more:
            return data, True
        data += more
    return data, False
