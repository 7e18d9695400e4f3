"""What a rank and the process that copies its console tell each other.

Over a pair of sockets, each message a head and a text. To the rank: lines under rising numbers, how
many lines there was no room for, that all is told which was asked for. To the copier: up to which
line the spool has them, a wish to be told all, goodbye (which is such a wish too).
"""

from __future__ import annotations

import struct
from typing import NamedTuple

HEAD = struct.Struct("<BqQI")  # kind, wall_ns, number, length of the text

LINE_OUT, LINE_ERR, REFUSED, FLUSHED = range(1, 5)  # to the rank
STORED, FLUSH, GOODBYE = range(16, 19)  # to the copier

LEVELS = {LINE_OUT: "stdout", LINE_ERR: "stderr"}


class Message(NamedTuple):
    """`number` is a line's, a count of lines, or of the flush that was asked for."""

    kind: int
    number: int
    wall_ns: int = 0
    text: str = ""

    def pack(self) -> bytes:
        text = self.text.encode("utf-8", "replace")
        return HEAD.pack(self.kind, self.wall_ns, self.number, len(text)) + text


class Messages:
    """Cuts what a socket gives into messages."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[Message]:
        buf, at, out = self._rest + data, 0, []
        while at + HEAD.size <= len(buf):
            kind, wall_ns, number, length = HEAD.unpack_from(buf, at)
            start = at + HEAD.size
            if start + length > len(buf):
                break
            at = start + length
            out.append(Message(kind, number, wall_ns, buf[start:at].decode()))
        self._rest = buf[at:]
        return out
