"""Signal handlers in the middle of `log`: what returned is there once, under rising numbers."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import FrameType

import pytest

from rank_client import spool as spool_module
from rank_client.rows import Rows
from rank_client.spool import Spool
from rank_client.wire.disk import OsDisk
from rank_client.wire.records import ROW_HEAD, UNNUMBERED, Kind
from rank_client.wire.segments import SPOOL_KINDS, scan_segment, segment_indexes

SECONDS = 1.5


class Interrupted(Exception):
    """What a handler raises, as Ctrl-C raises KeyboardInterrupt."""


@pytest.fixture
def alarms() -> Iterator[None]:
    before = signal.getsignal(signal.SIGALRM)
    yield
    signal.signal(signal.SIGALRM, signal.SIG_IGN)  # first: the handler winds the clock again
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def again(randomly: random.Random) -> None:
    signal.setitimer(signal.ITIMER_REAL, randomly.uniform(2e-5, 3e-4))


def steps_in(directory: Path) -> list[int]:
    """The steps of all rows in a spool, whose numbers must be 1, 2, 3 … without a hole."""
    steps, seqs = [], []
    for index in segment_indexes(OsDisk(), str(directory)):
        buf, found = scan_segment(OsDisk(), str(directory), index, SPOOL_KINDS)
        assert found.damage == []
        for head in found.heads:
            if head.kind not in UNNUMBERED:
                seqs.append(head.seq)
            if head.kind == Kind.ROW:
                steps.append(ROW_HEAD.unpack_from(buf, head.body.start)[0])
    assert seqs == list(range(1, len(seqs) + 1))
    return steps


@pytest.mark.parametrize("volatile", [False, True])
def test_a_handler_that_logs(tmp_path: Path, alarms: None, volatile: bool) -> None:
    """Rows logged by a handler and rows it interrupts are each there once."""
    seed = random.randrange(1 << 30)
    print("seed", seed)  # noqa: T201 - told when the test fails
    randomly = random.Random(seed)
    spool = Spool(str(tmp_path), {"x": 1}, segment_bytes=128 << 10)
    if volatile:
        spool.volatile = "told so"
    rows = Rows(spool, lambda what, text: None)
    returned: list[int] = []
    inside: list[int] = []

    def handler(_number: int, _frame: FrameType | None) -> None:
        step = 1_000_000 + len(inside)
        rows.log({"from": 1.0, "loss": 0.5}, step=step)
        inside.append(step)
        again(randomly)

    signal.signal(signal.SIGALRM, handler)
    again(randomly)
    end, step = time.monotonic() + SECONDS, 0
    while time.monotonic() < end and len(returned) < 150_000:  # the ring holds no more
        rows.log({"from": 0.0, "loss": 0.25}, step=step)
        returned.append(step)
        step += 1
    signal.signal(signal.SIGALRM, signal.SIG_IGN)  # first: the handler winds the clock again
    signal.setitimer(signal.ITIMER_REAL, 0)
    if volatile:
        spool.heal()
        assert spool.volatile == ""
    spool.close()
    assert len(inside) > 50
    assert sorted(steps_in(tmp_path)) == sorted(returned + inside)
    assert spool.last == len(returned) + len(inside)


def test_a_handler_that_raises(
    tmp_path: Path, alarms: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception out of a handler loses at most the call it hit, and nothing after it."""
    monkeypatch.setattr(spool_module, "MARK_BYTES", 2048)
    seed = random.randrange(1 << 30)
    print("seed", seed)  # noqa: T201 - told when the test fails
    randomly = random.Random(seed)
    spool = Spool(str(tmp_path), {"x": 1}, segment_bytes=16 << 10)
    rows = Rows(spool, lambda what, text: None)
    returned: list[int] = []
    hits = 0

    def handler(_number: int, _frame: FrameType | None) -> None:
        raise Interrupted

    signal.signal(signal.SIGALRM, handler)
    end, steps = time.monotonic() + SECONDS, iter(range(1 << 40))
    while time.monotonic() < end and len(returned) < 150_000:  # the ring holds no more
        try:
            again(randomly)
            for step in islice(steps, 1000):  # a finalizer that runs in here may swallow the alarm
                rows.log({"loss": 0.25}, step=step)
                returned.append(step)
        except Interrupted:  # the alarm is a single one, so none comes out here
            hits += 1
    rows.log({"loss": 0.25}, step=-1)
    returned.append(-1)
    spool.close()
    found = steps_in(tmp_path)
    assert hits > 50
    assert len(found) == len(set(found))
    assert set(returned) <= set(found)
    assert len(found) - len(returned) <= hits
