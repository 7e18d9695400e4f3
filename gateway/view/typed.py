"""Commands that a text tells people to type: with all that another shell would not know."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

DEFAULT_DIR = Path(".rankgate")


def typed(root: Path, *words: str, config: str = "", sinks: Sequence[str] = ()) -> str:
    """`rankgate WORDS` for a data directory, which is named unless it is the default one here."""
    line = ["rankgate", *words]
    if os.environ.get("RANKGATE_DIR") or root.absolute() != DEFAULT_DIR.absolute():
        line += ["--dir", str(root.absolute())]
    line += ["--config", config] if config else []
    for sink in sinks:
        line += ["--sink", sink]
    return shlex.join(line)
