"""Keeping below a backend's limits, with a clock that only sleeping moves."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.sinks.base import Unavailable
from gateway.sinks.hub.http import Limited
from gateway.sinks.hub.pace import Limits, Pace, Paced, shared_file
from tests.servers.platform import KEY


class Clock:
    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def pace(limits: Limits, clock: Clock, shared: Path | None = None) -> Pace:
    return Pace(limits, shared, clock, clock.sleep)


def went_by(one: Pace, clock: Clock, kind: str, seconds: float) -> int:
    """How many requests a greedy caller gets through in so many seconds."""
    end, count = clock.now + seconds, 0
    while clock.now < end:
        try:
            one.take(kind)
            count += 1
        except Unavailable as error:
            assert error.after_seconds is not None
            clock.now += error.after_seconds
    return count


def test_no_minute_holds_more_than_the_limit() -> None:
    """However much there is to send, a sliding minute holds as many requests as allowed."""
    clock = Clock()
    one = pace(Limits({"": 95}, 60.0), clock)
    assert went_by(one, clock, "epoch_end", 59.0) == 95
    assert went_by(one, clock, "epoch_end", 600.0) <= 95 * 11


def test_a_kind_has_its_own_limit() -> None:
    """Ten uploads a minute, and the other requests go on between them."""
    clock = Clock()
    one = pace(Limits({"": 95, "upload": 10}, 60.0), clock)
    for _ in range(10):
        one.take("upload")
    with pytest.raises(Unavailable):
        one.take("upload")
    one.take("epoch_end")


def test_lines_gather_between_two_requests() -> None:
    """A flood of lines makes one request in each gap, and leaves room for the rest."""
    clock = Clock()
    one = pace(Limits({"": 95}, 60.0, {"console_output": 1.5}), clock)
    assert went_by(one, clock, "console_output", 60.0) <= 41


def test_runs_of_a_key_share_the_limit(tmp_path: Path) -> None:
    """Two processes together stay within it, and a wish to wait is kept by both."""
    clock = Clock()
    file = shared_file(tmp_path, KEY)
    one, two = (pace(Limits({"": 10}, 60.0), clock, file) for _ in range(2))
    assert KEY not in file.name
    for _ in range(5):
        one.take("a")
        two.take("a")
    for blocked in (one, two):
        with pytest.raises(Unavailable):
            blocked.take("a")
    clock.now += 60.0
    one.hold(30.0)
    with pytest.raises(Unavailable) as caught:
        two.take("a")
    assert caught.value.after_seconds == 30.0


def test_a_damaged_file_and_a_clock_set_back_hold_nobody_up(tmp_path: Path) -> None:
    """The count begins again."""
    clock = Clock()
    file = shared_file(tmp_path, KEY)
    for text in ("", "{not json", '{"went": 3}', "[]"):
        file.write_text(text)
        pace(Limits({"": 1}, 60.0), clock, file).take("a")
    clock.now -= 1e6
    pace(Limits({"": 1}, 60.0), clock, file).take("a")


def test_too_many_requests_stops_all_runs(tmp_path: Path) -> None:
    """A 429 of one run is kept by the others of its key, without their asking."""
    clock = Clock()
    file = shared_file(tmp_path, KEY)

    class Busy:
        calls = 0

        def call(self, *_: object) -> dict[str, object]:
            self.calls += 1
            raise Limited("429", 40.0)

    wire = Busy()
    runs = [Paced(wire, pace(Limits(), clock, file), lambda *_: "a") for _ in range(2)]  # type: ignore[arg-type]
    for run in runs:
        with pytest.raises(Unavailable) as caught:
            run.call("POST", "/")
        assert caught.value.after_seconds == 40.0
    assert wire.calls == 1
