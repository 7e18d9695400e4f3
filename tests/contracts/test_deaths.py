"""Sinks whose process is killed, hangs or is ended by a vendor's package; `make faults` does
the same to all of them."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest

from .backends import Backend, Clearml, Neptune, Platform
from .deaths import DEATHS, Death, play

SMALL = {"kill": Platform, "hang": Neptune, "exit": Clearml}  #: each start imports a package


@pytest.mark.parametrize("death", DEATHS, ids=lambda death: death.how)
def test_a_death_loses_and_doubles_nothing(
    death: Death, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The next process goes on; the run is there once. Of a hang the log tells where it stood."""
    made: type[Backend] = SMALL[death.how]
    seed = zlib.crc32(f"{death.name} {made.name}".encode())
    print(f"seed {seed}")  # noqa: T201 - pytest shows it when the test fails
    outcome = play(made, death, tmp_path, seed)
    assert outcome.broken == [], outcome
    assert outcome.quarantined == 0, outcome
    if death.how == "hang":
        assert "Timeout (0:00:06)!" in capfd.readouterr().err
