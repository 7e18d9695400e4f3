"""The fault matrix, one seed for each cell; `make faults` plays it with many."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest

from .backends import Backend
from .faults import FAULTS, MADE, Fault, play

pytestmark = [  # the vendor's configuration reader uses old names of pyparsing
    pytest.mark.filterwarnings("ignore::DeprecationWarning:clearml.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:pyparsing.*"),
]

CELLS = [(fault, made) for fault in FAULTS for made in MADE]


@pytest.mark.parametrize(
    ("fault", "made"), CELLS, ids=[f"{made.name}-{fault.name}" for fault, made in CELLS]
)
def test_a_fault_loses_and_doubles_nothing(
    fault: Fault, made: type[Backend], tmp_path: Path
) -> None:
    """All of the run in the backend's own record, once, or told of as `maybe duplicate`."""
    if made in fault.not_for:
        pytest.skip(fault.not_for[made])
    seed = zlib.crc32(f"{fault.name} {made.name}".encode())
    print(f"seed {seed}")  # noqa: T201 - pytest shows it when the test fails
    outcome = play(made, fault, tmp_path, seed)
    assert outcome.broken == [], outcome
    assert outcome.quarantined == 0, outcome
