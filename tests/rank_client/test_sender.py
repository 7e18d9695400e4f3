"""The sender's thread: how often it wakes."""

from __future__ import annotations

import time
from pathlib import Path

from rank_client.sender import TICK_MAX_SECONDS, Sender
from rank_client.spool import Spool
from rank_client.wire.records import Kind
from rank_client.wire.session import ClientSession

STEP_SECONDS = 0.05
COUNTED_SECONDS = 1.5


def test_a_rank_that_logs_each_step_is_seldom_woken(tmp_path: Path) -> None:
    """A record each 50 ms leaves the longest pause between two ticks as it is: each waking costs
    the training more than what there is to send."""
    ticks = []

    def tick() -> int:
        ticks.append(time.monotonic())
        return 0

    spool = Spool(str(tmp_path / "s"), {"run": "r"})
    session = ClientSession(bytes(16), dict, spool, lambda: 0.5)
    sender = Sender(session, spool, tmp_path, None, {}, False, False, lambda *_: None, tick)
    until = time.monotonic() + 2 * COUNTED_SECONDS
    while time.monotonic() < until:
        spool.append_map(Kind.TEXT, {"t": "a step"})
        time.sleep(STEP_SECONDS)
    sender.finish(time.monotonic(), None, 0.0)
    spool.close()
    counted = [at for at in ticks if until - COUNTED_SECONDS <= at < until]
    assert 1 <= len(counted) <= COUNTED_SECONDS / TICK_MAX_SECONDS + 2
