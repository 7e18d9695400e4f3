"""What a log costs the training, small: only what holds on a busy machine too."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from .overhead import CONDITIONS, Block, Pair, attempt, broken_ends, broken_times, interval

SEED = 5


@pytest.mark.timeout(300)  # a stopped gateway alone takes the 10 s that an exit may take
def test_no_condition_of_the_gateway_changes_an_exit(tmp_path: Path) -> None:
    """With a gateway, without, stopped, black-holed, disk full, wrong key: no call raises, the exit
    code is the script's own, the exit comes in time, and nothing is lost."""
    found = attempt(tmp_path, SEED, blocks=1, ddp_blocks=0, steps=4, gate_times=False)
    assert found["broken"] == [], f"seed {SEED}"
    assert set(CONDITIONS) < set(found["numpy"])
    assert found["numpy"]["stopped"]["exit_delay_seconds"] > 3, "the gateway was not stopped"


def _pair(codes: list[int], exit_seconds: float) -> Pair:
    with_log = Block("gateway", "code", [], codes, exit_seconds)
    return Pair(with_log, Block("no log", "code", [], [7], 0.1))


@pytest.mark.parametrize(("codes", "seconds"), [([0], 0.1), ([7], 10.2), ([-9], 0.1)])
def test_a_changed_exit_is_found(codes: list[int], seconds: float) -> None:
    """Another code than the script's own, or an exit that takes too long, is a broken promise."""
    assert broken_ends([_pair([7], 10.0)]) == []
    assert len(broken_ends([_pair(codes, seconds)])) == 1


def _log(p50: float, slowest: float) -> dict[str, object]:
    return {"log_in_a_loop_us": {"p50": p50, "p99": 20.0, "p99.9": slowest, "max": 400.0}}


def test_the_clients_own_time_must_lie_below_the_gate() -> None:
    """With its whole interval; the difference of all processor time breaks the promise only where
    its interval lies above with its whole width, and where there are enough pairs."""
    found = {
        "gateway": {
            "own_us": [200, 100, 260],
            "all_us": [900, -900, 2000],
            "pairs": 8,
            "step_ms": 50,
        },
        "absent": {"own_us": [90, 80, 95], "all_us": [400, 251, 500], "pairs": 8, "step_ms": 50},
        "stopped": {
            "own_us": [90, 80, 95],
            "all_us": [9000, 9000, 9000],
            "pairs": 1,
            "step_ms": 50,
        },
        "slower": {"own_us": [300, 280, 320], "all_us": [0, 0, 0], "pairs": 8, "step_ms": 100},
    }
    assert broken_times(found, _log(5.0, 90.0)) == [
        "gateway: the client's own time per step: 260 µs, above 250",
        "absent: all time per step, at least: 251 µs, above 250",
    ]


def test_slow_calls_are_found() -> None:
    """A median above 10 µs, and a slowest thousandth above 100 µs."""
    assert len(broken_times({}, _log(10.1, 90.0))) == 1
    assert len(broken_times({}, _log(5.0, 101.0))) == 1


def test_the_interval_holds_the_mean() -> None:
    """The bootstrap's interval stands around the mean, and narrows with more pairs."""
    rng = random.Random(SEED)
    few, many = ([rng.gauss(100, 30) for _ in range(n)] for n in (10, 1000))
    (mean, low, high), (_, closer, above) = interval(few, rng), interval(many, rng)
    assert low < mean < high
    assert above - closer < high - low
