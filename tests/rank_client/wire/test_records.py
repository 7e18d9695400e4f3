"""Records: what is packed is what is read, and damage never reads as data."""

from __future__ import annotations

import math
import struct
from itertools import pairwise

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rank_client.wire.records import (
    HEADER_BYTES,
    MAX_DEPTH,
    MAX_RECORD_BYTES,
    ROW_HEAD,
    BadRecord,
    Kind,
    Schema,
    pack,
    pack_map,
    read_head,
    scan,
    schema_of,
    unpack_map,
    walk,
)
from rank_client.wire.segments import JOURNAL_KINDS, SPOOL_KINDS

BODIES = st.lists(st.tuples(st.integers(1, 255), st.binary(max_size=80)), max_size=8)
SPOOL_BODIES = st.lists(st.tuples(st.integers(1, 31), st.binary(max_size=60)), max_size=6)


def chain(items: list[tuple[int, bytes]], first: int = 1) -> bytes:
    return b"".join(pack(kind, first + i, body, i) for i, (kind, body) in enumerate(items))


@given(BODIES)
def test_walk_gives_back_what_was_packed(items: list[tuple[int, bytes]]) -> None:
    """Kind, number, schema and body of every record survive packing, in order."""
    buf = chain(items)
    found = [(h.seq, h.kind, h.schema, buf[h.body]) for h in walk(buf)]
    assert found == [(1 + i, kind, i, body) for i, (kind, body) in enumerate(items)]


@given(st.binary(max_size=100))
def test_every_record_is_padded_to_eight_bytes(body: bytes) -> None:
    """A record's size is a multiple of eight, and at most seven bytes of it are padding."""
    size = len(pack(Kind.TEXT, 1, body))
    assert size % 8 == 0
    assert 0 <= size - HEADER_BYTES - len(body) < 8


@given(st.binary(max_size=60), st.data())
def test_any_flipped_bit_is_found(body: bytes, data: st.DataObject) -> None:
    """A record with one bit changed anywhere, padding included, is no record."""
    buf = bytearray(pack(Kind.TEXT, 7, body, 3))
    bit = data.draw(st.integers(0, len(buf) * 8 - 1))
    buf[bit // 8] ^= 1 << bit % 8
    assert read_head(buf, 0, len(buf)) is None


@given(BODIES.filter(bool), st.data())
def test_walk_stops_before_a_torn_record(
    items: list[tuple[int, bytes]], data: st.DataObject
) -> None:
    """Of a buffer that is cut anywhere, the whole records before the cut are read, no other."""
    buf = chain(items)
    cut = data.draw(st.integers(0, len(buf)))
    ends = [h.at + h.size for h in walk(buf)]
    assert [h.at + h.size for h in walk(buf[:cut])] == [e for e in ends if e <= cut]


def test_a_length_beyond_the_limit_is_no_record() -> None:
    """A record longer than the limit is not read even when its checksum is right."""
    whole = pack(Kind.TEXT, 1, bytes(MAX_RECORD_BYTES - HEADER_BYTES))
    assert read_head(whole, 0, len(whole)) is not None
    over = pack(Kind.TEXT, 1, bytes(MAX_RECORD_BYTES))
    assert read_head(over, 0, len(over)) is None


@given(SPOOL_BODIES, st.data())
def test_scan_resyncs_after_damage(items: list[tuple[int, bytes]], data: st.DataObject) -> None:
    """After a damaged record, every whole one that follows is found, and the damage is told."""
    items += [(Kind.TEXT, b"the last")]
    buf = bytearray(chain(items))
    heads = list(walk(buf))
    hit = data.draw(st.integers(0, len(heads) - 1))
    buf[data.draw(st.integers(heads[hit].at, heads[hit].at + heads[hit].size - 1))] ^= 0x55
    found = scan(bytes(buf), SPOOL_KINDS)
    assert [h.seq for h in found.heads] == [h.seq for h in heads if h is not heads[hit]]
    assert found.damage == [(heads[hit].at, heads[hit].at + heads[hit].size)]


@given(SPOOL_BODIES.filter(bool), st.data())
def test_scan_takes_no_record_of_a_rank_for_an_entry(
    items: list[tuple[int, bytes]], data: st.DataObject
) -> None:
    """Where a journal entry is damaged, the rank's records inside it are not read as entries."""
    frame = bytes(48) + chain(items)  # as in a DATA frame: the records are 8-aligned in the entry
    entries = [pack(Kind.BATCH, n, bytes(8) + frame) for n in (1, 2, 3)]
    buf = bytearray(b"".join(entries))
    at = len(entries[0]) + data.draw(st.integers(0, len(entries[1]) - 1))
    buf[at] ^= 0x10
    found = scan(bytes(buf), JOURNAL_KINDS)
    assert [h.seq for h in found.heads] == [1, 3]
    assert found.damage == [(len(entries[0]), 2 * len(entries[0]))]


@given(st.binary(max_size=400))
def test_scan_accounts_for_every_byte(junk: bytes) -> None:
    """Whatever the bytes are, records and damage cover them without gap or overlap."""
    buf = pack(Kind.TEXT, 1, b"good") + junk
    found = scan(buf, SPOOL_KINDS)
    spans = sorted([(h.at, h.at + h.size) for h in found.heads] + found.damage)
    assert spans[0][0] == 0
    assert spans[-1][1] == len(buf)
    assert all(a[1] == b[0] for a, b in pairwise(spans))


# --- maps ----------------------------------------------------------------------------------------

SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=9)
)


@given(st.dictionaries(st.text(max_size=8), SCALARS | st.lists(SCALARS, max_size=3), max_size=6))
@example({"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "-0": -0.0})
@example({"min": -(2**63), "max": 2**63 - 1, "u": 2**64 - 1})
def test_maps_survive_exactly(value: dict[str, object]) -> None:
    """Every scalar of a map comes back bit for bit, NaN, infinities and 64-bit integers too."""
    record = pack_map(Kind.KV, 1, value)
    [head] = walk(record)
    assert repr(unpack_map(record[head.body])) == repr(value)


def test_lone_surrogates_are_replaced_at_the_writing_end() -> None:
    """Text that has no UTF-8 form is still written, with a question mark for what has none."""
    record = pack_map(Kind.TEXT, 1, {"t": "a\ud800b"})
    [head] = walk(record)
    assert unpack_map(record[head.body]) == {"t": "a?b"}


def nested(levels: int, inside: object) -> dict[str, object]:
    value: object = inside
    for i in range(levels):
        value = {"k": value} if i % 2 == 0 or i == levels - 1 else [value]
    assert isinstance(value, dict)
    return value


def test_a_map_may_be_nested_up_to_the_limit() -> None:
    """Containers up to the depth limit are read, one more is refused."""
    assert unpack_map(msgpack.packb(nested(MAX_DEPTH - 1, 1)))
    with pytest.raises(BadRecord, match="nested"):
        unpack_map(msgpack.packb(nested(MAX_DEPTH, 1)))


def test_a_thousand_levels_are_refused_without_a_recursion_error() -> None:
    """Nesting as deep as the decoder allows is refused by our own limit."""
    deep = b"\x81\xa1k" * 900 + b"\xc0"
    with pytest.raises(BadRecord):
        unpack_map(deep)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_map_or_a_bad_record(junk: bytes) -> None:
    """Reading never raises anything but BadRecord, and never gives anything but text keys."""
    try:
        value = unpack_map(junk)
    except BadRecord:
        return
    assert all(isinstance(k, str) for k in value)


@pytest.mark.parametrize(
    "packed",
    [
        msgpack.packb([1]),
        msgpack.packb({1: 2}),
        msgpack.packb({b"bytes": 1}),
        msgpack.packb({"inner": {b"bytes": 1}}),
        msgpack.packb({"x": msgpack.ExtType(4, b"abc")}),
        b"\x81\xa1k\xa2\xff\xfe",  # text that is not UTF-8
        b"\xdf\xff\xff\xff\xff",  # a map that says it has 2**32 - 1 pairs
        msgpack.packb({"a": 1}) + b"\0",
        b"",
    ],
)
def test_what_is_no_plain_map_is_refused(packed: bytes) -> None:
    """Lists, keys that are no text, extension types, bad text, lies and leftovers are refused."""
    with pytest.raises(BadRecord):
        unpack_map(packed)


# --- rows and schemas ----------------------------------------------------------------------------


@given(st.floats(), st.integers(-(2**63), 2**63 - 1))
@example(math.nan, 2**63 - 1)
@example(-math.inf, -(2**63))
def test_row_values_are_exact(real: float, whole: int) -> None:
    """A row's columns hold a float and a 64-bit integer bit for bit."""
    body = ROW_HEAD.pack(1, 2, 3) + struct.pack("<dq", real, whole)
    record = pack(Kind.ROW, 1, body)
    [head] = walk(record)
    found = struct.unpack("<dq", record[head.body][ROW_HEAD.size :])
    assert struct.pack("<dq", *found) == struct.pack("<dq", real, whole)


COLUMNS = st.dictionaries(
    st.text(min_size=1, max_size=8), st.sampled_from(["f8", "i8", "bool"]), min_size=1, max_size=6
)


@given(COLUMNS, st.integers(0, 2**16 - 1))
def test_a_schema_keeps_order_and_types(columns: dict[str, str], id_: int) -> None:
    """A schema record gives back its id, its keys in their order, and their types."""
    schema = Schema(id_, tuple(columns), tuple(columns.values()))
    record = schema.pack(9)
    [head] = walk(record)
    assert head.seq == 9
    assert schema_of(head, record) == schema


@pytest.mark.parametrize(
    "columns",
    [[], "c", [["a"]], [["a", "f4"]], [[1, "f8"]], [["a", ["f8"]]], [["a", "f8"], ["a", "i8"]]],
)
def test_a_schema_that_makes_no_sense_is_refused(columns: object) -> None:
    """Missing, doubled, unnamed or unknown columns are a BadRecord, not another error."""
    record = pack_map(Kind.SCHEMA, 1, {"c": columns})
    [head] = walk(record)
    with pytest.raises(BadRecord):
        schema_of(head, record)
