"""A small part of `make simulate` and `make mutants`: a seed is a whole job with its disasters."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Iterator

import pytest

from .__main__ import found_at, play
from .mutants import names
from .world import World

SEEDS = 600


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def pool() -> Iterator[multiprocessing.pool.Pool]:
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as made:
        yield made


def test_no_promise_is_broken(pool: multiprocessing.pool.Pool) -> None:
    """Nothing is lost, doubled, reordered or claimed too early, and all arrives in a minute."""
    broken = [p for p in pool.map(play, range(SEEDS), 25) if p.broken]
    assert not broken, "\n".join(f"seed {p.seed}: {p.broken}" for p in broken[:5])


def test_every_planted_bug_is_found(pool: multiprocessing.pool.Pool) -> None:
    """The simulator would notice the mistakes that somebody could make."""
    found = dict(zip(names(), pool.map(found_at, names(), 1), strict=True))
    assert len(found) >= 20
    assert not [name for name, seed in found.items() if seed is None]


def test_a_seed_plays_the_same_history_again() -> None:
    """Two plays of a seed agree in every frame and every line of the trace."""
    plays = []
    for _ in range(2):
        lines: list[str] = []
        world = World(11, tell=lines.append)
        world.run()
        plays.append((lines, world.digest, world.events))
    assert plays[0] == plays[1]
    assert len(plays[0][0]) > 3
