"""What a message may hold: everything read from the wire or the disk goes through `unpack_map`."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack

from rank_client.wire import frames, records
from rank_client.wire.frames import BadFrame, Type
from rank_client.wire.records import BadRecord, unpack_map

from .row import Remove, Row, nothing, refused, without

MIB = 1 << 20


def bad(body: bytes) -> bool:
    """Refused as what it is, as a record and as a message."""
    frame = frames.control(Type.PING, 1, b"s" * 16, {})[: frames.COMMON_BYTES]
    crc = frames.crc32(frame[:4] + bytes(4) + frame[8:], frames.crc32(body))
    frame = frame[:4] + crc.to_bytes(4, "little") + frame[8:] + body
    return refused(lambda: unpack_map(body), BadRecord) and refused(
        lambda: frames.read_control(frame), BadFrame
    )


def depth(_: Path) -> None:
    """The decoder allows 1,024 levels, of which repr and json raise RecursionError."""
    for levels in (records.MAX_DEPTH, 100, 900):
        assert bad(b"\x81\xa1a" * levels + b"\x80")
        assert bad(b"\x81\xa1a" + b"\x91" * levels + b"\xc0")


def text_keys(_: Path) -> None:
    for key in (b"\x01", b"\xc0", b"\xc4\x01a", b"\xcb" + bytes(8), b"\x90", b"\x80"):
        assert bad(b"\x81" + key + b"\x01"), key


def extensions(_: Path) -> None:
    for extension in (b"\xd4\x05x", b"\xd6\xff" + bytes(4), b"\xc7\x00\x05", b"\xc7\x02\x05ab"):
        assert bad(b"\x81\xa1a" + extension), extension


def utf_8(_: Path) -> None:
    assert bad(b"\x81\xa1a\xa2\xff\xfe")
    assert bad(b"\x81\xa2\xff\xfe\x01")


def containers(_: Path) -> None:
    """A frame of empty maps would be seventy times as large in memory."""
    many = b"\xdc\xff\xff" + b"\x80" * 0xFFFF
    body = b"\x81\xa1a\x9f" + many * 15
    assert MIB - (1 << 16) < len(body) < MIB
    assert refused(lambda: unpack_map(body), BadRecord)
    tracemalloc.start()
    try:
        refused(lambda: unpack_map(body), BadRecord)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 * MIB


def announced_lengths(_: Path) -> None:
    """A length that a message does not have asks for no memory."""
    for head in (b"\xdd", b"\xdf", b"\xdb", b"\xc6"):
        assert bad(b"\x81\xa1a" + head + b"\x7f\xff\xff\xff")
    assert bad(b"\x81\xa1a\xdd" + ((1 << 16) + 1).to_bytes(4, "big") + b"\xc0" * ((1 << 16) + 1))


def nothing_behind(_: Path) -> None:
    """One map and no more: what is behind it would be read by nobody."""
    assert bad(b"\x80\x80")
    assert bad(b"\x90")
    assert bad(b"")


def lenient(**changes: Any) -> Remove:
    """msgpack with other settings than ours; and no look at what it gave."""
    real: Callable[..., Any] = msgpack.unpackb

    def remove(patch: Any) -> None:
        decode = lambda body, **given: real(body, **{**given, **changes})  # noqa: E731
        patch.setattr(records.msgpack, "unpackb", decode)
        patch.setattr(records, "check_nesting", nothing)

    return remove


def first_map(body: bytes, **_: Any) -> Any:
    """A decoder that is fed piece by piece does not mind what is behind."""
    unpacker = msgpack.Unpacker()
    unpacker.feed(body)
    return unpacker.unpack()


BIG = {"max_array_len": 1 << 20, "max_map_len": 1 << 20}
THREAT = "msgpack"

ROWS = [
    Row(THREAT, "at most eight levels", depth, without(records, "check_nesting", nothing)),
    Row(THREAT, "keys are text", text_keys, lenient(strict_map_key=False)),
    Row(
        THREAT,
        "no extension types",
        extensions,
        lenient(max_ext_len=1 << 20, ext_hook=msgpack.ExtType),
    ),
    Row(THREAT, "text is UTF-8", utf_8, lenient(unicode_errors="replace")),
    Row(THREAT, "few maps and lists", containers, without(records, "MAX_CONTAINERS", 1 << 20)),
    Row(THREAT, "lengths are bounded", announced_lengths, lenient(**BIG)),
    Row(
        THREAT,
        "whole frames, one map",
        nothing_behind,
        without(records.msgpack, "unpackb", first_map),
    ),
]
