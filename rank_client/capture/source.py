"""What code a run came from: repository, commit, uncommitted changes, entry point, packages.

Collected once, by rank 0, in a thread that starts when `init` is done. `git` runs as a child with
a time limit for each call and a limit to what is read of it; without `git`, or outside a
repository, that part is left out. All of it goes through the redactor like any other parameter.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..redact import Redactor
from ..wire import source as names

SWITCH = "RANKGATE_CAPTURE_SOURCE"  #: 0 leaves all of this out
GIT_SECONDS = 5.0  #: the most that one call of git may take
MAX_DIFF_BYTES = 500_000
CUT = f"\n# rankgate: cut after {MAX_DIFF_BYTES:,} bytes\n"
MAX_ANSWER_BYTES = 4096  #: of all other answers of git
MAX_PACKAGES_CHARACTERS = 48_000  #: a parameter is one record, of at most 64 KiB
REDACT_CHARACTERS = 16_384  #: at a time: between two pieces the training goes on
PEM_CHARACTERS = 16_384  #: of a private key in a text, at most
#: no lock on the index, no question to a person, nothing fetched
GIT_ENVIRON = {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
Fact = str | int | float | bool

_INSTALLED = re.compile(r"(?P<name>[A-Za-z0-9._]+)-(?P<version>\d[^-]*)(?:-.*)?\.(?:dist|egg)-info")


class Source:
    """Collects in a daemon thread and hands over through the two calls it is given.

    `log_params` takes the map of facts, `log_diff` the text of the uncommitted changes; neither is
    called after `close`.
    """

    def __init__(
        self,
        log_params: Callable[[Mapping[str, Any]], None],
        log_diff: Callable[[bytes], None],
        clean: Redactor,
        environ: Mapping[str, str],
    ) -> None:
        self._log_params = log_params
        self._log_diff = log_diff
        self._clean = clean
        self._environ = {**environ, **GIT_ENVIRON}
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="rankgate-source", daemon=True)
        self._thread.start()

    def close(self, seconds: float) -> None:
        """Wait for what is being collected; later than that it is not logged."""
        self._thread.join(max(0.0, seconds))
        with self._lock:
            self._closed = True

    def _run(self) -> None:
        try:
            facts, diff = collect(self._environ)
            text = redacted(diff, self._clean) if diff else ""
            with self._lock:
                if self._closed:
                    return
                self._log_params(facts)
                if text:
                    self._log_diff(text.encode())
        except Exception:  # noqa: S110 - a run without it is as good, and nobody asked for it
            pass


def wanted(environ: Mapping[str, str], rank: int) -> bool:
    """One process tells for all: rank 0, or the only one there is."""
    return rank <= 0 and environ.get(SWITCH, "1") != "0"


def collect(environ: Mapping[str, str]) -> tuple[dict[str, Fact], str]:
    """(facts by their names, uncommitted changes); what cannot be found out is left out."""
    script, module = _entry_point()
    here = Path.cwd()
    facts: dict[str, Fact] = {}
    root = _git(environ, script.parent if script else here, "rev-parse", "--show-toplevel")
    diff = ""
    if root:
        top = Path(root)
        answers = {
            names.REPOSITORY: _git(environ, top, "config", "--get", "remote.origin.url"),
            names.BRANCH: _git(environ, top, "rev-parse", "--abbrev-ref", "HEAD"),
            names.COMMIT: _git(environ, top, "rev-parse", "--verify", "HEAD"),
        }
        facts |= {name: answer for name, answer in answers.items() if answer}
        if names.COMMIT in facts:
            diff = _diff(environ, top)
            facts[names.DIRTY] = bool(diff)
        here = here if here.is_relative_to(top) else top
        facts[names.WORKING_DIR] = here.relative_to(top).as_posix()
    if module:
        facts[names.ENTRY_POINT] = f"-m {module}"
    elif script:
        inside = script.is_relative_to(here)
        facts[names.ENTRY_POINT] = script.relative_to(here).as_posix() if inside else script.name
    return facts | _machine(), diff


def _machine() -> dict[str, Fact]:
    """What the code runs on, asked of nobody but this process and the kernel."""
    pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        names.PYTHON: platform.python_version(),
        names.PYTHON_EXECUTABLE: sys.executable,
        names.COMMAND: " ".join(sys.orig_argv)[:MAX_ANSWER_BYTES],
        names.PACKAGES: packages(sys.path),
        names.OS: platform.platform(),
        names.CPU_COUNT: os.cpu_count() or 0,
        names.MEMORY_GIB: round(pages * page_bytes / 2**30, 1),
    }


def _entry_point() -> tuple[Path | None, str]:
    """(the script's path, the module's name where it was started with -m)."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    file = getattr(main, "__file__", None)
    script = Path(file).resolve() if file and Path(file).is_file() else None
    return script, str(spec.name).removesuffix(".__main__") if spec is not None else ""


def _git(environ: Mapping[str, str], folder: Path, *words: str) -> str:
    """The answer's text, empty when git has none to give."""
    return _output(environ, folder, words, MAX_ANSWER_BYTES).strip()


def _diff(environ: Mapping[str, str], top: Path) -> str:
    words = ("diff", "HEAD", "--no-color", "--no-ext-diff", "--no-textconv", "--submodule=short")
    text = _output(environ, top, words, MAX_DIFF_BYTES + 1)
    if len(text.encode()) <= MAX_DIFF_BYTES:
        return text
    return text.encode()[:MAX_DIFF_BYTES].decode(errors="ignore") + CUT


def _output(environ: Mapping[str, str], folder: Path, words: Iterable[str], most_bytes: int) -> str:
    """What a call of git prints, up to `most_bytes`; empty when it fails or takes too long."""
    command = ["git", "-c", "core.fsmonitor=false", "-C", str(folder), *words]
    try:
        child = subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except OSError:  # no git, or no process to be had
        return ""
    late = threading.Timer(GIT_SECONDS, child.kill)
    late.daemon = True
    late.start()
    with child:
        assert child.stdout is not None
        data = child.stdout.read(most_bytes)
        if len(data) == most_bytes:
            child.kill()  # enough of it
    late.cancel()
    whole = child.returncode == 0 or len(data) == most_bytes
    return data.decode(errors="replace") if whole else ""


def packages(path: Iterable[str]) -> str:
    """`name==version` of every installed package, one a line, by name.

    Read from the names of folders: to parse their metadata would hold up the training.
    """
    found: dict[str, str] = {}
    for folder in path:
        try:
            entries = os.listdir(folder or ".")
        except OSError:
            continue
        for entry in entries:
            match = _INSTALLED.fullmatch(entry)
            if match:
                found.setdefault(match["name"].lower(), f"{match['name']}=={match['version']}")
    return "\n".join(found[name] for name in sorted(found))[:MAX_PACKAGES_CHARACTERS]


def redacted(text: str, clean: Redactor) -> str:
    """The text without secrets, in pieces of whole lines."""
    pieces: list[str] = []
    piece = ""
    for line in text.splitlines(keepends=True):
        # a private key is known by its first line and its last, so it stays in one piece
        if len(piece) > REDACT_CHARACTERS and "PRIVATE KEY" not in piece[-PEM_CHARACTERS:]:
            pieces.append(clean.text(piece))
            piece = ""
        piece += line
    pieces.append(clean.text(piece))
    return "".join(pieces)
