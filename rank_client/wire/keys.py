"""Names and keys both sides must agree on: which run ids there are."""

from __future__ import annotations

import re

_RUN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def valid_run_id(text: str) -> bool:
    """A run id names a directory, so it is never `.`, `..` or a path."""
    return _RUN_ID.fullmatch(text) is not None and text not in (".", "..")
