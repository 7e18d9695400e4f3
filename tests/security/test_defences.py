"""Each defence holds, and its absence is noticed: the check that passes with it fails without it.

The rows stand in the modules beside this one, by what they are about; docs/security.md names them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.flow.job import ROOT

from . import disks, keys, messages, network, paths, ranks, shown, sources, users
from .row import Row

MODULES = (network, keys, users, ranks, messages, sources, paths, disks, shown)
ROWS: list[Row] = [row for module in MODULES for row in module.ROWS]
each_row = pytest.mark.parametrize(
    "row", [pytest.param(row, id=f"{row.threat}: {row.defence}") for row in ROWS]
)


@each_row
def test_the_defence_holds(row: Row, tmp_path: Path) -> None:
    """What the row promises is so."""
    row.check(tmp_path)


@each_row
def test_its_absence_is_noticed(row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the defence taken out of the product, the very same check fails."""
    row.remove(monkeypatch)
    with pytest.raises(AssertionError):
        row.check(tmp_path)


def test_the_document_names_every_module() -> None:
    """Whoever reads of a threat finds its rows."""
    text = (ROOT / "docs/security.md").read_text()
    for module in MODULES:
        assert f"`{module.__name__.rpartition('.')[2]}`" in text
