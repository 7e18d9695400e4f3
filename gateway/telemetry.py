"""The gateway's own log: one line per event, to stderr (which a detached gateway has in
gateway.log). Secrets are taken out: an error may carry a key, or what a server said of one."""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
from types import TracebackType
from typing import TextIO

from rank_client.redact import Redactor

MAX_LINE_CHARACTERS = 64 << 10  #: of a line that is not ended; then it goes out as it is


class CleanFormatter(logging.Formatter):
    """Formats a line, traceback included, without what looks like a secret."""

    def __init__(self, form: str) -> None:
        super().__init__(form)
        self._secrets = Redactor(os.environ)

    def format(self, record: logging.LogRecord) -> str:
        return self._secrets.text(super().format(record))


class CleanOutput(io.TextIOBase):
    """Stands in for stdout or stderr where a vendor's package prints: the same, line by line."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._rest = ""
        self._secrets = Redactor(os.environ)

    def write(self, text: str) -> int:
        lines, newline, self._rest = (self._rest + text).rpartition("\n")
        self._out.write(self._secrets.text(lines + newline))
        if len(self._rest) > MAX_LINE_CHARACTERS:
            self.flush()
        return len(text)

    def flush(self) -> None:
        text, self._rest = self._rest, ""
        self._out.write(self._secrets.text(text))
        self._out.flush()

    def fileno(self) -> int:
        return self._out.fileno()

    def isatty(self) -> bool:
        return self._out.isatty()

    def writable(self) -> bool:
        return True


def configure(level: int = logging.INFO) -> None:
    """Log from now on; also the errors that end the process or one of its threads."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        CleanFormatter("%(asctime)s %(levelname)s %(name)s[%(process)d] %(message)s")
    )
    root = logging.getLogger("rankgate")
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(level)
    sys.excepthook = _unexpected
    threading.excepthook = lambda told: _unexpected(
        told.exc_type, told.exc_value, told.exc_traceback
    )


def clean_output() -> None:
    """What is printed from now on goes out without secrets too."""
    sys.stdout, sys.stderr = CleanOutput(sys.stdout), CleanOutput(sys.stderr)


def _unexpected(
    kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
) -> None:
    if error is not None and not issubclass(kind, SystemExit | KeyboardInterrupt):
        name = threading.current_thread().name
        logging.getLogger("rankgate").critical(
            "%s ended by an error that is a fault of ours or of a package",
            name,
            exc_info=(kind, error, trace),
        )
