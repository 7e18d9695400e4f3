"""The gateway's own log: one line per event, to stderr (which a detached gateway has in
gateway.log). Secrets are taken out: an error may carry a key, or what a server said of one."""

from __future__ import annotations

import logging
import os
import sys

from rank_client.redact import Redactor


class CleanFormatter(logging.Formatter):
    """Formats a line, traceback included, without what looks like a secret."""

    def __init__(self, form: str) -> None:
        super().__init__(form)
        self._secrets = Redactor(os.environ)

    def format(self, record: logging.LogRecord) -> str:
        return self._secrets.text(super().format(record))


def configure(level: int = logging.INFO) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        CleanFormatter("%(asctime)s %(levelname)s %(name)s[%(process)d] %(message)s")
    )
    root = logging.getLogger("rankgate")
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(level)
