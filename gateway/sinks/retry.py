"""How long to wait before the next try: growing, with jitter, for ever."""

from __future__ import annotations

import email.utils
from collections.abc import Callable

FIRST_SECONDS = 0.5
TOP_SECONDS = 300.0
ASKED_TOP_SECONDS = 3600.0  #: a backend that asks for more has a wrong clock


class Backoff:
    """Doubles from `FIRST_SECONDS` to `TOP_SECONDS`; `random()` in [0, 1) spreads each wait over
    the half below."""

    def __init__(self, random: Callable[[], float]) -> None:
        self._random = random
        self._seconds = FIRST_SECONDS

    def reset(self) -> None:
        self._seconds = FIRST_SECONDS

    def next_seconds(self, asked_seconds: float | None = None) -> float:
        """The wait now; what the backend asked for (Retry-After) is the least."""
        wait = self._seconds * (1 - self._random() / 2)
        self._seconds = min(self._seconds * 2, TOP_SECONDS)
        return max(wait, min(asked_seconds or 0.0, ASKED_TOP_SECONDS))


def asked_seconds(retry_after: str, now_unix_seconds: float) -> float | None:
    """How long a `Retry-After` header asks to wait, in either of its forms: seconds or a date.
    None when it is neither."""
    text = retry_after.strip()
    if text.isascii() and text.isdecimal():
        return float(text)
    try:
        moment = email.utils.parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0.0, moment.timestamp() - now_unix_seconds)
