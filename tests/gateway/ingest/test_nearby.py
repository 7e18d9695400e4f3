"""A file that a rank of this node keeps is taken from its disk, or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.ingest import nearby
from gateway.ingest.media import CHUNK_BYTES, Blob, blob_path
from rank_client.wire.disk import OsDisk

CONTENT = os.urandom(3 * CHUNK_BYTES + 17)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def blob(run_dir: Path, near: Path) -> Blob:
    made = Blob.announced(OsDisk(), "r", run_dir, SHA256, len(CONTENT))
    made.near = str(near)
    return made


def send_chunks(one: Blob) -> None:
    for n in range(one.high_water, one.chunks):
        one.write(n + 1, CONTENT[n * CHUNK_BYTES : (n + 1) * CHUNK_BYTES])
    one.finish()


def test_the_bytes_are_taken_from_the_disk(tmp_path: Path) -> None:
    """The file is whole without a chunk, and the rank's own is untouched."""
    near = tmp_path / "snapshot"
    near.write_bytes(CONTENT)
    one = blob(tmp_path / "run", near)
    one.open()
    assert one.high_water == one.chunks == 4
    one.finish()
    assert blob_path(tmp_path / "run", SHA256).read_bytes() == CONTENT
    assert near.read_bytes() == CONTENT
    assert near.stat().st_nlink == 1


def other_bytes(path: Path) -> None:
    path.write_bytes(bytes(len(CONTENT)))


def too_long(path: Path) -> None:
    path.write_bytes(CONTENT + b"more")


def link(path: Path) -> None:
    path.with_suffix(".real").write_bytes(CONTENT)
    path.symlink_to(path.with_suffix(".real"))


def fifo(path: Path) -> None:
    os.mkfifo(path)


def nothing(path: Path) -> None:
    pass


@pytest.mark.parametrize("make", [other_bytes, too_long, link, fifo, Path.mkdir, nothing])
def test_what_is_not_the_snapshot_is_not_taken(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    """Other bytes, another size, a link, a pipe, a folder: then the bytes are asked for."""
    make(tmp_path / "snapshot")
    one = blob(tmp_path / "run", tmp_path / "snapshot")
    one.open()
    assert one.high_water == 0
    send_chunks(one)
    assert blob_path(tmp_path / "run", SHA256).read_bytes() == CONTENT


def test_a_disk_without_room_takes_nothing_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where little is free the bytes come in chunks, which credit can stop."""
    monkeypatch.setattr(nearby, "FREE_BYTES", 1 << 60)
    (tmp_path / "snapshot").write_bytes(CONTENT)
    one = blob(tmp_path / "run", tmp_path / "snapshot")
    one.open()
    assert one.high_water == 0
    send_chunks(one)


def test_what_came_in_chunks_goes_on_in_chunks(tmp_path: Path) -> None:
    """A file that a killed gateway had begun is not begun again."""
    (tmp_path / "snapshot").write_bytes(CONTENT)
    begun = blob(tmp_path / "run", tmp_path / "nowhere")
    begun.open()
    begun.write(1, CONTENT[:CHUNK_BYTES])
    begun.close()
    one = blob(tmp_path / "run", tmp_path / "snapshot")
    one.open()
    assert one.high_water == 1
    send_chunks(one)
