"""Keys that vendors' packages keep in files: found in the notations they use, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rank_client import key_files
from rank_client.redact import MARK, Redactor

CLEARML = """
# access_key: "a-commented-key"
// secret_key: "another-comment"
api {
    web_server: https://app.example.org
    files_server: "https://me:files-password@files.example.org"
    credentials {"access_key": "ACCESS-key-0", "secret_key": "SECRET-key-1"}
}
api.credentials.secret_key = \"\"\"triple-quoted-2\"\"\"
sdk.aws.s3 { key: "", secret: "", credentials: [{key: minio-key-3, secret: 'minio-4'}] }
sdk.azure.storage.containers: [{account_name: "me", account_key: "azure-key-5=="}]
agent { git_user: "someone-or-other", git_pass="git-pass-6", default_python: 3.11 }
"""
SETTINGS = '{"settings_version": "0.0.8", "runs_dir": "/long/enough", "api_key": "hub-key-7"}'


def environ(home: Path, **more: str) -> dict[str, str]:
    return {"HOME": str(home), **more}


def known(around: dict[str, str]) -> set[str]:
    return {key for text in key_files.texts(around) for key in key_files.keys(text)} - {""}


def test_clearml_keys(tmp_path: Path) -> None:
    """Names in braces, on a path, quoted in three ways or not at all; comments do not count."""
    (tmp_path / "clearml.conf").write_text(CLEARML)
    assert known(environ(tmp_path)) == {
        "ACCESS-key-0", "SECRET-key-1", "triple-quoted-2", "minio-key-3", "minio-4",
        "azure-key-5==", "git-pass-6",
    }  # fmt: skip


@pytest.mark.parametrize(
    "place", ["~/elsewhere.conf", "$PLACE/elsewhere.conf", "{}/elsewhere.conf"]
)
@pytest.mark.parametrize("name", ["CLEARML_CONFIG_FILE", "TRAINS_CONFIG_FILE"])
def test_clearml_file_of_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, name: str
) -> None:
    """The variable that names it, as the package reads it."""
    monkeypatch.setenv("PLACE", str(tmp_path))
    (tmp_path / "elsewhere.conf").write_text(CLEARML)
    assert "SECRET-key-1" in known(environ(tmp_path, **{name: place.format(tmp_path)}))


@pytest.mark.parametrize("variable", ["", "XDG_CONFIG_HOME", "YOLO_CONFIG_DIR"])
@pytest.mark.parametrize(
    ("name", "text"),
    [("settings.json", SETTINGS), ("settings.yaml", "api_key: hub-key-7\nuuid: 12")],
)
def test_ultralytics_settings(tmp_path: Path, variable: str, name: str, text: str) -> None:
    """In each of the folders it may have, of new versions and old ones."""
    folder = tmp_path / (variable or ".config") / "Ultralytics"
    folder.mkdir(parents=True)
    (folder / name).write_text(text)
    around = environ(tmp_path, **({variable: str(tmp_path / variable)} if variable else {}))
    assert known(around) == {"hub-key-7"}


def test_what_they_hold_is_a_secret(tmp_path: Path) -> None:
    """Keys, and the password of a URL, are replaced wherever they stand; the rest is not."""
    (tmp_path / "clearml.conf").write_text(CLEARML)
    redactor = Redactor(environ(tmp_path))
    assert redactor.text("x SECRET-key-1, files-password.") == f"x {MARK}, {MARK}."
    harmless = "a-commented-key https://app.example.org someone-or-other minio-4"  # that is short
    assert redactor.text(harmless) == harmless


def test_files_that_are_none(tmp_path: Path) -> None:
    """A folder, a pipe that nobody writes to, bytes of any kind, a file without end, no right to
    read, no file: nothing is found, nothing raises and nothing waits."""
    (tmp_path / "clearml.conf").mkdir()
    os.mkfifo(tmp_path / "trains.conf")
    odd = tmp_path / "odd"
    odd.write_bytes(bytes(range(256)) * 10 + b'\nsecret_key: "behind-the-bytes"\n')
    assert known(environ(tmp_path, CLEARML_CONFIG_FILE=str(odd))) == {"behind-the-bytes"}
    for other in ("/dev/zero", "/nowhere/at/all", "~nobody/x", "", "$UNSET/x"):
        assert known(environ(tmp_path, CLEARML_CONFIG_FILE=other)) == set()
    odd.write_bytes(b"x" * key_files.MAX_FILE_BYTES + b"\nsecret_key: beyond-the-limit\n")
    assert known(environ(tmp_path, CLEARML_CONFIG_FILE=str(odd))) == set()
