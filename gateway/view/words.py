"""How numbers, times, ranks and other people's text are written, on every surface the same."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import isfinite, isnan
from typing import Any

BARS = "▁▂▃▄▅▆▇"
FLAT = "▂"
NOT_FINITE = "×"

#: terminal sequences as a whole (CSI, OSC and its kin, two-character ones), then what is left
_SEQUENCE = re.compile(
    "\x1b\\[[0-?]*[ -/]*[@-~]|\x9b[0-?]*[ -/]*[@-~]"
    "|(?:\x1b[\\]PX^_]|[\x9d\x90\x98\x9e\x9f]).*?(?:\x07|\x1b\\\\|\x9c|$)"
    "|\x1b[ -/]*[0-~]",
    re.DOTALL,
)
_SPACES = re.compile("[\t\n\x0b\x0c\r\x85\u2028\u2029]+")
#: C0, DEL, C1, direction marks and overrides, halves of surrogate pairs
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def clean(text: str) -> str:
    """Somebody else's text on one line, unable to move the cursor, colour or reorder anything."""
    return _UNSAFE.sub("", _SPACES.sub(" ", _SEQUENCE.sub("", text)))


def count(n: int) -> str:
    return f"{n:,}"


def plural(n: int, one: str, many: str = "") -> str:
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def duration(seconds: float) -> str:
    """`48 s`, `12 min`, `3 h 10 min`, `2 d 3 h`."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min"
    if whole < 86_400:
        return f"{whole // 3600} h {whole // 60 % 60} min"
    return f"{whole // 86_400} d {whole // 3600 % 24} h"


def size(n_bytes: int) -> str:
    value, unit = float(n_bytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" or value >= 10 else f"{value:.1f} {unit}"


def moment(ns: int) -> str:
    """A local time to the minute, as for what is over."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(ns / 1e9)) if ns else "unknown"


def clock(ns: int) -> str:
    """A local time of day to the second, with the date where that is not today's."""
    when = time.localtime(ns / 1e9)
    today = time.strftime("%Y-%m-%d") == time.strftime("%Y-%m-%d", when)
    return time.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M:%S", when)


def number(value: Any) -> str:
    """A value in at most nine characters; whole numbers keep all their digits."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return clean(str(value))
    if not isfinite(value):
        return "NaN" if isnan(value) else "Inf" if value > 0 else "-Inf"
    if value == 0:
        return "0"
    if 1000 <= abs(value) < 1e7:
        return f"{value:,.0f}" if abs(value) >= 1e4 or value.is_integer() else f"{value:,.1f}"
    text = f"{value:.4g}"
    if "e" in text:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return text


def sparkline(values: Sequence[float], width: int = 12) -> str:
    """The shape of a series, each character the mean of its share; not-finite ones are marked."""
    if not values:
        return ""
    width = min(width, len(values))
    edges = [len(values) * i // width for i in range(width + 1)]
    shares = [values[a:b] for a, b in pairwise(edges)]
    means = [sum(s) / len(s) for s in shares]
    finite = [m for m in means if isfinite(m)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    span = high - low
    if not isfinite(span) or span <= 1e-12 * max(abs(low), abs(high)):
        return "".join(FLAT if isfinite(m) else NOT_FINITE for m in means)
    top = len(BARS) - 1
    return "".join(
        BARS[round((m - low) / span * top)] if isfinite(m) else NOT_FINITE for m in means
    )


def ranges(numbers: Iterable[int]) -> str:
    """`0, 3, 8–15` of a set of numbers."""
    out: list[list[int]] = []
    for n in sorted(set(numbers)):
        if out and out[-1][1] == n - 1:
            out[-1][1] = n
        else:
            out.append([n, n])
    return ", ".join(
        str(a) if a == b else f"{a}, {b}" if b == a + 1 else f"{a}–{b}" for a, b in out
    )


def rank_name(rank: int, node: str, local_rank: int) -> str:
    """A rank at its first mention."""
    return f"rank {rank} ({clean(node)}, local {local_rank})" if node else f"rank {rank}"


def shorten(text: str, width: int) -> str:
    """At most `width` characters, the middle left out: both ends of a key tell it apart."""
    if len(text) <= width:
        return text
    if width < 3:
        return text[: max(width, 0)]
    head = (width - 1) // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"
