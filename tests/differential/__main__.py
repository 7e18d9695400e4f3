"""All cases, each original twice, and several ranks: `python -m tests.differential [NAME …]`.

Prints a line for each case on stderr and one line of JSON on stdout; exit code 1 when a difference
is not declared, a declared one is gone, an original differs from itself, ranks go wrong, or a case
has no environment to train in; 2 when there is no such case.
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

from tests.integrations.environment import python_of

from .ranks import VERSION, check
from .trainings import CASES, Case
from .trial import run

Outcome = tuple[bool, dict[str, Any]]
WRONG = (AssertionError, ValueError, subprocess.TimeoutExpired)  #: what a trial may raise


class NoEnvironment(Exception):
    """A version of Ultralytics cannot be had here; says why, and what to do."""


def _compared(case: Case, folder: Path) -> Outcome:
    verdict = run(case, folder, times=2)
    return verdict.ok, verdict.as_map()


def _ranks(ranks: int, every_rank_passes: bool, folder: Path) -> Outcome:
    return True, {"equal": check(folder, ranks, every_rank_passes)}


#: the version of Ultralytics that trains, and the trial
TRIALS: dict[str, tuple[str, Callable[[Path], Outcome]]] = {
    **{f"{case.sink}-{case.version}": (case.version, partial(_compared, case)) for case in CASES},
    "ranks-2": (VERSION, partial(_ranks, 2, False)),
    "ranks-4": (VERSION, partial(_ranks, 4, False)),
    "ranks-4-passing": (VERSION, partial(_ranks, 4, True)),
}


def _prepare(version: str) -> None:
    """Make the environment before any training. Raises NoEnvironment."""
    try:
        python_of(version)
        return
    except subprocess.CalledProcessError as error:
        why = f"pip ended with {error.returncode}, its words are above"
    except OSError as error:
        why = str(error)
    raise NoEnvironment(
        f"the environment for ultralytics {version} cannot be made: {why}. It needs the package "
        f"index once, for: python -m tests.integrations.environment {version}"
    )


def main(chosen: list[str]) -> int:
    strange = [name for name in chosen if name not in TRIALS]
    if strange:
        sys.stderr.write(f"no case {', '.join(strange)}; there are: {', '.join(TRIALS)}\n")
        return 2
    began = time.monotonic()
    ok, cases = True, {}
    for name in chosen or TRIALS:
        version, trial = TRIALS[name]
        with tempfile.TemporaryDirectory(prefix="rankgate-differential-") as folder:
            try:
                _prepare(version)
                good, cases[name] = trial(Path(folder))
            except (NoEnvironment, *WRONG) as error:
                good, cases[name] = False, {"wrong": str(error)}
                sys.stderr.write(f"{name}: {error}\n")
        sys.stderr.write(f"{name}: {'good' if good else 'NOT GOOD'}\n")
        ok &= good
    seconds = round(time.monotonic() - began)
    sys.stdout.write(json.dumps({"ok": ok, "seconds": seconds, "cases": cases}) + "\n")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
