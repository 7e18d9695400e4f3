"""How long to wait before the next try: growing, with jitter, for ever."""

from __future__ import annotations

from collections.abc import Callable

FIRST_SECONDS = 0.5
TOP_SECONDS = 300.0


class Backoff:
    """Doubles from `FIRST_SECONDS` to `TOP_SECONDS`; `random()` in [0, 1) spreads it."""

    def __init__(self, random: Callable[[], float]) -> None:
        self._random = random
        self._seconds = FIRST_SECONDS

    def reset(self) -> None:
        self._seconds = FIRST_SECONDS

    def next_seconds(self, asked_seconds: float | None = None) -> float:
        """The wait now; what the backend asked for (Retry-After) is the least."""
        wait = self._seconds * (0.5 + self._random())
        self._seconds = min(self._seconds * 2, TOP_SECONDS)
        return max(wait, asked_seconds or 0.0)
