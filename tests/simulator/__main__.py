"""Play many seeds on all cores, one seed with its trace, or the planted bugs.

A JSON line of figures comes last; the exit code is 1 when a promise was broken, or a planted bug
was not found.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import sys
import time
from typing import NamedTuple

from . import mutants
from .stores import Killed
from .world import World

MUTANT_SEEDS = 200
CHUNK_SEEDS = 25


class Played(NamedTuple):
    seed: int
    events: int
    records: int
    simulated_seconds: float
    digest: int
    broken: str  #: the promise, or empty


def play(seed: int) -> Played:
    world = World(seed)
    broken = ""
    try:
        world.run()
    except AssertionError as error:
        broken = str(error) or "an assertion"
    except (Exception, Killed) as error:  # a core that raises is broken as well
        broken = f"{type(error).__name__}: {error}"
    records = sum(len(life.wrote) for life in world.lives)
    return Played(seed, world.events, records, world.now, world.digest, broken)


def simulate(first: int, seeds: int) -> int:
    """Play `seeds` histories from `first` on; the exit code."""
    begun = time.monotonic()
    with multiprocessing.Pool(os.cpu_count(), initializer=_quiet) as pool:
        numbers = range(first, first + seeds)
        played = list(pool.imap_unordered(play, numbers, CHUNK_SEEDS))
    broken = sorted(p for p in played if p.broken)
    for p in broken[:20]:
        print(f"seed {p.seed}: {p.broken[:200]}")
    if broken:
        print(f"make simulate SEED={broken[0].seed} plays the first one again, with its trace")
    figures = {
        "seeds": seeds,
        "broken": len(broken),
        "events": sum(p.events for p in played),
        "records": sum(p.records for p in played),
        "simulated_hours": round(sum(p.simulated_seconds for p in played) / 3600, 1),
        "seconds": round(time.monotonic() - begun, 1),
    }
    print(json.dumps({"simulate": figures}))
    return 1 if broken else 0


def replay(seed: int) -> int:
    """Play one history, telling what happens; the exit code."""
    world = World(seed, tell=print)
    print(f"seed {seed}: {world.plan}")
    try:
        world.run()
    except AssertionError as error:
        print(f"{world.now:8.3f}  BROKEN: {error}")
        return 1
    finally:
        print(f"{world.events} events, digest {world.digest:08x}")
    return 0


def found_at(name: str) -> int | None:
    """The first seed that finds a planted bug; None when none of them does."""
    _quiet()
    with mutants.planted(name):
        return next((seed for seed in range(MUTANT_SEEDS) if play(seed).broken), None)


def hunt(names: list[str]) -> int:
    """Look for each planted bug; the exit code."""
    begun = time.monotonic()
    with multiprocessing.Pool(os.cpu_count()) as pool:
        found = dict(zip(names, pool.imap(found_at, names), strict=True))
    for name, seed in found.items():
        print(f"{name:44}", "SURVIVED" if seed is None else f"found by seed {seed}")
    survived = [name for name, seed in found.items() if seed is None]
    seeds = [seed for seed in found.values() if seed is not None]
    figures = {
        "planted": len(names),
        "survived": survived,
        "worst_seed": max(seeds, default=0),
        "seconds": round(time.monotonic() - begun, 1),
    }
    print(json.dumps({"mutants": figures}))
    return 1 if survived else 0


def _quiet() -> None:
    logging.disable(logging.CRITICAL)  # the sink loop logs each fault it survives


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulator", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many histories (1000)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (0)")
    parser.add_argument("--seed", type=int, help="play this one alone, with its trace")
    parser.add_argument("--mutants", action="store_true", help="look for every planted bug")
    parser.add_argument("--mutant", action="append", help="look for this planted bug")
    arguments = parser.parse_args()
    if arguments.mutants or arguments.mutant:
        return hunt(arguments.mutant or mutants.names())
    if arguments.seed is not None:
        _quiet()
        return replay(arguments.seed)
    return simulate(arguments.first, arguments.seeds)


if __name__ == "__main__":
    sys.exit(main())
