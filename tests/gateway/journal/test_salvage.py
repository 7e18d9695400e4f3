"""Salvage: a damaged batch gives the records that are still good, the same ones to all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.journal.salvage import BROKEN_BATCH
from gateway.series.reader import Reader
from rank_client.wire.records import Kind, walk
from tests.gateway.journal.made import make, read_all
from tests.gateway.rules.made import Life, Run, check_sums, project

Steps = Callable[[Run], list[int]]


def damaged(run: Run, at: int, size: int = 1) -> None:
    """Change bytes of the journal's one segment; `at` counts from the start of the file."""
    file = run.disk.files["j/00000001.log"]
    for i in range(at, at + size):
        file[i] ^= 0x55


def batches(run: Run) -> list[tuple[int, int]]:
    """(offset, size) of every batch of the journal."""
    file = bytes(run.disk.files["j/00000001.log"])
    return [(h.at, h.size) for h in walk(file) if h.kind == Kind.BATCH]


def three_frames() -> tuple[Run, Life]:
    """A schema and rows, rows, rows and a text; then the end."""
    run = Run()
    life = run.life()
    for step in range(12):
        life.row({"a": float(step), "b": step}, step)
        if step % 4 == 3:
            life.flush()
    life.text("the end").end().bye()
    run.entries()
    return run, life


@pytest.fixture
def steps(tmp_path: Path) -> Iterator[Steps]:
    """What a journal's series hold of key "a": `steps(run)`."""

    def read(run: Run) -> list[int]:
        project(tmp_path, read_all(run.disk, polls=50))
        with Reader(tmp_path) as reader:
            check_sums(reader)
            return sorted(reader.points("a").step.tolist())

    return read


def test_a_changed_record_costs_itself_alone(steps: Steps) -> None:
    """One bad row in a batch is a gap of one; the others and the schema before it are kept."""
    run, _ = three_frames()
    at, size = batches(run)[0]
    damaged(run, at + size - 8)  # in the last row
    assert steps(run) == [s for s in range(12) if s != 3]


def test_a_lost_schema_is_repaired_by_the_next_that_tells_it(steps: Steps) -> None:
    """Rows without their schema are quarantined until a batch tells it again."""
    run = Run()
    life = run.life()
    life.row({"a": 1.0}, 0).flush().row({"a": 2.0}, 1).flush()
    life.tell_again()
    life.row({"a": 3.0}, 2).flush().row({"a": 4.0}, 3).end().bye()
    run.entries()
    at, _ = batches(run)[0]
    damaged(run, at + 80 + 30)  # in the schema's record
    assert steps(run) == [2, 3]


def test_a_damaged_head_costs_the_batch(steps: Steps) -> None:
    """Where the batch does not say whose records it holds, they are not guessed to be anyone's."""
    run, _ = three_frames()
    at, _ = batches(run)[1]
    damaged(run, at + 32 + 20)  # in the stream's id
    assert steps(run) == [0, 1, 2, 3, 8, 9, 10, 11]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_whatever_is_damaged_writer_and_rules_agree(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """After any damage before a mark: what a stream may send next is what the rules expect, so its
    next batch is taken whole; what is kept is true and everything is accounted for."""
    run, life = three_frames()
    other = run.life(1, world_size=2)
    other.row({"a": 1.0}, 100).flush()
    run.entries()
    whole = bytes(run.disk.files["j/00000001.log"])
    marks = [h.at for h in walk(whole) if h.kind == Kind.MARK]
    at = data.draw(st.integers(next(walk(whole)).size, marks[-1] - 1))
    damaged(run, at, min(data.draw(st.integers(1, 200)), marks[-1] - at))
    again = make(run.disk)
    run.journal = again
    numbers = {id_: mark.high_water for id_, mark in again.streams.items()}
    if other.id in numbers:
        other.last = numbers[other.id]
        other._first = other.last + 1
        other.tell_again()
        other.row({"a": 2.0}, 101).flush()
        numbers[other.id] += 1
    folder = tmp_path_factory.mktemp("series")
    entries = run.entries()
    project(folder, entries, cuts=range(len(entries)))
    with Reader(folder) as reader:
        check_sums(reader)
        points = reader.points("a")
        streams = {s.index: s for s in reader.streams()}
        for stream, step, value in zip(
            points.stream.tolist(), points.step.tolist(), points.value.tolist(), strict=True
        ):
            want = float(step) if streams[stream].id == life.id else float(step - 99)
            assert value == want
        for stream in streams.values():
            assert stream.last_seq == numbers[stream.id]
        assert all(why != "numbers that were told of before" for *_, why in reader.quarantine())
        if other.id in {s.id for s in streams.values()}:
            assert 101 in points.step.tolist()


def test_broken_batches_are_given_once(steps: Steps) -> None:
    """A reader that begins after a broken batch does not give it again."""
    run, _ = three_frames()
    at, size = batches(run)[1]
    damaged(run, at + size - 8)
    entries = read_all(run.disk)
    [broken] = [e.seq for e in entries if e.kind == BROKEN_BATCH]
    assert [e.seq for e in read_all(run.disk, after=broken)] == [
        e.seq for e in entries if e.seq > broken
    ]
