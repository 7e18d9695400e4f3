"""A dead rank's last lines: appended once, after what it wrote, while its stream is open."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from rank_client.capture.leftover import store
from rank_client.capture.messages import LINE_OUT, Message
from rank_client.capture.record import REFUSED, Record
from rank_client.counts import read_counts
from rank_client.redact import Redactor
from rank_client.spool import Spool
from rank_client.wire.disk import OsDisk
from rank_client.wire.records import Kind
from tests.rank_client.read import on_disk

HEAD = {"stream": b"s" * 16, "run": "r"}


def line(number: int, text: str = "") -> Message:
    return Message(LINE_OUT, number, time.time_ns(), text or f"line {number}")


@pytest.fixture
def directory(tmp_path: Path) -> str:
    """The spool of a rank that died after two calls of its own and the lines 1 and 2."""
    spool = Spool(str(tmp_path / "stream"), HEAD)
    spool.append_map(Kind.TEXT, {"t": "a text", "l": "info", "w": 1, "s": None})
    record = Record(Redactor({}))
    for number in (1, 2):
        for body in record.bodies(line(number)):
            spool.append_map(Kind.TEXT, body, console=True)
    spool.append_map(Kind.PARAMS, {"v": {"lr": 0.1}, "w": 1})
    spool.close()
    return str(tmp_path / "stream")


def numbers(directory: str) -> list[tuple[int, Any]]:
    """(number of the record, number of its line) of all texts."""
    return [(w.seq, w.values.get("n")) for w in on_disk(Path(directory)) if w.kind == Kind.TEXT]


def test_only_what_was_not_stored_is_appended(directory: str) -> None:
    """Lines that the rank stored and had no time to say so are not there twice."""
    store(directory, [line(2), line(3), line(4)], 0)
    assert numbers(directory) == [(1, None), (2, 1), (3, 2), (5, 3), (6, 4)]


def test_twice_is_once(directory: str) -> None:
    """The same lines again change nothing."""
    for _ in range(2):
        store(directory, [line(3)], 0)
    assert numbers(directory)[-1] == (5, 3)


def test_a_torn_record_gives_way(directory: str) -> None:
    """What the rank was just writing when it died was not counted, and is written over."""
    with (Path(directory) / "00000001.log").open("ab") as segment:
        segment.write(b"half a record")
    store(directory, [line(3)], 0)
    assert numbers(directory)[-1] == (5, 3)


@pytest.mark.parametrize("note", ["done", "hole", "rejected"])
def test_nothing_is_appended_to_what_was_shipped(directory: str, note: str) -> None:
    """Who has shipped the spool does not look again."""
    (Path(directory) / note).write_text("00 4\n")
    store(directory, [line(3)], 5)
    assert numbers(directory)[-1] == (3, 2)


def test_nothing_comes_after_the_end(tmp_path: Path) -> None:
    """A stream with an END record is over."""
    spool = Spool(str(tmp_path / "stream"), HEAD)
    spool.append_map(Kind.END, {"status": "completed", "text": "", "w": 1})
    spool.close()
    store(str(tmp_path / "stream"), [line(1)], 0)
    assert numbers(str(tmp_path / "stream")) == []


def test_what_was_refused_is_counted(directory: str) -> None:
    """Lines there was no room for stand in the spool's counts, to be told by who ships it."""
    store(directory, [], 7)
    counts = read_counts(OsDisk(), directory)
    assert (counts.refused, counts.owed) == (7, {REFUSED: 7})


def test_secrets_are_taken_out(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last lines go through the redactor like all others."""
    monkeypatch.setitem(os.environ, "SERVICE_SECRET", "plain-secret-value")
    store(directory, [line(3, "password=hunter2222 plain-secret-value")], 0)
    [last] = on_disk(Path(directory))[-1:]
    assert last.values["t"] == "password=[redacted] [redacted]"


def test_a_spool_that_is_gone(tmp_path: Path) -> None:
    """Nothing to write to is no error."""
    store(str(tmp_path / "gone"), [line(1)], 1)
