"""How the sinks of a run stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..series.tables import StreamRow
from ..sinks.store import SinkView, read_views

SINKS = ("clearml", "hub", "neptune")


@dataclass(frozen=True, slots=True)
class SinkRow:
    """A sink of a run; counts are items. feed = delivered + skipped + quarantined + waiting."""

    sink: str
    state: str
    reason: str
    feed: int
    delivered: int
    skipped: int
    skipped_reasons: dict[str, int]
    quarantined: int
    waiting: int
    lag_seconds: float
    maybe_duplicate: int
    export: str


def sink_rows(
    run_dir: Path, streams: Sequence[StreamRow], feed: int, started_ns: int
) -> tuple[SinkRow, ...]:
    """The sinks that have a file, then those that are not in the config."""
    newest = max((s.last_wall_ns for s in streams), default=0)
    rows = [_sink_row(v, feed, newest, started_ns) for v in read_views(run_dir)]
    known = {r.sink for r in rows}
    off = [
        SinkRow(n, "off", f"not in the config: add [sinks.{n}]", 0, 0, 0, {}, 0, 0, 0.0, 0, "")
        for n in SINKS
        if n not in known
    ]
    return (*rows, *off)


def _sink_row(view: SinkView, feed: int, newest_ns: int, started_ns: int) -> SinkRow:
    waiting = view.waiting(feed)
    since = view.sent_wall_ns or started_ns
    return SinkRow(
        sink=view.name,
        state=view.state,
        reason=view.reason.removeprefix(f"{view.name}: "),  # it stands under the sink's name
        feed=feed,
        delivered=view.delivered,
        skipped=sum(view.skipped.values()),
        skipped_reasons=view.skipped,
        quarantined=view.quarantined,
        waiting=waiting,
        lag_seconds=max(0.0, (newest_ns - since) / 1e9) if waiting and since else 0.0,
        maybe_duplicate=view.maybe_duplicate,
        export=view.export,
    )
