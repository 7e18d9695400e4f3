"""Lives of one sink's process, driven here: the real loop and store; waits are counted only."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

from gateway.series.reader import Reader
from gateway.sinks.base import Sink
from gateway.sinks.loop import Loop
from gateway.sinks.process import run_info
from gateway.sinks.retry import Backoff
from gateway.sinks.store import SinkView, Store, read_view

from .backends import Backend

PAUSE_SECONDS = 0.02  #: instead of a wait
DRAIN_SECONDS = 60.0  #: after which a run that is not delivered never will be


class Lives:
    """Use as a context manager. `wrap` stands between the loop and the sink of every life."""

    def __init__(
        self,
        backend: Backend,
        run_dir: Path,
        wrap: Callable[[Sink], Sink] = lambda sink: sink,
        rng: random.Random | None = None,
        offline: bool = False,
    ) -> None:
        self.backend = backend
        self.path = run_dir / "sinks" / f"{backend.kind}.db"
        self.waited_seconds = 0.0  #: what a real process would have slept, over all lives
        self.longest_seconds = 0.0
        self._run_dir = run_dir
        self._wrap = wrap
        self._rng = rng or random.Random(0)
        self._offline = offline

    def __enter__(self) -> Lives:
        self._begin()
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _begin(self) -> None:
        self.store = Store(self.path)
        self.reader = Reader(self._run_dir)
        made = self.backend.export_sink if self._offline else self.backend.sink
        self._sink = made()
        backoff = Backoff(self._rng.random)
        info = run_info(self.reader)
        sink = self._wrap(self._sink)
        self.loop = Loop(self.reader, self.store, sink, info, backoff, not self._offline)

    def _end(self) -> None:
        self.backend.let_go(self._sink)
        self.reader.close()
        self.store.close()

    def again(self) -> None:
        """The process is gone, and another begins."""
        self._end()
        self._begin()

    def step(self) -> float:
        wait = self.loop.step()
        self.waited_seconds += wait
        self.longest_seconds = max(self.longest_seconds, wait)
        return wait

    def finish(self, each: Callable[[], None] = lambda: None) -> None:
        """Step until all is dealt with; `each` is called before every step."""
        deadline = time.monotonic() + DRAIN_SECONDS
        while not self.loop.done:
            each()
            if self.step():
                time.sleep(PAUSE_SECONDS)
            view = self.view()
            assert not self.loop.off, view
            assert time.monotonic() < deadline, view

    def view(self) -> SinkView:
        return read_view(self.path)

    def assert_accounted(self) -> None:
        """passed = delivered + skipped + quarantined."""
        counters = self.reader.about().counters
        passed = sum(n for name, n in counters.items() if name.startswith("passed "))
        view = self.view()
        done = view.delivered + sum(view.skipped.values()) + view.quarantined
        assert done == passed, (view, passed)

    def assert_arrived(self) -> None:
        """Everything once in the backend's own record, or told of as `maybe duplicate`."""
        have, want = self.backend.have(), self.backend.want()
        doubled, view = have.doubled(want), self.view()
        assert have.lost(want) == [], view
        assert len(doubled) <= view.maybe_duplicate, (doubled, view)
        self.assert_accounted()
