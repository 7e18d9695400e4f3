"""Pieces of a batch: how two items are joined, how a batch is halved down to a single point, and
how a piece and a single thing are named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from .base import Item, Media, Rows
from .quarantine import Kept, Row


def split(items: list[Item]) -> Iterator[list[Item]]:
    """Two halves of a batch: by items, of one item by rows, of one row by keys; none for a
    single point, line or file."""
    if len(items) > 1:
        middle = len(items) // 2
        yield items[:middle]
        yield items[middle:]
        return
    [item] = items
    if not isinstance(item, Rows):
        return
    if len(item.seq) > 1:
        middle = len(item.seq) // 2
        yield [_cut(item, slice(0, middle))]
        yield [_cut(item, slice(middle, None))]
    elif len(item.columns) > 1:
        names = list(item.columns)
        for part in (names[: len(names) // 2], names[len(names) // 2 :]):
            yield [replace(item, columns={name: item.columns[name] for name in part})]


def _cut(rows: Rows, part: slice) -> Rows:
    return Rows(
        rows.stream,
        rows.rank,
        rows.seq[part],
        rows.step[part],
        rows.wall_ns[part],
        {name: values[part] for name, values in rows.columns.items()},
    )


def follows(before: Rows, after: Rows) -> bool:
    return (
        before.stream == after.stream
        and before.columns.keys() == after.columns.keys()
        and all(before.columns[k].dtype == after.columns[k].dtype for k in before.columns)
    )


def join(before: Rows, after: Rows) -> Rows:
    return Rows(
        before.stream,
        before.rank,
        np.concatenate((before.seq, after.seq)),
        np.concatenate((before.step, after.step)),
        np.concatenate((before.wall_ns, after.wall_ns)),
        {k: np.concatenate((v, after.columns[k])) for k, v in before.columns.items()},
    )


def piece_name(place: str, items: list[Item]) -> str:
    """A piece of a batch as it is noted: the same text in another life is the same piece."""
    return f"{place} {len(items)} {items[0].stream.hex()} {_name(items[0])}"


def set_aside(item: Item, reason: str) -> Kept:
    """A single point, line or file, as it is set aside."""
    kind, seq, key = type(item).__name__.lower(), item.seq, ""
    if isinstance(item, Rows):
        seq, key = int(item.seq[0]), next(iter(item.columns))
    return Kept(kind, item.stream, int(seq), key, item.items, _name(item), reason)


def identity(row: Row) -> tuple[str, bytes, int, str]:
    return row.kind, row.stream, row.seq, row.key


def _name(item: Item) -> str:
    """What a quarantined item is, for people."""
    if isinstance(item, Rows):
        return f"{next(iter(item.columns))} step {int(item.step[0])} rank {item.rank}"
    if isinstance(item, Media):
        return f"{item.what} {item.key} rank {item.rank}"
    return f"{type(item).__name__.lower()} record {item.seq} rank {item.rank}"


def newest_wall_ns(items: Sequence[Item]) -> int:
    return max(
        (int(i.wall_ns.max()) if isinstance(i, Rows) else i.wall_ns for i in items), default=0
    )
