"""Printed lines as records: in pieces that fit, and without secrets."""

from __future__ import annotations

from rank_client.capture.messages import LINE_ERR, LINE_OUT, Message, Messages
from rank_client.capture.record import PIECE_CHARACTERS, Record
from rank_client.redact import MARK, Redactor


def test_a_line_says_where_it_was_printed() -> None:
    """Level and kind of stdout and stderr differ; time and number are the copier's."""
    record = Record(Redactor({}))
    [out] = record.bodies(Message(LINE_OUT, 3, 5, "x"))
    [err] = record.bodies(Message(LINE_ERR, 4, 6, ""))
    assert out == {"t": "x", "l": "stdout", "w": 5, "s": None, "k": "console", "n": 3}
    assert (err["l"], err["k"], err["t"]) == ("stderr", "console-err", "")


def test_a_long_line_is_cut() -> None:
    """Each piece fits a record, and together they are the line."""
    text = "é" * (2 * PIECE_CHARACTERS + 1)
    pieces = [body["t"] for body in Record(Redactor({})).bodies(Message(LINE_OUT, 1, 0, text))]
    assert [len(piece) for piece in pieces] == [PIECE_CHARACTERS, PIECE_CHARACTERS, 1]
    assert "".join(pieces) == text


def test_a_private_key_over_several_lines() -> None:
    """Its lines are hidden one by one, and those after it are not."""
    printed = ["key:", "-----BEGIN RSA PRIVATE KEY-----", "MIIEsecret", "AQABsecret",
               "-----END RSA PRIVATE KEY-----", "after"]  # fmt: skip
    record = Record(Redactor({}))
    texts = [b["t"] for text in printed for b in record.bodies(Message(LINE_OUT, 1, 0, text))]
    assert texts == ["key:", MARK, MARK, MARK, MARK, "after"]


def test_messages_however_they_are_cut() -> None:
    """A socket may give any part of a message at a time."""
    sent = [Message(LINE_OUT, n, n * 10, "é" * n) for n in range(5)]
    raw = b"".join(message.pack() for message in sent)
    messages = Messages()
    got = [m for i in range(len(raw)) for m in messages.feed(raw[i : i + 1])]
    assert got == sent
