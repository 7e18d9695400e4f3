"""Which checkpoints stay: the choice alone, then with what sinks have taken."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from gateway.series.reader import Reader
from gateway.series.tables import MediaRow
from gateway.sinks.keep import HOLDS, Policy, choose, surplus, taken_by
from gateway.sinks.quarantine import Kept
from gateway.sinks.store import Store
from rank_client.wire.records import Kind
from tests.build import RunBuilder


def row(seq: int, key: str = "m.pt", size: int = 10, stream: int = 0, **meta: Any) -> MediaRow:
    return MediaRow(stream, seq, seq, None, "checkpoint", key, key, meta, f"{seq:064x}", size, None)


def dropped(rows: list[MediaRow], checkpoints: str, cap_bytes: int = 0) -> list[int]:
    return [
        one.row.seq for one in surplus(rows, lambda index: index, Policy(checkpoints, cap_bytes))
    ]


BEST = [row(1), row(2, best=True), row(3), row(4, best=True), row(5), row(6, final=True), row(7)]


@pytest.mark.parametrize(
    ("checkpoints", "gone"), [("all", []), ("best", [1, 2, 3, 5, 7]), ("last", [1, 2, 3, 4, 5])]
)
def test_what_each_policy_drops(checkpoints: str, gone: list[int]) -> None:
    """`best` keeps the newest best one, `last` the newest; what was logged as final stays."""
    assert dropped(BEST, checkpoints) == gone


def test_without_a_best_one_the_newest_is_kept() -> None:
    """Nobody loses the only weights there are because none was called best."""
    assert dropped([row(1), row(2), row(3)], "best") == [1, 2]


def test_keys_and_ranks_are_looked_at_for_themselves() -> None:
    """Rank 1's newest does not make rank 0's old, nor does last.pt make best.pt old."""
    rows = [row(1), row(2, key="other.pt"), row(3, stream=1), row(4, stream=1)]
    assert dropped(rows, "last") == [3]


def test_other_files_and_those_gone_already_are_left_alone() -> None:
    """Policy is about checkpoints whose bytes are here."""
    rows = [row(1), row(2), row(3)]
    rows[0] = MediaRow(0, 1, 1, None, "file", "m.pt", "m.pt", {}, "a" * 64, 5, None)
    rows[1] = MediaRow(0, 2, 2, None, "checkpoint", "m.pt", "m.pt", {}, None, None, "media lost")
    assert dropped(rows, "last") == []


@pytest.mark.parametrize(
    ("cap_bytes", "gone"), [(0, []), (40, []), (30, [1]), (20, [1, 3]), (1, [1, 3, 2])]
)
def test_the_cap_takes_the_plain_ones_first(cap_bytes: int, gone: list[int]) -> None:
    """Oldest first, best ones after those that are not, and never the newest."""
    assert dropped([row(1), row(2, best=True), row(3), row(4)], "all", cap_bytes) == gone


def test_equal_content_counts_once() -> None:
    """Two names of one content fill the disk once, and dropping one frees nothing."""
    one, two = row(1), row(2, key="b.pt")
    two = MediaRow(0, 2, 2, None, "checkpoint", "b.pt", "b.pt", {}, one.sha256, 10, None)
    assert dropped([one, two], "all", 10) == []


def test_a_file_whose_record_is_still_to_come_stays(tmp_path: Path) -> None:
    """Files travel beside the records: nobody knows yet what the same bytes were logged as."""
    made = RunBuilder(tmp_path, "r1")
    [rank] = made.ranks(1)
    rank.media("last.pt", b"old", "checkpoint").media("last.pt", b"new", "checkpoint").flush()
    old = {hashlib.sha256(b"old").hexdigest(): 'media dropped by policy (checkpoints = "last")'}
    early = {"media": rank.last + 1, "sha256": next(iter(old)), "size": 3}
    with Reader(made.close()) as reader:
        assert choose(reader, Policy("last", 0), [], lambda sha256: True) == old
    made.entry(Kind.BLOB, {"stream": rank.stream, **early})
    with Reader(made.close()) as reader:
        assert choose(reader, Policy("last", 0), [], lambda sha256: True) == {}


def test_what_a_sink_has_taken_and_still_needs(tmp_path: Path) -> None:
    """Files in quarantine are not dealt with, and those that are held back are named."""
    store = Store(tmp_path / "hub.db")
    kept = Kept("media", b"s" * 16, 2, "", 1, "checkpoint", "refused")
    store.put(HOLDS, ["ab" * 32])
    store.receipt(
        delivered=1,
        skipped={},
        maybe_duplicate=0,
        spans={},
        media=[(b"s" * 16, 1), (b"s" * 16, 2)],
        quarantine=[kept],
        intended={},
        about={},
    )
    store.close()
    taken = taken_by(tmp_path / "hub.db")
    assert [taken.needs((b"s" * 16, seq)) for seq in (1, 2, 3)] == [False, True, True]
    assert taken.held == {"ab" * 32}
    assert taken_by(tmp_path / "nothing.db").needs((b"s" * 16, 1))
