"""Frames: one ZeroMQ message each. DATA is fixed and carries records verbatim; the rest is msgpack.

All: `magic u16 · major u8 · type u8 · crc u32 · session u64 · stream 16 B`; DATA goes on with
`first u64 · n u32 · body_len u32` and the records. `crc` covers the whole frame with crc = 0,
body first. docs/protocol.md describes every message.
"""

from __future__ import annotations

import struct
from enum import Enum, IntEnum
from typing import Any, NamedTuple
from zlib import crc32

import msgpack

from .records import HEADER_BYTES, BadRecord, unpack_map

MAGIC = 0x4752  # "RG"
MAJOR = 1
COMMON = struct.Struct("<HBBIQ16s")
DATA_HEAD = struct.Struct("<HBBIQ16sQII")
COMMON_BYTES = COMMON.size
DATA_HEAD_BYTES = DATA_HEAD.size

MAX_DATA_BYTES = 64 << 10  #: of records in a DATA frame that holds more than one
MAX_FRAME_BYTES = 1 << 20
MAX_HELLO_BYTES = 16 << 10  #: of a HELLO's map, which a gateway keeps for as long as the run


class Type(IntEnum):
    HELLO = 1
    WELCOME = 2
    REJECT = 3
    DATA = 4
    ACK = 5
    PING = 6
    PONG = 7
    BYE = 8
    BYE_ACK = 9
    DRAIN = 10
    UNKNOWN = 11


#: The fields of each message's map, as docs/protocol.md lists them. HELLO has a stream's attributes
#: besides, and whoever finds a field that it does not know skips it.
FIELDS: dict[Type, tuple[str, ...]] = {
    Type.HELLO: ("v", "nonce", "run", "kind", "first", "last", "acked", "journal"),
    Type.WELCOME: ("v", "nonce", "journal", "durable", "credit", "now", "full"),
    Type.REJECT: ("code", "text", "fatal", "retry_seconds", "v", "nonce"),
    Type.DATA: (),
    Type.ACK: ("durable", "credit", "back", "stop", "full"),
    Type.PING: (
        "t", "wall", "offset", "last", "step", "logged", "refused", "bad", "spool", "volatile",
    ),
    Type.PONG: ("t", "now", "durable", "credit", "stop", "full"),
    Type.BYE: ("final", "status", "of", "media"),
    Type.BYE_ACK: ("durable",),
    Type.DRAIN: (),
    Type.UNKNOWN: (),
}  # fmt: skip


class Code(str, Enum):
    """Why a gateway rejects: the whole set. Fatal ones are not asked again."""

    VERSION = "version"  # fatal: no version that both sides speak; `v` tells the gateway's
    HELLO = "hello"  # fatal: a field of HELLO that cannot be
    SIZE = "size"  # fatal: a HELLO above MAX_HELLO_BYTES
    KEY = "key"  # fatal: the run is not the one that the key is for
    STREAM = "stream"  # fatal: the stream is known, and of another run, kind or file
    STREAMS = "streams"  # fatal: the run has as many streams as a run can have
    JOURNAL = "journal"  # fatal: the run's journal is damaged
    FULL = "full"  # the disk is full
    STORAGE = "storage"  # the run's directory cannot be written
    CROWDED = "crowded"  # the gateway has no descriptor left for another run or file
    STRIKES = "strikes"  # too many bad frames


class BadFrame(ValueError):
    """A message that is not a frame of this protocol; the text is a closed set of reasons."""


class Control(NamedTuple):
    type: int
    session: int
    stream: bytes
    body: dict[str, Any]


class Data(NamedTuple):
    session: int
    stream: bytes
    first: int
    n: int
    body_len: int


def data(session: int, stream: bytes, first: int, n: int, records: bytes) -> bytes:
    """A DATA frame: `n` numbered records (and the schemas before them) from `first` on."""
    size = len(records)
    crc = crc32(
        DATA_HEAD.pack(MAGIC, MAJOR, Type.DATA, 0, session, stream, first, n, size), crc32(records)
    )
    head = DATA_HEAD.pack(MAGIC, MAJOR, Type.DATA, crc, session, stream, first, n, size)
    return head + records


def control(type_: int, session: int, stream: bytes, body: dict[str, Any]) -> bytes:
    packed: bytes = msgpack.packb(body, use_bin_type=True, unicode_errors="replace")
    crc = crc32(COMMON.pack(MAGIC, MAJOR, type_, 0, session, stream), crc32(packed))
    return COMMON.pack(MAGIC, MAJOR, type_, crc, session, stream) + packed


def type_of(frame: bytes) -> int:
    """The message type of a frame of our major version. Raises BadFrame."""
    if len(frame) < COMMON_BYTES:
        raise BadFrame("too short")
    if len(frame) > MAX_FRAME_BYTES:
        raise BadFrame("too long")
    if frame[0] | frame[1] << 8 != MAGIC:
        raise BadFrame("no magic")
    if frame[2] != MAJOR:
        raise BadFrame("version")
    return frame[3]


def read_data(frame: bytes) -> Data:
    """The header of a DATA frame whose checksum and length are right. Raises BadFrame."""
    if len(frame) < DATA_HEAD_BYTES:
        raise BadFrame("too short")
    magic, major, type_, crc, session, stream, first, n, size = DATA_HEAD.unpack_from(frame)
    if size != len(frame) - DATA_HEAD_BYTES or first == 0:
        raise BadFrame("length")
    if not 0 < n <= max(1, size // HEADER_BYTES):  # more records than there is room for
        raise BadFrame("length")
    found = crc32(
        DATA_HEAD.pack(magic, major, type_, 0, session, stream, first, n, size),
        crc32(memoryview(frame)[DATA_HEAD_BYTES:]),
    )
    if found != crc:
        raise BadFrame("checksum")
    return Data(session, stream, first, n, size)


def read_control(frame: bytes) -> Control:
    """Any message but DATA. Raises BadFrame."""
    magic, major, type_, crc, session, stream = COMMON.unpack_from(frame)
    body = memoryview(frame)[COMMON_BYTES:]
    if crc32(COMMON.pack(magic, major, type_, 0, session, stream), crc32(body)) != crc:
        raise BadFrame("checksum")
    try:
        return Control(type_, session, stream, unpack_map(body))
    except BadRecord as error:
        raise BadFrame("body") from error
