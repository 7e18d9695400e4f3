"""What a backend refused, released by a person: tried again at most once each, or given up; the
account holds at every moment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from gateway.rules.follow import rebuild
from gateway.sinks import requests
from gateway.sinks.base import Item, Refused, Rows, Sent, Unavailable
from gateway.sinks.loop import NOT_THERE
from gateway.sinks.memory import MemorySink
from gateway.sinks.quarantine import BEGUN, SKIPPED, Kept, read_quarantine
from gateway.sinks.store import read_view

from .test_loop import Driven, builder, points, want

BAD = ("loss", 13, 13.5)


class Choosy(MemorySink):
    """Refuses what `bad` says, as long as it says so."""

    def __init__(self) -> None:
        super().__init__()
        self.bad = {BAD, ("lr", 13, 0.1), "text", "media", "params"}

    def send(self, batch: Sequence[Item], again: bool) -> Sent:
        kinds = {type(i).__name__.lower() for i in batch if not isinstance(i, Rows)}
        if self.bad & {*points(batch), *kinds}:
            raise Refused("not this one")
        return super().send(batch, again)


@pytest.fixture
def driven(tmp_path: Path) -> Driven:
    """A run that is delivered but for five items: two points, a line, a file, the params."""
    driven = Driven(builder(tmp_path).close(), Choosy())
    driven.run()
    assert sorted(r.kind for r in read_quarantine(driven.path)) == [
        "media", "params", "rows", "rows", "text",
    ]  # fmt: skip
    driven.check()
    return driven


def release(driven: Driven, action: str, ids: list[int] | None) -> None:
    """As the sink's process does it: what is asked for, then steps of the loop to its end."""
    requests.ask(driven.run_dir, "memory", action, ids)
    driven.close()
    driven.open()
    requests.consume(driven.run_dir, "memory", driven.store.quarantine)
    assert requests.waiting(driven.run_dir, "memory") == []
    driven.check()
    driven.run()
    driven.check()


def everything(items: Sequence[Item]) -> Counter[str]:
    return Counter(type(item).__name__ for item in items if not isinstance(item, Rows))


def test_all_kinds_are_delivered_when_they_are_tried_again(driven: Driven) -> None:
    """Points, text, files and params: each once, exactly what was kept aside, unmarked."""
    sink = driven.sink
    assert isinstance(sink, Choosy)
    sink.bad.clear()
    before = len(sink.again)
    release(driven, requests.RETRY, None)
    assert points(sink.received) == want()
    assert everything(sink.received) == {"Text": 1, "Media": 1, "Params": 1}
    assert sink.again[before:] == [False]
    assert read_quarantine(driven.path) == []
    assert read_view(driven.path).state == "drained"
    release(driven, requests.RETRY, None)
    assert points(sink.received) == want()


def test_after_a_rebuilt_series_it_is_the_same_item(driven: Driven) -> None:
    """An item in quarantine is found by what it is, not by where it was."""
    sink = driven.sink
    assert isinstance(sink, Choosy)
    driven.close()
    for path in driven.run_dir.glob("series.db*"):
        path.unlink()
    rebuild(driven.run_dir)
    driven.open()
    sink.bad.clear()
    release(driven, requests.RETRY, None)
    assert points(sink.received) == want()
    assert everything(sink.received) == {"Text": 1, "Media": 1, "Params": 1}


def test_one_of_them_is_refused_again(driven: Driven) -> None:
    """It stays under its number with the newer reason; the others are gone from there."""
    sink = driven.sink
    assert isinstance(sink, Choosy)
    [bad] = [r for r in read_quarantine(driven.path) if r.what == "loss step 13 rank 0"]
    sink.bad = {BAD}
    release(driven, requests.RETRY, None)
    [left] = read_quarantine(driven.path)
    assert (left.id, left.reason, left.asked) == (bad.id, "not this one", 0)
    assert points(sink.received) == want() - Counter([BAD])


def test_only_the_chosen_are_tried(driven: Driven) -> None:
    """By their numbers; one that does not exist changes nothing."""
    sink = driven.sink
    assert isinstance(sink, Choosy)
    sink.bad.clear()
    rows = read_quarantine(driven.path)
    [bad] = [r for r in rows if r.what == "loss step 13 rank 0"]
    release(driven, requests.RETRY, [bad.id, 4711])
    assert points(sink.received) == want() - Counter([("lr", 13, 0.1)])
    assert {r.id for r in read_quarantine(driven.path)} == {r.id for r in rows} - {bad.id}


def test_given_up_they_count_as_skipped(driven: Driven) -> None:
    """Never sent, counted under a reason of their own; a number is never given again."""
    rows = read_quarantine(driven.path)
    release(driven, requests.SKIP, [rows[0].id, rows[-1].id])
    assert read_view(driven.path).skipped == {SKIPPED: 2}
    release(driven, requests.SKIP, None)
    assert read_view(driven.path).skipped == {SKIPPED: 5}
    assert read_quarantine(driven.path) == []
    assert points(driven.sink.received) == want() - Counter([BAD, ("lr", 13, 0.1)])
    driven.store.quarantine.add([Kept("text", b"", 1, "", 1, "a line", "another one")])
    [later] = read_quarantine(driven.path)
    assert later.id > max(r.id for r in rows)


def test_killed_in_the_try_it_comes_again_marked_so(driven: Driven) -> None:
    """Until there is a receipt it is counted in quarantine, and the next life knows that it may
    have got through."""
    sink = driven.sink
    assert isinstance(sink, Choosy)
    sink.bad.clear()
    driven.store.quarantine.retry(None)
    driven.close()
    driven.open()
    sink.faults = [Unavailable("cut after it was applied")]
    assert driven.loop.step() > 0
    driven.check()
    assert {r.asked for r in read_quarantine(driven.path)} == {BEGUN}
    driven.close()
    driven.open()
    before = len(sink.again)
    driven.run()
    assert sink.again[before:] == [True]
    assert points(sink.received) == want()
    driven.check()


def test_what_the_series_have_no_more_stays(driven: Driven) -> None:
    """A journal put back to an older state: said, nothing is sent, and the rest goes on."""
    sink = driven.sink
    assert isinstance(sink, Choosy)
    sink.bad.clear()
    driven.store.db.execute("UPDATE quarantine SET seq = 4711")
    release(driven, requests.RETRY, None)
    assert {r.reason for r in read_quarantine(driven.path)} == {NOT_THERE}
    assert points(sink.received) == want() - Counter([BAD, ("lr", 13, 0.1)])


@pytest.mark.parametrize("text", ["", "[]", '{"action": "sing", "ids": null}', '{"ids": ["x"]}'])
def test_a_request_that_cannot_be_read(
    driven: Driven, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Is told in the log, left out, and changes nothing."""
    path = requests.ask(driven.run_dir, "memory", requests.SKIP, None)
    path.write_text(text)
    requests.consume(driven.run_dir, "memory", driven.store.quarantine)
    assert not path.exists()
    assert str(path) in caplog.text
    assert len(read_quarantine(driven.path)) == 5
    driven.check()
