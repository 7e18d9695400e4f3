"""Records: the unit of everything that is written down, in a spool, a frame or a journal.

Layout, little-endian, 8-aligned:
`crc u32 (of all that follows) · len u32 (whole record, padded) · seq u64 · kind u8 · flags u8 ·
schema u16 · 0 u32`, then the body. The low three bits of `flags` count the padding bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Any, NamedTuple
from zlib import crc32

import msgpack

HEADER = struct.Struct("<IIQBBHI")
HEADER_BYTES = HEADER.size
ROW_HEAD = struct.Struct("<qqq")  # step, wall_ns, mono_ns
ROW_HEAD_BYTES = ROW_HEAD.size

MAX_RECORD_BYTES = 2 << 20  #: a journal entry holds one whole frame, so this is above the frame's
MAX_EVENT_BYTES = 256 << 10  #: the largest record a rank may write
MAX_SCHEMAS = 1024  #: per stream; beyond it rows are written as `KV` maps
MAX_SCHEMA_BYTES = 512 << 10  #: of all schemas of a stream; the same beyond it
MAX_KEYS = 20_000  #: per stream; beyond it values are refused and counted
MAX_DEPTH = 8  #: of nested maps and lists in a control or record map
MAX_CONTAINERS = 1 << 17  #: maps and lists in one: a byte of them becomes 64 in memory

PAD_MASK = 0b111


class Kind(IntEnum):
    """What a record is. A reader keeps and skips the kinds it does not know."""

    HEAD = 1  # opens a segment; not numbered: its seq is that of the next numbered record
    SCHEMA = 2  # an ordered set of (key, type) under a stream's own id; not numbered
    ROW = 3  # step, wall_ns, mono_ns, then 8 bytes per column of its schema
    KV = 4  # the same as a map, for streams with too many schemas
    TEXT = 5
    PARAMS = 6
    SUMMARY = 7
    MEDIA = 8  # a file was logged; its bytes travel as a stream of their own
    LOSS = 9  # control: this many calls were refused, and why
    END = 10  # control: how the life of this stream ended

    OPEN = 32  # journal: a stream's HELLO map
    BATCH = 33  # journal: received_ns i64, then a DATA frame verbatim
    GAP = 34  # journal: numbers that will never come
    BYE = 35
    RULES = 36
    TICK = 37
    BLOB = 38  # journal: the last byte of a media file has arrived
    MARK = 39  # journal: all before this is on disk; not numbered
    DROP = 41  # journal: the bytes of a media file were removed, and why
    TABLE = 40  # opens a journal segment: high water per stream; not numbered


UNNUMBERED = frozenset({Kind.HEAD, Kind.SCHEMA, Kind.MARK, Kind.TABLE})
FIRST_JOURNAL_KIND = 32

#: column types of a schema, and the struct codes of their 8 bytes
COLUMN_CODES = {"f8": "d", "i8": "q", "bool": "q"}


class BadRecord(ValueError):
    """Bytes that are not what they should be: too deep, too long, or not msgpack."""


class Head(NamedTuple):
    """A record's header and where it lies in the buffer it was read from."""

    at: int
    size: int
    seq: int
    kind: int
    flags: int
    schema: int

    @property
    def body(self) -> slice:
        return slice(self.at + HEADER_BYTES, self.at + self.size - (self.flags & PAD_MASK))


def pack(kind: int, seq: int, body: bytes, schema: int = 0) -> bytes:
    """One record with its checksum and padding."""
    pad = -len(body) & PAD_MASK
    size = HEADER_BYTES + len(body) + pad
    rest = HEADER.pack(0, size, seq, kind, pad, schema, 0)[4:] + body + b"\0" * pad
    return crc32(rest).to_bytes(4, "little") + rest


def pack_map(kind: int, seq: int, value: dict[str, Any], schema: int = 0) -> bytes:
    return pack(
        kind, seq, msgpack.packb(value, use_bin_type=True, unicode_errors="replace"), schema
    )


def unpack_map(body: bytes | memoryview) -> dict[str, Any]:
    """A msgpack map from the wire or disk, bounded in size and depth. Raises BadRecord."""
    size = len(body)
    hook = _Containers() if size > MAX_CONTAINERS else None  # each takes a byte at least
    try:
        value = msgpack.unpackb(
            body,
            raw=False,
            strict_map_key=True,
            max_str_len=size,
            max_bin_len=size,
            max_array_len=min(size, 1 << 16),
            max_map_len=min(size, 1 << 16),
            max_ext_len=0,
            object_hook=hook,
            list_hook=hook,
            ext_hook=_no_extension,
        )
    except BadRecord:
        raise
    except Exception as error:  # msgpack raises a dozen kinds for bytes that are not its own
        raise BadRecord(f"not a msgpack map: {type(error).__name__}") from None
    if not isinstance(value, dict):
        raise BadRecord("not a map")
    check_nesting(value, MAX_DEPTH)
    return value


class _Containers:
    """Lets so many maps and lists of one message be made, and no more."""

    def __init__(self) -> None:
        self._left = MAX_CONTAINERS

    def __call__(self, made: Any) -> Any:
        self._left -= 1
        if self._left < 0:
            raise BadRecord("too many maps and lists")
        return made


def _no_extension(_code: int, _data: bytes) -> Any:
    raise BadRecord("an extension type")  # the limit above lets empty ones pass


def check_nesting(value: Any, left: int) -> None:
    """Raises BadRecord where a value has more than `left` levels, or keys that are no text."""
    # The C decoder allows 1024 levels; repr and json raise RecursionError long before that.
    if left == 0:
        raise BadRecord("nested too deep")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):  # the decoder lets bytes pass
                raise BadRecord("a key that is no text")
            check_nesting(item, left - 1)
    elif isinstance(value, list):
        for item in value:
            check_nesting(item, left - 1)


def read_head(buf: bytes | memoryview, at: int, end: int) -> Head | None:
    """The record at `at`, or None when no whole good record starts there."""
    if end - at < HEADER_BYTES:
        return None
    crc, size, seq, kind, flags, schema, _ = HEADER.unpack_from(buf, at)
    if size < HEADER_BYTES or size & PAD_MASK or size > MAX_RECORD_BYTES or at + size > end:
        return None
    if crc32(memoryview(buf)[at + 4 : at + size]) != crc:
        return None
    return Head(at, size, seq, kind, flags, schema)


def walk(buf: bytes | memoryview, at: int = 0, end: int | None = None) -> Iterator[Head]:
    """The good records from `at` on; stops before the first byte that is not one."""
    end = len(buf) if end is None else end
    while True:
        head = read_head(buf, at, end)
        if head is None:
            return
        yield head
        at += head.size


class Scan(NamedTuple):
    heads: list[Head]
    damage: list[tuple[int, int]]  #: byte ranges that hold no good record, in order


def scan(buf: bytes | memoryview, kinds: range) -> Scan:
    """Every good record of a file, and what lies between them.

    After damage, goes on at the next 8-aligned offset where a record with a right checksum and a
    kind in `kinds` starts (a journal entry holds records of a rank, which must not be taken for
    entries). A stretch that reaches the end of the file is a torn tail.
    """
    heads: list[Head] = []
    damage: list[tuple[int, int]] = []
    at, end = 0, len(buf)
    while at < end:
        for head in walk(buf, at, end):
            heads.append(head)
            at = head.at + head.size
        if at >= end:
            break
        start = at
        at = _resync(buf, at + 8, end, kinds)
        damage.append((start, at))
    return Scan(heads, damage)


def _resync(buf: bytes | memoryview, at: int, end: int, kinds: range) -> int:
    while at + HEADER_BYTES <= end:
        head = read_head(buf, at, end)
        if head is not None and head.kind in kinds:
            return at
        at += 8
    return end


# --- schemas -----------------------------------------------------------------


class Schema(NamedTuple):
    """An ordered set of (key, type) of one stream."""

    id: int
    keys: tuple[str, ...]
    types: tuple[str, ...]

    @property
    def row_bytes(self) -> int:
        return HEADER_BYTES + ROW_HEAD_BYTES + 8 * len(self.keys)

    def pack(self, seq: int) -> bytes:
        columns = [[k, t] for k, t in zip(self.keys, self.types, strict=True)]
        return pack_map(Kind.SCHEMA, seq, {"c": columns}, self.id)


def schema_of(head: Head, buf: bytes | memoryview) -> Schema:
    """The schema in a SCHEMA record. Raises BadRecord."""
    columns = unpack_map(bytes(memoryview(buf)[head.body])).get("c")
    if not isinstance(columns, list) or not columns:
        raise BadRecord("a schema without columns")
    keys, types = [], []
    for column in columns:
        if not (isinstance(column, list) and len(column) == 2):
            raise BadRecord("a schema column that is not [key, type]")
        key, kind = column
        if not isinstance(key, str) or not isinstance(kind, str) or kind not in COLUMN_CODES:
            raise BadRecord("a schema column of an unknown type")
        keys.append(key)
        types.append(kind)
    if len(set(keys)) != len(keys):
        raise BadRecord("a schema that names a key twice")
    return Schema(head.schema, tuple(keys), tuple(types))


def column_type_of(value: object) -> str:
    """The column type of a value in a KV map. Raises TypeError for what is no scalar."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "i8"
    if isinstance(value, float):
        return "f8"
    raise TypeError(type(value).__name__)
