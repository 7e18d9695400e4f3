"""Resident memory: of a rank before and after `init` and after a million calls, of the gateway."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import throughput
from .gateway import Gateway
from .measure import say


def run(directory: Path, quick: bool) -> dict[str, Any]:
    calls = 100_000 if quick else 1_000_000
    case = throughput.Case(streams=1, frame=0, rows=calls)
    with Gateway(directory / "memory") as gateway:
        idle = gateway.memory()
        senders = throughput.start(case, gateway)
        try:
            throughput.tell(senders[0])
            rank = throughput.heard(senders[0])["memory"]
        finally:
            throughput.stop(senders)
    say(f"\nRSS of a rank, MB ({calls:,} calls of {throughput.KEYS} scalars)")
    for name, sizes in rank.items():
        say(f"{name:20}{sizes['rss_mb']:8}  peak {sizes['peak_mb']}")
    return {"unit": "MB", "calls": calls, "rank": rank, "gateway_idle": idle}
