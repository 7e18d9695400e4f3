"""One call of a sink's `send` or `close`: its account, and how far it came if it is called again.

A batch takes many requests and HUB's limits are low, so a batch may have to be called for again
and again; what was confirmed is marked at once and not sent twice. All else that is to be
remembered goes into the memory when the call has succeeded, so that a failed one leaves no trace.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from gateway.sinks.base import Item, Media, Memory, Params, Rows, Sent, Summary, Text

_MARKS = "marks"
_DOUBTS = "doubts"
_ITEM, _REQUEST = b"i", b"r"


class Turn:
    def __init__(self, memory: Memory, again: bool) -> None:
        self.sent = Sent()
        #: the next request that is not marked may have been carried out before
        self.doubtful = again
        self._memory = memory
        self._puts: dict[str, Any] = {}
        self._marks: set[bytes] = set(memory.get(_MARKS) or ())

    def get(self, key: str, default: Any = None) -> Any:
        value = self._puts[key] if key in self._puts else self._memory.get(key)
        return default if value is None else value

    def put(self, key: str, value: Any) -> None:
        """Remember it if this call succeeds."""
        self._puts[key] = value

    def put_now(self, key: str, value: Any) -> None:
        self._puts.pop(key, None)
        self._memory.put_now(key, value)

    def is_confirmed(self, mark: bytes) -> bool:
        return mark in self._marks

    def confirm(self, marks: Sequence[bytes]) -> None:
        """The backend has taken what `marks` stand for."""
        self.doubtful = False
        self._marks.update(marks)
        self._memory.put_now(_MARKS, sorted(self._marks))

    def doubt(self, items: int) -> None:
        """So many were perhaps sent twice; kept at once, for this call may yet fail."""
        if items:
            self._memory.put_now(_DOUBTS, (self._memory.get(_DOUBTS) or 0) + items)

    def commit(self, batch: Sequence[Item] | None) -> None:
        """The call has succeeded: forget the marks of `batch`, or all of them at the end.

        Marks of other items stay, since a batch that held a refused item comes again in halves.
        """
        keep: set[bytes] = set()
        if batch is not None:
            done = {item_mark(item) for item in batch if not isinstance(item, Rows)}
            keep = {mark for mark in self._marks if mark[:1] == _ITEM} - done
        self._puts[_MARKS] = sorted(keep)
        self.sent.maybe_duplicate = self._memory.get(_DOUBTS) or 0
        self._puts[_DOUBTS] = 0
        for key, value in self._puts.items():
            self._memory.put(key, value)


def item_mark(item: Text | Params | Summary | Media) -> bytes:
    return _ITEM + item.stream + item.seq.to_bytes(8, "big")


def request_mark(body: Any) -> bytes:
    text = json.dumps(body, sort_keys=True).encode()
    return _REQUEST + hashlib.blake2b(text, digest_size=16).digest()
