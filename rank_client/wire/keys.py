"""Names and keys both sides must agree on: which run ids there are, and what one secret gives.

A secret of 32 random bytes gives both key pairs of an encrypted connection, so nothing else has to
be handed over. A keyfile holds it, and may bind it to one run.
"""

from __future__ import annotations

import base64
import binascii
import errno
import hashlib
import hmac
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

SECRET_BYTES = 32
ANY_RUN = "*"  #: what a key that is bound to no run is bound to
MAX_KEYFILE_BYTES = 4096

_RUN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PUBLIC = re.compile(r"[!-~]{40}")  #: 32 bytes in Z85


class BadKey(ValueError):
    """A key that cannot be used; the text says why and what to do, and never the secret."""


@dataclass(frozen=True, slots=True)
class Key:
    """A secret, the run it is for, and the gateway's public key where another secret makes it."""

    secret: bytes = field(repr=False)
    run: str = ANY_RUN
    server: str = ""  #: Z85; empty: the secret is the gateway's own

    def server_secret(self) -> bytes:
        """The 32 bytes of the gateway's secret key."""
        return hmac.digest(self.secret, b"server", hashlib.sha256)

    def client_secret(self) -> bytes:
        """The 32 bytes of a rank's secret key: another one for each run."""
        return hmac.digest(self.secret, b"client:" + self.run.encode(), hashlib.sha256)


def valid_run_id(text: str) -> bool:
    """A run id names a directory, so it is never `.`, `..` or a path."""
    return _RUN_ID.fullmatch(text) is not None and text not in (".", "..")


def key_of(environ: Mapping[str, str]) -> Key | None:
    """The key of RANKGATE_KEYFILE, else of RANKGATE_SECRET, else None. Raises BadKey."""
    path, text = environ.get("RANKGATE_KEYFILE"), environ.get("RANKGATE_SECRET")
    if path:
        return read_keyfile(Path(path))
    return Key(parse_secret(text, "RANKGATE_SECRET")) if text else None


def parse_secret(text: str, source: str) -> bytes:
    """64 hex digits, or base64 of 32 bytes. Raises BadKey."""
    text = text.strip()
    try:
        secret = bytes.fromhex(text) if len(text) == 2 * SECRET_BYTES else _base64(text)
    except (ValueError, binascii.Error):
        secret = b""
    if len(secret) != SECRET_BYTES:
        raise BadKey(
            f"{source} must be {SECRET_BYTES} random bytes as hex or base64; make a keyfile with: "
            "rankgate keys new"
        )
    return secret


def _base64(text: str) -> bytes:
    return base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True)


def read_keyfile(path: Path) -> Key:
    """A keyfile that nobody else can read or put in its place. Raises BadKey."""
    try:
        content = _read_private(path)
    except OSError as error:
        link = error.errno == errno.ELOOP
        reason = "it is a symbolic link; name the file itself" if link else error.strerror
        raise BadKey(f"cannot read the keyfile {path}: {reason}") from None
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError):
        raw = None
    about = {"run": ANY_RUN, "server": "", **raw} if isinstance(raw, dict) else {}
    secret, run, server = (about.get(name) for name in ("secret", "run", "server"))
    if not (isinstance(secret, str) and isinstance(run, str) and isinstance(server, str)):
        raise BadKey(f"{path} is no keyfile; make one with: rankgate keys new")
    if run != ANY_RUN and not valid_run_id(run):
        raise BadKey(f"the keyfile {path} is for a run that cannot be: {run[:80]!r}")
    if server and not _PUBLIC.fullmatch(server):
        raise BadKey(f"the keyfile {path} has no readable public key of its gateway")
    return Key(parse_secret(secret, f"the secret in {path}"), run, server)


def _read_private(path: Path) -> bytes:
    """Raises BadKey, OSError. What is checked is what is read: by descriptor, never by name."""
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _check_directory(path.parent, os.fstat(directory))
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(path.name, flags, dir_fd=directory)
    finally:
        os.close(directory)
    try:
        _check_file(path, os.fstat(fd))
        return os.read(fd, MAX_KEYFILE_BYTES)
    finally:
        os.close(fd)


def _check_directory(path: Path, info: os.stat_result) -> None:
    if info.st_uid not in (os.geteuid(), 0) or info.st_mode & 0o022:
        raise BadKey(
            f"others may write {path}, and so put another keyfile there; move the keyfile to a "
            f"directory of yours, or run: chmod go-w {path}"
        )


def _check_file(path: Path, info: os.stat_result) -> None:
    if not stat.S_ISREG(info.st_mode):
        raise BadKey(f"the keyfile {path} is not a regular file")
    if info.st_uid not in (os.geteuid(), 0):
        raise BadKey(f"the keyfile {path} belongs to uid {info.st_uid}, not to you")
    if info.st_mode & 0o077:
        raise BadKey(f"others may read the keyfile {path}; run: chmod 600 {path}")


def write_keyfile(path: Path, key: Key) -> None:
    """A new keyfile of mode 0600; an existing file is never replaced. Raises BadKey."""
    about = {"secret": key.secret.hex(), "run": key.run, "server": key.server}
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_directory(path.parent, path.parent.stat())
        fd = os.open(path, flags, 0o600)
    except FileExistsError:
        raise BadKey(f"{path} is there already; remove it first, or give another path") from None
    except OSError as error:
        raise BadKey(f"cannot write the keyfile {path}: {error.strerror}") from None
    with os.fdopen(fd, "w") as file:
        json.dump({name: value for name, value in about.items() if value}, file)
        file.write("\n")
