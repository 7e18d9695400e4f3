"""One call of a sink's `send` or `close`: its account, and how far it came if it is called again.

A batch takes many requests and HUB's limits are low, so a batch may have to be called for again
and again; what was confirmed is marked at once and not sent twice. All else that is to be
remembered goes into the memory when the call has succeeded, so that a failed one leaves no trace.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from gateway.sinks.base import (
    RECEIPTS,
    Item,
    Media,
    Memory,
    Params,
    Rows,
    Sent,
    SinkError,
    Summary,
    Text,
)
from gateway.sinks.hub.http import NoAnswer

_MARKS = "confirmed_marks"  #: of what is confirmed → how many receipts there were before it
_SPENT = "spent_marks"  #: marks that are of no more use once the receipt is there
_DOUBTS = "doubts"  #: so many were perhaps sent twice, over all calls
_TOLD = "doubts_told"  #: so many of them a call has reported
_UNANSWERED = "unanswered"
_ITEM, _REQUEST = b"i", b"r"


class Turn:
    def __init__(self, memory: Memory) -> None:
        self.sent = Sent()
        self._memory = memory
        self._puts: dict[str, Any] = {}
        self._receipts = int(memory.get(RECEIPTS) or 0)
        # A batch in pieces has one receipt, and until then all its marks must outlive our death.
        marks: dict[bytes, int] = memory.get(_MARKS) or {}
        self._kept = {mark: n for mark, n in marks.items() if n >= self._receipts}
        receipts, spent = memory.get(_SPENT) or (self._receipts, ())
        self._spent = set(spent if receipts == self._receipts else ())

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
        return mark in self._kept and mark not in self._spent

    def confirm(self, marks: Sequence[bytes]) -> None:
        """The backend has taken what `marks` stand for."""
        self._kept.update(dict.fromkeys(marks, self._receipts))
        self._spent.difference_update(marks)
        self._memory.put_now(_MARKS, self._kept)

    @contextmanager
    def once(self, marks: Sequence[bytes], items: int) -> Iterator[None]:
        """Around a request with so many items that leaves them there each time it is carried out.

        What stands for it is on disk first. So after a lost answer, or our own death, its next
        attempt is known for one that may be the second, and counted as that when it succeeds; one
        that was put off (a limit, a key to be renewed) is not.
        """
        unanswered: dict[bytes, int] = self._memory.get(_UNANSWERED) or {}
        doubted = unanswered.get(marks[0], 0)
        self._memory.put_now(_UNANSWERED, {**unanswered, marks[0]: max(doubted, items)})
        try:
            yield
        except NoAnswer:
            raise
        except SinkError:
            self._memory.put_now(_UNANSWERED, unanswered)
            raise
        self.doubt(doubted)
        self.confirm(marks)
        unanswered.pop(marks[0], None)
        self._memory.put_now(_UNANSWERED, unanswered)

    def forget_requests(self) -> None:
        """What they were about is gone: they have to be made again."""
        self._kept = {mark: n for mark, n in self._kept.items() if mark[:1] == _ITEM}
        self._memory.put_now(_MARKS, self._kept)

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
            done = {row_mark(i) if isinstance(i, Rows) else item_mark(i) for i in batch}
            keep = {mark for mark in self._kept if mark[:1] == _ITEM} - done
        self._puts[_SPENT] = [self._receipts, sorted(self._kept.keys() - keep)]
        doubts = self._memory.get(_DOUBTS) or 0
        self.sent.maybe_duplicate = doubts - (self._memory.get(_TOLD) or 0)
        self._puts[_TOLD] = doubts
        for key, value in self._puts.items():
            self._memory.put(key, value)


def item_mark(item: Text | Params | Summary | Media) -> bytes:
    return _ITEM + item.stream + item.seq.to_bytes(8, "big")


def row_mark(rows: Rows) -> bytes:
    """Of the last of them."""
    return _ITEM + rows.stream + int(rows.seq[-1]).to_bytes(8, "big") if len(rows.seq) else b""


def request_mark(body: Any) -> bytes:
    text = json.dumps(body, sort_keys=True).encode()
    return _REQUEST + hashlib.blake2b(text, digest_size=16).digest()
