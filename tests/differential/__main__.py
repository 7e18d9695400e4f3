"""All cases, each original twice, and several ranks: `python -m tests.differential [NAME …]`.

Prints a line for each case on stderr and one line of JSON on stdout; exit code 1 when a difference
is not declared, a declared one is gone, an original differs from itself, or ranks go wrong.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from .ranks import check
from .trainings import CASES, Case
from .trial import run

Outcome = tuple[bool, dict[str, Any]]


def _compared(case: Case, folder: Path) -> Outcome:
    verdict = run(case, folder, times=2)
    return verdict.ok, verdict.as_map()


def _ranks(ranks: int, every_rank_passes: bool, folder: Path) -> Outcome:
    return True, {"equal": check(folder, ranks, every_rank_passes)}


TRIALS: dict[str, Callable[[Path], Outcome]] = {
    **{f"{case.sink}-{case.version}": partial(_compared, case) for case in CASES},
    "ranks-2": partial(_ranks, 2, False),
    "ranks-4": partial(_ranks, 4, False),
    "ranks-4-passing": partial(_ranks, 4, True),
}


def main(chosen: list[str]) -> int:
    began = time.monotonic()
    ok, cases = True, {}
    for name in chosen or TRIALS:
        with tempfile.TemporaryDirectory(prefix="rankgate-differential-") as folder:
            try:
                good, cases[name] = TRIALS[name](Path(folder))
            except (AssertionError, ValueError, subprocess.TimeoutExpired) as error:
                good, cases[name] = False, {"wrong": str(error)}
        sys.stderr.write(f"{name}: {'good' if good else 'NOT GOOD'}\n")
        ok &= good
    seconds = round(time.monotonic() - began)
    sys.stdout.write(json.dumps({"ok": ok, "seconds": seconds, "cases": cases}) + "\n")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
