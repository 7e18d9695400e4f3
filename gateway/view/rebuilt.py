"""A run copied while it was written: its series are made anew from its journal, in a folder that
goes when this process does. The copy itself may be read-only, and is not touched.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import apsw

from ..journal.writer import JournalDamaged
from ..rules.follow import rebuild
from ..series.home import torn_copy


def series_of(run_dir: Path) -> Path:
    """The folder whose series.db can be believed: the run's own, nearly always."""
    return _made_anew(run_dir) if torn_copy(run_dir / "series.db") else run_dir


@functools.cache
def _made_anew(run_dir: Path) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="rankgate-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "journal").symlink_to(run_dir.absolute() / "journal")
    try:
        rebuild(folder)
    except (OSError, apsw.Error, JournalDamaged):
        return run_dir  # whoever reads it says what is wrong with it
    return folder
