"""How long it takes to build series.db from a journal of 10 million points, and to ask it.

The journal is made through the real writer from rows made beforehand; nothing is simulated after
that. Two shapes: many keys (each is a twentieth of the run), and one key that is all of it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gateway.journal.writer import Journal
from gateway.rules.follow import rebuild
from gateway.series.reader import Reader
from gateway.series.tables import Points
from rank_client.wire import frames
from rank_client.wire.disk import OsDisk
from rank_client.wire.records import Kind

from . import records
from .gateway import RUN
from .measure import best_of, say

FRAME_ROWS = 20
COMMIT_BYTES = 1 << 20


@dataclass(frozen=True)
class Shape:
    ranks: int
    rows: int  #: per rank
    keys: int

    @property
    def name(self) -> str:
        return f"{self.ranks} ranks × {self.keys} keys"

    @property
    def points(self) -> int:
        return self.ranks * self.rows * self.keys


SHAPES = (Shape(1024, 488, 20), Shape(1024, 9766, 1))
QUICK_SHAPES = (Shape(128, 390, 20), Shape(128, 1562, 1))


def run(directory: Path, quick: bool) -> dict[str, Any]:
    shapes = QUICK_SHAPES if quick else SHAPES
    out = {shape.name: _one(shape, directory / f"{shape.keys}") for shape in shapes}
    _table(out)
    return {"cache": "warm: each query once before it is timed", "runs": out}


def _one(shape: Shape, run_dir: Path) -> dict[str, Any]:
    journal_s = make_journal(shape, run_dir / "journal")
    start = time.perf_counter()
    rebuild(run_dir)
    rebuild_s = time.perf_counter() - start
    with Reader(run_dir) as reader:
        key = records.schema(shape.keys).keys[0]
        times = {
            "one_key_all_ranks": best_of(5, lambda: reader.points(key)),
            "last_value_per_rank": best_of(5, lambda: last_per_rank(reader.points(key))),
        }
        _check(shape, reader.points(key))
    size = (run_dir / "series.db").stat().st_size
    return {
        "points": shape.points,
        "points_of_key": shape.ranks * shape.rows,
        "journal_write_s": round(journal_s, 2),
        "rebuild_s": round(rebuild_s, 2),
        "rebuild_mpts": round(shape.points / rebuild_s / 1e6, 2),
        "rebuild_rows_per_s": round(shape.ranks * shape.rows / rebuild_s),
        "series_db_bytes_per_point": round(size / shape.points, 1),
        **times,
    }


def make_journal(shape: Shape, directory: Path) -> float:
    """All ranks in step, 20 rows a frame, committed by the MiB; seconds it took."""
    schema = records.schema(shape.keys)
    rows, size = records.rows(shape.rows, shape.keys), schema.row_bytes
    streams = [rank.to_bytes(16, "big") for rank in range(shape.ranks)]
    start = time.perf_counter()
    journal = Journal(OsDisk(), str(directory), bytes(16))
    now = records.START_NS
    for rank, stream in enumerate(streams):
        hello = {"kind": "live", "run": RUN, "rank": rank, "world_size": shape.ranks}
        journal.append_map(Kind.OPEN, now, {"stream": stream, "hello": hello})
    for first in range(0, shape.rows, FRAME_ROWS):
        n = min(FRAME_ROWS, shape.rows - first)
        data = rows[first * size : (first + n) * size]
        data = schema.pack(1) + data if first == 0 else data
        for stream in streams:
            journal.append_batch(now, frames.data(1, stream, first + 1, n, data))
            if journal.pending_bytes >= COMMIT_BYTES:
                journal.commit()
    journal.commit()
    journal.mark()
    journal.close()
    return time.perf_counter() - start


def last_per_rank(points: Points) -> Points:
    """The newest point of each stream."""
    order = np.lexsort((points.seq, points.stream))
    streams = points.stream[order]
    return points.pick(order[np.append(streams[1:] != streams[:-1], True)])


def _check(shape: Shape, points: Points) -> None:
    """The answer is the input: every rank's last value is the last row's."""
    last = last_per_rank(points)
    assert len(points) == shape.ranks * shape.rows and len(last) == shape.ranks
    raw = np.frombuffer(records.rows(shape.rows, shape.keys), "<f8").reshape(shape.rows, -1)
    assert (last.value == raw[-1, 6]).all()


def _table(out: dict[str, Any]) -> None:
    say(
        "\nseries.db            points   rebuild s  Mpt/s   one key: points      ms  last value, ms"
    )
    for name, r in out.items():
        key, last = (r[q]["median_ms"] for q in ("one_key_all_ranks", "last_value_per_rank"))
        rebuilt = f"{r['rebuild_s']:12}{r['rebuild_mpts']:7}"
        say(f"{name:20}{r['points']:>8,}{rebuilt}{r['points_of_key']:>24,}{key:>8}{last:>8}")
