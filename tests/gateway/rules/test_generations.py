"""Generations: which launch of the group a life belongs to, from its HELLO alone."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.rules.generations import UNORDERED, Generations

OLD, NEW = b"o" * 16, b"n" * 16


def hello(rank: int, stream: bytes = b"", **more: Any) -> dict[str, Any]:
    return {
        "kind": "live",
        "stream": stream or bytes([rank]) * 16,
        "rank": rank,
        "launch": "L",
        "restart": 0,
        "world_size": 4,
        "boot": "b0",
        "agent": "b0:1:1",
        **more,
    }


def test_the_ranks_of_one_launch_are_one_generation() -> None:
    """Ranks of one group, from whatever node and in whatever order, are together."""
    generations = Generations()
    ids = [
        generations.place(hello(rank, boot=f"b{rank // 2}", agent=f"b{rank // 2}:1:1"))
        for rank in (2, 0, 3, 1)
    ]
    assert ids == [0, 0, 0, 0]


@pytest.mark.parametrize(
    "change",
    [
        {"restart": 1},
        {"launch": "L2"},
        {"world_size": 2},
        {"agent": "b0:2:9"},
        {"rank": 0},
    ],
)
def test_what_opens_the_next_generation(change: dict[str, Any]) -> None:
    """A restart, another launch, another size, another agent on the node, or a rank that is there
    already: each begins a new generation."""
    generations = Generations()
    generations.place(hello(0))
    assert generations.place({**hello(1), **change}) == 1
    assert [generations.position(id_) for id_ in (0, 1)] == [0, 1]


def test_a_late_rank_goes_back_to_its_own_launch() -> None:
    """A living rank of an older launch whose first word comes late does not become the newest."""
    generations = Generations()
    generations.place(hello(0))
    generations.place(hello(0, stream=NEW, restart=1))
    assert generations.place(hello(1)) == 0


def test_the_same_size_again_is_a_later_launch() -> None:
    """Down to two ranks and back to three, with the same agent and restart count: who has found
    the streams of the second round on its node is not of the first, where its rank is free."""
    generations = Generations()
    generations.place(hello(0, stream=OLD, world_size=3))
    generations.place(hello(0, stream=NEW, world_size=2, earlier=[OLD]))
    assert generations.place(hello(2, world_size=3, earlier=[OLD, NEW])) == 2


def torch(local_rank: int, group: int, restart: int = 0, **more: Any) -> dict[str, Any]:
    """What a worker of torchrun tells, two agents on one machine."""
    agent = f"b0:{group}:1"
    more = {"node": "n", "launcher": "torch", "local_rank": local_rank, "group": group} | more
    return {"agent": agent, "restart": restart, **more}


def test_agents_count_their_restarts_alone() -> None:
    """The agent whose worker failed counts a restart, the other one of the group does not: their
    new workers are one generation, whoever comes first."""
    for first, second in ((0, 1), (1, 0)):
        generations = Generations()
        old = [generations.place(hello(g, **torch(0, g))) for g in (0, 1)]
        counts = {0: 1, 1: 0}
        new = [
            generations.place(hello(g, bytes([9, g]) * 8, **torch(0, g, counts[g])))
            for g in (first, second)
        ]
        assert (old, new) == ([0, 0], [1, 1])


def test_two_agents_on_one_machine_are_one_launch() -> None:
    """Each is a node of the job, as its group rank tells."""
    generations = Generations()
    assert {generations.place(hello(g, **torch(0, g))) for g in (0, 1)} == {0}


def test_ranks_numbered_anew_do_not_join_an_unfinished_round() -> None:
    """The first round had rank 2 and 3 of the second agent only, which then become 0 and 1."""
    generations = Generations()
    for local in (0, 1):
        assert generations.place(hello(2 + local, **torch(local, 1))) == 0
    for local in (0, 1):
        assert generations.place(hello(local, bytes([9, local]) * 8, **torch(local, 1))) == 1


def test_an_adopted_life_that_knew_the_newest_is_newer() -> None:
    """The last life of a run, that never met a gateway, is the last when it is adopted."""
    generations = Generations()
    generations.place(hello(0, stream=OLD))
    made = generations.place(hello(0, kind="replay", restart=1, earlier=[OLD]))
    assert generations.position(made) == 1


def test_two_adopted_lives_keep_their_order() -> None:
    """Two lives without a gateway, adopted newest first, stand in the order they were lived."""
    generations = Generations()
    generations.place(hello(0, restart=2, earlier=[OLD, NEW]))
    second = generations.place(hello(0, NEW, kind="replay", restart=1, earlier=[OLD]))
    first = generations.place(hello(0, OLD, kind="replay"))
    assert [generations.position(id_) for id_ in (first, second, 0)] == [0, 1, 2]


def test_a_late_word_puts_an_older_launch_back() -> None:
    """A rank of an older launch came late and seemed the newest; then one that had found its
    stream says otherwise."""
    generations = Generations()
    generations.place(hello(0, NEW, restart=1))
    late = generations.place(hello(0, OLD, boot="b1", agent="b1:1:1"))
    assert generations.position(late) == 1
    newest = generations.place(hello(1, restart=1, boot="b1", agent="b1:1:1", earlier=[OLD]))
    assert [generations.position(id_) for id_ in (late, newest)] == [0, 1]


def test_an_adopted_life_goes_to_its_own_launch() -> None:
    """A replayed spool joins the generation its attributes match, also an older one."""
    generations = Generations()
    generations.place(hello(0))
    generations.place(hello(0, restart=1))
    assert generations.place(hello(1, kind="replay")) == 0


def test_an_adopted_life_goes_before_the_one_that_knew_of_it() -> None:
    """A replayed spool of an unknown launch stands before the first stream that names it."""
    generations = Generations()
    generations.place(hello(0))
    old = b"o" * 16
    generations.place(hello(0, restart=2, earlier=[old]))
    made = generations.place(hello(1, stream=old, kind="replay", restart=1))
    assert made == 2
    assert [generations.position(id_) for id_ in (0, 1, 2)] == [0, 2, 1]


def test_an_adopted_life_that_nobody_knew_of_is_unordered() -> None:
    """A replayed spool that fits nowhere is kept, and stands before all."""
    generations = Generations()
    generations.place(hello(0))
    made = generations.place(hello(1, kind="replay", restart=7))
    assert made == UNORDERED
    assert generations.position(made) == UNORDERED


def test_the_first_life_of_a_run_may_be_an_adopted_one() -> None:
    """A run that consists of replayed spools has a generation all the same."""
    generations = Generations()
    assert generations.place(hello(0, kind="replay")) == 0
    assert generations.place(hello(1, kind="replay")) == 0


def test_what_comes_later_may_tell_where_an_orphan_belongs() -> None:
    """A dead rank's stream that nobody knew is unordered; as soon as a sibling's place is known it
    stands there too, and bounds what comes after it."""
    generations = Generations()
    first, second, third = ({"launch": name, "kind": "replay"} for name in "abc")
    first_1, second_0, second_1 = (bytes([n]) * 16 for n in (11, 20, 21))
    generations.place(hello(0, b"c" * 16, **{**third, "kind": "live", "earlier": [second_0]}))
    other = {"boot": "b1", "agent": "b1:1:1"}
    lost = hello(1, second_1, **second, **other, earlier=[first_1])
    assert generations.place(lost) == UNORDERED
    found = generations.place(hello(0, second_0, **second))
    assert generations.moved == {second_1: found}
    older = generations.place(hello(1, first_1, **first, **other))
    assert generations.moved == {}
    assert generations.position(older) < generations.position(found) < generations.position(0)


HELLOS = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["live", "replay"]),
        "stream": st.integers(0, 9).map(lambda n: bytes([n]) * 16),
        "rank": st.integers(-1, 2),
        "launch": st.sampled_from(["L", "M"]),
        "restart": st.integers(0, 1),
        "world_size": st.sampled_from([2, 3]),
        "boot": st.sampled_from(["b0", "b1"]),
        "agent": st.sampled_from(["x", "y"]),
        "earlier": st.lists(st.integers(0, 9).map(lambda n: bytes([n]) * 16), max_size=2),
    }
)


@given(st.lists(HELLOS, max_size=12), st.integers(0, 12))
def test_a_restart_places_alike(hellos: list[dict[str, Any]], cut: int) -> None:
    """Saved after any stream and loaded again, generations place the rest as if never saved."""
    whole, parts = Generations(), Generations()
    expected = [whole.place(h) for h in hellos]
    found = []
    for n, one in enumerate(hellos):
        if n == cut:
            packed = msgpack.packb(parts.dump())
            parts = Generations.load(msgpack.unpackb(packed, strict_map_key=False))
        found.append(parts.place(one))
    assert found == expected
    assert parts.dump() == whole.dump()


@given(st.lists(HELLOS, max_size=12))
def test_no_rank_is_twice_in_a_generation(hellos: list[dict[str, Any]]) -> None:
    """Whatever comes, a generation has each rank once, and ids are those of the order."""
    generations = Generations()
    placed = [(generations.place(h), h["rank"]) for h in hellos]
    ordered = [p for p in placed if p[0] != UNORDERED]
    assert len(ordered) == len(set(ordered))
    assert sorted(g.id for g in generations.order) == list(range(len(generations.order)))


@given(
    st.dictionaries(
        st.sampled_from(["kind", "rank", "launch", "restart", "world_size", "agent", "earlier"]),
        st.none() | st.integers(-(2**63), 2**64 - 1) | st.text() | st.lists(st.integers()),
    )
)
def test_any_hello_can_be_placed(strange: dict[str, Any]) -> None:
    """A HELLO whose fields are of any type is placed without an error."""
    generations = Generations()
    generations.place(hello(0))
    generations.place(strange)
    msgpack.packb(generations.dump())
