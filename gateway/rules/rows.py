"""Rows of frames that hold one schema only, split with numpy, many frames at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from zlib import crc32

import numpy as np
import numpy.typing as npt

from rank_client.wire.records import HEADER_BYTES, ROW_HEAD_BYTES, Kind

from .changes import Layout, Stream
from .gate import Gate

TAIL_HEAD_COLUMNS = 4  #: a tail row: stream, seq, step, wall, then the values, 8 bytes each

_U64 = np.dtype("<u8")


@dataclass(slots=True)
class Piece:
    """Rows of one frame and one schema, in order."""

    position: int
    entry: int
    stream: Stream
    layout: Layout
    first: int
    n: int
    data: bytes | memoryview
    gate: Gate  #: in force where the frame stands in the journal


def all_alike(records: memoryview, size: int) -> bool:
    """Do the records of a frame all have the length, kind and schema of its first one?

    By induction: where one record has that length, the next one's header is read right. (That
    n of them make up the frame's length does not tell: shorter ones may make up for longer.)
    """
    n = len(records) // size
    return all(
        bytes(records[i::size]) == records[i : i + 1].tobytes() * n
        for i in (4, 5, 6, 7, 16, 18, 19)
    )


def blocks(pieces: list[Piece]) -> Iterable[list[Piece]]:
    """Stretches of pieces whose columns lie in the same order, under the same schema id."""
    start = 0
    for end in range(1, len(pieces) + 1):
        if end < len(pieces):
            here, there = pieces[end].layout, pieces[start].layout
            if here.take is there.take and here.schema == there.schema:
                continue
        yield pieces[start:end]
        start = end


def split(pieces: list[Piece]) -> npt.NDArray[np.uint64] | None:
    """Record rows as tail rows, (n, 4 + columns) of 8 bytes each; None when a record is not
    what its frame announced."""
    layout = pieces[0].layout
    size = layout.row_bytes
    data = memoryview(pieces[0].data if len(pieces) == 1 else b"".join(p.data for p in pieces))
    raw = np.frombuffer(data, _U64).reshape(-1, size // 8)
    counts = [p.n for p in pieces]
    ends = np.cumsum(counts)
    starts = np.repeat([p.first for p in pieces] - (ends - counts), counts)
    checks = [crc32(data[at + 4 : at + size]) for at in range(0, len(data), size)]
    if not (
        np.array_equal(raw[:, 0], np.array(checks, _U64) | _U64.type(size << 32))
        and np.array_equal(raw[:, 1], (starts + np.arange(len(raw))).astype(_U64))
        and bool((raw[:, 2] == _U64.type(int(Kind.ROW) | layout.schema << 16)).all())
    ):
        return None
    first = (HEADER_BYTES + ROW_HEAD_BYTES) // 8
    values = raw[:, first:]
    rows = np.empty((len(raw), TAIL_HEAD_COLUMNS + values.shape[1]), _U64)
    rows[:, 0] = np.repeat([p.stream.index for p in pieces], counts)
    rows[:, 1] = raw[:, 1]
    rows[:, 2:4] = raw[:, 3:5]
    rows[:, 4:] = values if layout.take is None else values[:, layout.take]
    return rows
