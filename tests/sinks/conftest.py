"""Sinks under test do not pause between requests; `test_hub_pace.py` tests the pauses."""

from __future__ import annotations

import pytest

from gateway.sinks.hub import legacy, platform


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "CONSOLE_GAP_SECONDS", 0.0)
    monkeypatch.setattr(legacy, "METRICS_GAP_SECONDS", 0.0)
