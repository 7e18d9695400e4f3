"""Another user of the same node: what he can connect to, read, or put in our way."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from gateway import app
from gateway.ingest import sockets
from rank_client import orphans, rendezvous, spool_place
from rank_client.wire.disk import OsDisk
from tests.flow.job import ROOT

from .row import Row, careless, needs_root, nothing, refused, without

_STRANGER = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
what, path = sys.argv[1:]
try:
    if what == "connect":
        socket.socket(socket.AF_UNIX).connect(path)
    elif what == "read":
        open(path, "rb").read()
    else:
        os.listdir(path)
except PermissionError:
    sys.exit(13)
"""

_SERVE = """
import os, pathlib, signal, sys
from gateway import app
from gateway.config import load
os.umask(0)
app.PRIVATE = int(sys.argv[2])
leave = lambda where, guard: os.kill(os.getpid(), signal.SIGTERM)
app.serve(pathlib.Path(sys.argv[1]), load(None), False, True, leave)
"""


@contextmanager
def open_place() -> Iterator[Path]:
    """A folder that everybody may enter, as /tmp is: what is private in it is so by itself."""
    place = Path(tempfile.mkdtemp(prefix="rankgate-test-"))
    place.chmod(0o755)
    try:
        yield place
    finally:
        shutil.rmtree(place)


def stranger_may(what: str, path: Path) -> bool:
    words = (sys.executable, "-I", "-S", "-c", _STRANGER, what, str(path))
    code = subprocess.run(words, check=False).returncode
    assert code in (0, 13), f"the stranger stumbled over something else: {code}"
    return code == 0


# --- reading and connecting ----------------------------------------------------------------------


def cannot_connect(_: Path) -> None:
    """Though its folder should be open to all, the socket is not."""
    needs_root()
    with open_place() as place, careless():
        router = sockets.bind([f"ipc://{place}/s"])
        try:
            assert not stranger_may("connect", place / "s")
        finally:
            router.context.destroy(0)


def cannot_read_logs(_: Path) -> None:
    needs_root()
    with open_place() as place, careless():
        disk = OsDisk()
        for make in (disk.create, disk.open_edit):
            path = place / make.__name__
            disk.close(make(str(path)))
            assert not stranger_may("read", path)


def cannot_enter(_: Path) -> None:
    needs_root()
    with open_place() as place, careless():
        OsDisk().make_dir(str(place / "stream"))
        assert not stranger_may("list", place / "stream")


def readable(patched: Any) -> None:
    flags = os.O_RDWR | os.O_CREAT
    for name in ("create", "open_edit"):
        opened = lambda _, path: os.open(path, flags, 0o666)  # noqa: E731
        opened.__name__ = name
        patched.setattr(OsDisk, name, opened)


def all_is_private(root: Path) -> None:
    """Everything a gateway leaves in a folder that was open to all is for its user alone."""
    data = root / "data"
    data.mkdir(mode=0o755)
    words = (sys.executable, "-c", _SERVE, str(data), str(app.PRIVATE))
    subprocess.run(words, cwd=ROOT, check=True, stderr=subprocess.DEVNULL, timeout=60)
    made = sorted(data.rglob("*"))
    assert {"gateway.json", "ingest.json", "supervisor.json"} <= {p.name for p in made}
    assert [p.name for p in made if p.lstat().st_mode & 0o077] == []


def log_is_private(root: Path) -> None:
    with careless(), patch.object(rendezvous, "gateway_command", lambda *_: ["true"]):
        assert rendezvous.start_gateway(root, {})
    assert (root / "gateway.log").stat().st_mode & 0o777 == 0o600


# --- what he put there before we came ------------------------------------------------------------


def elsewhere(place: Path) -> type[Path]:
    """`Path`, with the shared folder of sockets in a place of the test's own."""

    class Elsewhere(type(Path())):  # type: ignore[misc]
        def __new__(cls, *parts: object) -> Path:
            text = "/".join(map(str, parts))
            if text.startswith("/run/user/"):
                return place / "none"
            return place / "shared" if text.startswith("/tmp/rankgate-") else Path(text)

    return Elsewhere


def no_foreign_socket_folder(root: Path) -> None:
    """A link, or a folder others may enter, where our socket's folder would be."""
    (root / "his").mkdir(mode=0o700)
    with patch.object(rendezvous, "Path", elsewhere(root)):
        (root / "shared").symlink_to(root / "his")
        assert refused(lambda: rendezvous.socket_dir(), PermissionError)
        (root / "shared").unlink()
        (root / "shared").mkdir()
        (root / "shared").chmod(0o755)
        assert refused(lambda: rendezvous.socket_dir(), PermissionError)


@contextmanager
def as_user(uid: int) -> Iterator[None]:
    """What we find belongs to somebody else than `uid`, whom we now take ourselves for."""
    with patch.object(os, "getuid", lambda: uid):
        yield


def no_foreign_data_folder(root: Path) -> None:
    data = root / "data"
    data.mkdir()
    if os.geteuid() == 0:
        os.chown(data, 65534, 65534)
    with as_user(4321), patch.object(rendezvous, "gateway_command", lambda *_: ["true"]):
        assert refused(lambda: rendezvous.start_gateway(data, {}), PermissionError)
        assert refused(lambda: app.make_data_dir(data), app.RankgateError)


def without_owner(patched: Any) -> None:
    patched.setattr(rendezvous, "check_owner", nothing)
    patched.setattr(app, "check_owner", nothing)


def no_foreign_spool(root: Path) -> None:
    """Nothing is written into a spool of somebody else's, and nothing of it is shipped."""
    stream = root / "spool" / "r" / ("a" * 32)
    stream.mkdir(parents=True)
    with as_user(4321):
        assert spool_place.spool_dir({"RANKGATE_SPOOL": str(root / "spool")}, "r", nothing) is None
        assert list(orphans.stream_directories(root / "spool")) == []


def everything_is_ours(patched: Any) -> None:
    patched.setattr(Path, "lstat", lambda path: Owned(path.stat()))


class Owned:
    """What stat told, as if it were ours."""

    def __init__(self, real: os.stat_result) -> None:
        self.st_uid, self.st_mode = os.getuid(), real.st_mode


def follows_no_link(root: Path) -> None:
    """A link that was put in the place of a log leads nowhere."""
    (root / "his").write_bytes(b"")
    (root / "log").symlink_to(root / "his")
    disk = OsDisk()
    opens: tuple[Callable[[str], int], ...] = (
        disk.open_append, disk.open_read, disk.open_edit, disk.lock,
    )  # fmt: skip
    for opened in opens:
        assert refused(lambda opened=opened: opened(str(root / "log")), OSError)


THREAT = "another user of the node"

ROWS = [
    Row(THREAT, "the socket is 0600", cannot_connect, without(sockets.os, "umask", nothing)),
    Row(THREAT, "logs are 0600", cannot_read_logs, readable),
    Row(
        THREAT,
        "their folders are 0700",
        cannot_enter,
        without(OsDisk, "make_dir", lambda _, path: Path(path).mkdir()),
    ),
    Row(THREAT, "a gateway's files are private", all_is_private, without(app, "PRIVATE", 0)),
    Row(
        THREAT,
        "its log is 0600",
        log_is_private,
        without(rendezvous, "_private", lambda path, flags: os.open(path, flags, 0o666)),
    ),
    Row(
        THREAT,
        "the socket's folder is checked",
        no_foreign_socket_folder,
        without(rendezvous, "socket_dir", nothing),
    ),
    Row(THREAT, "the data folder's owner is checked", no_foreign_data_folder, without_owner),
    Row(THREAT, "the spool's owner is checked", no_foreign_spool, everything_is_ours),
    Row(THREAT, "no link is followed", follows_no_link, without(os, "O_NOFOLLOW", 0)),
]
