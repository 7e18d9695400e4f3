"""Keeping below a backend's limits, over all runs of one key: they share a small file.

A limit is so many requests within a sliding window. Requests of a frequent kind also keep a gap,
in which the next batch grows: that is how many lines become one request.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from gateway.sinks.base import Unavailable
from gateway.sinks.hub.http import LONGEST_WAIT_SECONDS, Limited, Wire

LONGEST_SLEEP_SECONDS = 3.0  #: in a call; who has to wait longer is called again


Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Limits:
    """Per kind of request: how many within `window_seconds`, and the gap after the one before.
    The kind "" is all requests. What is not named goes as the backend lets it."""

    calls: Mapping[str, int] = field(default_factory=dict)
    window_seconds: float = 60.0
    gap_seconds: Mapping[str, float] = field(default_factory=dict)


class Pace:
    """Says when a request may go; `shared` is one file for all runs of a key, or None.

    The file holds when requests went (by kind, unix seconds) and until when the backend wants
    none. It is read and written under its lock only; broken or lost, the count begins again.
    """

    def __init__(
        self,
        limits: Limits,
        shared: Path | None,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._limits = limits
        self._shared = shared
        self._clock = clock
        self._sleep = sleep
        self._last: dict[str, float] = {}  # kind → when one went, of this run
        self._own: dict[str, Any] = {}  # what the file would hold

    def take(self, kind: str) -> None:
        """Wait for the turn of a request. Raises Unavailable when that takes long."""
        gap = self._limits.gap_seconds.get(kind, 0.0)
        self._wait(min(gap, self._last.get(kind, -gap) + gap - self._clock()))
        while (wait := self._change(lambda state: self._enter(state, kind))) > 0:
            self._wait(wait)
        self._last[kind] = self._clock()

    def hold(self, seconds: float) -> None:
        """The backend wants nothing for so long, of any run."""
        until = self._clock() + seconds

        def later(state: dict[str, Any]) -> float:
            state["until"] = max(until, state.get("until", 0.0))
            return 0.0

        self._change(later)

    def _wait(self, seconds: float) -> None:
        if seconds > LONGEST_SLEEP_SECONDS:
            raise Unavailable(
                f"hub: going on in {seconds:.0f} s, to stay within the requests that the key "
                "may make",
                seconds,
            )
        if seconds > 0:
            self._sleep(seconds)

    def _enter(self, state: dict[str, Any], kind: str) -> float:
        """Enter a request, or tell for how many seconds there is no room."""
        now, window = self._clock(), self._limits.window_seconds
        # Times far ahead are of a clock that was set back since; nobody waits for those.
        if now < state.get("until", 0.0) <= now + LONGEST_WAIT_SECONDS:
            return float(state["until"] - now)
        went: dict[str, list[float]] = state.get("went", {})
        fresh = {
            name: [m for m in went.get(name, ()) if now - window < m <= now] for name in ("", kind)
        }
        for name, moments in fresh.items():
            if len(moments) >= self._limits.calls.get(name, len(moments) + 1):
                return moments[0] + window - now
        for name in self._limits.calls.keys() & fresh.keys():
            state["went"] = {**state.get("went", {}), name: [*fresh[name], now]}
        return 0.0

    def _change(self, change: Callable[[dict[str, Any]], float]) -> float:
        if self._shared is None:
            return change(self._own)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(self._shared, flags, 0o600)
        with os.fdopen(fd, "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            state = _read(file.read())
            result = change(state)
            file.seek(0)
            json.dump(state, file)
            file.truncate()
        return result


def _read(text: str) -> dict[str, Any]:
    try:
        state = json.loads(text)
        return {
            "until": float(state.get("until", 0.0)),
            "went": {str(k): [float(m) for m in v] for k, v in state.get("went", {}).items()},
        }
    except (ValueError, TypeError, AttributeError):
        return {}


def shared_file(directory: Path, key: str) -> Path:
    """Where all runs below `directory` meet that use one key; the name does not tell the key."""
    return directory / f"hub-{hashlib.sha256(key.encode()).hexdigest()[:12]}.pace"


class Paced:
    """A `Wire` that keeps a pace. `kind_of(path, body)` names the kind of a request."""

    def __init__(self, wire: Wire, pace: Pace, kind_of: Callable[[str, Any], str]) -> None:
        self._wire = wire
        self._pace = pace
        self._kind_of = kind_of

    def call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        self._pace.take(self._kind_of(path, body))
        return self._told(lambda: self._wire.call(method, path, body))

    def post_file(self, path: str, fields: Mapping[str, str], name: str, file: Path) -> None:
        self._pace.take(self._kind_of(path, None))
        self._told(lambda: self._wire.post_file(path, fields, name, file))

    def put_file(self, url: str, file: Path) -> None:
        self._wire.put_file(url, file)  # the storage is another host with no such limit

    def close(self) -> None:
        self._wire.close()

    def _told(self, request: Callable[[], Answer]) -> Answer:
        try:
            return request()
        except Limited as error:
            self._pace.hold(error.after_seconds or 0.0)
            raise
