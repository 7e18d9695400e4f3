"""What code a run came from: repository, commit, uncommitted changes, entry point, packages.

Collected once, by rank 0, in a thread that starts when `init` is done; without `git`, or outside a
repository, that part is left out. All of it goes through the redactor like any other parameter.
The thread imports nothing: a child that is forked meanwhile would wait for that module for ever.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..redact import Redactor
from ..wire import source as names
from .git import Git

SWITCH = "RANKGATE_CAPTURE_SOURCE"  #: 0 leaves all of this out
MAX_DIFF_BYTES = 500_000
CUT = f"\n# rankgate: cut after {MAX_DIFF_BYTES:,} bytes\n"
MAX_COMMAND_CHARACTERS = 4096
MAX_CPU_BYTES = 4096  #: of what the kernel tells of its processors: the first one's name
MAX_PACKAGES_CHARACTERS = 48_000  #: a parameter is one record, of at most 64 KiB
REDACT_CHARACTERS = 16_384  #: at a time: between two pieces the training goes on
PEM_CHARACTERS = 16_384  #: of a private key in a text, at most
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
        self._git = Git(environ)
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="rankgate-source", daemon=True)
        self._thread.start()

    def close(self, seconds: float) -> None:
        """Wait for what is being collected; later than that it is not logged, and no call of git
        is left behind."""
        try:
            self._thread.join(max(0.0, seconds))
        finally:  # also after a Ctrl-C
            self._git.stop()
            with self._lock:
                self._closed = True

    def _run(self) -> None:
        try:
            facts, diff = collect(self._git)
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


def collect(git: Git) -> tuple[dict[str, Fact], str]:
    """(facts by their names, uncommitted changes); what cannot be found out is left out."""
    script, module = _entry_point()
    here = _working_dir()
    facts: dict[str, Fact] = {}
    folder = script.parent if script else here
    root = git.ask(folder, "rev-parse", "--show-toplevel") if folder else ""
    diff = ""
    if root:
        top = Path(root)
        answers = {
            names.REPOSITORY: git.ask(top, "config", "--get", "remote.origin.url"),
            names.BRANCH: git.ask(top, "rev-parse", "--abbrev-ref", "HEAD"),
            names.COMMIT: git.ask(top, "rev-parse", "--verify", "HEAD"),
            names.COMMIT_MESSAGE: git.ask(top, "log", "-1", "--no-show-signature", "--format=%s"),
        }
        facts |= {name: answer for name, answer in answers.items() if answer}
        if names.COMMIT in facts:
            diff = _diff(git, top)
            facts[names.DIRTY] = bool(diff)
        here = here if here and here.is_relative_to(top) else top
        facts[names.WORKING_DIR] = here.relative_to(top).as_posix()
    if module:
        facts[names.ENTRY_POINT] = f"-m {module}"
    elif script and here and script.is_relative_to(here):
        facts[names.ENTRY_POINT] = script.relative_to(here).as_posix()
    elif script:
        facts[names.ENTRY_POINT] = script.name
    return facts | _machine(), diff


def _working_dir() -> Path | None:
    """None when somebody has deleted it meanwhile."""
    try:
        return Path.cwd()
    except OSError:
        return None


def _machine() -> dict[str, Fact]:
    """What the code runs on, asked of nobody but this process and the kernel."""
    pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    disk = os.statvfs("/")
    return {
        names.PYTHON: platform.python_version(),
        names.PYTHON_EXECUTABLE: sys.executable,
        names.COMMAND: _command(),
        names.PACKAGES: packages(sys.path),
        names.OS: platform.platform(),
        names.CPU: _cpu(),
        names.CPU_COUNT: os.cpu_count() or 0,
        names.MEMORY_GIB: round(pages * page_bytes / 2**30, 1),
        names.DISK_GIB: round(disk.f_blocks * disk.f_frsize / 2**30, 1),
    }


def _cpu() -> str:
    """The processor's name without its trade marks; its architecture where it has no name."""
    try:
        with Path("/proc/cpuinfo").open("rb") as file:
            text = file.read(MAX_CPU_BYTES).decode(errors="replace")
    except OSError:
        text = ""
    match = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    name = match[1] if match else platform.machine()  # to ask for more would start a process
    return " ".join(re.sub(r"\((?:R|TM)\)", "", name, flags=re.IGNORECASE).split())


def _entry_point() -> tuple[Path | None, str]:
    """(the script's path, the module's name where it was started with -m)."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    file = getattr(main, "__file__", None)
    script = Path(file).resolve() if file and Path(file).is_file() else None
    return script, str(spec.name).removesuffix(".__main__") if spec is not None else ""


def _diff(git: Git, top: Path) -> str:
    """The changes; of more than so many bytes whole lines, as half of a secret has no shape."""
    words = ("diff", "HEAD", "--no-color", "--no-ext-diff", "--no-textconv", "--submodule=short")
    text = git.output(top, *words, most_bytes=MAX_DIFF_BYTES + 1)
    if len(text.encode()) <= MAX_DIFF_BYTES:
        return text
    lines, newline, _ = text.encode()[:MAX_DIFF_BYTES].rpartition(b"\n")
    return (lines + newline).decode(errors="ignore") + CUT


def _command() -> str:
    """The words that this process was started with, as many as fit; none is cut."""
    command = " ".join(sys.orig_argv)
    if len(command) <= MAX_COMMAND_CHARACTERS:
        return command
    return command[: MAX_COMMAND_CHARACTERS + 1].rpartition(" ")[0]


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
