"""The console of a process: what anybody writes to its descriptors 1 and 2, as lines in its spool.

A pipe (or a terminal, where there was one) stands in for each descriptor; `copier.py` copies it to
where it went before and tells the lines to a thread here. When the copier dies, the descriptors are
put back.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..redact import Redactor
from ..spool import RING_BYTES, SHARES, Spool
from ..wire.records import Kind
from .messages import FLUSH, FLUSHED, GOODBYE, REFUSED, STORED, Message, Messages
from .record import REFUSED as REFUSED_REASON
from .record import Record

READ_BYTES = 64 << 10
PIPE_BYTES = 1 << 20  #: what may be printed before the copier has to look at it
SILENT_SECONDS = 3.0  #: without a line, the end of a run waits no longer: a terminal is held up
LATE = "console lines not read when the run ended"
LOW_FDS = 10  #: those below are for the program
PACKAGE = str(Path(__file__).parents[1])
#: starts the copier in a bare interpreter, without importing the package above it
START = (
    "import sys, types; p = types.ModuleType('rank_client'); p.__path__ = [{package!r}]; "
    "sys.modules['rank_client'] = p; from rank_client.capture.copier import main; main()"
)

log = logging.getLogger("rankgate")

_active: Console | None = None  # descriptors belong to the process, and there is one process


def begin(spool: Spool, clean: Redactor, warn: Callable[[str, str], None]) -> Console | None:
    """Record what this process prints from now on. None where its streams are not on descriptors
    1 and 2 (a notebook, a test runner), or where another of its runs does so already."""
    global _active  # noqa: PLW0603 - see above
    if _active is not None:
        log.info("rankgate: printed lines go to the first run of this process that is not finished")
        return None
    if not (_stands_on(sys.stdout, 1) and _stands_on(sys.stderr, 2)):
        log.info("rankgate: stdout is not descriptor 1 here; printed lines are not recorded")
        return None
    try:
        _active = Console(spool, clean, warn)
    except OSError as error:
        warn("console", f"printed lines are not recorded: {error}")
    return _active


def _stands_on(stream: Any, fd: int) -> bool:
    try:
        os.fstat(fd)
        return bool(stream.fileno() == fd)
    except (AttributeError, OSError, ValueError):
        return False


class Console:
    """Stands in for descriptors 1 and 2 until `end`. Raises OSError, and then nothing is changed.

    `end` and `become_child` from the thread that ends the run or has forked.
    """

    def __init__(self, spool: Spool, clean: Redactor, warn: Callable[[str, str], None]) -> None:
        self._spool = spool
        self._warn = warn
        self._record = Record(clean)
        self._messages = Messages()
        self._leaving = self._ended = False
        self._alone = False  #: the copier is gone, and the thread here copies
        self._asked = self._flushed = 0
        self._heard_at = 0.0
        self._answered = threading.Condition()
        self._saved: dict[int, int] = {}  # descriptor → where it went before
        self._reading: dict[int, int] = {}  # descriptor → where what is printed to it comes out
        self._channel, other = socket.socketpair()
        writing: dict[int, int] = {}
        try:
            for fd in (1, 2):
                self._saved[fd] = _dup(fd)
                if fd == 2 and _same(1, 2):  # else their order among each other would change
                    writing[2] = _dup(writing[1])
                else:
                    self._reading[fd], writing[fd] = _stand_in(fd)
            self._process = self._start(other)
            _flush_python()  # what was printed before is not of this run
            for fd, end in writing.items():
                os.dup2(end, fd)
        except BaseException:
            self._close()
            raise
        finally:
            other.close()
            for end in writing.values():
                os.close(end)
        self._ours = {fd: _identity(fd) for fd in (1, 2)}
        self._thread = threading.Thread(target=self._listen, name="rankgate-console", daemon=True)
        self._thread.start()

    def _start(self, other: socket.socket) -> subprocess.Popen[bytes]:
        sources = [[end, self._saved[fd], fd, os.isatty(end)] for fd, end in self._reading.items()]
        told = {
            "sources": sources,
            "channel": other.fileno(),
            "directory": self._spool.directory or "",
            "path": [p for p in sys.path if p],
        }
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", START.format(package=PACKAGE), json.dumps(told)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[*self._reading.values(), *self._saved.values(), other.fileno()],
            start_new_session=True,
            cwd="/",
        )

    # --- the end -----------------------------------------------------------------

    def end(self, deadline: float) -> None:
        """Put the descriptors back, after what was printed so far has come out; the last lines
        are in the spool then. Waits until `deadline` at most."""
        global _active  # noqa: PLW0603
        if self._ended:
            return
        _flush_python()
        _flush_c()
        self._ask(FLUSH, deadline)
        self._leaving = True
        self._put_back()
        if not self._ask(GOODBYE, deadline):  # what other threads printed meanwhile
            self._spool.refuse(LATE)  # how many there were, nobody knows
        with self._spool.lock:  # nothing more is written from now on
            self._ended = True
        _active = None
        if self._alone:
            return
        try:
            self._channel.shutdown(socket.SHUT_RDWR)  # a close alone does not wake the thread
        except OSError:
            pass  # the copier has closed it
        self._close()

    def _ask(self, kind: int, deadline: float) -> bool:
        """Have the copier tell all that was printed before; False when that took too long."""
        self._asked += 1
        if self._alone:
            return True
        try:
            self._channel.send(Message(kind, self._asked).pack(), socket.MSG_DONTWAIT)
        except OSError:
            return True  # the copier is gone
        self._heard_at = time.monotonic()
        with self._answered:
            while self._flushed < self._asked and not self._alone:
                left = min(deadline, self._heard_at + SILENT_SECONDS) - time.monotonic()
                if left <= 0:
                    return False
                self._answered.wait(left)
        return True

    def _put_back(self) -> None:
        for fd, saved in self._saved.items():
            try:
                if _identity(fd) == self._ours[fd]:  # else the program has put something there
                    os.dup2(saved, fd)
            except OSError:
                pass  # the program has closed it

    def _close(self) -> None:
        self._channel.close()
        for fd in (*self._saved.values(), *self._reading.values()):
            os.close(fd)
        self._saved, self._reading = {}, {}

    def become_child(self) -> None:
        """In a forked child, which goes on printing to the stand-ins: let go of all else."""
        global _active  # noqa: PLW0603
        if not self._ended:
            self._leaving = self._ended = True
            _active = None
            self._close()

    # --- the thread --------------------------------------------------------------

    def _listen(self) -> None:
        try:
            self._process.wait()  # it leaves a grandchild behind, which is nobody's child
            while data := self._channel.recv(READ_BYTES):
                self._heard_at = time.monotonic()
                self._take(self._messages.feed(data))
        except OSError:
            pass
        except Exception as error:  # nothing may escape into the training process
            self._warn("console", f"printed lines are no longer recorded: {error!r}")
        if not self._leaving:
            self._take_over()

    def _take(self, messages: list[Message]) -> None:
        stored = 0
        for message in messages:
            if message.kind == FLUSHED:
                with self._answered:
                    self._flushed = message.number
                    self._answered.notify_all()
            elif message.kind == REFUSED:
                self._spool.refuse(REFUSED_REASON, message.number)
            else:
                self._put(message)
                stored = message.number
        if stored:
            try:
                self._channel.send(Message(STORED, stored).pack(), socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass  # the next one tells it too

    def _put(self, line: Message) -> None:
        spool = self._spool
        for body in self._record.bodies(line):
            with spool.lock:
                if self._ended:
                    return
                if spool.volatile and spool.unacknowledged_bytes > RING_BYTES * SHARES["console"]:
                    spool.refuse(REFUSED_REASON)  # the rest of the ring is for metrics
                else:
                    spool.append_map(Kind.TEXT, body, console=True)

    def _take_over(self) -> None:
        """The copier is gone: put the descriptors back, and copy what is on its way and what
        children print from now on."""
        with self._answered:
            self._alone = True
            self._answered.notify_all()
        self._put_back()
        self._warn("copier", "the process that records printed lines is gone; they are only shown")
        out = {end: self._saved[fd] for fd, end in self._reading.items()}
        while out:
            for end in select.select(list(out), [], [])[0]:
                try:
                    data = os.read(end, READ_BYTES)
                except OSError:  # a terminal whose last writer has gone
                    data = b""
                if data:
                    _write(out[end], data)
                else:
                    del out[end]


# --- descriptors -----------------------------------------------------------------


def _dup(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, LOW_FDS)


def _identity(fd: int) -> tuple[int, int]:
    info = os.fstat(fd)
    return info.st_dev, info.st_ino


def _same(one: int, other: int) -> bool:
    """Do both lead to one place (`2>&1`, a terminal)?"""
    return _identity(one) == _identity(other)


def _stand_in(fd: int) -> tuple[int, int]:
    """(reading end, writing end) of what stands in for a descriptor: a terminal for a terminal,
    so that colours and the width of progress bars stay; else a pipe."""
    reading, writing = _terminal(fd) if os.isatty(fd) else os.pipe()
    ends = _dup(reading), _dup(writing)
    os.close(reading)
    os.close(writing)
    if not os.isatty(fd):
        try:
            fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        except OSError:
            pass  # this user's pipes have reached their limit; a smaller one works too
    return ends


def _terminal(fd: int) -> tuple[int, int]:
    """A pair that changes no byte, of the size of the real terminal."""
    import termios

    reading, writing = os.openpty()
    modes = termios.tcgetattr(writing)
    modes[1] &= ~termios.OPOST
    modes[3] &= ~(termios.ECHO | termios.ICANON | termios.ISIG)
    termios.tcsetattr(writing, termios.TCSANOW, modes)
    size = fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8))
    fcntl.ioctl(writing, termios.TIOCSWINSZ, size)
    return reading, writing


def _write(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[os.write(fd, rest) :]
    except OSError:
        pass  # as for the copier: its reader is gone, or its disk is full


def _flush_python() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:  # noqa: S110 - closed, or any stream the program has put there
            pass


def _flush_c() -> None:
    """What C code has printed and still holds back."""
    import ctypes

    try:
        libc = ctypes.CDLL(None)
        libc.fflush(ctypes.c_void_p.in_dll(libc, "stdout"))
    except (OSError, ValueError, AttributeError):
        pass  # another C library
