"""The sink of tests: keeps everything in a list, and can be told to fail."""

from __future__ import annotations

from collections.abc import Sequence

from .base import Item, Memory, RunInfo, Sent


class MemorySink:
    """Takes every item. `received` is what it confirmed, `faults` are raised one per call."""

    def __init__(self) -> None:
        self.stop_asked = ""
        self.run: RunInfo | None = None
        self.received: list[Item] = []
        self.again: list[bool] = []
        self.closed: list[tuple[str, str]] = []
        self.faults: list[Exception] = []

    def open(self, run: RunInfo, memory: Memory) -> None:
        self.run = run

    def send(self, batch: Sequence[Item], again: bool) -> Sent:
        if self.faults:
            raise self.faults.pop(0)
        self.received += batch
        self.again.append(again)
        return Sent(delivered=sum(item.items for item in batch))

    def close(self, state: str, reason: str) -> Sent:
        self.closed.append((state, reason))
        return Sent()
