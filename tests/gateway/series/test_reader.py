"""Reading the series: points and rows are what was logged, wherever they lie by now."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.series import writer
from gateway.series.db import open_writer
from gateway.series.reader import Reader
from gateway.series.writer import Series, seal_rows
from rank_client.wire.records import Kind
from tests.gateway.journal.made import UUID
from tests.gateway.rules.made import Run, project, reading


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows make a segment, three segments are merged."""
    monkeypatch.setattr(writer, "SEAL_ROWS", 4)
    monkeypatch.setattr(writer, "MERGE", 3)


def many_rows(steps: int, ranks: int = 3) -> Run:
    run = Run()
    for rank in range(ranks):
        run.life(rank, world_size=ranks)
    for step in range(steps):
        for life in run.lives:
            life.row({"a": step + life.id[0] / 10, "n": step}, step)
            if step % 3 == 0:
                life.row({"b": float(step)}, step)
            if step % 2:
                life.flush()
    return run


def check_segments(reader: Reader) -> None:
    """Of key set 1: three full segments make one, those left over are full, the rest is tail."""
    rows = reader._db.execute("SELECT ordinal, level, n FROM segment WHERE keyset = 1").fetchall()
    merged = [(ordinal, n) for ordinal, level, n in rows if level]
    assert merged == [(3 * i, 12) for i in range(len(merged))]
    assert [n for _, level, n in rows if not level] == [4] * (len(rows) - len(merged))
    assert 0 < len(merged) < len(rows) < len(merged) + 3


@pytest.mark.parametrize("steps", [1, 2, 5, 11, 38])
def test_points_are_those_that_were_logged(tmp_path: Path, steps: int) -> None:
    """In the tail, in segments and in merged ones, each point has its stream, number, step and
    value."""
    run = many_rows(steps)
    with reading(tmp_path, run) as reader:
        if steps == 38:
            check_segments(reader)
        for key in "anb":
            points = reader.points(key)
            found = zip(
                points.stream.tolist(),
                points.seq.tolist(),
                points.step.tolist(),
                points.value.tolist(),
                strict=True,
            )
            expected = [
                (index, seq, step, values[key])
                for index, life in enumerate(run.lives)
                for seq, (step, values) in life.rows.items()
                if key in values
            ]
            assert sorted(found) == sorted(expected)
            assert points.value.dtype == (np.int64 if key == "n" else np.float64)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.lists(st.integers(0, 80), max_size=5), st.data())
def test_rows_of_any_span(steps: int, cuts: list[int], data: st.DataObject) -> None:
    """Rows asked for by stream and numbers come whole and in order, whether they lie in the tail,
    in segments or in both, and however the journal was fetched."""
    run = many_rows(steps)
    entries = run.entries()
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as root:
        patch.setattr(writer, "SEAL_ROWS", 4)
        patch.setattr(writer, "MERGE", 3)
        project(Path(root), entries, [c for c in cuts if c < len(entries)])
        with Reader(Path(root)) as reader:
            for keyset in (1, 2):
                columns = reader.keyset(keyset)
                keys = {name for name, _ in columns}
                spans = []
                expected = []
                for index, life in enumerate(run.lives):
                    numbers = [n for n, (_, v) in life.rows.items() if v.keys() == keys]
                    if not numbers or data.draw(st.booleans()):
                        continue
                    first, last = sorted(data.draw(st.sampled_from(numbers)) for _ in range(2))
                    spans.append((index, first, last))
                    expected += [(index, n, life.rows[n]) for n in numbers if first <= n <= last]
                block = reader.rows(keyset, spans)
                assert [(s, n, p) for s, n, (p, _) in expected] == list(
                    zip(block.stream.tolist(), block.seq.tolist(), block.step.tolist(), strict=True)
                )
                for column, (name, type_) in enumerate(columns):
                    raw = np.ascontiguousarray(block.values[:, column])
                    values = raw.view(np.float64 if type_ == "f8" else np.int64)
                    assert values.tolist() == [v[name] for _, _, (_, v) in expected]


def test_values_are_exact(tmp_path: Path) -> None:
    """NaN, infinities, minus zero, the ends of int64 and bools come back bit for bit."""
    run = Run()
    life = run.life()
    reals = [math.nan, math.inf, -math.inf, -0.0, 5e-324]
    for step in range(9):
        whole = [2**63 - 1, -(2**63), 2**53 + 1][step % 3]
        life.row({"f": reals[step % 5], "i": whole, "t": step % 2 == 0}, -(2**62) + step)
    with reading(tmp_path, run) as reader:
        assert repr(reader.points("f").value.tolist()) == repr([reals[i % 5] for i in range(9)])
        assert reader.points("i").value.tolist() == [2**63 - 1, -(2**63), 2**53 + 1] * 3
        assert reader.points("t").value.dtype == bool
        assert reader.points("t").value.tolist() == [i % 2 == 0 for i in range(9)]
        assert reader.points("f").step[0] == -(2**62)


def test_a_key_of_several_types(tmp_path: Path) -> None:
    """A key that was a float, an int and a bool has all its points, each of its own type."""
    run = Run()
    life = run.life()
    for value in (0.5, 2**60 + 1, True):
        life.row({"a": value}, 0)
    with reading(tmp_path, run) as reader:
        points = reader.points("a")
        by_seq = dict(zip(points.seq.tolist(), points.value.tolist(), strict=True))
        assert [repr(by_seq[n]) for n in (1, 2, 3)] == ["0.5", str(2**60 + 1), "True"]


def test_a_key_nobody_logged(tmp_path: Path) -> None:
    """A key that is not there has no points, and no error."""
    with reading(tmp_path, many_rows(3)) as reader:
        assert len(reader.points("none")) == 0
        assert len(reader.points("a%")) == 0


def test_wide_key_sets_are_sealed_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment holds fewer rows the more keys there are, at least one."""
    monkeypatch.setattr(writer, "SEAL_ROWS", 4096)
    assert seal_rows(20) == 4096
    assert seal_rows(20_000) == (4 << 20) // (8 * 20_004)
    assert seal_rows(10_000_000) == 1


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 100])
def test_the_feed_is_never_cut_inside_an_entry(tmp_path: Path, limit: int) -> None:
    """However few entries are asked for, what one journal entry brought comes together, and the
    parts make up the whole."""
    run = Run()
    life = run.life()
    for step in range(4):
        life.row({"a": 1.0}, step).text("x").row({"b": 1.0}, step).params({"p": 1}).flush()
        life.text("alone").flush()
    with reading(tmp_path, run) as reader:
        whole = reader.feed(0, 10_000)
        parts, after = [], 0
        while part := reader.feed(after, limit):
            entries = {e.entry for e in part}
            assert [e.id for e in whole if e.entry in entries] == [e.id for e in part]
            parts += part
            after = part[-1].id
        assert parts == whole
        assert reader.feed_end() == whole[-1].id
        assert reader.feed(after, 5) == []


def test_the_feed_is_in_the_order_of_the_journal(tmp_path: Path) -> None:
    """Rows of several key sets, texts and params stand in the feed as they were logged."""
    run = Run()
    life = run.life()
    life.row({"a": 1.0}).text("t").row({"b": 1.0}).params({"p": 1}).row({"a": 2.0}).flush()
    with reading(tmp_path, run) as reader:
        assert [(e.kind, e.first) for e in reader.feed(0, 99)] == [
            ("rows", 1), ("text", 2), ("rows", 3), ("params", 4), ("rows", 5),
        ]  # fmt: skip


def test_texts_params_and_summaries(tmp_path: Path) -> None:
    """What is no number comes back as it was logged, and one by one by its number."""
    run = Run()
    life = run.life()
    life.text("one").params({"lr": 0.1, "n": None, "é": "x"}).params({"b": 2}, Kind.SUMMARY)
    with reading(tmp_path, run) as reader:
        [(stream, seq, wall, step, level, text)] = reader.texts()
        assert (stream, seq, step, level, text) == (0, 1, None, "info", "one")
        assert reader.text_at(0, 1) == (wall, None, "info", "one")
        assert [m[3] for m in reader.maps("params")] == [{"lr": 0.1, "n": None, "é": "x"}]
        assert reader.map_at("summary", 0, 3)[1] == {"b": 2}


def test_texts_are_read_in_pages(tmp_path: Path) -> None:
    """Texts after a known one, a few at a time, give each once, by time."""
    run = Run()
    a, b = run.life(0), run.life(1)
    for n in range(7):
        run.now += 1
        (a if n % 2 else b).text(str(n))
    with reading(tmp_path, run) as reader:
        seen: list[Any] = []
        after = (0, -1, -1)
        while page := reader.texts(after, 2):
            seen += page
            after = (page[-1][2], page[-1][0], page[-1][1])
        assert [row[5] for row in seen] == [str(n) for n in range(7)]


def test_streams_tell_what_they_are(tmp_path: Path) -> None:
    """A stream's row has its attributes, its sums and its end."""
    run = Run()
    run.life(3, world_size=4, node="gpu-7", local_rank=1).row({"a": 1.0}, 9).end("failed", text="x")
    with reading(tmp_path, run) as reader:
        [s] = reader.streams()
        assert (s.rank, s.local_rank, s.node, s.kind, s.ended) == (3, 1, "gpu-7", "live", True)
        assert (s.stored, s.projected, s.control, s.last_step) == (2, 1, 1, 9)
        assert (s.status, s.text) == ("failed", "x")
        assert (reader.about().state, reader.about().reason) == ("failed", "rank 3: x")
        assert reader.about().journal == UUID


# --- the writer's file ---------------------------------------------------------------------------


def test_another_journal_begins_anew(tmp_path: Path) -> None:
    """A series of another journal, or of another format, is thrown away and built again."""
    run = many_rows(3)
    with reading(tmp_path, run) as reader:
        build = reader.about().build
        assert len(reader.points("a")) == 9
    series = Series(tmp_path / "series.db", b"other journal...")
    assert series.cursor == 0
    series.close()
    with Reader(tmp_path) as reader:
        assert reader.about().build != build
        assert reader.streams() == []


def test_a_transaction_that_fails_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fetch is written with its cursor as a whole: killed in between, it is done again."""
    run = many_rows(6)
    entries = run.entries()
    project(tmp_path, entries[:5])
    series = Series(tmp_path / "series.db", UUID)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(series, "_write_about", killed)
        with pytest.raises(KeyboardInterrupt):
            series.apply(series.projection.take(entries[5:]))
    series.close()
    series = Series(tmp_path / "series.db", UUID)
    assert series.cursor == entries[4].seq
    series.apply(series.projection.take(entries[5:]))
    series.close()
    (tmp_path / "once").mkdir()
    project(tmp_path / "once", entries)
    with Reader(tmp_path) as found, Reader(tmp_path / "once") as expected:
        assert found.dump() == expected.dump()


def test_a_reader_keeps_nobody_from_writing(tmp_path: Path) -> None:
    """A reader that is open sees what is committed since, and holds no lock."""
    run = many_rows(6)
    entries = run.entries()
    project(tmp_path, entries[:5])
    with Reader(tmp_path) as reader:
        before = len(reader.points("a"))
        series = Series(tmp_path / "series.db", UUID)
        series.apply(series.projection.take(entries[5:]))
        series.close()
        assert len(reader.points("a")) > before


def test_a_series_can_be_read_where_nothing_can_be_written(tmp_path: Path) -> None:
    """A copy in a read-only place opens, also under a name that is special in a URI."""
    directory = tmp_path / "50% #1?"
    directory.mkdir()
    with reading(directory, many_rows(3)):
        pass
    db = open_writer(directory / "series.db", 1)
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    db.close()
    (directory / "series.db").chmod(0o400)
    directory.chmod(0o500)
    try:
        with Reader(directory) as reader:
            assert len(reader.points("a")) == 9
    finally:
        directory.chmod(0o700)


def test_a_key_set_without_keys(tmp_path: Path) -> None:
    """A map without a single value is a row of no columns, and harms nothing."""
    run = Run()
    run.life().kv({}, 3).row({"a": 1.0}, 4)
    with reading(tmp_path, run) as reader:
        assert len(reader.points("a")) == 1
        [empty, _] = sorted(reader.feed(0, 9), key=lambda e: e.first)
        assert reader.rows(empty.keyset, [(0, 1, 1)]).step.tolist() == [3]
