"""Files that policy drops: asked for in `requests/drop`, entered in the journal, then removed.

Ingest alone removes from `media/`, by the thread that also writes there. Who asks says how much of
the journal it knew: a file that came in again since then stays. A request is gone once it is read;
who asked looks again, and asks again for what is still there.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

REQUEST = "drop"


def ask(run_dir: Path, cursor: int, reasons: dict[str, str]) -> None:
    """Ask for files by their sha256, each with its reason, as of the journal entry `cursor`."""
    folder = run_dir / "requests"
    folder.mkdir(mode=0o700, exist_ok=True)
    part = folder / f".{REQUEST}.{os.getpid()}"
    part.write_text(json.dumps({"cursor": cursor, "files": reasons}))
    part.rename(folder / REQUEST)


def take(request: Path) -> tuple[int, dict[str, str]]:
    """(cursor, sha256 → reason) of a request, which is gone then; nothing when it is no such."""
    try:
        found = json.loads(request.read_text())
        request.unlink()
        reasons = {str(sha256): str(reason) for sha256, reason in found["files"].items()}
        return int(found["cursor"]), reasons
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        request.unlink(missing_ok=True)
        return 0, {}
