"""For which gateway a dead process's stream was meant.

The name of its run alone does not tell: two projects of a node may use the same one, and what is
shipped to the wrong gateway goes to the other project's backends.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def meant_for(
    hello: Mapping[str, Any], run: str, data_dir: Path, has_run: Callable[[str], bool]
) -> bool:
    """Is it this data directory's: by what it says itself, or as a run that was moved here?"""
    here = same_directory(hello, data_dir)
    address = str(hello.get("addr") or "")
    if not address.startswith("tcp://"):
        return here or (has_run(run) and not _is_data_dir(Path(str(hello.get("dir")))))
    if _port(address) in map(_port, _addresses(data_dir)):
        return here or has_run(run)
    return here and has_run(run)  # else it waits for the gateway it named


def same_directory(hello: Mapping[str, Any], data_dir: Path) -> bool:
    """Did the process name this data directory?"""
    return os.path.realpath(str(hello.get("dir"))) == os.path.realpath(data_dir)


def _is_data_dir(directory: Path) -> bool:
    """Does a gateway come there, who takes what is its own? One we may not look into does."""
    for name in ("gateway.lock", "runs"):
        try:
            (directory / name).lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            pass
        return True
    return False


def _addresses(data_dir: Path) -> list[str]:
    """Where the directory's gateway listens, or the one before it did."""
    try:
        found = json.loads((data_dir / "gateway.json").read_text())["addresses"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [a for a in found if isinstance(a, str) and a.startswith("tcp://")]


def _port(address: str) -> str:
    """What two addresses of one gateway have in common: its host has many names."""
    return address.rpartition(":")[2]
