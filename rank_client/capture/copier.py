"""The process that copies a rank's console to where it went before, and tells the rank its lines.

A process and not a thread, as a C call of the training may hold the interpreter's lock while it
prints more than a pipe takes. It knows nothing of rankgate until its rank has died by force; then
it writes the last lines into the rank's spool itself. It ends when nobody can print any more.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field

from .lines import Lines
from .messages import (
    FLUSHED,
    GOODBYE,
    LINE_ERR,
    LINE_OUT,
    REFUSED,
    STORED,
    Message,
    Messages,
)

READ_BYTES = 256 << 10
BATCH_SECONDS = 0.1  #: between two wakings of the rank's thread
TERMINAL_SECONDS = 0.01  #: a terminal hands its bytes over behind the write
DRAIN_SECONDS = 1.0  #: the most that a flush reads of somebody who never stops printing
LOCK_SECONDS = 2.0  #: after a rank's death, for its lock to become free

#: what a rank is asked to keep: a line costs its thread some 20 µs of the training's time
LINE_COST_BYTES = 100
RATE_BYTES_PER_SECOND = 512 << 10
BURST_BYTES = 2 << 20
UNSTORED_BYTES = 4 << 20  #: lines that the rank has not stored yet, kept here


@dataclass
class Source:
    """A pipe or terminal that somebody prints into, and where it is copied to."""

    fd: int
    out: int
    kind: int  #: of the messages that tell its lines
    terminal: bool
    lines: Lines = field(default_factory=Lines)


class Copier:
    """Copies until every writer is gone; `run` is its one verb."""

    def __init__(self, sources: list[Source], channel: socket.socket, directory: str) -> None:
        self._sources = sources
        self._channel: socket.socket | None = channel
        self._directory = directory
        self._messages = Messages()
        self._number = 0
        self._refused = 0
        self._unstored: deque[tuple[Message, int]] = deque()
        self._unstored_bytes = 0
        self._out = bytearray()
        self._send_at = 0.0
        self._room = float(BURST_BYTES)
        self._room_at = time.monotonic()
        self._lock_wanted = True
        self._lock_fd = -1
        self._locked = threading.Event()
        threading.Thread(target=self._wait_for_lock, daemon=True).start()

    def run(self) -> None:
        while self._sources:
            self._step()
        while self._channel is not None:  # nobody prints any more, but the rank is still there
            select.select([self._channel], [], [])
            self._hear(self._channel)

    def _step(self) -> None:
        channel = self._channel
        readers: list[int] = [s.fd for s in self._sources] + ([channel.fileno()] if channel else [])
        pause = None
        if self._out or self._refused:
            pause = max(0.0, self._send_at - time.monotonic())
        ready = set(select.select(readers, [], [], pause)[0])
        for source in self._sources[:]:
            if source.fd in ready:
                self._copy(source)
        if channel and channel.fileno() in ready:
            self._hear(channel)
        if time.monotonic() >= self._send_at:
            self._send()

    # --- copying -----------------------------------------------------------------

    def _copy(self, source: Source) -> None:
        try:
            data = os.read(source.fd, READ_BYTES)
        except BlockingIOError:
            return
        except OSError:  # a terminal whose last writer has gone
            data = b""
        if not data:
            os.close(source.fd)
            self._sources.remove(source)
            self._offer(source, source.lines.end())
            return
        _write(source, data)
        if source.terminal:
            _follow_size(source)
        if self._channel is None:
            return
        if self._has_room():
            self._offer(source, source.lines.feed(data, time.monotonic()))
        else:
            self._refused += source.lines.skip(data)

    def _has_room(self) -> bool:
        now = time.monotonic()
        gained = (now - self._room_at) * RATE_BYTES_PER_SECOND
        self._room, self._room_at = min(BURST_BYTES, self._room + gained), now
        return self._room > 0 and self._unstored_bytes < UNSTORED_BYTES

    def _offer(self, source: Source, texts: list[str]) -> None:
        if self._channel is None:
            return
        stamp = time.time_ns()
        for text in texts:
            self._number += 1
            line = Message(source.kind, self._number, stamp, text)
            packed = line.pack()
            cost = len(packed) + LINE_COST_BYTES
            self._room -= cost
            self._unstored.append((line, cost))
            self._unstored_bytes += cost
            self._out += packed

    # --- the rank ----------------------------------------------------------------

    def _hear(self, channel: socket.socket) -> None:
        try:
            data = channel.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lose_rank()
        for message in self._messages.feed(data):
            if message.kind == STORED:
                self._forget(message.number)
            else:
                self._flush(channel, message)

    def _forget(self, number: int) -> None:
        while self._unstored and self._unstored[0][0].number <= number:
            self._unstored_bytes -= self._unstored.popleft()[1]

    def _flush(self, channel: socket.socket, message: Message) -> None:
        """Tell all that was printed before this was asked for."""
        self._drain()
        if message.kind == GOODBYE:
            for source in self._sources:
                self._offer(source, source.lines.end())
        self._say_refused()
        self._out += Message(FLUSHED, message.number).pack()
        self._send_whole(channel)
        if message.kind == GOODBYE:
            self._leave_rank()

    def _drain(self) -> None:
        """Copy what is there now."""
        deadline = time.monotonic() + DRAIN_SECONDS
        pause = TERMINAL_SECONDS if any(s.terminal for s in self._sources) else 0.0
        while self._sources and time.monotonic() < deadline:
            ready = select.select([s.fd for s in self._sources], [], [], pause)[0]
            if not ready:
                return
            for source in [s for s in self._sources if s.fd in ready]:
                self._copy(source)

    def _say_refused(self) -> None:
        if self._refused:
            self._out += Message(REFUSED, self._refused).pack()
            self._refused = 0

    def _send(self) -> None:
        """As much as the rank's thread takes now."""
        self._send_at = time.monotonic() + BATCH_SECONDS
        self._say_refused()
        if self._channel is None or not self._out:
            return
        try:
            del self._out[: self._channel.send(self._out)]
        except OSError:
            pass  # full, or closed: what it has not stored is still here, and its end is heard

    def _send_whole(self, channel: socket.socket) -> None:
        deadline = time.monotonic() + DRAIN_SECONDS
        while self._out and (left := deadline - time.monotonic()) > 0:
            select.select([], [channel], [], left)
            self._send()

    # --- the rank's end ------------------------------------------------------------

    def _leave_rank(self) -> None:
        """From now on bytes are copied, and nothing else."""
        if self._channel is not None:
            self._channel.close()
        self._channel = None
        self._unstored.clear()
        self._out.clear()
        self._release()

    def _lose_rank(self) -> None:
        """The rank is gone, and has not said goodbye: what it did not store is stored for it."""
        if self._channel is None:
            return
        self._drain()
        for source in self._sources:
            self._offer(source, source.lines.end())
        lines, refused = [line for line, _ in self._unstored], self._refused
        if self._locked.wait(LOCK_SECONDS) and (lines or refused):
            from .leftover import store

            try:
                store(self._directory, lines, refused)
            except OSError:
                pass  # nobody is left to tell; the spool's disk is full, or it was removed
        self._leave_rank()

    def _wait_for_lock(self) -> None:
        """Get the lock of the rank's spool in the moment it dies, before somebody else finds that
        spool and ships it as it is."""
        try:
            fd = os.open(f"{self._directory}/lock", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            fcntl.lockf(fd, fcntl.LOCK_EX)
        except OSError:
            return
        self._lock_fd = fd
        self._locked.set()
        if not self._lock_wanted:
            self._release()

    def _release(self) -> None:
        self._lock_wanted = False
        fd, self._lock_fd = self._lock_fd, -1
        if fd >= 0:
            os.close(fd)


def _write(source: Source, data: bytes) -> None:
    """All of it, however slow: that the reader of a console holds up its writer is as it was."""
    rest = memoryview(data)
    while rest and source.out >= 0:
        try:
            rest = rest[os.write(source.out, rest) :]
        except BlockingIOError:
            select.select([], [source.out], [])
        except BrokenPipeError:
            source.out = -1  # its reader is gone; the training goes on, and is still recorded
        except OSError:
            return  # a full disk, or a terminal that hung up; maybe the next bytes go through


def _follow_size(source: Source) -> None:
    """Give the terminal in between the size of the real one."""
    import termios

    try:
        size = fcntl.ioctl(source.out, termios.TIOCGWINSZ, bytes(8))
        fcntl.ioctl(source.fd, termios.TIOCSWINSZ, size)
    except OSError:
        pass  # it hung up


def main() -> None:
    """As `console.py` starts it: what to copy is told as JSON in the first argument."""
    if os.fork():  # nobody's child: a training may wait for all children that it has
        os._exit(0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)  # meant for the training; its last words follow
    told = json.loads(sys.argv[1])
    sys.path[:] = told["path"]
    channel = socket.socket(fileno=told["channel"])
    channel.setblocking(False)
    kinds = {1: LINE_OUT, 2: LINE_ERR}
    sources = [Source(fd, out, kinds[of], tty) for fd, out, of, tty in told["sources"]]
    Copier(sources, channel, told["directory"]).run()
