"""A spool's counts: what its process refused, in a small file that outlives the process."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import NamedTuple
from zlib import crc32

import msgpack

from .wire.disk import Disk
from .wire.records import BadRecord, unpack_map
from .wire.segments import read_whole

COUNTS_BYTES = 4096
COUNTS = struct.Struct("<QQ")  # refused calls, bad values; then _REASONS and a map of the reasons
_REASONS = struct.Struct("<II")  # checksum and length of the map


class Counts(NamedTuple):
    """What a spool says of its refusals; `owed` are those that no LOSS record may tell of."""

    refused: int
    bad_values: int
    owed: dict[str, int]


def read_counts(disk: Disk, directory: str) -> Counts:
    """The counts of a spool, of a killed process too; all zero where there are none to read."""
    try:
        page = read_whole(disk, f"{directory}/counts")
        refused, bad = COUNTS.unpack_from(page)
        check, size = _REASONS.unpack_from(page, COUNTS.size)
    except (OSError, struct.error):
        return Counts(0, 0, {})
    at = COUNTS.size + _REASONS.size
    packed = page[at : at + size]
    try:
        owed = unpack_map(packed) if crc32(packed) == check else {}
    except BadRecord:
        owed = {}
    return Counts(refused, bad, {k: n for k, n in owed.items() if isinstance(n, int)})


def packed_counts(refused: int, bad_values: int, owed: Mapping[str, int]) -> bytes:
    """What `read_counts` reads; without the reasons where they do not fit."""
    reasons: bytes = msgpack.packb(owed, unicode_errors="replace")
    if COUNTS.size + _REASONS.size + len(reasons) > COUNTS_BYTES:
        reasons = b""  # the sums are what must be right
    return COUNTS.pack(refused, bad_values) + _REASONS.pack(crc32(reasons), len(reasons)) + reasons
