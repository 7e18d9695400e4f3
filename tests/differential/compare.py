"""Two records against each other, and against the differences that are meant."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from .record import Record

How = Literal["only original", "only gateway", "value"]


@dataclass(frozen=True)
class Difference:
    """One fact that the two records do not share."""

    how: How
    name: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.how}: {self.name} {self.detail}".rstrip()


@dataclass(frozen=True)
class Declared:
    """Differences that are meant: facts by a shell pattern, and the defect each of them mends."""

    how: How
    pattern: str
    why: str

    def covers(self, found: Difference) -> bool:
        # brackets would be a set of characters in a pattern: here they are themselves
        pattern = self.pattern.replace("[", "[[]")
        return self.how == found.how and fnmatchcase(found.name, pattern)


@dataclass(frozen=True)
class Renamed:
    """Facts that have another name on one side, which must not hide their values: all that match
    the regular expression get the name the other side has."""

    side: Literal["original", "gateway"]
    pattern: str
    name: str  #: may refer to the pattern's groups
    why: str

    def apply(self, record: Record) -> Record:
        """The record with other names. Raises AssertionError when two facts would have one name."""
        renamed = {re.sub(self.pattern, self.name, name): value for name, value in record.items()}
        assert len(renamed) == len(record), f"{self.name} stands for two facts of the {self.side}"
        return renamed

    def occurs(self, record: Record) -> bool:
        return any(re.search(self.pattern, name) for name in record)


def differences(original: Record, gateway: Record) -> list[Difference]:
    """All of them, in the order of their names."""
    found = []
    for name in sorted(original.keys() | gateway.keys()):
        if name not in gateway:
            found.append(Difference("only original", name, f"= {original[name]!r:.100}"))
        elif name not in original:
            found.append(Difference("only gateway", name, f"= {gateway[name]!r:.100}"))
        elif original[name] != gateway[name]:
            detail = f"{original[name]!r:.100} there, {gateway[name]!r:.100} here"
            found.append(Difference("value", name, detail))
    return found


def undeclared(found: list[Difference], declared: tuple[Declared, ...]) -> list[Difference]:
    return [one for one in found if not any(d.covers(one) for d in declared)]


def absent(found: list[Difference], declared: tuple[Declared, ...]) -> list[Declared]:
    """Declared differences that did not occur: what they say is no longer true."""
    return [one for one in declared if not any(one.covers(f) for f in found)]
