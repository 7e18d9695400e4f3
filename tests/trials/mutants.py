"""Hostile frames: made of good ones, so that they get past the first check.

A mutant is *honest* when its checksum was made anew: what it says is absurd, but it came so. One
that is not must leave no trace.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple
from zlib import crc32

import msgpack

from rank_client.wire import frames
from rank_client.wire.frames import COMMON, COMMON_BYTES, DATA_HEAD_BYTES, Type
from rank_client.wire.records import Kind, pack, pack_map, unpack_map, walk

CORPUS = Path(__file__).with_name("corpus") / "values.hex"
DEEP = b"\x91" * 1000 + b"\x90"
WIDE_LIST = b"\xdc\xff\xff" + b"\x80" * 65535
WIDE_MAP = b"\xde\x40\x00" + b"".join(b"\xa5%05d" % i + b"\x01" for i in range(1 << 14))
EDGES = (
    0,
    1,
    2,
    7,
    255,
    1 << 16,
    (1 << 31) - 1,
    (1 << 32) - 1,
    1 << 62,
    (1 << 63) - 1,
    (1 << 64) - 1,
)
FIELDS = (
    *sorted({name for names in frames.FIELDS.values() for name in names}),
    "rank", "world_size", "launch", "restart", "agent", "boot", "node", "earlier", "stream", "dir",
    "sha256", "size", "of", "media", "tags", "name", "gap", "l", "w", "s", "m", "c", "key", "what",
    "meta", "n", "reason", "owed",
)  # fmt: skip


LARGE = {"deep": DEEP, "wide-list": WIDE_LIST, "wide-map": WIDE_MAP}
LARGE_SHARE = 0.005  #: of the values: they cost a hundred times as much as the others


def corpus() -> dict[str, bytes]:
    """name → packed value, of tests/trials/corpus."""
    lines = [line.split() for line in CORPUS.read_text().splitlines() if line[0] != "#"]
    return {name: bytes.fromhex(packed) for name, packed in lines}


class Mutant(NamedTuple):
    frame: bytes
    honest: bool


def sealed(frame: bytes) -> bytes:
    """The frame with the checksum that its other bytes have."""
    at = DATA_HEAD_BYTES if len(frame) > 3 and frame[3] == Type.DATA else COMMON_BYTES
    if len(frame) < at:
        return frame
    crc = crc32(frame[:4] + bytes(4) + frame[8:at], crc32(frame[at:]))
    return frame[:4] + crc.to_bytes(4, "little") + frame[8:]


class Mutator:
    """Makes mutants of recorded frames. `follow(stream)` gives the number a stream's next record
    must have, for those that are meant to be stored."""

    def __init__(
        self, random: Random, recorded: list[bytes], follow: Callable[[bytes], int]
    ) -> None:
        self.random = random
        self.recorded = recorded
        self._follow = follow
        self._values = list(corpus().values())
        self._data = [f for f in recorded if f[3] == Type.DATA]
        self._control = [f for f in recorded if f[3] != Type.DATA]
        self._maps = [found for frame in self._data for found in _maps_of(frame)]
        self._broken = (self._flip, self._flip, self._cut, self._longer, self._zeroes, self._swap,
                        self._noise, self._wrong_crc)  # fmt: skip
        self._honest = (self._numbers, self._absurd_record, self._absurd_record, self._bad_records,
                        self._field, self._field, self._body, self._head, self._again)  # fmt: skip

    def mutant(self, honest: bool) -> Mutant:
        frame = self.random.choice(self.recorded)
        if not honest:
            if frame[3] == Type.DATA and self.random.random() < 0.7:
                frame = self._next(frame)
            changed = self.random.choice(self._broken)(frame)
            return Mutant(changed, changed == frame or sealed(changed) == changed)
        return Mutant(self.random.choice(self._honest)(), True)

    # --- checksum wrong ------------------------------------------------------

    def _flip(self, frame: bytes) -> bytes:
        found = bytearray(frame)
        for _ in range(self.random.choice((1, 1, 1, 2, 8))):
            bit = int(self.random.random() * len(found) * 8)
            found[bit >> 3] ^= 1 << (bit & 7)
        return bytes(found)

    def _cut(self, frame: bytes) -> bytes:
        return frame[: int(self.random.random() * len(frame))]

    def _longer(self, frame: bytes) -> bytes:
        return frame + self.random.randbytes(int(self.random.random() * 64) + 1)

    def _zeroes(self, frame: bytes) -> bytes:
        at, n = (int(self.random.random() * len(frame)) for _ in range(2))
        return frame[:at] + bytes(min(n, len(frame) - at)) + frame[at + n :]

    def _swap(self, frame: bytes) -> bytes:
        a, b = sorted(int(self.random.random() * len(frame)) for _ in range(2))
        return frame[:a] + frame[b:] + frame[a:b]

    def _noise(self, frame: bytes) -> bytes:
        keep = self.random.choice((0, 4, 8, 32))
        return frame[:keep] + self.random.randbytes(int(self.random.random() * 200))

    def _wrong_crc(self, frame: bytes) -> bytes:
        return frame[:4] + self.random.randbytes(4) + frame[8:]

    # --- checksum right ------------------------------------------------------

    def _numbers(self) -> bytes:
        """A lie in the head of DATA: first, n, length, session, stream."""
        random, frame = self.random, bytearray(random_choice(self.random, self._data))
        at, size = random.choice(((32, 8), (40, 4), (44, 4), (8, 8), (16, 16)))
        if size == 16:
            value = random.randbytes(16)
        else:
            value = (random.choice(EDGES) & (1 << 8 * size) - 1).to_bytes(size, "little")
        frame[at : at + size] = value
        return sealed(bytes(frame))

    def _records(self, stream: bytes, records: bytes, n: int) -> bytes:
        session = int.from_bytes(self._data[0][8:16], "little")
        return frames.data(session, stream, self._follow(stream), n, records)

    def _next(self, base: bytes) -> bytes:
        """A good frame that follows what its stream has: only its checksum can keep it out."""
        seq = self._follow(base[16:32])
        return self._records(base[16:32], pack_map(Kind.TEXT, seq, {"t": "x" * 40}), 1)

    def _again(self) -> bytes:
        """What was said before."""
        return self.random.choice(self.recorded)

    def _absurd_record(self) -> bytes:
        """The next record of a stream, whole but for what it says."""
        random = self.random
        stream = random_choice(random, self._data)[16:32]
        kind = random.choice((*range(12), 32, 33, 39, 40, 255))
        body = random.choice((self._map, self._value, self._some_bytes))()
        if random.random() < 0.5:
            kind, body = self._changed_map()
        seq = self._follow(stream)
        schema = random.choice((0, 0, 1, 2, 65535))
        record = pack(kind, seq, body, schema)
        n = 1 if random.random() < 0.8 else random.choice((2, 1 << 20))
        return self._records(stream, record, min(n, max(1, len(record) // 24)))

    def _bad_records(self) -> bytes:
        """Records that were good, with a checksum of their own that is wrong, in a good frame."""
        base = random_choice(self.random, self._data)
        body = bytearray(base[DATA_HEAD_BYTES:])
        n = int.from_bytes(base[40:44], "little")
        for head in walk(bytes(body)):
            if self.random.random() < 0.3 and head.size > 24:
                body[head.at + 24 + int(self.random.random() * (head.size - 24))] ^= 0x41
        return self._records(base[16:32], bytes(body), n)

    def _field(self) -> bytes:
        """A control message with one field, or an additional one, that says something absurd."""
        random, base = self.random, random_choice(self.random, self._control)
        body = msgpack.unpackb(base[COMMON_BYTES:], strict_map_key=False)
        name = (
            random.choice(list(body)) if body and random.random() < 0.7 else random.choice(FIELDS)
        )
        body.pop(name, None)
        pairs = b"".join(msgpack.packb(k) + msgpack.packb(v) for k, v in body.items())
        packed = b"\xde" + (len(body) + 1).to_bytes(2, "big") + pairs
        return self._of(base, packed + msgpack.packb(name) + self._value())

    def _body(self) -> bytes:
        """A control message whose map is none, or quite another."""
        base = random_choice(self.random, self._control)
        return self._of(base, self.random.choice((self._value, self._map, self._some_bytes))())

    def _head(self) -> bytes:
        """A type nobody knows, a session or stream of others."""
        random, base = self.random, random_choice(self.random, self._control)
        type_ = random.choice((base[3], random.randrange(256)))
        session = random.choice((int.from_bytes(base[8:16], "little"), 0, (1 << 64) - 1))
        stream = random.choice((base[16:32], bytes(16), random.randbytes(16)))
        head = COMMON.pack(frames.MAGIC, frames.MAJOR, type_, 0, session, stream)
        return sealed(head + base[COMMON_BYTES:])

    @staticmethod
    def _of(base: bytes, body: bytes) -> bytes:
        return sealed(base[:COMMON_BYTES] + body)

    # --- contents ------------------------------------------------------------

    def _changed_map(self) -> tuple[int, bytes]:
        """A good record's map, one field of which says something absurd."""
        kind, found = self.random.choice(self._maps)
        body = dict(found)
        name = self.random.choice(list(body))
        del body[name]
        pairs = b"".join(msgpack.packb(k) + msgpack.packb(v) for k, v in body.items())
        packed = bytes([0x80 | len(body) + 1]) + pairs + msgpack.packb(name) + self._value()
        return kind, packed

    def _value(self) -> bytes:
        if self.random.random() < LARGE_SHARE:
            return self.random.choice(list(LARGE.values()))
        return self.random.choice(self._values)

    def _map(self) -> bytes:
        random = self.random
        names = random.sample(FIELDS, random.randrange(1, 8))
        pairs = b"".join(msgpack.packb(name) + self._value() for name in names)
        return bytes([0x80 | len(names)]) + pairs

    def _some_bytes(self) -> bytes:
        return self.random.randbytes(int(self.random.random() * 120))


def _maps_of(frame: bytes) -> list[tuple[int, dict[str, Any]]]:
    """The records of a frame whose body is a map."""
    records = frame[DATA_HEAD_BYTES:]
    wanted = range(Kind.KV, Kind.END + 1)
    return [(h.kind, unpack_map(records[h.body])) for h in walk(records) if h.kind in wanted]


def random_choice(random: Random, frames_: list[bytes]) -> bytes:
    """Faster than Random.choice, and called for every mutant."""
    return frames_[int(random.random() * len(frames_))]
