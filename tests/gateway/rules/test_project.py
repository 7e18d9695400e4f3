"""The projection: the same journal gives the same series, whatever it is cut into, whatever is
in it, and nothing is unaccounted for."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.rules import keys
from gateway.rules.keys import TOO_MANY_KEYS
from gateway.rules.project import Projection
from gateway.series import writer
from gateway.series.reader import Reader
from rank_client.wire.records import Kind, Schema, pack, pack_map
from tests.gateway.rules.made import Life, Run, check_sums, project, reading

# --- any journal, any cut ------------------------------------------------------------------------

VALUES = st.sampled_from([0.5, math.nan, -math.inf, 1, 2**63 - 1, True, False])
ROWS = st.lists(
    st.tuples(st.sampled_from(["a", "b", "a/b", "é"]), VALUES),
    min_size=1,
    max_size=3,
    unique_by=lambda kv: kv[0],
).map(dict)
STEPS = st.integers(-1, 5)
ACTIONS = st.one_of(
    st.tuples(st.just("row"), ROWS, STEPS),
    st.tuples(st.just("row"), ROWS, STEPS),
    st.tuples(st.just("kv"), ROWS, STEPS),
    st.tuples(st.just("text"), st.text(max_size=20)),
    st.tuples(st.just("params"), ROWS),
    st.tuples(st.just("summary"), ROWS),
    st.tuples(st.just("file")),
    st.tuples(st.just("some_file_arrived"), st.integers(0, 3)),
    st.tuples(st.just("a_later_file_arrived"), st.integers(0, 2)),
    st.tuples(st.just("lose"), st.integers(1, 9)),
    st.tuples(st.just("some_file_lost"), st.integers(0, 3)),
    st.tuples(st.just("gap"), st.integers(1, 5)),
    st.tuples(st.just("junk"), st.binary(max_size=40)),
    st.tuples(st.just("unknown_kind"), st.integers(11, 31)),
    st.tuples(st.just("corrupt"), st.integers(0, 5000)),
    st.tuples(st.just("flush")),
    st.tuples(st.just("flush")),
    st.tuples(st.just("tell_again")),
    st.tuples(st.just("end"), st.sampled_from(["completed", "failed", "ended"])),
    st.tuples(st.just("bye")),
    st.tuples(st.just("quiet")),
    st.tuples(st.just("back")),
    st.tuples(st.just("again"), st.integers(-1, 2)),
)
JOURNALS = st.lists(st.tuples(st.integers(0, 3), ACTIONS), max_size=60)


def build(actions: list[tuple[int, tuple[Any, ...]]]) -> Run:
    run = Run()
    run.life(0, world_size=2)
    run.life(1, world_size=2)
    for which, action in actions:
        what, *args = action
        getattr(run.lives[which % len(run.lives)], what)(*args)
    return run


@settings(max_examples=60, deadline=None)
@given(JOURNALS, st.lists(st.integers(0, 40), max_size=6))
def test_the_series_does_not_depend_on_how_it_was_fetched(
    actions: list[tuple[int, tuple[Any, ...]]], cuts: list[int]
) -> None:
    """A journal taken at once, cut anywhere with a new process for each piece, or rebuilt after
    its series was deleted, gives the same tables; every record and item is accounted for; and
    the points are those that were logged."""
    run = build(actions)
    entries = run.entries()
    cuts = [c for c in cuts if c < len(entries)]
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as root:
        patch.setattr(writer, "SEAL_ROWS", 3)
        patch.setattr(writer, "MERGE", 2)
        dumps = []
        for name, at in (("once", []), ("cut", cuts), ("each", range(len(entries)))):
            directory = Path(root) / name
            directory.mkdir()
            project(directory, entries, at)
            with Reader(directory) as reader:
                dumps.append(reader.dump())
                check_sums(reader)
                check_points(reader, run)
        assert dumps[1] == dumps[0]
        assert dumps[2] == dumps[0]


def check_points(reader: Reader, run: Run) -> None:
    """Every value of every good row is there, with its number and step, and no other."""
    expected = [
        (index, seq, step, key, repr(value))
        for index, life in enumerate(run.lives)
        for seq, (step, values) in life.rows.items()
        for key, value in values.items()
    ]
    found = []
    for key in {name for _, name, _ in reader.keys()}:
        points = reader.points(key)
        for stream, seq, step, value in zip(
            points.stream, points.seq, points.step, points.value, strict=True
        ):
            plain = value.item() if hasattr(value, "item") else value
            found.append((int(stream), int(seq), int(step), key, repr(plain)))
    assert sorted(found) == sorted(expected)


# --- rows ----------------------------------------------------------------------------------------


def test_ranks_with_other_key_orders_share_a_key_set(tmp_path: Path) -> None:
    """Two ranks that log the same keys in other orders are one key set, each value at its key."""
    run = Run()
    for step in range(3):
        for rank, order in ((0, "ab"), (1, "ba")):
            if step == 0:
                run.life(rank, world_size=2)
            run.lives[rank].row({k: ord(k) + rank / 2 for k in order}, step).flush()
    with reading(tmp_path, run) as reader:
        assert len({e.keyset for e in reader.feed(0, 99)}) == 1
        check_points(reader, run)


def test_frames_of_mixed_schemas_of_one_size(tmp_path: Path) -> None:
    """A frame whose rows are of several schemas of the same length loses none of them."""
    run = Run()
    life = run.life()
    for step in range(4):
        life.row({"a": 1.0}, step).row({"b": 2.0}, step).row({"a": 1}, step).flush()
    with reading(tmp_path, run) as reader:
        check_points(reader, run)
        assert reader.quarantine() == []


def test_a_text_among_rows_of_its_length(tmp_path: Path) -> None:
    """A record of another kind that is as long as the rows beside it is not taken for one."""
    run = Run()
    life = run.life()
    life.row({"a": 1.0}, 0).flush()
    size = len(pack(Kind.ROW, 1, bytes(24 + 8)))
    for length in range(60):
        record = pack_map(Kind.TEXT, 1, {"t": "x" * length, "l": "", "w": 1, "s": None})
        if len(record) == size:
            break
    life.row({"a": 2.0}, 1)
    life.map(Kind.TEXT, {"t": "x" * length, "l": "", "w": 1, "s": None})
    life.row({"a": 3.0}, 2).flush()
    with reading(tmp_path, run) as reader:
        check_points(reader, run)
        assert len(reader.texts()) == 1
        assert reader.quarantine() == []


@pytest.mark.parametrize("at", [0, 3, 9, 17, 30, 60, 100, 150])
def test_a_frame_with_a_bad_record_is_quarantined_whole(tmp_path: Path, at: int) -> None:
    """A frame one of whose records is broken is put aside as a whole and counted; the frames
    before and after it are kept."""
    run = Run()
    life = run.life()
    life.row({"a": 1.0}, 0).flush()
    life.row({"a": 2.0}, 1).row({"a": 3.0}, 2).row({"a": 4.0}, 3).flush(corrupt=at)
    life.row({"a": 5.0}, 4).flush()
    with reading(tmp_path, run) as reader:
        assert sorted(reader.points("a").value.tolist()) == [1.0, 5.0]
        [(_, stream, first, n, reason)] = reader.quarantine()
        assert (stream, first, n) == (0, 2, 3)
        assert "not the ones it announced" in reason
        check_sums(reader)


def test_a_row_without_its_schema_is_quarantined(tmp_path: Path) -> None:
    """Rows of a schema nobody told of are put aside, the rest of the frame is kept."""
    run = Run()
    life = run.life()
    life.text("before")
    life.record(pack(Kind.ROW, 2, bytes(32), schema=9))
    life.text("after").flush()
    with reading(tmp_path, run) as reader:
        assert [row[5] for row in reader.texts()] == ["before", "after"]
        assert reader.quarantine()[0][2:] == (2, 1, "a row without its schema")
        check_sums(reader)


@pytest.mark.parametrize("how", ["row", "kv"])
def test_keys_beyond_those_of_a_run_are_put_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """A row that would give the run more keys than it may have is quarantined with that reason,
    also where its schema was told long before; all other rows are kept."""
    monkeypatch.setattr(keys, "MAX_RUN_KEYS", 3)
    run = Run()
    life, other = run.life(), run.life()
    getattr(life, how)({"a": 1.0, "b": 1.0}, 0).flush()
    getattr(other, how)({"a": 1.0, "c": 1.0}, 0).flush()
    getattr(life, how)({"d": 1.0}, 1).flush()
    getattr(life, how)({"d": 1.0}, 2)
    getattr(life, how)({"c": 2.0}, 3).text("still here").flush()
    with reading(tmp_path, run) as reader:
        assert {name for _, name, _ in reader.keys()} == {"a", "b", "c"}
        aside = [(stream, first, n, reason) for _, stream, first, n, reason in reader.quarantine()]
        assert aside == [(0, 2, 1, TOO_MANY_KEYS), (0, 3, 1, TOO_MANY_KEYS)]
        assert reader.points("c").value.tolist() == [1.0, 2.0]
        assert len(reader.texts()) == 1
        check_sums(reader)


def test_schemas_told_again_are_ignored_and_contradictions_put_aside(tmp_path: Path) -> None:
    """The same schema again changes nothing; another one under its id is quarantined and the
    first stays in force."""
    run = Run()
    life = run.life()
    life.row({"a": 1.0}, 0).flush()
    life.unnumbered(Schema(0, ("a",), ("f8",)).pack(2)).row({"a": 2.0}, 1).flush()
    life.unnumbered(Schema(0, ("z",), ("f8",)).pack(3)).row({"a": 3.0}, 2).flush()
    with reading(tmp_path, run) as reader:
        check_points(reader, run)
        assert [q[4] for q in reader.quarantine()] == ["a schema id used for two schemas"]
        assert reader.streams()[0].quarantined == 0


def test_a_schema_told_again_after_a_restart(tmp_path: Path) -> None:
    """The rules know a schema, in whatever order its keys are, after they were started again."""
    run = Run()
    life = run.life()
    for step in range(3):
        life.row({"b": 1.0, "c": 2.0, "a": 3.0}, step).flush().tell_again()
    entries = run.entries()
    project(tmp_path, entries, range(len(entries)))
    with Reader(tmp_path) as reader:
        assert reader.quarantine() == []
        check_points(reader, run)


def test_what_is_put_aside_stands_in_the_order_of_the_journal(tmp_path: Path) -> None:
    """Rows that turn out broken only when they are split, and records that are seen to be bad at
    once, are told of in journal order, however they were fetched."""
    run = Run()
    life = run.life().row({"a": 1.0}).flush()
    life.row({"a": 2.0}).row({"a": 3.0}).flush(corrupt=-9)
    life.junk(b"junk")
    entries = run.entries()
    found = []
    for name, cuts in (("once", []), ("each", range(len(entries)))):
        (tmp_path / name).mkdir()
        project(tmp_path / name, entries, cuts)
        with Reader(tmp_path / name) as reader:
            found.append(reader.quarantine())
    assert [(first, n) for _, _, first, n, _ in found[0]] == [(2, 2), (4, 1)]
    assert found[1] == found[0]


def test_what_a_stream_did_last_is_by_its_order(tmp_path: Path) -> None:
    """The last step shown is that of the last row, whichever key set it is of."""
    run = Run()
    life = run.life()
    life.row({"a": 1.0}, 1).row({"b": 1.0}, 2).row({"a": 1.0}, 3).row({"a": 2.0}, 4)
    with reading(tmp_path, run) as reader:
        assert reader.streams()[0].last_step == 4
    run.lives[0].row({"b": 1.0}, 5).row({"a": 1.0}, 6)
    (tmp_path / "2").mkdir()
    with reading(tmp_path / "2", run) as reader:
        assert reader.streams()[0].last_step == 6


def test_an_unknown_stream_is_put_aside(tmp_path: Path) -> None:
    """Frames of a stream that was never opened, as in a damaged journal, are quarantined."""
    run = Run()
    life = run.life().row({"a": 1.0}, 0).flush()
    with reading(tmp_path, run) as reader:
        check_points(reader, run)
    entries = [e for e in run.entries() if e.kind != Kind.OPEN]
    (tmp_path / "2").mkdir()
    project(tmp_path / "2", entries)
    with Reader(tmp_path / "2") as reader:
        assert [(q[1], q[2], q[3]) for q in reader.quarantine()] == [(None, 1, life.last)]


def test_a_hole_in_the_journal_is_a_gap(tmp_path: Path) -> None:
    """Entries that a damaged journal lacks, in the middle or before the end, are told as gaps."""
    run = Run()
    life = run.life()
    for step in range(5):
        life.row({"a": 1.0}, step).flush()
    life.bye()
    entries = run.entries()
    project(tmp_path, [entries[0], entries[1], entries[3], entries[4], entries[6]])
    with Reader(tmp_path) as reader:
        assert [(first, last) for _, first, last, _, _ in reader.losses()] == [(2, 2), (5, 5)]
        assert sorted(reader.points("a").seq.tolist()) == [1, 3, 4]
        check_sums(reader)


# --- gating --------------------------------------------------------------------------------------


def test_other_ranks_are_kept_and_not_passed_on(tmp_path: Path) -> None:
    """Every rank's points, texts and params are in the series; the feed has rank 0's only, and
    what is held is counted under its rule."""
    run = Run()
    for rank in range(3):
        run.life(rank, world_size=3).row({"a": 1.0, "b": 2.0}, 0).text("t").params({"p": 1})
    with reading(tmp_path, run) as reader:
        assert len(reader.points("a")) == 3
        assert len(reader.texts()) == 3
        assert {e.stream for e in reader.feed(0, 99)} == {0}
        counters = reader.about().counters
        assert counters["passed metric"] == 2
        assert counters["held metric built-in:rank-0"] == 4
        assert counters["held text built-in:rank-0"] == 2
        check_sums(reader)


@pytest.mark.parametrize("entries_a_fetch", [1, 99])
def test_a_rule_set_counts_from_where_it_stands(tmp_path: Path, entries_a_fetch: int) -> None:
    """A `rules` entry changes what passes after it, not before, also over a restart, and in
    however large fetches the journal is read."""
    run = Run()
    life = run.life(1, world_size=2).row({"a": 1.0}, 0).flush()
    rule = {"name": "mine", "kinds": ["metric"], "ranks": "all"}
    run.entry(Kind.RULES, {"rules": [rule]})
    life.row({"a": 2.0}, 1).flush()
    entries = run.entries()
    project(tmp_path, entries, range(0, len(entries), entries_a_fetch))
    with Reader(tmp_path) as reader:
        assert [(e.first, e.rule) for e in reader.feed(0, 99)] == [(2, "mine")]


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("early", [False, True])
def test_a_file_is_passed_on_when_its_last_byte_is_there(tmp_path: Path, early: bool) -> None:
    """A file is in the feed once both its record and its bytes have come, whichever came first,
    and only once."""
    run = Run()
    life = run.life()
    life.text("first").flush()
    if early:
        life.arrived(2).arrived(2)
    life.file("best.pt")
    life.flush()
    if not early:
        life.arrived(2).arrived(2)
    with reading(tmp_path, run) as reader:
        [media] = reader.media()
        assert (media.key, media.sha256, media.size_bytes) == ("best.pt", "a" * 64, 5)
        assert [e.first for e in reader.feed(0, 99) if e.kind == "media"] == [2]


def test_a_file_that_never_comes_is_not_passed_on(tmp_path: Path) -> None:
    """A record without bytes stays out of the feed; one that is told lost says why."""
    run = Run()
    life = run.life()
    life.file("waiting")
    lost = life.file("lost")
    life.lose(0, "media lost (rewritten)", media=lost)
    with reading(tmp_path, run) as reader:
        assert [(m.sha256, m.lost) for m in reader.media()] == [
            (None, None),
            (None, "media lost (rewritten)"),
        ]
        assert reader.feed(0, 99) == []
        assert reader.about().counters["lost media"] == 1
        check_sums(reader)


def test_a_file_whose_stream_is_over_is_given_up_until_it_comes(tmp_path: Path) -> None:
    """BYE without the bytes counts a file as lost; bytes that come after all revive it."""
    run = Run()
    life = run.life()
    media = life.file("late")
    life.end().bye()
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
    with reading(tmp_path / "1", run) as reader:
        [row] = reader.media()
        assert (row.sha256, row.lost) == (None, "media lost (its bytes never came)")
        assert reader.about().counters["lost media"] == 1
        assert reader.about().counters["passed media"] == 0
    life.arrived(media)
    with reading(tmp_path / "2", run) as reader:
        [row] = reader.media()
        assert (row.sha256, row.lost) == ("a" * 64, None)
        assert reader.about().counters["lost media"] == 0
        assert [entry.kind for entry in reader.feed(0, 99)] == ["media"]
        check_sums(reader)


# --- the state of a run --------------------------------------------------------------------------


def state(run: Run) -> str:
    projection = Projection()
    projection.take(run.entries())
    return projection.state()[0]


def test_a_run_is_completed_when_all_its_ranks_are() -> None:
    """Running until the last of the expected ranks has ended."""
    run = Run()
    assert state(run) == "running"
    run.life(0, world_size=2).row({"a": 1.0}).end()
    assert state(run) == "running"
    other = run.life(1, world_size=2)
    assert state(run) == "running"
    other.end("ended").bye()
    assert state(run) == "completed"


def test_one_failed_rank_fails_the_run() -> None:
    """A rank that ended by an exception makes the run failed, whatever the others do."""
    run = Run()
    run.life(0, world_size=2).end()
    run.life(1, world_size=2).end("failed", text="ValueError: boom")
    assert state(run) == "failed"


@pytest.mark.parametrize(("code", "expected"), [(0, "completed"), (1, "failed"), (-9, "failed")])
def test_the_launcher_has_the_last_word(code: int, expected: str) -> None:
    """The launcher's exit code decides for its launch, even when ranks said nothing."""
    run = Run()
    run.life(0, world_size=2).row({"a": 1.0}).flush()
    run.life(-1, kind="tool").end("ended", code=code).bye()
    assert state(run) == expected


def test_a_launcher_of_another_launch_says_nothing() -> None:
    """The exit of another launch does not end this one."""
    run = Run()
    run.life(0, world_size=2).row({"a": 1.0}).flush()
    run.life(-1, kind="tool", launch="other").end("ended", code=1)
    assert state(run) == "running"


def silence(run: Run, *lives: Life) -> None:
    run.now += 15 * 10**9
    run.tick(quiet=lives)
    for _ in range(70):
        run.tick()


def test_a_silent_run_is_lost_and_comes_back() -> None:
    """When every rank has been silent for a minute the run is lost; one word makes it running."""
    run = Run()
    lives = [run.life(rank, world_size=2).row({"a": 1.0}).flush() for rank in range(2)]
    silence(run, lives[0])
    assert state(run) == "running"
    silence(run, lives[1])
    assert state(run) == "lost"
    run.tick(back=[lives[1]])
    assert state(run) == "running"
    silence(run, lives[1])
    assert state(run) == "lost"
    lives[0].row({"a": 2.0}).flush()
    assert state(run) == "running"


def test_a_new_generation_reopens_a_run() -> None:
    """Whatever a run's state is, a new launch of the group makes it running again, and its own
    end decides."""
    run = Run()
    run.life(0).end("failed")
    assert state(run) == "failed"
    again = run.life(0, restart=1).row({"a": 1.0}).flush()
    assert state(run) == "running"
    again.end()
    assert state(run) == "completed"


# --- whatever a rank says ------------------------------------------------------------------------

ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=4)
    | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
WHOLE = {"s": 1, "w": 1, "v": {"a": 1.0}, "t": "", "l": "", "what": "", "key": "", "name": ""}
BODIES = st.dictionaries(
    st.sampled_from([*WHOLE, "m", "meta", "n", "reason", "media", "status", "text", "code", "c"]),
    ODD,
    max_size=8,
)
HELLO = st.dictionaries(
    st.sampled_from(
        ["rank", "world_size", "launch", "restart", "boot", "agent", "earlier", "kind"]
    ),
    ODD,
)


@settings(max_examples=150, deadline=None)
@given(
    records=st.lists(st.tuples(st.integers(1, 31), BODIES, st.booleans()), max_size=6),
    hello=HELLO,
    kind=st.sampled_from(["live", "replay", "tool", "worker"]),
)
@example(records=[(Kind.TEXT, {"w": -1}, True)], hello={}, kind="live")  # a clock before 1970
def test_nothing_a_rank_says_stops_the_rules(
    records: list[tuple[int, dict[str, Any], bool]], hello: dict[str, Any], kind: str
) -> None:
    """HELLO maps and records with any fields of any type are projected or quarantined; nothing
    raises, everything can be read, and the other streams are untouched."""
    run = Run()
    strange = run.life(**{"kind": kind, **hello})
    good = run.life(0, launch="good")
    for number, body, whole in records:
        record = pack_map(number, strange.last + 1, {**WHOLE, **body} if whole else body)
        if number in (Kind.HEAD, Kind.SCHEMA):
            strange.unnumbered(record)
        else:
            strange.record(record)
    strange.text("end").flush()
    good.row({"a": 1.0}).flush()
    with tempfile.TemporaryDirectory() as directory:
        project(Path(directory), run.entries(), range(3))
        with Reader(Path(directory)) as reader:
            check_sums(reader)
            assert len(reader.dump()) > 0
            streams = reader.streams()
            assert streams[0].stored == strange.last
            assert streams[1].projected == 1
            reader.media(), reader.texts(), reader.about(), reader.keys()
