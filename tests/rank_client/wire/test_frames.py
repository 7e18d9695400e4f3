"""Frames: what is read is what was sent, and nothing else is taken for a frame."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rank_client.wire import frames
from rank_client.wire.frames import BadFrame, Type
from rank_client.wire.records import Kind, pack

STREAM = bytes(range(16))


def rows(n: int) -> bytes:
    return b"".join(pack(Kind.ROW, i + 1, bytes(24)) for i in range(n))


@given(st.integers(0, 2**64 - 1), st.integers(1, 2**64 - 1), st.integers(1, 20))
def test_a_data_frame_says_what_it_carries(session: int, first: int, n: int) -> None:
    """Session, stream, first number, count and length come back; the records stand verbatim."""
    records = rows(n)
    frame = frames.data(session, STREAM, first, n, records)
    assert frames.type_of(frame) == Type.DATA
    assert frames.read_data(frame) == (session, STREAM, first, n, len(records))
    assert frame[frames.DATA_HEAD_BYTES :] == records


def test_the_data_header_keeps_records_aligned() -> None:
    """Records in a frame, and in a frame in a journal entry, start at multiples of eight."""
    assert frames.DATA_HEAD_BYTES % 8 == 0


@given(
    st.sampled_from([t for t in Type if t != Type.DATA]),
    st.dictionaries(st.text(max_size=5), st.integers(0, 99) | st.text(max_size=5), max_size=4),
)
def test_a_control_frame_keeps_its_map(type_: Type, body: dict[str, Any]) -> None:
    """Type, session, stream and map of a control message come back."""
    frame = frames.control(type_, 77, STREAM, body)
    assert frames.type_of(frame) == type_
    assert frames.read_control(frame) == (type_, 77, STREAM, body)


@given(st.data())
def test_any_flipped_bit_is_refused(data: st.DataObject) -> None:
    """A frame with one bit changed anywhere is a BadFrame."""
    frame = data.draw(
        st.sampled_from(
            [frames.data(5, STREAM, 9, 3, rows(3)), frames.control(Type.ACK, 5, STREAM, {"a": 1})]
        )
    )
    reader = frames.read_data if frame[3] == Type.DATA else frames.read_control
    bit = data.draw(st.integers(0, len(frame) * 8 - 1))
    broken = bytearray(frame)
    broken[bit // 8] ^= 1 << bit % 8
    with pytest.raises(BadFrame):
        frames.type_of(bytes(broken))
        reader(bytes(broken))


@given(st.data())
def test_any_cut_is_refused(data: st.DataObject) -> None:
    """A frame that lost its end is a BadFrame."""
    frame = frames.data(5, STREAM, 9, 3, rows(3))
    cut = frame[: data.draw(st.integers(0, len(frame) - 1))]
    with pytest.raises(BadFrame):
        frames.type_of(cut)
        frames.read_data(cut)


@given(st.binary(max_size=200))
def test_junk_raises_only_bad_frame(junk: bytes) -> None:
    """Random bytes, with or without a right start, raise BadFrame and nothing else."""
    start = frames.COMMON.pack(frames.MAGIC, frames.MAJOR, Type.ACK, 0, 0, STREAM)
    for frame in (junk, start[: len(junk)] + junk, start + junk):
        with pytest.raises(BadFrame):
            frames.type_of(frame)
            frames.read_control(frame)
        with pytest.raises(BadFrame):
            frames.read_data(frame)


def test_another_major_version_is_told_apart() -> None:
    """A frame of another major version is refused with that reason."""
    frame = bytearray(frames.control(Type.HELLO, 0, STREAM, {}))
    frame[2] = 9
    with pytest.raises(BadFrame, match="version"):
        frames.type_of(bytes(frame))


def test_a_frame_beyond_the_limit_is_refused() -> None:
    """A frame longer than one MiB is refused before anything else is looked at."""
    with pytest.raises(BadFrame, match="long"):
        frames.type_of(frames.data(1, STREAM, 1, 1, bytes(frames.MAX_FRAME_BYTES)))


@pytest.mark.parametrize(("first", "n"), [(0, 1), (1, 0), (1, 3), (1, 2**32 - 1)])
def test_numbers_that_cannot_be_are_refused(first: int, n: int) -> None:
    """Numbers start at one, and a frame cannot hold more records than its bytes have room for."""
    records = rows(2)
    size = len(records)
    head = struct.Struct("<HBBIQ16sQII")
    assert head.size == frames.DATA_HEAD_BYTES
    with pytest.raises(BadFrame):
        frames.read_data(frames.data(1, STREAM, first, n, records[: size // 2]))


def test_one_small_piece_of_a_file_is_a_good_frame() -> None:
    """The chunks of a file are frames of one number each, of any length."""
    frame = frames.data(1, STREAM, 4, 1, b"xyz")
    assert frames.read_data(frame).n == 1
