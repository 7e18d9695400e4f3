"""A sink's process started by a command (`replay`, `sinks retry`), and its progress on stderr."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import apsw
import msgspec

from rank_client.rendezvous import clean_environment, gateway_command

from .. import parent
from ..series.reader import Reader
from ..sinks.base import SinkConfig
from ..sinks.process import BUSY, OFF
from ..sinks.store import SinkView, read_view, store_name
from ..view.words import clean, count, duration

LOOK_SECONDS = 0.2
TERMINAL_SECONDS = 0.5  #: between two states of the line that a terminal shows
LINES_SECONDS = 10.0  #: between two lines where stderr is a file
RATE_SECONDS = 20.0  #: the rate is that of so long
FIRST_PAUSE_SECONDS, TOP_PAUSE_SECONDS = 0.2, 5.0
LIVES = 30  #: that bring nothing new, before we give up


def deliver(run_dir: Path, name: str, config: SinkConfig, since: str = "") -> int:
    """Until a sink has all of a run: 0, OFF or BUSY; any other code when its process died again
    and again. One that dies is started again, as a gateway does, and goes on from its cursor."""
    packed = msgspec.json.encode(config).decode()
    how = "export" if config.mode == "offline" else "online"
    command = gateway_command("sink", str(run_dir), name, packed, how, *([since] if since else []))
    progress = Progress(run_dir, name, config.mode)
    lives, pause, done = 0, FIRST_PAUSE_SECONDS, progress.done
    try:
        while True:
            code = _live(command, progress)
            lives, done = (0, progress.done) if progress.done != done else (lives + 1, done)
            if code in (0, OFF, BUSY) or lives >= LIVES:
                return code
            time.sleep(pause)
            pause = min(2 * pause, TOP_PAUSE_SECONDS) if lives else FIRST_PAUSE_SECONDS
    finally:
        progress.end()


def _live(command: list[str], progress: Progress) -> int:
    """One process of the sink, to its end; it leaves with us."""
    environ = parent.child_environment(clean_environment(os.environ))
    environ.pop("RANKGATE_SECRET", None)  # a vendor's package may record its environment
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environ)
    try:
        while process.poll() is None:
            progress.tell(time.monotonic())
            time.sleep(LOOK_SECONDS)
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    progress.look(time.monotonic())
    return process.returncode


class Progress:
    """How far a delivery is: one line that is written over on a terminal, else one now and then."""

    def __init__(self, run_dir: Path, name: str, mode: str) -> None:
        self.done = 0  #: items that are dealt with
        self._run_dir, self._name, self._mode = run_dir, name, mode
        self._terminal = sys.stderr.isatty()
        self._told_at = time.monotonic()
        self._seen: deque[tuple[float, int]] = deque()
        self._written = False
        self.look(self._told_at)

    def look(self, now: float) -> tuple[SinkView, int] | None:
        """The sink's own file and how many items passed; None while it is being made."""
        try:
            view = read_view(self._run_dir / "sinks" / store_name(self._name, self._mode))
            with Reader(self._run_dir) as reader:
                counters = reader.about().counters
        except (apsw.Error, KeyError):
            return None
        passed = sum(n for name, n in counters.items() if name.startswith("passed "))
        self.done = passed - view.waiting(passed)
        self._seen.append((now, self.done))
        while now - self._seen[0][0] > RATE_SECONDS:
            self._seen.popleft()
        return view, passed

    def tell(self, now: float) -> None:
        if now - self._told_at < (TERMINAL_SECONDS if self._terminal else LINES_SECONDS):
            return
        self._told_at = now
        found = self.look(now)
        if found is None:
            return
        text = self._line(*found)
        self._written = True
        _write(f"\r\x1b[K{text}" if self._terminal else f"rankgate: {text}\n")

    def _line(self, view: SinkView, passed: int) -> str:
        whole = f" ({100 * self.done / passed:.0f} %)" if passed else ""
        text = f"{view.name}: {count(self.done)} of {count(passed)} items{whole}"
        if view.state == "retrying":
            return f"{text}, waiting to try again: {clean(view.reason)}"[:200]
        (begun, before), (now, done) = self._seen[0], self._seen[-1]
        rate = (done - before) / (now - begun) if now > begun else 0.0
        if rate > 0:
            text += f", {count(round(rate))} a second, {duration((passed - done) / rate)} left"
        return text

    def end(self) -> None:
        if self._written and self._terminal:
            _write("\r\x1b[K")


def _write(text: str) -> None:
    with contextlib.suppress(OSError):  # whoever watched has gone; the delivery goes on
        sys.stderr.write(text)
        sys.stderr.flush()
