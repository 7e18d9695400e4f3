"""A sink that is to have a run from some step or moment on only: what is older is skipped, and
counted so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from .base import Item, Memory, Params, Rows, RunInfo, Sent, Sink, Summary

TOO_OLD = "before --since"  #: the reason to skip


class Since(msgspec.Struct, frozen=True):
    """From this step, or from this moment on; one of the two."""

    step: int | None = None
    wall_ns: int | None = None


@dataclass
class SinceSink:
    """See `base.Sink`. Hands on what is new enough: rows, and lines and files that have a step,
    by their step; all by its time. Params and summaries belong to the run whole and always pass,
    and so does what has no step when a step is asked for."""

    inner: Sink
    since: Since

    @property
    def stop_asked(self) -> str:
        return self.inner.stop_asked

    def open(self, run: RunInfo, memory: Memory) -> None:
        self.inner.open(run, memory)

    def send(self, batch: Sequence[Item], again: bool) -> Sent:
        wanted = [kept for item in batch if (kept := self._kept(item)) is not None]
        too_old = sum(i.items for i in batch) - sum(i.items for i in wanted)
        sent = self.inner.send(wanted, again) if wanted or not batch else Sent()
        sent.skip(TOO_OLD, too_old)
        return sent

    def close(self, state: str, reason: str) -> Sent:
        return self.inner.close(state, reason)

    def _kept(self, item: Item) -> Item | None:
        if isinstance(item, Rows):
            return self._kept_rows(item)
        if isinstance(item, Params | Summary):
            return item
        if self.since.wall_ns is not None:
            return item if item.wall_ns >= self.since.wall_ns else None
        new = item.step is None or item.step >= (self.since.step or 0)
        return item if new else None

    def _kept_rows(self, rows: Rows) -> Rows | None:
        new: npt.NDArray[np.bool_]
        if self.since.wall_ns is not None:
            new = rows.wall_ns >= self.since.wall_ns
        else:
            new = rows.step >= (self.since.step or 0)
        if new.all():
            return rows
        if not new.any():
            return None
        columns = {key: values[new] for key, values in rows.columns.items()}
        heads = (rows.seq[new], rows.step[new], rows.wall_ns[new])
        return Rows(rows.stream, rows.rank, *heads, columns)
