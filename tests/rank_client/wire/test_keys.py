"""Keys: what one secret gives, and that a keyfile is nobody else's."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rank_client.wire.keys import (
    ANY_RUN,
    BadKey,
    Key,
    key_of,
    parse_secret,
    read_keyfile,
    write_keyfile,
)

SECRET = bytes(range(32))


@given(st.binary(min_size=32, max_size=32), st.sampled_from([ANY_RUN, "a", "b"]))
def test_both_sides_derive_the_same_pairs(secret: bytes, run: str) -> None:
    """The keys follow from secret and run alone; server and client have different ones."""
    key, other = Key(secret, run), Key(secret, run)
    assert key.server_secret() == other.server_secret()
    assert key.client_secret() == other.client_secret()
    assert len({key.server_secret(), key.client_secret(), secret}) == 3


def test_a_run_has_a_client_key_of_its_own() -> None:
    """The same secret gives another client key for each run, and one server key for all."""
    keys = [Key(SECRET, run) for run in (ANY_RUN, "a", "b")]
    assert len({key.client_secret() for key in keys}) == 3
    assert len({key.server_secret() for key in keys}) == 1


def test_a_key_does_not_print_its_secret() -> None:
    """Neither repr nor str of a key shows what it holds."""
    assert SECRET.hex()[:8] not in f"{Key(SECRET)!r} {Key(SECRET)}"
    assert "\\x01" not in repr(Key(SECRET))


@pytest.mark.parametrize(
    "text",
    [
        SECRET.hex(),
        SECRET.hex().upper() + "\n",
        base64.b64encode(SECRET).decode(),
        base64.urlsafe_b64encode(b"\xfb" * 32).decode(),
    ],
)
def test_a_secret_is_hex_or_base64(text: str) -> None:
    """64 hex digits, or base64 in either alphabet, with or without a newline."""
    assert parse_secret(text, "it") in (SECRET, b"\xfb" * 32)


@pytest.mark.parametrize("text", ["", "password", "00" * 31, "00" * 33, "zz" * 32, "é" * 44])
def test_what_is_no_secret_is_refused_without_being_told(text: str) -> None:
    """A word, or another number of bytes, is no secret; the message does not repeat it."""
    with pytest.raises(BadKey, match="RANKGATE_SECRET must be 32") as error:
        parse_secret(text, "RANKGATE_SECRET")
    assert not text or text not in str(error.value)


def test_the_environment_names_a_file_or_the_secret(tmp_path: Path) -> None:
    """RANKGATE_KEYFILE goes before RANKGATE_SECRET; with neither there is no key."""
    write_keyfile(tmp_path / "k", Key(SECRET, "r1"))
    other = "11" * 32
    assert key_of({}) is None
    assert key_of({"RANKGATE_KEYFILE": "", "RANKGATE_SECRET": ""}) is None
    assert key_of({"RANKGATE_SECRET": other}) == Key(bytes.fromhex(other))
    both = {"RANKGATE_SECRET": other, "RANKGATE_KEYFILE": str(tmp_path / "k")}
    assert key_of(both) == Key(SECRET, "r1")


@pytest.mark.parametrize("umask", [0, 0o077])
def test_a_keyfile_is_written_private_and_read_back(tmp_path: Path, umask: int) -> None:
    """Mode 0600 in directories of mode 0700, whatever the umask; what is read is what was
    written."""
    path = tmp_path / "new" / "k"
    key = Key(SECRET, "r1", "x" * 40)
    before = os.umask(umask)
    try:
        write_keyfile(path, key)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert read_keyfile(path) == key


def test_a_keyfile_is_never_replaced(tmp_path: Path) -> None:
    """Writing where a file or a link is fails, and leaves both as they are."""
    path, link = tmp_path / "k", tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere")
    write_keyfile(path, Key(SECRET))
    for taken in (path, link):
        with pytest.raises(BadKey, match="there already"):
            write_keyfile(taken, Key(bytes(32)))
    assert read_keyfile(path) == Key(SECRET)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o700])
def test_a_private_keyfile_is_read(tmp_path: Path, mode: int) -> None:
    """What nobody else can read is fine, whatever the owner may do."""
    write_keyfile(tmp_path / "k", Key(SECRET))
    (tmp_path / "k").chmod(mode)
    assert read_keyfile(tmp_path / "k") == Key(SECRET)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o666])
def test_a_keyfile_that_others_can_open_is_refused(tmp_path: Path, mode: int) -> None:
    """Any right of group or others is too much; the message has the line that mends it."""
    path = tmp_path / "k"
    write_keyfile(path, Key(SECRET))
    path.chmod(mode)
    with pytest.raises(BadKey, match=f"chmod 600 {path}"):
        read_keyfile(path)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_a_directory_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    """Where others may put a file, none is read and none written."""
    place = tmp_path / "place"
    place.mkdir(0o700)
    write_keyfile(place / "k", Key(SECRET))
    place.chmod(mode)
    with pytest.raises(BadKey, match=f"chmod go-w {place}"):
        read_keyfile(place / "k")
    with pytest.raises(BadKey, match=f"chmod go-w {place}"):
        write_keyfile(place / "k2", Key(SECRET))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("what", ["file", "directory"])
def test_a_keyfile_of_somebody_else_is_refused(tmp_path: Path, what: str) -> None:
    """A file, or its directory, that belongs to another user is not trusted."""
    place = tmp_path / "place"
    write_keyfile(place / "k", Key(SECRET))
    os.chown(place / "k" if what == "file" else place, 12345, 12345)
    with pytest.raises(BadKey, match="belongs to uid 12345" if what == "file" else "others may"):
        read_keyfile(place / "k")


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    """A link is not followed, a pipe does not make us wait, and what is not there is said."""
    write_keyfile(tmp_path / "k", Key(SECRET))
    (tmp_path / "link").symlink_to(tmp_path / "k")
    os.mkfifo(tmp_path / "pipe", 0o600)
    (tmp_path / "directory").mkdir()
    wants = {
        "link": "symbolic link",
        "pipe": "not a regular file",
        "directory": "not a regular file",
        "none": "No such file",
        "none/none": "No such file",
    }
    for name, why in wants.items():
        with pytest.raises(BadKey, match=why):
            read_keyfile(tmp_path / name)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not json",
        "[]",
        "{}",
        '"' + "00" * 32 + '"',
        "[" * 4000,
        json.dumps({"secret": "short"}),
        json.dumps({"secret": 7}),
        json.dumps({"secret": "00" * 32, "run": "../x"}),
        json.dumps({"secret": "00" * 32, "run": 7}),
        json.dumps({"secret": "00" * 32, "server": "short"}),
        json.dumps({"secret": "00" * 32, "server": ["x"]}),
        json.dumps({"secret": "00" * 32, "more": "x" * 5000}),
    ],
)
def test_a_file_that_holds_no_key_is_refused(tmp_path: Path, text: str) -> None:
    """Whatever stands in it, the error is ours and names the file."""
    path = tmp_path / "k"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(BadKey, match=str(path)):
        read_keyfile(path)
