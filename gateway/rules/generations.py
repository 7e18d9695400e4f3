"""Generations: which launch of the whole group a stream belongs to, and in what order they came.

Derived from HELLO attributes and journal order alone, so that a rebuild gives the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

UNORDERED = -1  #: kept and shown, but never wins over an ordered one

MAX_UNORDERED = 256  #: of which the place may still be told; the oldest are given up

#: what of a HELLO tells its place
_TELLING = (
    "agent", "boot", "earlier", "group", "kind", "launch", "launcher", "local_rank", "node",
    "rank", "restart", "stream", "world_size",
)  # fmt: skip


@dataclass(slots=True)
class Generation:
    """One launch of the whole group; `id` never changes, its place in the order may."""

    id: int
    launch: str
    world_size: int
    agents: dict[str, str] = field(default_factory=dict)  #: node → agent and its restarts
    ranks: set[int] = field(default_factory=set)
    places: set[str] = field(default_factory=set)  #: nodes and local ranks, where both are sure
    streams: set[bytes] = field(default_factory=set)
    earlier: set[bytes] = field(default_factory=set)  #: streams its own have found on their nodes
    sure: bool = False  #: one of its own has found a stream of the generations before it

    def matches(self, hello: dict[str, Any]) -> bool:
        """Could this stream be of this launch?"""
        agent = _agent(hello)
        return (
            self.launch == str(hello.get("launch", ""))
            and self.world_size == _int(hello.get("world_size"))
            and self.agents.get(_node(hello), agent) == agent
            and _int(hello.get("rank")) not in self.ranks
            and self.places.isdisjoint(_place(hello))
        )

    def add(self, hello: dict[str, Any]) -> None:
        self.agents.setdefault(_node(hello), _agent(hello))
        self.ranks.add(_int(hello.get("rank")))
        self.places |= _place(hello)
        self.streams.add(hello.get("stream", b""))
        self.earlier |= _earlier(hello)


def _node(hello: dict[str, Any]) -> str:
    """By boot, name and torchrun's number of it: containers on one machine share its boot, and two
    agents may share a machine; both count as nodes of one job."""
    return f"{hello.get('boot', '')} {hello.get('node', '')} {hello.get('group', 0)}"


def _agent(hello: dict[str, Any]) -> str:
    """An agent counts only those restarts that its own workers were the cause of, so that the
    ranks of one launch may differ in them from node to node."""
    return f"{hello.get('agent', '')} {_int(hello.get('restart'))}"


def _place(hello: dict[str, Any]) -> set[str]:
    """A second life in one place is another launch, also where the first round never had all its
    ranks and the second has numbered them anew. Only torchrun's local ranks are sure."""
    sure = hello.get("launcher") == "torch"
    return {f"{_node(hello)} {hello.get('local_rank')}"} if sure else set()


def _int(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _earlier(hello: dict[str, Any]) -> set[bytes]:
    """The streams that this one's process has found on its node: they began before it."""
    named = hello.get("earlier")
    return {e for e in named if isinstance(e, bytes)} if isinstance(named, list) else set()


class Generations:
    """The generations of a run, oldest first."""

    def __init__(self) -> None:
        self.order: list[Generation] = []
        #: stream → id, of streams that were unordered until the last `place` told where they belong
        self.moved: dict[bytes, int] = {}
        self._unordered: list[dict[str, Any]] = []  # HELLOs of which nothing is known yet

    def place(self, hello: dict[str, Any]) -> int:
        """The id of the generation a new stream belongs to."""
        self.moved = {}
        found = self._find(hello)
        if found is None:
            told = {name: hello[name] for name in _TELLING if name in hello}
            self._unordered = [*self._unordered, told][-MAX_UNORDERED:]
            return UNORDERED
        self._join(found, hello)
        while late := self._first_known():
            generation, before = late
            self._unordered.remove(before)
            self._join(generation, before)
            self.moved[before.get("stream", b"")] = generation.id
        return found.id

    def _first_known(self) -> tuple[Generation, dict[str, Any]] | None:
        for hello in self._unordered:
            if generation := self._find(hello):
                return generation, hello
        return None

    def _join(self, found: Generation, hello: dict[str, Any]) -> None:
        found.add(hello)
        self._put_older_before(found)
        older = self.order[: self.order.index(found)]
        found.sure |= any(not _earlier(hello).isdisjoint(g.streams) for g in older)

    def _find(self, hello: dict[str, Any]) -> Generation | None:
        """It comes after every generation that it names a stream of, and before every one that
        names it, or is of these two: siblings find each other. The newest that matches is its own.

        A generation that is last only because it came last bounds nothing: a rank of an old launch
        may have been late.
        """
        after, before = self._bounds(hello)
        for generation in reversed(self.order[max(after, 0) : before + 1]):
            if generation.matches(hello):
                return generation
        live, known = hello.get("kind") != "replay", after >= 0 or before < len(self.order)
        if live or not self.order:
            return self._insert(before, hello)
        if not known:
            return None
        return self._insert(before if before < len(self.order) else after + 1, hello)

    def _bounds(self, hello: dict[str, Any]) -> tuple[int, int]:
        """(position of the newest generation that is older or its own, -1 for none; position of
        the first that is newer)."""
        earlier, stream = _earlier(hello), hello.get("stream", b"")
        after, before = -1, len(self.order)
        for position, generation in enumerate(self.order):
            sure = generation.sure or position == 0
            if sure and not earlier.isdisjoint(generation.streams):
                after = position
            if stream in generation.earlier:
                before = min(before, position)
        return (after, before) if after < before else (after, after + 1)

    def _put_older_before(self, newer: Generation) -> None:
        """A late word may tell that generations behind this one are older."""
        place = self.order.index(newer)
        behind = [g for g in self.order[place:] if not newer.earlier.isdisjoint(g.streams)]
        older = [g for g in behind if g is not newer]
        rest = [g for g in self.order[place:] if g not in older]
        self.order[place:] = older + rest

    def _insert(self, position: int, hello: dict[str, Any]) -> Generation:
        made = Generation(
            len(self.order),
            str(hello.get("launch", "")),
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
        order = [
            [g.id, g.launch, g.world_size, g.agents, g.sure]
            + [sorted(s) for s in (g.ranks, g.places, g.streams, g.earlier)]
            for g in self.order
        ]
        return {"order": order, "unordered": self._unordered}

    @classmethod
    def load(cls, saved: dict[str, Any]) -> Generations:
        made = cls()
        made._unordered = saved["unordered"]
        for id_, launch, size, agents, sure, *sets in saved["order"]:
            ranks, places, streams, earlier = map(set, sets)
            made.order.append(
                Generation(id_, launch, size, agents, ranks, places, streams, earlier, sure)
            )
        return made
