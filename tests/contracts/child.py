"""A sink's process in which the vendor's package hangs, or ends the process, in a request.

Usage: python -m tests.contracts.child HOW AT MARK RUN_DIR NAME CONFIG_JSON online

HOW is `hang`, `exit` or `live`. It befalls the AT-th request (or sync of a file) of the life that
makes the file MARK, and no later life.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from requests.adapters import HTTPAdapter

from gateway.sinks import loop, process

HANG_SECONDS = 6.0  #: instead of an hour
EXIT_CODE = 7  #: of the package that ends the process


def striking(real: Callable[..., Any], how: str, at: int, mark: Path) -> Callable[..., Any]:
    """`real`, whose call number `at` goes wrong once."""
    calls = 0

    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != at or mark.exists():
            return real(*arguments, **named)
        mark.touch()
        if how == "hang":
            threading.Event().wait()
        real(*arguments, **named)
        os._exit(EXIT_CODE)

    return call


def main() -> int:
    how, at, mark = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    loop.FETCH_ENTRIES = 6
    if how != "live" and not mark.exists():
        HTTPAdapter.send = striking(HTTPAdapter.send, how, at, mark)  # type: ignore[method-assign]
        os.fsync = striking(os.fsync, how, at, mark)
    if how == "hang" and not mark.exists():
        process.CALL_SECONDS = HANG_SECONDS
    return process.main(sys.argv[4:])


if __name__ == "__main__":
    sys.exit(main())
