"""The virtual environment of the loggers we are compared with: `python -m bench.competitors`.

Apart from ours, so that nothing of theirs gets into what is measured for us, or into a release.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent
ENVIRONMENT = HERE / ".venv-bench"
REQUIREMENTS = HERE / "requirements.txt"
STAMP = ENVIRONMENT / "installed.txt"  #: the requirements that were installed, written last


def python() -> Path:
    return ENVIRONMENT / "bin" / "python"


def ready() -> bool:
    """Is the environment there, with the versions that are pinned now?"""
    return STAMP.exists() and STAMP.read_text() == REQUIREMENTS.read_text()


def create() -> None:
    """Make it, or bring it up to date. Raises CalledProcessError when pip cannot."""
    if ready():
        return
    venv.create(ENVIRONMENT, with_pip=True)
    command = [python(), "-m", "pip", "install", "--quiet", "-r", REQUIREMENTS]
    subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr)
    STAMP.write_text(REQUIREMENTS.read_text())


if __name__ == "__main__":
    create()
