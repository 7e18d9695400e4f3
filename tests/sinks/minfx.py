"""The `minfx` package beside our own environment, for tests only: it needs what `neptune` needs."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

VERSION = "0.7.4"
ROOT = Path(__file__).parents[2]


def folder() -> Path:
    """Where it can be imported from; made on first use (seconds), and left there.

    Raises CalledProcessError with pip's words on stderr when it cannot be had.
    """
    found = ROOT / f".venv-minfx-{VERSION}"
    with (ROOT / f".venv-minfx-{VERSION}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (found / ".ready").exists():
            shutil.rmtree(found, ignore_errors=True)
            pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps")
            where = ("--disable-pip-version-check", "--target", str(found))
            subprocess.run((*pip, *where, f"minfx=={VERSION}"), check=True, stdout=sys.stderr)
            (found / ".ready").touch()
    return found
