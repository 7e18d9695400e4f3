"""Files arrive chunk by chunk, and are there whole or not at all."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from gateway.ingest.media import CHUNK_BYTES, BadBlob, Blob, blob_path
from rank_client import media as client
from rank_client.wire.disk import OsDisk

CONTENT = os.urandom(2 * CHUNK_BYTES + 100)


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def chunks(content: bytes) -> list[bytes]:
    return [content[i : i + CHUNK_BYTES] for i in range(0, len(content), CHUNK_BYTES)]


def opened(tmp_path: Path, content: bytes = CONTENT) -> Blob:
    blob = Blob.announced(OsDisk(), "r", tmp_path, sha(content), len(content))
    blob.open()
    return blob


def write(blob: Blob, *pieces: bytes) -> None:
    for piece in pieces:
        blob.write(blob.high_water + 1, piece)


def test_both_sides_cut_alike() -> None:
    """The gateway expects chunks of the size the client makes."""
    assert CHUNK_BYTES == client.CHUNK_BYTES


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1])
def test_a_whole_file_stands_under_its_hash(tmp_path: Path, size: int) -> None:
    """After the last chunk the file is at its place, private, and no part file is left."""
    content = os.urandom(size)
    blob = opened(tmp_path, content)
    write(blob, *chunks(content))
    path = blob_path(tmp_path, sha(content))
    assert not path.exists()
    blob.finish()
    assert path.read_bytes() == content
    assert path.stat().st_mode & 0o077 == 0
    assert list(path.parent.iterdir()) == [path]


def test_a_restart_goes_on_with_the_part_file(tmp_path: Path) -> None:
    """Opened again, also after a torn write, a file goes on after its last whole chunk."""
    pieces = chunks(CONTENT)
    first = opened(tmp_path)
    write(first, pieces[0])
    first.close()
    part = Path(f"{first.path}.part")
    with part.open("ab") as file:
        file.write(b"torn")
    second = opened(tmp_path)
    assert second.high_water == 1
    write(second, *pieces[1:])
    second.finish()
    assert second.path.read_bytes() == CONTENT


def test_a_file_that_is_there_is_not_taken_again(tmp_path: Path) -> None:
    """A file the run has is whole at once, for whoever sends it next."""
    blob = opened(tmp_path)
    write(blob, *chunks(CONTENT))
    blob.finish()
    again = opened(tmp_path)
    assert again.whole
    assert again.high_water == again.chunks == 3
    again.finish()


def test_a_lie_about_the_hash_leaves_nothing(tmp_path: Path) -> None:
    """Bytes that do not have the announced hash are refused and removed, and the right ones can
    be sent afterwards."""
    blob = Blob.announced(OsDisk(), "r", tmp_path, sha(CONTENT), 5)
    blob.open()
    write(blob, b"wrong")
    with pytest.raises(BadBlob, match="sha256"):
        blob.finish()
    assert list(blob.path.parent.iterdir()) == []
    again = opened(tmp_path)
    assert again.high_water == 0
    again.close()


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES + 1])
def test_a_chunk_of_a_wrong_length_is_refused(tmp_path: Path, size: int) -> None:
    """Every chunk but the last is full, and none goes beyond the announced size."""
    blob = opened(tmp_path)
    with pytest.raises(BadBlob, match="length"):
        write(blob, bytes(size))
    assert blob.high_water == 0
    blob.close()


def test_nothing_goes_beyond_the_end(tmp_path: Path) -> None:
    """After the last chunk there is room for no other."""
    blob = opened(tmp_path, b"abc")
    write(blob, b"abc")
    with pytest.raises(BadBlob, match="length"):
        write(blob, b"")
    with pytest.raises(BadBlob, match="length"):
        write(blob, b"x")
    blob.close()


@pytest.mark.parametrize(
    ("sha256", "size"),
    [
        (None, 1),
        ("", 1),
        ("../../etc/passwd", 1),
        ("A" * 64, 1),
        ("a" * 63, 1),
        ("a" * 64 + "\n", 1),
        (b"a" * 64, 1),
        ("a" * 64, -1),
        ("a" * 64, "1"),
        ("a" * 64, None),
    ],
)
def test_announcements_that_make_no_sense(tmp_path: Path, sha256: Any, size: Any) -> None:
    """What is no sha256 or no size is refused before anything is made, so no name is a path."""
    with pytest.raises(BadBlob):
        Blob.announced(OsDisk(), "r", tmp_path, sha256, size)
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_the_place_of_the_part_file_is_not_followed(tmp_path: Path) -> None:
    """A symbolic link planted where the part file goes is an error, not a way out."""
    path = blob_path(tmp_path, sha(CONTENT))
    path.parent.mkdir(parents=True)
    Path(f"{path}.part").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"(?i)link"):
        opened(tmp_path)
    assert not (tmp_path / "elsewhere").exists()
