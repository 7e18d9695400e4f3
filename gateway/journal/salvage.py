"""What a damaged stretch of a journal still holds.

A batch holds the records of a rank verbatim, each with a checksum of its own: where the batch's
is wrong, most of its records are right. Writer and readers take the same ones, so they agree on
how far each stream is stored.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from rank_client.wire.frames import DATA_HEAD, DATA_HEAD_BYTES, MAGIC, MAJOR, Type
from rank_client.wire.records import (
    HEADER,
    HEADER_BYTES,
    PAD_MASK,
    UNNUMBERED,
    Head,
    Kind,
    Scan,
    scan,
)
from rank_client.wire.segments import SPOOL_KINDS

#: the kind of an entry that is a batch with a wrong checksum; no byte on disk can say it
BROKEN_BATCH = -1

RECEIVED = struct.Struct("<q")
_BEFORE_RECORDS_BYTES = RECEIVED.size + DATA_HEAD_BYTES


def in_order(found: Scan) -> list[Head | tuple[int, int]]:
    """The good records of a file and the stretches between them, as they stand."""
    pieces: list[Head | tuple[int, int]] = [*found.heads, *found.damage]
    return sorted(pieces, key=lambda piece: piece[0])


def broken_batches(
    buf: bytes | memoryview, at: int, end: int, seq: int
) -> Iterator[tuple[int, memoryview]]:
    """(number, body) of the batches in the damaged stretch from `at` to `end`, which begins where
    entry `seq` must stand. Stops at the first header that does not say what must be there."""
    view = memoryview(buf)
    while end - at >= HEADER_BYTES + _BEFORE_RECORDS_BYTES:
        _, size, number, kind, flags, _, _ = HEADER.unpack_from(view, at)
        if kind != Kind.BATCH or number != seq or at + size > end:
            return
        body = view[at + HEADER_BYTES : at + size - (flags & PAD_MASK)]
        if not _is_data(body):
            return
        yield number, body
        at, seq = at + size, seq + 1


def _is_data(body: memoryview) -> bool:
    if len(body) < _BEFORE_RECORDS_BYTES:
        return False
    magic, major, type_, *_, size = DATA_HEAD.unpack_from(body, RECEIVED.size)
    return (magic, major, type_, size) == (
        MAGIC, MAJOR, Type.DATA, len(body) - _BEFORE_RECORDS_BYTES,
    )  # fmt: skip


class Salvaged(NamedTuple):
    """The good records of a broken batch: where they lie in `records`, numbers ascending."""

    heads: list[Head]
    records: memoryview


def stream_of(body: memoryview) -> bytes:
    """The stream that a batch says it is of: 16 random bytes, so right if it is known at all."""
    stream: bytes = DATA_HEAD.unpack_from(body, RECEIVED.size)[5]
    return stream


def salvage(body: memoryview, stored: int) -> Salvaged:
    """What a stream of which `stored` is the last number can still get of a broken batch."""
    *_, first, n, _ = DATA_HEAD.unpack_from(body, RECEIVED.size)
    records = body[_BEFORE_RECORDS_BYTES:]
    last = max(stored, first - 1)
    heads = []
    for head in scan(records, SPOOL_KINDS).heads:
        if head.kind in UNNUMBERED:
            heads.append(head)
        elif last < head.seq < first + n:
            heads.append(head)
            last = head.seq
    return Salvaged(heads, records)
