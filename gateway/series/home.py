"""Was this series.db copied while somebody wrote to it? Then its pages are of different moments,
and may well read as if all were right.

The writer notes beside the file which file it is; a copy is another one. While it is open there is
a write-ahead log beside it, which goes when it is closed: a copy without one was made at rest.
"""

from __future__ import annotations

import os
from pathlib import Path


def note_home(series: Path) -> None:
    """This file is written here from now on."""
    home, place = Path(f"{series}-home"), _place(series)
    if _read(home) == place:
        return
    part = Path(f"{home}.{os.getpid()}")
    try:
        part.write_text(place)
        part.rename(home)
    except OSError:
        part.unlink(missing_ok=True)  # no room: until the next opening, copies are believed


def torn_copy(series: Path) -> bool:
    """Not to be believed: what it was made from, the journal beside it, is."""
    return _is_copy(series) and Path(f"{series}-wal").exists()


def resting_copy(series: Path) -> bool:
    """Whole, and nobody writes to it."""
    return _is_copy(series) and not Path(f"{series}-wal").exists()


def _is_copy(series: Path) -> bool:
    home = _read(Path(f"{series}-home"))
    return bool(home) and home != _place(series)


def _place(path: Path) -> str:
    try:
        found = path.stat()
    except OSError:
        return ""
    return f"{found.st_dev} {found.st_ino}"


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
