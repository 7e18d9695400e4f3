"""RANK gating: the one place that says whose items pass."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.rules.gate import BUILT_IN, KINDS, Gate, Rule

RANKED = ("metric", "text", "params", "summary", "media")


@pytest.mark.parametrize("kind", RANKED)
def test_only_rank_0_and_a_process_on_its_own_pass(kind: str) -> None:
    """What a training logs passes from ranks -1 and 0 and is held from every other."""
    passed = [rank for rank in range(-2, 20) if Gate().decide(kind, rank)[1]]
    assert passed == [-1, 0]


@pytest.mark.parametrize("kind", ["console", "system"])
def test_what_a_node_does_passes_from_every_rank(kind: str) -> None:
    """Console lines and machine figures pass from all ranks."""
    assert all(Gate().decide(kind, rank)[1] for rank in range(-1, 20))


def test_every_kind_has_a_built_in_rule() -> None:
    """No kind of item is left without a rule, and a rule's name says which decided."""
    assert {Gate().decide(kind, 3)[0] for kind in KINDS} == {rule.name for rule in BUILT_IN}


def test_what_no_rule_names_is_held() -> None:
    """An unknown kind is held, and says so."""
    assert Gate().decide("hologram", 0) == ("no rule", False)


def test_the_first_match_wins() -> None:
    """Of two rules for a kind the first decides."""
    gate = Gate((Rule("mine", ("metric",), (2,)), *BUILT_IN))
    assert gate.decide("metric", 2) == ("mine", True)
    assert gate.decide("metric", 0) == ("mine", False)
    assert gate.decide("text", 0) == ("built-in:rank-0", True)


RULES = st.builds(
    Rule,
    st.text(max_size=5),
    st.lists(st.sampled_from(KINDS), max_size=3).map(tuple),
    st.sampled_from(["all", "none"]) | st.lists(st.integers(-1, 9), max_size=3).map(tuple),
)


@given(st.lists(RULES, max_size=4), st.sampled_from(KINDS), st.integers(-1, 9))
def test_a_rule_set_survives_the_journal(rules: list[Rule], kind: str, rank: int) -> None:
    """A rule set written as maps and read back decides the same."""
    gate = Gate(rules)
    again = Gate.from_maps(gate.as_maps())
    assert again.rules == gate.rules
    assert again.decide(kind, rank) == gate.decide(kind, rank)
