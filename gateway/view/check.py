"""What one look at a machine found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Check:
    """`state`: ok | warn | bad; `text` is the finding, `advice` what to do about it."""

    name: str
    state: str
    text: str
    advice: str = ""
