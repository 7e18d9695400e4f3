"""What every trial has in common: its seed, its one line of figures, its exit code."""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

Figures = dict[str, Any]


def parser(about: str, seconds: float) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=about)
    made.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    made.add_argument("--seconds", type=float, default=seconds, help="the longest it may take")
    return made


def _end(number: int, _frame: FrameType | None) -> None:
    """Leave through every `with` and `finally`, which end what the trial has started."""
    signal.signal(number, lambda *_: None)  # not once more, while we leave
    raise SystemExit(128 + number)


def run(name: str, seed: int, body: Callable[[Path], Figures]) -> int:
    """Run `body` in a directory of its own. The figures have `broken`, a list of sentences; with
    any, the directory stays and the exit code is 1. Ended by SIGTERM, nothing of it stays."""
    sys.stderr.write(f"{name}: seed {seed}\n")
    signal.signal(signal.SIGTERM, _end)
    folder = Path(tempfile.mkdtemp(prefix=f"rankgate-{name}-"))
    began = time.monotonic()
    try:
        figures = body(folder)
    except SystemExit:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    took = round(time.monotonic() - began, 1)
    line = {"trial": name, "seed": seed, **figures, "took_seconds": took}
    sys.stdout.write(json.dumps(line) + "\n")
    if figures["broken"]:
        sys.stderr.write(f"{name}: broken; all of it is in {folder}\n")
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    return 0
