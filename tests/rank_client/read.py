"""Reading back what a rank has written, with the wire's own tools and nothing of the spool's."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, NamedTuple

from rank_client.wire.disk import OsDisk
from rank_client.wire.records import (
    COLUMN_CODES,
    ROW_HEAD,
    ROW_HEAD_BYTES,
    UNNUMBERED,
    Kind,
    Schema,
    schema_of,
    unpack_map,
    walk,
)
from rank_client.wire.segments import SPOOL_KINDS, scan_segment, segment_indexes


class Written(NamedTuple):
    """A numbered record. `values` of rows and KV maps are alike; other kinds have their map."""

    seq: int
    kind: int
    step: int
    wall_ns: int
    values: dict[str, Any]


def decode(data: bytes, schemas: dict[int, Schema] | None = None) -> list[Written]:
    """The numbered records in `data`; every row needs its schema before it."""
    schemas = {} if schemas is None else schemas
    out = []
    at = 0
    for head in walk(data):
        at = head.at + head.size
        body = data[head.body]
        if head.kind == Kind.SCHEMA:
            schemas[head.schema] = schema_of(head, data)
        elif head.kind == Kind.ROW:
            out.append(_row(head.seq, body, schemas[head.schema]))
        elif head.kind == Kind.KV:
            found = unpack_map(body)
            out.append(Written(head.seq, head.kind, found["s"], found["w"], found["v"]))
        elif head.kind not in UNNUMBERED:
            found = unpack_map(body)
            out.append(Written(head.seq, head.kind, 0, 0, found))
    assert at == len(data), "bytes that are no record"
    return out


def _row(seq: int, body: bytes, schema: Schema) -> Written:
    step, wall_ns, _ = ROW_HEAD.unpack_from(body)
    codes = "".join(COLUMN_CODES[t] for t in schema.types)
    raw = struct.unpack(f"<{codes}", body[ROW_HEAD_BYTES:])
    values = {
        key: bool(value) if type_ == "bool" else value
        for key, type_, value in zip(schema.keys, schema.types, raw, strict=True)
    }
    return Written(seq, Kind.ROW, step, wall_ns, values)


def on_disk(directory: Path | str) -> list[Written]:
    """All numbered records of a spool's segments; each segment is read on its own."""
    out: list[Written] = []
    for index in segment_indexes(OsDisk(), str(directory)):
        buf, found = scan_segment(OsDisk(), str(directory), index, SPOOL_KINDS)
        assert not found.damage
        assert found.heads[0].kind == Kind.HEAD
        out += decode(buf)
    return out
