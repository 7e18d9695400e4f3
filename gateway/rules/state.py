"""How a run stands: running, completed, failed or lost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .changes import Stream
from .generations import Generations

LOST_AFTER_NS = 60 * 10**9


def state_of(
    generations: Generations,
    all_streams: Iterable[Stream],
    launchers: Mapping[str, int],
    now_ns: int,
) -> tuple[str, str]:
    """(running | completed | failed | lost, why); a new generation reopens a run."""
    if not generations.order:
        return "running", ""
    newest = generations.order[-1]
    streams = [s for s in all_streams if s.generation == newest.id and s.kind != "tool"]
    for stream in streams:
        if stream.status == "failed":
            return "failed", f"rank {stream.rank}: {stream.text or 'failed'}"
    code = launchers.get(newest.launch)
    if code:
        return "failed", f"the launcher exited with {code}"
    finished = {s.rank for s in streams if s.status}
    if code == 0 or len(finished) >= max(1, newest.world_size):
        return "completed", ""
    # Without an END record it did not end by itself; `bye` says that its spool is shipped.
    waiting = [s for s in streams if not s.status]
    if waiting and all(s.bye or _silent(s, now_ns) for s in waiting):
        ranks = ", ".join(str(s.rank) for s in waiting[:8])
        return "lost", f"rank {ranks} ended without a word"
    return "running", ""


def _silent(stream: Stream, now_ns: int) -> bool:
    return bool(stream.quiet_ns) and now_ns - stream.quiet_ns >= LOST_AFTER_NS
