"""Fuzzing, small; and what the trial rests on bites when it is broken."""

from __future__ import annotations

import struct
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gateway.rules.project
from gateway.journal.reader import JournalReader
from rank_client.wire import frames, session
from rank_client.wire.records import (
    COLUMN_CODES,
    BadRecord,
    Kind,
    Schema,
    pack_map,
    read_head,
    schema_of,
    unpack_map,
)

from . import fuzz_connections, fuzz_files, fuzz_frames
from .fuzz import fuzz, growth_kib
from .mutants import DEEP, WIDE_LIST, WIDE_MAP, Mutator, corpus, sealed

SEED = 5
FRAMES = 6_000
FILES = 150


def test_hostile_frames_and_files_change_nothing(tmp_path: Path) -> None:
    """Neither raises, stores junk, nor touches the good rank; what is stored adds up."""
    options = SimpleNamespace(seed=SEED, frames=FRAMES, files=FILES, connections=0)
    figures = fuzz(options, tmp_path)
    assert figures["broken"] == [], f"seed {SEED}"
    assert figures["frames"][0]["frames"] >= FRAMES - 10
    assert figures["frames"][0]["quarantined"] > 0
    assert figures["files"][0]["gaps"] > 0
    assert figures["files"][0]["salvaged entries"] > 0


@pytest.mark.parametrize("keyed", [False, True])
def test_raw_connections_change_nothing(tmp_path: Path, keyed: bool) -> None:
    """Noise on the gateway's port: it lives, stores what the good rank logged, and nothing else.
    (How long the rank waited says little on a machine that does other things: that is for make.)"""
    figures = fuzz_connections.fuzz(SEED, 300, tmp_path / "run", keyed)
    assert figures["broken"] == [], f"seed {SEED}"
    assert figures["connections"] == 300


def test_a_seed_gives_the_same_mutants_again() -> None:
    """The frames that are tried follow from the seed alone."""

    def some() -> list[Any]:
        recorded = [
            frames.data(7, b"s" * 16, 1, 1, pack_map(Kind.TEXT, 1, {"t": "x"})),
            frames.control(frames.Type.PING, 7, b"s" * 16, {"t": 1.0, "last": 1}),
        ]
        mutator = Mutator(Random(SEED), recorded, lambda _: 1)
        return [mutator.mutant(i % 2 == 0) for i in range(500)]

    assert some() == some()


@pytest.mark.parametrize("packed", [*corpus().values(), DEEP, WIDE_LIST, WIDE_MAP], ids=repr)
def test_no_value_of_the_corpus_breaks_the_decoder(packed: bytes) -> None:
    """As a map, as a value of one and as a key: decoded or refused as BadRecord, nothing else."""
    for body in (packed, b"\x81\xa1a" + packed, b"\x81" + packed + b"\x01"):
        try:
            assert isinstance(unpack_map(body), dict)
        except BadRecord:
            pass


def test_growth_is_told_from_noise() -> None:
    """One large world is no growth; a little more each time is."""
    assert growth_kib([100] * 10 + [9000] + [100] * 10) == 0
    assert growth_kib([100 * n for n in range(30)]) > 1000


# --- each check bites --------------------------------------------------------------------------


def _frames(tmp_path: Path) -> list[str]:
    return fuzz_frames.fuzz(SEED, 12_000, tmp_path)[2]


def _no_checksum(patch: pytest.MonkeyPatch) -> None:
    def read_data(frame: bytes) -> frames.Data:
        head = frames.DATA_HEAD.unpack_from(frame.ljust(48, b"\0"))
        return frames.Data(*head[4:])

    patch.setattr(frames, "read_data", read_data)


def _any_number(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gateway.rules.project, "_i64", int)


def _decoder_raises(patch: pytest.MonkeyPatch) -> None:
    def careless(body: bytes) -> Any:
        return msgpack.unpackb(bytes(body), raw=False)

    patch.setattr(frames, "unpack_map", careless)


def _any_credit(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(session, "CREDIT_MAX_BYTES", 1 << 60)


@pytest.mark.parametrize("plant", [_no_checksum, _any_number, _decoder_raises, _any_credit])
def test_a_planted_fault_is_found_by_frames(
    plant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a check of a frame, of a number or of a credit, the trial says so."""
    plant(monkeypatch)
    assert _frames(tmp_path), f"seed {SEED}"


def _uncounted_holes(patch: pytest.MonkeyPatch) -> None:
    def unreadable(self: Any, stream: Any, following: int) -> None:
        stream.last_seq = max(stream.last_seq, following - 1)

    patch.setattr(gateway.rules.project.Projection, "_unreadable", unreadable)


def _starts_anywhere(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(JournalReader, "_first_of", lambda self, index: 1)


def _salvages_twice(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gateway.rules.project, "salvage", _all_heads)


def _all_heads(body: memoryview, stored: int) -> Any:
    from gateway.journal.salvage import Salvaged, salvage
    from rank_client.wire.records import UNNUMBERED

    found = salvage(body, 0)  # what the stream has already, again
    return Salvaged([h for h in found.heads if h.kind not in UNNUMBERED] * 2, found.records)


@pytest.mark.parametrize("plant", [_uncounted_holes, _starts_anywhere, _salvages_twice])
def test_a_planted_fault_is_found_by_files(
    plant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the sums of holes, or with a start or a salvage that is careless, it says so."""
    plant(monkeypatch)
    assert fuzz_files.fuzz(SEED, 400, tmp_path)[2], f"seed {SEED}"


# --- encode and decode -------------------------------------------------------------------------

values = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text()
maps = st.dictionaries(st.text(max_size=20), values | st.lists(values, max_size=3), max_size=6)


@given(st.integers(1, 31), st.integers(0, 2**64 - 1), maps)
def test_a_record_comes_back(kind: int, seq: int, body: dict[str, Any]) -> None:
    """What is packed as a record is read as the same, wherever it stands."""
    record = b"x" * 8 + pack_map(kind, seq, body)
    head = read_head(record, 8, len(record))
    assert head is not None
    assert (head.kind, head.seq) == (kind, seq)
    assert repr(unpack_map(record[head.body])) == repr(body)  # NaN is not itself


@given(st.sampled_from([t for t in frames.Type if t != frames.Type.DATA]), maps)
def test_a_control_frame_comes_back(type_: frames.Type, body: dict[str, Any]) -> None:
    """What is said arrives."""
    found = frames.read_control(frames.control(type_, 7, b"s" * 16, body))
    assert (found.type, found.session, found.stream) == (type_, 7, b"s" * 16)
    assert repr(found.body) == repr(body)


@given(st.integers(1, 2**64 - 1), st.binary(max_size=200), st.integers(0, 8 * 248 - 1))
def test_a_data_frame_comes_back_and_no_bit_of_it_may_change(
    first: int, records: bytes, bit: int
) -> None:
    """Its head is read as written; with one bit changed it is no frame any more."""
    frame = frames.data(7, b"s" * 16, first, 1, records)
    assert frames.read_data(frame) == (7, b"s" * 16, first, 1, len(records))
    assert sealed(frame) == frame
    changed = bytearray(frame)
    changed[(bit >> 3) % len(frame)] ^= 1 << (bit & 7)
    with pytest.raises(frames.BadFrame):
        frames.type_of(bytes(changed))
        if changed[3] == frames.Type.DATA:
            frames.read_data(bytes(changed))
        else:
            frames.read_control(bytes(changed))


@given(
    st.integers(0, 65535),
    st.dictionaries(st.text(max_size=30), st.sampled_from(sorted(COLUMN_CODES)), min_size=1),
)
def test_a_schema_comes_back(id_: int, columns: dict[str, str]) -> None:
    """Keys in their order, and their types."""
    schema = Schema(id_, tuple(columns), tuple(columns.values()))
    record = schema.pack(9)
    head = read_head(record, 0, len(record))
    assert head is not None
    assert schema_of(head, record) == schema


@given(st.dictionaries(st.text(max_size=20), st.floats() | st.integers(-(2**63), 2**63 - 1)))
def test_a_map_of_values_comes_back(values: dict[str, float]) -> None:
    """KV: every float bit for bit, every int64 exactly."""
    record = pack_map(Kind.KV, 1, {"s": 1, "w": 2, "m": 3, "v": values})
    head = read_head(record, 0, len(record))
    assert head is not None
    found = unpack_map(record[head.body])["v"]
    assert list(found) == list(values)
    for key, value in values.items():
        if isinstance(value, float):
            assert struct.pack("<d", found[key]) == struct.pack("<d", value)
        else:
            assert found[key] == value
