"""What rankgate itself says passes its own cleaner unchanged: an instruction that reads
`[redacted]` helps nobody."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from rank_client.redact import Redactor

ROOT = Path(__file__).parents[2]
SOURCES = sorted(p for name in ("gateway", "rank_client") for p in (ROOT / name).rglob("*.py"))
WORDS = ("harmless", "/data/run-7f3a9c21")  #: stand for what a text is filled with
REDACTOR = Redactor({})


def texts(source: str, word: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every literal of three words or more, with `word` in each field; docstrings
    are for readers of the code."""
    skipped: set[ast.AST] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr):
            skipped.add(node.value)
        if node in skipped:
            continue
        if isinstance(node, ast.JoinedStr):
            skipped |= set(node.values)  # no texts of their own
            text = "".join(
                str(part.value) if isinstance(part, ast.Constant) else word for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        else:
            continue
        if len(text.split()) > 2:
            yield node.lineno, text


@pytest.mark.parametrize("word", WORDS)
def test_every_text_of_ours_survives(word: str) -> None:
    """Reasons of sinks, errors, what doctor says, warnings, help: all there is."""
    found = [
        (path.relative_to(ROOT), line, text)
        for path in SOURCES
        for line, text in texts(path.read_text(), word)
    ]
    assert len(found) > 500
    eaten = [one for one in found if REDACTOR.text(one[2]) != one[2]]
    assert eaten == []


def test_this_test_sees_what_is_eaten() -> None:
    """An instruction after a colon is taken for the secret itself; also in an f-string."""
    source = 'raise Off("no credentials: set THIS")\nraise Off(f"{x}: api_key={y} now")\n'
    found = list(texts(source, WORDS[0]))
    assert found == [
        (1, "no credentials: set THIS"),
        (2, "harmless: api_key=harmless now"),
    ]
    assert all(REDACTOR.text(text) != text for _, text in found)
