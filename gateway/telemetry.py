"""The gateway's own log: one line per event, to stderr (which a detached gateway has in
gateway.log)."""

from __future__ import annotations

import logging
import sys


def configure(level: int = logging.INFO) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(levelname)s %(name)s[%(process)d] %(message)s")
    )
    root = logging.getLogger("rankgate")
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(level)
