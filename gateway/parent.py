"""Is whoever started this process still there? The gateway's children leave when it is gone.

The supervisor tells its number to each child: one that is killed before a child could look who
its parent is would else leave a child behind that holds the directory's locks for ever.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

PARENT = "RANKGATE_PARENT"

_first = os.getppid()  # for a process that somebody started by hand


def child_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for a child of this process."""
    return {**environ, PARENT: str(os.getpid())}


def gone() -> bool:
    told = os.environ.get(PARENT, "")
    return os.getppid() != (int(told) if told.isdigit() else _first)
