"""A row of the table of threats: what must hold, and how to take its defence out."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

set_umask = os.umask  #: the real one, whatever a row takes out
Remove = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Row:
    """`check` is given an empty folder; it passes with the defence, and fails once `remove` has
    taken that out."""

    threat: str
    defence: str
    check: Callable[[Path], None]
    remove: Remove


def without(target: Any, name: str, stand_in: Any) -> Remove:
    """Take a defence out by putting something harmless in the place of a product's attribute."""
    return lambda patch: patch.setattr(target, name, stand_in)


def nothing(*_: Any, **__: Any) -> None:
    """In the place of a check: it finds no fault."""


def refused(call: Callable[[], Any], *errors: type[BaseException]) -> bool:
    """Does it raise one of these?"""
    try:
        call()
    except errors:
        return True
    return False


@contextmanager
def careless() -> Any:
    """With the worst umask a user can have: what is private now is private by our own doing."""
    before = set_umask(0)
    try:
        yield
    finally:
        set_umask(before)


def needs_root() -> None:
    if os.getuid() != 0:
        pytest.skip("only root can be another user")
