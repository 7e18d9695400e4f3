"""Rendezvous: a directory has one address, found by name alone, and safe from other users."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rank_client import rendezvous
from rank_client.rendezvous import (
    LOCK_GATEWAY,
    LOCK_INGEST,
    LOCK_STARTER,
    clean_environment,
    data_dir,
    ipc_address,
    locked,
    start_gateway,
)


@given(st.lists(st.text("abc/.é", min_size=1, max_size=300), min_size=2, max_size=2, unique=True))
def test_two_directories_never_meet(names: list[str]) -> None:
    """Directories with different real paths have different addresses, each short enough."""
    paths = [Path("/data") / name.lstrip("/") for name in names]
    addresses = [ipc_address(path) for path in paths]
    same = os.path.realpath(paths[0]) == os.path.realpath(paths[1])
    assert (addresses[0] == addresses[1]) == same
    assert all(len(a.removeprefix("ipc://").encode()) < 107 for a in addresses)


def test_a_directory_is_found_through_links(tmp_path: Path) -> None:
    """A link to a directory, or a path with dots, leads to the same address."""
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    assert ipc_address(tmp_path / "link") == ipc_address(real)
    assert ipc_address(real / ".." / "real") == ipc_address(real)


@pytest.fixture
def no_runtime_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """As on a node without /run/user: the socket's directory is then made in a shared place."""
    place = tmp_path / "shared"

    class Elsewhere(type(Path())):  # type: ignore[misc]
        def __new__(cls, *parts: object) -> Path:
            text = "/".join(map(str, parts))
            if text.startswith("/run/user/"):
                return tmp_path / "none"
            return place if text.startswith("/tmp/rankgate-") else Path(text)

    monkeypatch.setattr(rendezvous, "Path", Elsewhere)
    return place


def test_the_socket_directory_is_made_private(no_runtime_dir: Path) -> None:
    """The directory for sockets is made with mode 0700 whatever the umask."""
    before = os.umask(0)
    try:
        assert rendezvous.socket_dir() == no_runtime_dir
    finally:
        os.umask(before)
    assert no_runtime_dir.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701, 0o777])
def test_an_open_socket_directory_is_refused(no_runtime_dir: Path, mode: int) -> None:
    """A directory that others may enter is refused, with the line that mends it."""
    no_runtime_dir.mkdir()
    no_runtime_dir.chmod(mode)
    with pytest.raises(PermissionError, match="chmod 700"):
        rendezvous.socket_dir()


def test_a_link_or_file_in_its_place_is_refused(no_runtime_dir: Path, tmp_path: Path) -> None:
    """A symbolic link where the directory should be is not followed."""
    (tmp_path / "mine").mkdir(mode=0o700)
    no_runtime_dir.symlink_to(tmp_path / "mine")
    with pytest.raises(PermissionError):
        rendezvous.socket_dir()


def test_a_directory_of_another_user_is_refused(
    no_runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory that somebody else made is refused, even with the right mode."""
    no_runtime_dir.mkdir(mode=0o700)
    mine = os.getuid()
    monkeypatch.setattr(rendezvous.os, "getuid", lambda: mine + 1)
    with pytest.raises(PermissionError, match=f"uid {mine + 1}"):
        rendezvous.socket_dir()


def test_the_data_directory_is_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The data directory is RANKGATE_DIR or .rankgate here, always as an absolute path."""
    monkeypatch.chdir(tmp_path)
    assert data_dir({}) == tmp_path / ".rankgate"
    assert data_dir({"RANKGATE_DIR": ""}) == tmp_path / ".rankgate"
    assert data_dir({"RANKGATE_DIR": "a/b"}) == tmp_path / "a" / "b"


def test_a_gateway_gets_nothing_that_says_rank() -> None:
    """The environment of a gateway loses the variables of ranks and launchers, and keeps others."""
    environ = {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "TORCHELASTIC_RUN_ID": "x",
        "OMPI_COMM_WORLD_RANK": "3",
        "CUDA_VISIBLE_DEVICES": "0",
        "CLEARML_PROC_MASTER_ID": "1:2",
        "CLEARML_API_ACCESS_KEY": "k",
        "PATH": "/bin",
        "RANKGATE_RUN": "r",
    }
    assert clean_environment(environ).keys() == {"CLEARML_API_ACCESS_KEY", "PATH", "RANKGATE_RUN"}


HOLD = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.lockf(fd, fcntl.LOCK_EX, 1, int(sys.argv[2]))
print("held", flush=True)
sys.stdin.read()
"""


def holder(path: Path, which: int) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", HOLD, str(path), str(which)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_lock_is_seen_from_another_process_only_for_its_byte(tmp_path: Path) -> None:
    """Each byte of the lock file is a lock of its own; a missing file is held by nobody."""
    path = tmp_path / "gateway.lock"
    assert not locked(path, LOCK_GATEWAY)
    with holder(path, LOCK_GATEWAY):
        assert locked(path, LOCK_GATEWAY)
        assert not locked(path, LOCK_INGEST)
    assert not locked(path, LOCK_GATEWAY)


def test_while_one_starts_a_gateway_nobody_else_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several ranks that find no gateway one is elected; the others start nothing."""
    started: list[object] = []
    with holder(tmp_path / "gateway.lock", LOCK_STARTER):
        monkeypatch.setattr(rendezvous.subprocess, "Popen", lambda *a, **k: started.append(a))
        assert start_gateway(tmp_path, {}) is False
    assert not started


STARTED = """
import fcntl, os, sys
assert os.getcwd() == "/" and os.getsid(0) == os.getpid()
fd = os.open(sys.argv[1], os.O_RDWR)
try:
    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int(sys.argv[2]))
except OSError:
    sys.exit(0)
sys.exit("nobody holds the election")
"""


def test_the_starter_keeps_its_election_until_the_gateway_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one who starts a gateway makes the data directory with mode 0700 and holds the election
    while the gateway, in a session of its own, comes up; then it is free."""
    directory = tmp_path / "data"
    lock = directory / "gateway.lock"
    command = [sys.executable, "-S", "-c", STARTED, str(lock), str(LOCK_STARTER)]
    monkeypatch.setattr(rendezvous, "gateway_command", lambda *_: command)
    assert start_gateway(directory, {}) is True, (directory / "gateway.log").read_text()
    assert directory.stat().st_mode & 0o777 == 0o700
    assert not locked(lock, LOCK_STARTER)


def test_a_gateway_that_cannot_start_ends_the_election(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the gateway leaves at once, the starter is told so, and others may try."""
    monkeypatch.setattr(rendezvous, "gateway_command", lambda *_: ["/bin/false"])
    assert start_gateway(tmp_path, {}) is False
    assert not locked(tmp_path / "gateway.lock", LOCK_STARTER)


def test_the_gateway_is_ours_whatever_stands_beside_the_script(tmp_path: Path) -> None:
    """A user's own gateway.py in the current directory is not what is run."""
    (tmp_path / "gateway.py").write_text("raise SystemExit('not this one')")
    command = rendezvous.gateway_command()
    code = command[2].replace("from gateway.__main__ import main", "import gateway")
    code = code.replace("main()", "print(gateway.__file__)")
    out = subprocess.run(
        [command[0], "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(rendezvous.__file__).parents[1])},
    )
    assert out.stdout.strip().endswith("gateway/__init__.py"), out.stderr
