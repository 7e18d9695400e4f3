"""Where the gateway is, and starting one where there is none (one node only).

A data directory has one gateway. Its socket is named by the hash of the directory's real path, so
ranks find it without reading anything, and other directories and other users never meet it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

#: bytes of gateway.lock, each locked by one owner for as long as it lives
LOCK_GATEWAY, LOCK_INGEST, LOCK_RULES, LOCK_STARTER = range(4)

START_SECONDS = 10.0
MAX_PORT = 65_535

#: what a gateway must not inherit from the rank that happened to start it
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")
_RANK_PREFIXES = ("TORCHELASTIC_", "CLEARML_PROC_", "TRAINS_PROC_", "OMPI_", "PMIX_", "CUDA_")


def data_dir(environ: Mapping[str, str]) -> Path:
    try:
        return Path(environ.get("RANKGATE_DIR") or ".rankgate").absolute()
    except FileNotFoundError:  # the current directory was deleted
        return Path(f"/var/tmp/rankgate-{os.getuid()}-data")  # noqa: S108 - the owner is checked


def socket_dir() -> Path:
    """A directory of this user alone. Raises PermissionError when somebody else made it."""
    uid = os.getuid()
    runtime = Path(f"/run/user/{uid}")
    directory = runtime if runtime.is_dir() else Path(f"/tmp/rankgate-{uid}")  # noqa: S108
    directory.mkdir(mode=0o700, exist_ok=True)
    info = directory.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != uid or info.st_mode & 0o077:
        raise PermissionError(
            f"{directory} must be a directory of uid {uid} with mode 0700, as logs pass through "
            f"it; remove it or run: chmod 700 {directory}"
        )
    return directory


def check_owner(directory: Path) -> None:
    """Whoever made a data directory can read and change what is in it. Raises PermissionError."""
    owner = directory.stat().st_uid
    if os.getuid() not in (0, owner) and owner != 0:
        raise PermissionError(errno.EPERM, f"it belongs to uid {owner}", str(directory))


def ipc_address(directory: Path) -> str:
    digest = hashlib.sha256(os.fsencode(os.path.realpath(directory))).hexdigest()[:20]
    return f"ipc://{socket_dir()}/rankgate-{digest}"


def address_trouble(address: str) -> str:
    """Why nobody is ever reached at such an address, or nothing. ZeroMQ takes ports that there are
    not, and tries for ever."""
    if address.startswith("ipc://"):
        return ""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    if not address.startswith("tcp://") or not host or not re.fullmatch("[0-9]{1,9}", port):
        return "it lacks a protocol, host or port"
    return "" if 1 <= int(port) <= MAX_PORT else f"its port is not one of 1 to {MAX_PORT}"


def locked(lock_file: Path, which: int) -> bool:
    """Does some other process hold this byte of the lock file?"""
    try:
        fd = os.open(lock_file, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, which)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for a gateway: nothing that says `I am rank 3`."""
    return {
        name: value
        for name, value in environ.items()
        if name not in _RANK_VARIABLES and not name.startswith(_RANK_PREFIXES)
    }


def gateway_command(*arguments: str) -> list[str]:
    """Runs the gateway with the current directory kept off the import path: a user's own
    `gateway.py` beside the training script must not be taken for ours. A Ctrl-C, which reaches all
    processes of a terminal, is for whoever started it to act on."""
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "sys.path[:] = [p for p in sys.path if p]; "
        "from gateway.__main__ import main; main()"
    )
    return [sys.executable, "-c", code, *arguments]


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def start_gateway(
    directory: Path,
    environ: Mapping[str, str],
    config: str = "",
    sinks: Sequence[str] = (),
    bind: str = "",
) -> bool:
    """Start one detached, unless another process is just doing so. Raises OSError.

    `config` is a TOML file, `sinks` are `NAME[=offline]`, `bind` is where else to listen than on
    this node; none of them changes a gateway that runs.

    Elected by a lock on gateway.lock; the gateway takes its own byte of it, so that a start that
    comes too late simply leaves.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_owner(directory)
    configured = environ.get("RANKGATE_CONFIG", "")
    configured = str(Path(configured).absolute()) if configured else ""
    sinks = sinks or [name for name in environ.get("RANKGATE_SINKS", "").split(",") if name]
    lock_file = directory / "gateway.lock"
    fd = os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, LOCK_STARTER)
        with open(directory / "gateway.log", "ab", opener=_private) as log:
            process = subprocess.Popen(
                gateway_command("detached", str(directory), config or configured, bind, *sinks),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                close_fds=True,
                cwd="/",
                env=clean_environment(environ),
            )
        return process.wait(START_SECONDS) == 0
    except (BlockingIOError, subprocess.TimeoutExpired):
        return False
    finally:
        os.close(fd)
