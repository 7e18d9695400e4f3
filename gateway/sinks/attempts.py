"""For a backend that keeps one value of a name and step: the newest attempt's, in whatever order
the attempts arrive.

A rank that began again logs steps once more, and its later values replace the earlier ones there.
What an earlier life left on its node may arrive after that: of it only the steps that no newer
attempt has are handed on, the rest is skipped, and counted so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..rules.generations import UNORDERED
from ..series.reader import Reader
from .base import Item, Memory, Rows, RunInfo, Sent, Sink

OLDER = "an older attempt"  #: the reason to skip
SENT = "rows sent of"  #: what is remembered under: (rank, stream) of those that have rows there

Mask = npt.NDArray[np.bool_]


@dataclass
class NewestSink:
    """See `base.Sink`. Compares only with streams of which something was handed on before: what
    comes later replaces by itself."""

    inner: Sink
    reader: Reader
    _memory: Memory | None = None
    _sent: set[tuple[int, bytes]] = field(default_factory=set)

    @property
    def stop_asked(self) -> str:
        return self.inner.stop_asked

    def open(self, run: RunInfo, memory: Memory) -> None:
        self.inner.open(run, memory)
        self._memory = memory
        self._sent = {(rank, stream) for rank, stream in memory.get(SENT) or ()}

    def send(self, batch: Sequence[Item], again: bool) -> Sent:
        there = set(self._sent)
        wanted: list[Item] = []
        for item in batch:
            if isinstance(item, Rows):
                wanted += self._newest(item, there)
                there.add((item.rank, item.stream))
            else:
                wanted.append(item)
        older = sum(i.items for i in batch) - sum(i.items for i in wanted)
        sent = self.inner.send(wanted, again) if wanted or not batch else Sent()
        sent.skip(OLDER, older)
        if there != self._sent and self._memory is not None:
            self._memory.put(SENT, sorted(there))
            self._sent = there
        return sent

    def close(self, state: str, reason: str) -> Sent:
        return self.inner.close(state, reason)

    def _newest(self, rows: Rows, there: set[tuple[int, bytes]]) -> list[Rows]:
        newer = self._newer(rows, there)
        if not newer:
            return [rows]
        kept: dict[bytes, tuple[Mask, list[str]]] = {}  # keys with the same rows left, together
        for key in rows.columns:
            points = self.reader.points(key)
            mask = ~np.isin(rows.step, points.step[np.isin(points.stream, newer)])
            kept.setdefault(mask.tobytes(), (mask, []))[1].append(key)
        return [_part(rows, mask, keys) for mask, keys in kept.values() if mask.any()]

    def _newer(self, rows: Rows, there: set[tuple[int, bytes]]) -> list[int]:
        """Indexes of the streams of newer attempts of this rank that have rows there."""
        others = {s for rank, s in there if rank == rows.rank and s != rows.stream}
        if not others:
            return []
        places = {id_: place for place, id_ in enumerate(self.reader.about().generations)}
        streams = {s.id: s for s in self.reader.streams()}
        own = places.get(streams[rows.stream].generation, UNORDERED)
        found = [streams[s] for s in others if s in streams]
        return [s.index for s in found if places.get(s.generation, UNORDERED) > own]


def _part(rows: Rows, mask: Mask, keys: list[str]) -> Rows:
    columns = {key: rows.columns[key][mask] for key in keys}
    heads = (rows.seq[mask], rows.step[mask], rows.wall_ns[mask])
    return Rows(rows.stream, rows.rank, *heads, columns)
