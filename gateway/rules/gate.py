"""RANK gating, as data: the one place that says which rank's items pass to the sinks.

All ranks' items are kept and shown; a rule decides only what is forwarded. First match wins.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

KINDS = ("metric", "text", "params", "summary", "media", "console", "system")


@dataclass(frozen=True, slots=True)
class Rule:
    """Items of these kinds pass from these ranks; `ranks` is "all", "none" or a tuple."""

    name: str
    kinds: tuple[str, ...]
    ranks: str | tuple[int, ...]

    def passes(self, rank: int) -> bool:
        if isinstance(self.ranks, str):
            return self.ranks == "all"
        return rank in self.ranks

    def as_map(self) -> dict[str, Any]:
        ranks = self.ranks if isinstance(self.ranks, str) else list(self.ranks)
        return {"name": self.name, "kinds": list(self.kinds), "ranks": ranks}


#: what Ultralytics does: only the single process (-1) and the first worker (0) pass on
BUILT_IN = (
    Rule("built-in:every-rank", ("console", "system"), "all"),
    Rule("built-in:rank-0", ("metric", "text", "params", "summary", "media"), (-1, 0)),
)


class Gate:
    """A rule set in force; `decide` gives (rule's name, does it pass)."""

    def __init__(self, rules: Iterable[Rule] = BUILT_IN) -> None:
        self.rules = tuple(rules)

    @classmethod
    def from_maps(cls, maps: Iterable[dict[str, Any]]) -> Gate:
        """The rule set of a journal's `rules` entry."""
        return cls(
            Rule(
                str(m["name"]),
                tuple(m["kinds"]),
                m["ranks"] if isinstance(m["ranks"], str) else tuple(m["ranks"]),
            )
            for m in maps
        )

    def as_maps(self) -> list[dict[str, Any]]:
        return [rule.as_map() for rule in self.rules]

    def decide(self, kind: str, rank: int) -> tuple[str, bool]:
        for rule in self.rules:
            if kind in rule.kinds:
                return rule.name, rule.passes(rank)
        return "no rule", False
