"""Bytes of a console in, lines out: what a terminal would still show of each line.

No clock and no descriptor: the copier hands in both bytes and time.
"""

from __future__ import annotations

import re

PROGRESS_SECONDS = 10.0  #: between two states of a line that is drawn over and over
MAX_LINE_BYTES = 128 << 10  #: a longer line becomes several

#: back to the start of this line, or up to an earlier one: what was drawn before is drawn over
_DRAWN_OVER = re.compile(rb"\r|\x1b\[\d{0,4}[AF]")
_UP = re.compile(rb"\x1b\[(\d{0,4})[AF]")
_ANSI = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])"
    r"|[\x00-\x08\x0b-\x1f\x7f]"
)


def visible(raw: bytes) -> str:
    """The last state of a line, without colours and cursor movements."""
    states = _DRAWN_OVER.split(raw)
    for state in reversed(states):
        text = _ANSI.sub("", state.decode("utf-8", "replace"))
        if text.strip():
            return text if len(states) == 1 else text.rstrip()
    return ""


class Lines:
    """The lines of one descriptor. A line that a progress bar draws over and over gives its last
    state, and each PROGRESS_SECONDS the one it is in."""

    def __init__(self) -> None:
        self._rest = b""
        self._above = 0  # so many of the next lines were drawn before
        self._drawn_at: float | None = None  # when the line was first drawn over, or last told
        self._redrawn_at: float | None = None  # the same of the lines above
        self._told = ""

    def feed(self, data: bytes, now: float) -> list[str]:
        """The lines that these bytes complete; `now` in seconds."""
        *whole, self._rest = (self._rest + data).split(b"\n")
        out: list[str] = []
        for raw in whole:
            self._line(raw, now, out)
        if b"\r" in self._rest:
            self._progress(now, out)
        if len(self._rest) > MAX_LINE_BYTES:
            out.append(visible(self._rest))
            self._rest = b""
        return out

    def skip(self, data: bytes) -> int:
        """Pass bytes by; how many lines end in them."""
        count = data.count(b"\n")
        if count:
            self._rest = data[data.rfind(b"\n") + 1 :]
            self._drawn_at = None
        else:
            self._rest += data
        self._rest = self._rest[-MAX_LINE_BYTES:]
        return count

    def end(self) -> list[str]:
        """What stands in the last line, which nothing ended."""
        raw, self._rest, self._drawn_at = self._rest, b"", None
        text = visible(raw)
        return [text] if text and text != self._told else []

    def _line(self, raw: bytes, now: float, out: list[str]) -> None:
        text = visible(raw)
        told, self._told, self._drawn_at = self._told, "", None
        self._above += sum(int(n or 1) for n in _UP.findall(raw)) if b"\x1b" in raw else 0
        if self._above:
            self._above -= 1
            if not text or not self._due(now):
                return
        elif told and text == told:
            return
        out.append(text)

    def _due(self, now: float) -> bool:
        """May one of the lines that are drawn over be told again?"""
        if self._redrawn_at is None:
            self._redrawn_at = now
        if now - self._redrawn_at < PROGRESS_SECONDS:
            return False
        self._redrawn_at = now
        return True

    def _progress(self, now: float, out: list[str]) -> None:
        states = self._rest.split(b"\r")
        kept = [s for s in states[:-1] if s.strip()][-1:]
        ups = b"".join(m.group() for s in states[:-1] for m in _UP.finditer(s) if s not in kept)
        self._rest = ups + b"\r".join([*kept, states[-1]])
        if self._drawn_at is None:
            self._drawn_at = now
        elif now - self._drawn_at >= PROGRESS_SECONDS:
            self._drawn_at = now
            text = visible(self._rest)
            if text and text != self._told:
                self._told = text
                out.append(text)
