"""Where a console is not captured, and what `init` takes."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rank_client
from rank_client import exits
from rank_client.capture.console import begin
from rank_client.redact import Redactor
from rank_client.spool import Spool


@pytest.fixture(autouse=True)
def a_rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("RANKGATE_SPOOL", str(tmp_path / "spool"))
    monkeypatch.setenv("RANKGATE_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("RANKGATE_MODE", "offline")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    yield
    for run in list(exits.live):
        run.finish()


@pytest.mark.parametrize("stream", [io.StringIO(), None])
def test_streams_that_are_on_no_descriptor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stream: io.StringIO | None
) -> None:
    """In a notebook or a test runner the descriptors are left as they are, and nothing is said."""
    monkeypatch.setattr(sys, "stdout", stream)
    said: list[str] = []
    spool = Spool(str(tmp_path / "stream"), {"stream": b"s" * 16})
    assert begin(spool, Redactor({}), lambda what, text: said.append(text)) is None
    assert said == []
    spool.close()


@pytest.mark.parametrize("value", [None, 1, "no"])
def test_a_wrong_argument_is_told(value: object) -> None:
    """It is a ValueError that names it."""
    with pytest.raises(ValueError, match="capture_console must be True or False"):
        rank_client.init(run="r", rank=0, capture_console=value)  # type: ignore[arg-type]


def test_a_copier_that_cannot_be_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without an interpreter to start, printing is as it was, and that is said once."""
    monkeypatch.setattr("rank_client.capture.console._stands_on", lambda stream, fd: True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    said: list[str] = []
    spool = Spool(str(tmp_path / "stream"), {"stream": b"s" * 16})
    assert begin(spool, Redactor({}), lambda what, text: said.append(text)) is None
    assert len(said) == 1
    print("still here")  # noqa: T201
    sys.stdout.flush()
    assert "still here" in capfd.readouterr().out
    spool.close()
