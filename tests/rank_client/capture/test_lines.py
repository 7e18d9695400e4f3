"""Lines of a console: what a terminal would still show, and every newline accounted for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rank_client.capture.lines import MAX_LINE_BYTES, PROGRESS_SECONDS, Lines, visible


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"plain  ", "plain  "),
        (b"windows\r", "windows"),
        (b"\r 10%\r 20%\r", " 20%"),
        (b"one\r\x1b[2Ktwo", "two"),
        (b"\x1b[1;31mred\x1b[0m and \x1b]0;title\x07rest", "red and rest"),
        (b"\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        (b"bell\x07 and back\x08space\tand tab", "bell and backspace\tand tab"),
        ("é \N{FULL BLOCK}".encode(), "é \N{FULL BLOCK}"),
        (b"\xff broken", "\N{REPLACEMENT CHARACTER} broken"),
        (b"", ""),
    ],
)
def test_what_is_still_visible(raw: bytes, text: str) -> None:
    """The last state of a line, without colours, titles and control characters."""
    assert visible(raw) == text


@given(
    st.lists(st.text(st.characters(codec="utf-8", categories=("L", "N"))), max_size=9), st.data()
)
def test_however_the_bytes_are_cut(texts: list[str], data: st.DataObject) -> None:
    """The same lines come out wherever reads end, in the middle of a character too."""
    raw = "".join(f"{text}\n" for text in texts).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=5)))
    lines = Lines()
    out: list[str] = []
    for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True):
        out += lines.feed(raw[start:end], 0.0)
    assert out + lines.end() == texts


def test_a_progress_bar_gives_its_last_state() -> None:
    """A bar that is drawn a thousand times within the time is one line."""
    lines = Lines()
    out = []
    for i in range(1000):
        out += lines.feed(f"\rstep {i}".encode(), i / 1000)
    out += lines.feed(b"\nnext\n", 1.0)
    assert out == ["step 999", "next"]


def test_a_long_progress_bar_is_told_now_and_then() -> None:
    """One that takes long is told each PROGRESS_SECONDS, and its last state once."""
    lines = Lines()
    out = []
    for i in range(35):
        out += lines.feed(f"\rsecond {i}".encode(), float(i))
    out += lines.feed(b"\n", 35.0)
    every = int(PROGRESS_SECONDS)
    assert out == [f"second {i}" for i in (every, 2 * every, 3 * every, 34)]


def test_bars_that_are_drawn_over_each_other() -> None:
    """Nested bars and live displays go up again: they do not flood the log."""
    lines = Lines()
    out = []
    for i in range(500):
        out += lines.feed(f"\router {i}\n\rinner {i}\x1b[A".encode(), i / 100)
    out += lines.feed(b"\n\n\nend\n", 5.0)
    assert out[0] == "outer 0"
    assert out[-1] == "end"
    assert len(out) <= 4


def test_a_line_without_an_end_is_cut() -> None:
    """What is held is bounded."""
    lines = Lines()
    out = []
    for _ in range(100):
        out += lines.feed(b"x" * 10_000, 0.0)
    assert all(len(text) <= MAX_LINE_BYTES + 10_000 for text in out)
    assert sum(map(len, out + lines.end())) == 1_000_000


@given(st.lists(st.tuples(st.booleans(), st.binary(max_size=30)), max_size=20))
def test_every_newline_is_a_line_or_is_counted(parts: list[tuple[bool, bytes]]) -> None:
    """Bytes passed by and bytes taken add up, in any order."""
    lines = Lines()
    told = skipped = 0
    for skip, raw in parts:
        clean = raw.replace(b"\r", b"").replace(b"\x1b", b"")
        if skip:
            skipped += lines.skip(clean)
        else:
            told += len(lines.feed(clean, 0.0))
    wanted = sum(raw.count(b"\n") for _, raw in parts)
    assert told + skipped == wanted
