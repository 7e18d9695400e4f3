"""The fault matrix in full: every fault × every sink, several seeds each, and deaths of processes.

What counts is the backends' own record: everything once, or told of as `maybe duplicate` where a
backend cannot be asked (docs/sinks.md).

Run: python -m tests.trials.faults [--rounds N] [--deaths N] [--seed S] [--seconds MAX]
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

from tests.contracts import deaths, faults
from tests.contracts.backends import Backend
from tests.contracts.deaths import Death
from tests.contracts.faults import Fault, Outcome

from . import trial

ROUNDS = 3  #: seeds of each cell
DEATHS = 2  #: processes that die before the one that finishes, of each cell of a death

Cell = tuple[str, Callable[[Path, int], Outcome]]


def cells(deaths_each: int) -> list[Cell]:
    """Every cell that applies: its name, and what plays it in a folder with a seed."""
    return [
        (f"{made.name}: {one.name}", partial(_play, made, one, deaths_each))
        for one in (*faults.FAULTS, *deaths.DEATHS)
        for made in faults.MADE
        if not (isinstance(one, Fault) and made in one.not_for)
    ]


def _play(
    made: type[Backend], one: Fault | Death, deaths_each: int, folder: Path, seed: int
) -> Outcome:
    if isinstance(one, Fault):
        return faults.play(made, one, folder, seed)
    return deaths.play(made, one, folder, seed, deaths_each)


def attempt(
    folder: Path, seed: int, rounds: int, deaths_each: int, seconds: float
) -> trial.Figures:
    """Every cell with `rounds` seeds, as far as the time reaches."""
    logging.disable(logging.CRITICAL)  # every fault would be told of, at length
    warnings.simplefilter("ignore")
    until = time.monotonic() + seconds
    broken: list[str] = []
    totals: Counter[str] = Counter()
    of_sink: Counter[str] = Counter()
    twice: Counter[str] = Counter()  # no more than was told, else it is broken
    for number in range(rounds):
        for name, play in cells(deaths_each):
            if time.monotonic() > until:
                break
            place = folder / f"{totals['played']}"
            place.mkdir()
            one = seed + number
            try:
                outcome = play(place, one)
                wrong = outcome.broken
                wrong += ["quarantined"] * outcome.quarantined
            except Exception as error:
                said = f"{type(error).__name__}: {error}"[:400]
                outcome, wrong = Outcome([], [], 0, 0, 0.0), [said]
            broken += [f"{name}, seed {one}: {what}" for what in wrong]
            totals["played"] += 1
            twice[name.partition(":")[0]] += len(outcome.doubled)
            totals["maybe_duplicate"] += outcome.maybe_duplicate
            of_sink[name.partition(":")[0]] += 1
    return {
        "cells": len(cells(deaths_each)),
        "played": totals["played"],
        "of_sink": dict(of_sink),
        "there_twice": {name: n for name, n in twice.items() if n},
        "told_maybe_twice": totals["maybe_duplicate"],
        "broken": broken,
    }


def main() -> int:
    arguments = trial.parser(__doc__ or "", seconds=1800.0)
    arguments.add_argument("--rounds", type=int, default=ROUNDS)
    arguments.add_argument("--deaths", type=int, default=DEATHS)
    given = arguments.parse_args()

    def body(folder: Path) -> trial.Figures:
        with redirect_stdout(sys.stderr):  # Neptune's package greets and takes leave
            return attempt(folder, given.seed, given.rounds, given.deaths, given.seconds)

    return trial.run("faults", given.seed, body)


if __name__ == "__main__":
    sys.exit(main())
