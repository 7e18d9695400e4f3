"""Every test has its own spool, data directory and no rank in its environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# For as long as this process lives: a thread of Neptune's package may outlast its test by a moment.
os.environ["OAUTHLIB_INSECURE_TRANSPORT"] = "1"

_NOT_OURS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_", "TORCHELASTIC_", "RANKGATE_", "OMPI_",
             "NEPTUNE_", "CLEARML_", "ULTRALYTICS_", "HUB_API")  # fmt: skip


@pytest.fixture(autouse=True)
def own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(_NOT_OURS):
            monkeypatch.delenv(name)
    monkeypatch.setenv("RANKGATE_SPOOL", str(tmp_path / "spool"))
    monkeypatch.setenv("RANKGATE_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("RANKGATE_CAPTURE_SOURCE", "0")  # a record at a moment of its own
