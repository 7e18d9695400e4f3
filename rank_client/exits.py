"""How a process ends or splits in two, told to the runs that live in it.

No signal handler: what a signal kills is in the spool already.
"""

from __future__ import annotations

import atexit
import os
import sys
import weakref
from types import TracebackType
from typing import Protocol

_hooked = False


class Life(Protocol):
    """What is told of the end: a `Run`."""

    def _fail(
        self,
        kind: type[BaseException],
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...
    def _at_exit(self) -> None: ...
    def _become_child(self) -> None: ...


live: weakref.WeakSet[Life] = weakref.WeakSet()


def watch(run: Life) -> None:
    """Tell this run from now on. The exception hook is chained once per process."""
    global _hooked  # noqa: PLW0603 - hooks belong to the process, and there is one process
    live.add(run)
    if _hooked:
        return
    _hooked = True
    before = sys.excepthook

    def excepthook(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        try:
            _fail_all(kind, error, trace)
        except BaseException:  # noqa: S110 - another Ctrl-C, say: the user's own trace comes first
            pass
        before(kind, error, trace)

    sys.excepthook = excepthook


def _fail_all(
    kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
) -> None:
    if hasattr(sys, "ps1"):  # at a prompt a typo ends nothing
        return
    for run in list(live):
        run._fail(kind, error, trace)


def end_all() -> None:
    """At exit. An error that ended the process is looked up, as others set the hook too and some
    chain nothing."""
    last = getattr(sys, "last_value", None)
    try:
        if last is not None:
            _fail_all(type(last), last, last.__traceback__)
    except KeyboardInterrupt:
        pass  # pressed again while the error was put into words: the end is told without them
    for run in list(live):
        run._at_exit()


def _after_fork() -> None:
    for run in list(live):
        run._become_child()


# When this is imported, not when a run begins: the last handler registered runs first, so that
# those of the script, registered after its imports, may still log.
atexit.register(end_all)
os.register_at_fork(after_in_child=_after_fork)
