"""Rows as a rank would have written them, made by the thousand with numpy."""

from __future__ import annotations

from zlib import crc32

import numpy as np

from rank_client.wire.records import Kind, Schema

START_NS = 1_790_000_000_000_000_000


def schema(keys: int) -> Schema:
    return Schema(0, tuple(f"bench/m{i:03}" for i in range(keys)), ("f8",) * keys)


def rows(count: int, keys: int, seed: int = 0) -> bytes:
    """`count` row records numbered from 1, of `keys` float64 each; steps from 0."""
    size = schema(keys).row_bytes
    raw = np.zeros((count, size // 8), "<u8")
    number = np.arange(count, dtype="<u8")
    raw[:, 0] = size << 32
    raw[:, 1] = number + 1
    raw[:, 2] = int(Kind.ROW)
    raw[:, 3] = number
    raw[:, 4] = START_NS + number * 1_000_000
    raw[:, 5] = number * 1_000_000
    raw[:, 6:] = np.random.default_rng(seed).normal(size=(count, keys)).view("<u8")
    view = memoryview(raw.tobytes())
    sums = [crc32(view[at + 4 : at + size]) for at in range(0, len(view), size)]
    raw[:, 0] |= np.array(sums, "<u8")
    return raw.tobytes()
