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
    log = {"p50": p50, "p99": 20.0, "p99.9": slowest, "max": 400.0}
    return {"log_in_a_loop_us": log, "log_beside_a_step_us": log}


def test_the_gate_says_what_it_stands_on() -> None:
    """An interval narrower than what is allowed decides by its upper end, else the mean does; a
    pair on its own decides nothing."""
    found = {
        "gateway": {"cpu_us": [200, 100, 260], "own_us": 90.0, "pairs": 8},
        "absent": {"cpu_us": [200, -900, 1300], "own_us": 251.0, "pairs": 8},
        "stopped": {"cpu_us": [9000, 9000, 9000], "own_us": 90.0, "pairs": 1},
    }
    assert broken_times(found, _log(5.0, 90.0)) == [
        "gateway: time per step: 260 µs, above 250",
        "absent: the client's own time per step: 251 µs, above 250",
    ]
    assert found["gateway"]["gated_on"] == "interval"
    assert str(found["absent"]["gated_on"]).startswith("mean")


def test_slow_calls_are_found() -> None:
    """A median above 10 µs, and a slowest thousandth above 100 µs, wherever it was measured."""
    assert len(broken_times({}, _log(10.1, 90.0))) == 1
    assert len(broken_times({}, _log(5.0, 101.0))) == 2


def test_the_interval_holds_the_mean() -> None:
    """The bootstrap's interval stands around the mean, and narrows with more pairs."""
    rng = random.Random(SEED)
    few, many = ([rng.gauss(100, 30) for _ in range(n)] for n in (10, 1000))
    (mean, low, high), (_, closer, above) = interval(few, rng), interval(many, rng)
    assert low < mean < high
    assert above - closer < high - low
