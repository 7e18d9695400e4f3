"""The things a sink is given, made of what a run's series has: of entries of the feed, or once more
of what was set aside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..ingest.media import blob_path
from ..series.columns import DTYPES
from ..series.reader import Reader
from ..series.tables import Block, FeedEntry, StreamRow
from .base import Item, Media, Params, Rows, Summary, Text
from .keep import DROPPED
from .pieces import follows, join
from .quarantine import Row


class Items:
    """`look` first, after it what the series had then can be made."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._streams: dict[int, StreamRow] = {}

    def look(self) -> None:
        """Learn of the streams there are by now."""
        self._streams = {s.index: s for s in self._reader.streams()}

    def stream(self, entry: FeedEntry) -> bytes:
        return self._streams[entry.stream].id

    def of(self, entries: Sequence[FeedEntry]) -> tuple[list[Item], int]:
        """Their items in order, rows that follow each other as one; and how many files are not
        among them, as policy dropped them before this sink was there."""
        blocks = self._blocks(entries)
        items: list[Item] = []
        dropped = 0
        for entry in entries:
            if entry.kind == "media" and self._is_dropped(entry):
                dropped += 1
                continue
            item = self._item(entry, blocks)
            before = items[-1] if items else None
            if isinstance(item, Rows) and isinstance(before, Rows) and follows(before, item):
                items[-1] = join(before, item)
            else:
                items.append(item)
        return items, dropped

    def again(self, rows: list[Row]) -> dict[int, Item]:
        """id → the item again, by what it is for ever; without those the series have no more."""
        index = {s.id: i for i, s in self._streams.items()}
        places = {i: self._reader.stretches(i) for i in {index.get(r.stream, -1) for r in rows}}
        entries: dict[int, list[FeedEntry]] = {}
        for row in rows:
            stream = index.get(row.stream, -1)
            first, last, keyset = places[stream]
            here = keyset[(first <= row.seq) & (last >= row.seq)] if row.kind == "rows" else [0]
            entries[row.id] = [
                FeedEntry(0, 0, row.kind, int(k), stream, row.seq, row.seq, "") for k in here
            ]
        blocks = self._blocks([entry for each in entries.values() for entry in each])
        found = {r.id: self._kept_item(r, entries[r.id], blocks) for r in rows}
        return {id_: item for id_, item in found.items() if item is not None}

    def _kept_item(
        self, row: Row, entries: list[FeedEntry], blocks: dict[int, Block]
    ) -> Item | None:
        for entry in entries:
            if entry.stream not in self._streams:
                return None
            try:
                if entry.kind == "media" and self._is_dropped(entry):
                    return None
                item = self._item(entry, blocks)
            except ValueError:  # no such record
                return None
            if not isinstance(item, Rows):
                return item
            if len(item.seq) and row.key in item.columns:
                return replace(item, columns={row.key: item.columns[row.key]})
        return None

    def _blocks(self, entries: Sequence[FeedEntry]) -> dict[int, Block]:
        spans: dict[int, list[tuple[int, int, int]]] = {}
        for entry in entries:
            if entry.kind == "rows":
                spans.setdefault(entry.keyset, []).append((entry.stream, entry.first, entry.last))
        return {keyset: self._reader.rows(keyset, s) for keyset, s in spans.items()}

    def _item(self, entry: FeedEntry, blocks: dict[int, Block]) -> Item:
        stream, reader = self._streams[entry.stream], self._reader
        where: dict[str, Any] = {"stream": stream.id, "rank": stream.rank, "seq": entry.first}
        if entry.kind == "rows":
            return self._rows(entry, stream, blocks[entry.keyset])
        if entry.kind in ("text", "console"):
            wall, step, level, text = reader.text_at(entry.stream, entry.first)
            console = entry.kind == "console"
            return Text(**where, wall_ns=wall, level=level, text=text, step=step, console=console)
        if entry.kind == "media":
            return self._media_item(entry, where)
        wall, values = reader.map_at(entry.kind, entry.stream, entry.first)
        kind = Params if entry.kind == "params" else Summary
        return kind(**where, wall_ns=wall, values=values)

    def _rows(self, entry: FeedEntry, stream: StreamRow, block: Block) -> Rows:
        # A block is sorted by (stream, seq), so an entry is one stretch of it.
        start, end = np.searchsorted(block.stream, [entry.stream, entry.stream + 1])
        first, last = np.searchsorted(block.seq[start:end], [entry.first, entry.last + 1]) + start
        here = slice(int(first), int(last))
        columns: dict[str, Any] = {}
        for i, (name, type_) in enumerate(self._reader.keyset(entry.keyset)):
            values = np.ascontiguousarray(block.values[here, i]).view(DTYPES[type_])
            columns[name] = values.astype(bool) if type_ == "bool" else values
        return Rows(
            stream.id, stream.rank, block.seq[here], block.step[here], block.wall_ns[here], columns
        )

    def _is_dropped(self, entry: FeedEntry) -> bool:
        """Did policy drop a file before this sink was there?"""
        lost = self._reader.media_at(entry.stream, entry.first).lost
        return lost is not None and lost.startswith(DROPPED)

    def _media_item(self, entry: FeedEntry, where: dict[str, Any]) -> Media:
        row = self._reader.media_at(entry.stream, entry.first)
        assert row.sha256 is not None and row.size_bytes is not None  # else it is not in the feed
        return Media(
            **where,
            wall_ns=row.wall_ns,
            what=row.what,
            key=row.key,
            name=row.name,
            step=row.step,
            path=blob_path(self._reader.run_dir, row.sha256),
            sha256=row.sha256,
            size_bytes=row.size_bytes,
            meta=row.meta,
        )
