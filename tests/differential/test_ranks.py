"""Several ranks, real torchrun, three backends: `make differential` adds four ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from .ranks import check


@pytest.mark.torch
@pytest.mark.timeout(600)
def test_two_ranks_are_one_run_in_each_backend(tmp_path: Path) -> None:
    """One ClearML task, one Neptune run, one HUB model with rank 0's losses under the names of the
    original; each rank's own are in the gateway, and with a rule that passes them in the backends
    too, under names of their own."""
    assert check(tmp_path, 2, every_rank_passes=True) == 48
