"""The hook for trainings whose code nobody changes: `yolo train …`, and versions before 8.4.140.

This folder goes on PYTHONPATH (`rankgate run --ultralytics` puts it there), so that every Python
of the job runs `sitecustomize.py` when it starts: the workers of Ultralytics' DDP too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

SWITCH = "RANKGATE_ULTRALYTICS"  #: the hook does something only where this is "1"
FOLDER = Path(__file__).parent


def hooked(environ: Mapping[str, str]) -> dict[str, str]:
    """An environment whose Pythons log the trainings of Ultralytics."""
    before = environ.get("PYTHONPATH")
    path = f"{FOLDER}:{before}" if before else str(FOLDER)
    return {**environ, SWITCH: "1", "PYTHONPATH": path}
