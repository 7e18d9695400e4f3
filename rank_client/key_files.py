"""Keys that stand in no variable but in a file of a vendor's package: those of ClearML's
`clearml.conf` and of Ultralytics' `settings.json`. Neptune's package keeps none.

The files are not parsed: whatever comes after a name such as `secret_key` in them, in the notations
of HOCON, JSON and YAML, is a key, and so is the password of a URL.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping

MAX_FILE_BYTES = 256 << 10  #: theirs have some 20 KiB; no more than this is looked at

#: variables that name ClearML's file, and the files that it looks for in the home directory
CLEARML_VARIABLES = ("CLEARML_CONFIG_FILE", "TRAINS_CONFIG_FILE")
CLEARML_FILES = ("clearml.conf", "trains.conf")
ULTRALYTICS_FILES = ("Ultralytics/settings.json", "Ultralytics/settings.yaml")

_COMMENT = re.compile(r"^\s*(?:#|//).*$", re.MULTILINE)
_NAMED = re.compile(  # its first letter is one of a few: most places are passed by at once
    r"[kKsStTpP](?i:(?<=k)ey|(?<=s)ecrets?|(?<=t)oken|(?<=p)ass(?:wd|word)?)[\"']?\s{0,4}[=:]\s{0,4}"
    r"(?:\"\"\"([^\"\n]*)\"\"\"|\"([^\"\n]*)\"|'([^'\n]*)'|([^\s\"',{}\[\]]+))"
)


def texts(environ: Mapping[str, str]) -> Iterator[str]:
    """What stands in each of these files that is there, without comments; nothing raises."""
    for path in _paths(environ):
        yield _COMMENT.sub("", _read(path))


def keys(text: str) -> Iterator[str]:
    """The value after each name that is a key's."""
    for match in _NAMED.finditer(text):
        yield next(filter(None, match.groups()), "")


def _paths(environ: Mapping[str, str]) -> list[str]:
    home = environ.get("HOME") or os.path.expanduser("~")  # noqa: PTH111 - it raises nothing
    config = environ.get("XDG_CONFIG_HOME") or f"{home}/.config"
    named = [_expanded(environ[name], home) for name in CLEARML_VARIABLES if environ.get(name)]
    folders = {config, f"{home}/.config", environ.get("YOLO_CONFIG_DIR") or config}
    return [
        *named,
        *(f"{home}/{name}" for name in CLEARML_FILES),
        *(f"{folder}/{name}" for folder in sorted(folders) for name in ULTRALYTICS_FILES),
    ]


def _expanded(path: str, home: str) -> str:
    return os.path.expandvars(f"{home}{path[1:]}" if path.startswith("~/") else path)


def _read(path: str) -> str:
    """Empty where there is no such file; a pipe of that name holds nobody up."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except (OSError, ValueError):
        return ""
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return ""
        return os.read(fd, MAX_FILE_BYTES).decode(errors="replace")
    except OSError:
        return ""
    finally:
        os.close(fd)
