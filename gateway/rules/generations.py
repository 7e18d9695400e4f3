"""Generations: which launch of the whole group a stream belongs to, and in what order they came.

Derived from HELLO attributes and journal order alone, so that a rebuild gives the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

UNORDERED = -1  #: kept and shown, but never wins over an ordered one


@dataclass(slots=True)
class Generation:
    """One launch of the whole group; `id` never changes, its place in the order may."""

    id: int
    launch: str
    restart: int
    world_size: int
    agents: dict[str, str] = field(default_factory=dict)  #: node's boot id → agent
    ranks: set[int] = field(default_factory=set)

    def matches(self, hello: dict[str, Any]) -> bool:
        """Could this stream be of this launch, its rank aside?"""
        boot, agent = str(hello.get("boot", "")), str(hello.get("agent", ""))
        return (
            self.launch == str(hello.get("launch", ""))
            and self.restart == _int(hello.get("restart"))
            and self.world_size == _int(hello.get("world_size"))
            and self.agents.get(boot, agent) == agent
        )

    def add(self, hello: dict[str, Any]) -> None:
        self.agents.setdefault(str(hello.get("boot", "")), str(hello.get("agent", "")))
        self.ranks.add(_int(hello.get("rank")))


def _int(value: Any) -> int:
    return value if isinstance(value, int) else 0


class Generations:
    """The generations of a run, oldest first."""

    def __init__(self) -> None:
        self.order: list[Generation] = []
        self._named_by: dict[bytes, int] = {}  # stream → id of the first generation that names it

    def place(self, hello: dict[str, Any]) -> int:
        """The id of the generation a new stream belongs to."""
        found = self._find(hello)
        if found is None:
            return UNORDERED
        found.add(hello)
        named = hello.get("earlier")
        for earlier in named if isinstance(named, list) else ():
            if isinstance(earlier, bytes):
                self._named_by.setdefault(earlier, found.id)
        return found.id

    def _find(self, hello: dict[str, Any]) -> Generation | None:
        if hello.get("kind") == "replay":
            return self._find_orphan(hello)
        newest = self.order[-1] if self.order else None
        if newest and newest.matches(hello) and _int(hello.get("rank")) not in newest.ranks:
            return newest
        return self._insert(len(self.order), hello)

    def _find_orphan(self, hello: dict[str, Any]) -> Generation | None:
        """An adopted life: with its own launch, else before the first that knew of it."""
        for generation in self.order:
            if generation.matches(hello) and _int(hello.get("rank")) not in generation.ranks:
                return generation
        if not self.order:
            return self._insert(0, hello)
        stream = hello.get("stream")
        name = self._named_by.get(stream) if isinstance(stream, bytes) else None
        for position, generation in enumerate(self.order):
            if generation.id == name:
                return self._insert(position, hello)
        return None

    def _insert(self, position: int, hello: dict[str, Any]) -> Generation:
        made = Generation(
            len(self.order),
            str(hello.get("launch", "")),
            _int(hello.get("restart")),
            _int(hello.get("world_size")),
        )
        self.order.insert(position, made)
        return made

    def position(self, id_: int) -> int:
        """Where a generation stands, 0 the oldest; UNORDERED stays before all."""
        for position, generation in enumerate(self.order):
            if generation.id == id_:
                return position
        return UNORDERED

    def dump(self) -> dict[str, Any]:
        return {
            "order": [
                [g.id, g.launch, g.restart, g.world_size, g.agents, sorted(g.ranks)]
                for g in self.order
            ],
            "named": list(self._named_by.items()),
        }

    @classmethod
    def load(cls, saved: dict[str, Any]) -> Generations:
        made = cls()
        for id_, launch, restart, size, agents, ranks in saved["order"]:
            made.order.append(Generation(id_, launch, restart, size, agents, set(ranks)))
        made._named_by = dict(saved["named"])
        return made
