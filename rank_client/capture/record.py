"""A printed line as the records of a spool: without secrets, and in pieces that fit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ..redact import MARK, Redactor
from .messages import LEVELS, Message

PIECE_CHARACTERS = 15_000  #: four bytes each at most: a record stays below 64 KiB
KEY_LINES = 200  #: a private key is not longer
NAMES = {"stdout": "console", "stderr": "console-err"}  #: `k` of a record
REFUSED = "console lines beyond what is kept of a burst"

_BEGIN = re.compile(r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----")
_END = re.compile(r"-----END [A-Z ]{0,40}KEY-----")


class Record:
    """Makes the records of one console. A private key that goes over several lines is seen here,
    as the redactor gets them one by one."""

    def __init__(self, clean: Redactor) -> None:
        self._clean = clean
        self._key_lines = 0  # so many lines may belong to a key that has begun

    def bodies(self, line: Message) -> Iterator[dict[str, Any]]:
        level, text = LEVELS[line.kind], self._without_secrets(line.text)
        for at in range(0, max(len(text), 1), PIECE_CHARACTERS):
            piece = text[at : at + PIECE_CHARACTERS]
            yield {
                "t": piece,
                "l": level,
                "w": line.wall_ns,
                "s": None,
                "k": NAMES[level],
                "n": line.number,
            }

    def _without_secrets(self, text: str) -> str:
        if self._key_lines:
            end = _END.search(text)
            self._key_lines = 0 if end else self._key_lines - 1
            return MARK + (self._clean.text(text[end.end() :]) if end else "")
        begin = _BEGIN.search(text)
        if begin and not _END.search(text, begin.end()):
            self._key_lines = KEY_LINES
        return self._clean.text(text)
