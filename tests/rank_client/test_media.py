"""Files and pictures: a snapshot is whole or lost and told so; pictures can be read by others."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rank_client import media as media_module
from rank_client.images import figure_bytes, image_maker, png, table_bytes
from rank_client.media import (
    CHUNK_BYTES,
    COPY_TRIES,
    FileSource,
    MediaSender,
    Rewritten,
    blob_session,
    copy_unchanged,
    snapshot,
)
from rank_client.spool import Spool
from rank_client.wire import frames
from rank_client.wire.records import Kind
from tests.rank_client.read import on_disk

Image = pytest.importorskip("PIL.Image")


# --- snapshots -----------------------------------------------------------------------------------


def test_a_quiet_file_is_copied_as_it_is(tmp_path: Path) -> None:
    """A file nobody writes to is copied once, byte for byte."""
    (tmp_path / "a").write_bytes(os.urandom(5000))
    copy_unchanged(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def rewriting(monkeypatch: pytest.MonkeyPatch, change: Callable[[Path, int], None]) -> list[int]:
    """Make every copy be followed by `change(source, n)`, as by somebody else at that moment."""
    copies: list[int] = []
    copyfile = shutil.copyfile

    def copy_then_change(source: Path, target: Path) -> None:
        copyfile(source, target)
        copies.append(1)
        change(Path(source), len(copies))

    monkeypatch.setattr(media_module.shutil, "copyfile", copy_then_change)
    return copies


def grow(path: Path, n: int) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def touch(path: Path, n: int) -> None:
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(n, n))


def replace(path: Path, n: int) -> None:
    before = path.stat()
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize("change", [grow, touch, replace])
def test_a_file_that_is_rewritten_each_time_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path, int], None]
) -> None:
    """A change of size, time or inode during each of three copies is found, and told as such."""
    (tmp_path / "a").write_bytes(b"weights")
    copies = rewriting(monkeypatch, change)
    with pytest.raises(Rewritten, match="during each of 3 copies"):
        copy_unchanged(tmp_path / "a", tmp_path / "b")
    assert len(copies) == COPY_TRIES


def test_a_file_that_is_rewritten_once_is_copied_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a copy during which the file changed, the next quiet copy is what is kept."""
    (tmp_path / "a").write_bytes(b"weights")
    copies = rewriting(monkeypatch, lambda path, n: grow(path, n) if n == 1 else None)
    copy_unchanged(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"weightsmore"
    assert len(copies) == 2


@pytest.mark.parametrize("change", [grow, touch, replace])
def test_a_later_content_does_not_pass_for_the_one_that_was_logged(
    tmp_path: Path, change: Callable[[Path, int], None]
) -> None:
    """A file that is rewritten between the call and its copy is told of as such, not mixed up."""
    path = tmp_path / "a"
    path.write_bytes(b"epoch 1")
    logged = path.stat()
    change(path, 1)
    with pytest.raises(Rewritten, match="before it could be copied"):
        copy_unchanged(path, tmp_path / "b", logged)
    assert not (tmp_path / "b").exists()


def test_a_file_that_is_cut_while_it_is_copied_is_copied_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saving begins with an empty file: half of the old content is never kept."""
    (tmp_path / "a").write_bytes(b"old weights")

    def save(path: Path, n: int) -> None:
        if n == 1:
            os.truncate(path, 3)
            path.write_bytes(b"new weights!")

    rewriting(monkeypatch, save)
    copy_unchanged(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"new weights!"


def test_a_snapshot_is_a_clone_or_nothing(tmp_path: Path) -> None:
    """Where blocks cannot be shared there is no half-made target and never a hard link."""
    (tmp_path / "a").write_bytes(b"weights")
    if snapshot(tmp_path / "a", tmp_path / "b"):
        assert (tmp_path / "b").read_bytes() == b"weights"
        assert (tmp_path / "b").stat().st_ino != (tmp_path / "a").stat().st_ino
    else:
        assert not (tmp_path / "b").exists()
    assert (tmp_path / "a").stat().st_nlink == 1


# --- files as streams ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1])
def test_a_file_is_a_source_of_chunks(tmp_path: Path, size: int) -> None:
    """The chunks of a file, put together, are the file; its sha256 and length are told."""
    content = os.urandom(size)
    (tmp_path / "a").write_bytes(content)
    source = FileSource(tmp_path / "a")
    chunks = [source.read(n, 1) for n in range(1, source.last + 1)]
    assert b"".join(data for _, data in chunks) == content
    assert all(n == 1 for n, _ in chunks)
    assert source.read(source.last + 1, 1) == (0, b"")
    assert source.sha256 == hashlib.sha256(content).hexdigest()
    assert source.size_bytes == size
    source.close()


def test_two_senders_of_one_content_are_one_stream(tmp_path: Path) -> None:
    """A file's stream follows from run and content, so that whoever sends it continues it; in
    another run it is another."""
    (tmp_path / "a").write_bytes(b"same")
    (tmp_path / "b").write_bytes(b"same")
    a, b = FileSource(tmp_path / "a"), FileSource(tmp_path / "b")
    one = blob_session(a, "run", b"1" * 16, 5)
    two = blob_session(b, "run", b"2" * 16, 9)
    assert one.stream == two.stream
    assert one.stream != blob_session(a, "other", b"1" * 16, 5).stream
    hello = frames.read_control(two.tick(0.0)[0]).body
    assert (hello["kind"], hello["of"], hello["media"]) == ("blob", b"2" * 16, 9)
    a.close()
    b.close()


class Sending:
    """A MediaSender without a gateway."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.warned: list[str] = []
        self.spool = Spool(str(directory), {})
        self.media = MediaSender(
            directory / "media",
            "run",
            b"s" * 16,
            self.spool,
            lambda: None,
            lambda what, text: self.warned.append(what),
        )

    def wait_made(self) -> bool:
        return self.media.wait(time.monotonic() + 10, sent=False)


@pytest.fixture
def sending(tmp_path: Path) -> Iterator[Sending]:
    made = Sending(tmp_path)
    yield made
    made.media.close()
    made.spool.close()


def test_the_record_is_written_at_the_call(sending: Sending) -> None:
    """A file made in the call stands under its record's number when the call returns."""
    sending.media.add({"key": "k"}, lambda path: path.write_bytes(b"x") and None, now=True)
    [record] = on_disk(sending.directory)
    assert (record.kind, record.values) == (Kind.MEDIA, {"key": "k"})
    assert (sending.directory / "media" / "1").read_bytes() == b"x"


def test_a_copy_in_the_background_does_not_hold_the_call(sending: Sending) -> None:
    """What is copied later is only begun in the call; the record is there, the bytes follow."""
    go = threading.Event()

    def make(path: Path) -> None:
        assert go.wait(10)
        path.write_bytes(b"late")

    sending.media.add({"key": "k"}, make, now=False)
    assert len(on_disk(sending.directory)) == 1
    assert not (sending.directory / "media" / "1").exists()
    go.set()
    assert sending.wait_made()
    assert (sending.directory / "media" / "1").read_bytes() == b"late"


@pytest.mark.parametrize(
    ("error", "reason"),
    [(Rewritten("again"), "media lost (rewritten)"), (FileNotFoundError("gone"), "media lost")],
)
def test_a_file_that_cannot_be_kept_is_told_of(
    sending: Sending, error: Exception, reason: str
) -> None:
    """A background copy that fails leaves a LOSS record that names its media record and why."""

    def make(path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    sending.media.add({"key": "k"}, make, now=False)
    assert sending.wait_made()
    loss = on_disk(sending.directory)[1]
    assert loss.kind == Kind.LOSS
    assert (loss.values["media"], loss.values["reason"]) == (1, reason)
    assert list((sending.directory / "media").iterdir()) == []
    assert sending.warned == [reason]


def test_a_file_that_fails_in_the_call_leaves_nothing(sending: Sending) -> None:
    """A file that cannot be made in the call raises there, with no record and no half file."""

    def make(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("no such thing")

    with pytest.raises(OSError, match="no such"):
        sending.media.add({"key": "k"}, make, now=True)
    assert on_disk(sending.directory) == []
    assert list((sending.directory / "media").iterdir()) == []


def test_a_file_sent_while_they_are_counted_hides_no_other(
    sending: Sending, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits is reckoned against the cap, though the sender removes a file at that moment."""
    sending.spool.cap_bytes = 1000
    waiting = sending.directory / "media"
    waiting.mkdir()
    for name in "123":
        (waiting / name).write_bytes(bytes(900))
    lstat = os.lstat

    def sent_first(path: str) -> os.stat_result:
        (waiting / "1").unlink(missing_ok=True)
        return lstat(path)

    monkeypatch.setattr(os, "lstat", sent_first)
    sending.media.add({}, lambda part: None, now=True)
    monkeypatch.undo()
    assert sum(sending.spool.refused.values()) == 1
    assert sorted(path.name for path in waiting.iterdir()) == ["2", "3"]


def test_waiting_has_a_deadline(sending: Sending) -> None:
    """Waiting for files ends at its deadline when nobody takes them."""
    sending.media.add({"key": "k"}, lambda path: path.write_bytes(b"x") and None, now=True)
    assert sending.media.wait(time.monotonic() + 0.01, sent=True) is False


# --- pictures ------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.data())
def test_a_png_holds_the_pixels(
    height: int, width: int, channels: int, data: st.DataObject
) -> None:
    """Another reader finds every pixel of grey, grey+alpha, RGB and RGBA pictures."""
    size = height * width * channels
    pixels = data.draw(st.binary(min_size=size, max_size=size))
    picture = Image.open(io.BytesIO(png(height, width, channels, pixels)))
    picture.load()
    assert picture.mode == {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[channels]
    assert picture.size == (width, height)
    assert picture.tobytes() == pixels


def made(value: Any, path: Path) -> Any:
    image_maker(value)(path)
    return np.asarray(Image.open(path))


GREY = np.arange(30, dtype=np.uint8).reshape(5, 6) * 8
COLOR = np.arange(90, dtype=np.uint8).reshape(5, 6, 3) * 2


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (GREY, GREY),
        (GREY[:, :, None], GREY),
        (GREY[None], GREY),
        (COLOR, COLOR),
        (COLOR.transpose(2, 0, 1), COLOR),
        (COLOR.astype(np.float32) / 255, COLOR),
        (COLOR.astype(np.float64), COLOR),
        (COLOR.astype(np.int64), COLOR),
        (GREY > 100, (GREY > 100) * np.uint8(255)),
        (np.full((2, 2), 300), np.full((2, 2), 255)),
        (COLOR[::2, ::-1], COLOR[::2, ::-1]),
    ],
)
def test_arrays_of_every_usual_shape(value: Any, expected: Any, tmp_path: Path) -> None:
    """(H, W), (H, W, C) and (C, H, W), bytes, floats from 0 to 1 and to 255, and masks."""
    assert np.array_equal(made(value, tmp_path / "p"), expected)


def test_tensors_and_pictures(tmp_path: Path) -> None:
    """A tensor in (C, H, W) and a PIL image become the same picture as the array."""
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(COLOR.transpose(2, 0, 1).copy())
    assert np.array_equal(made(tensor, tmp_path / "a"), COLOR)
    coarse = made(tensor.to(torch.bfloat16) / 255, tmp_path / "b").astype(int)
    assert np.abs(coarse - COLOR).max() <= 1
    assert np.array_equal(made(Image.fromarray(COLOR), tmp_path / "c"), COLOR)


def test_pixels_are_those_of_the_call(tmp_path: Path) -> None:
    """An array that is changed after the call is written as it was in the call."""
    array = COLOR.copy()
    make = image_maker(array)
    array[:] = 0
    make(tmp_path / "p")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "p")), COLOR)


@pytest.mark.parametrize("value", ["text", 5, [[1]], None])
def test_what_is_no_picture_is_refused_in_the_call(value: Any) -> None:
    """What has no pixels is a TypeError at once, not in another thread."""
    with pytest.raises(TypeError, match="image"):
        image_maker(value)


@pytest.mark.parametrize("shape", [(5,), (5, 5, 7), (1, 2, 3, 4)])
def test_shapes_that_are_no_picture(shape: tuple[int, ...], tmp_path: Path) -> None:
    """An array that is no picture fails with its shape in the message."""
    with pytest.raises(ValueError, match=r"shape"):
        image_maker(np.zeros(shape))(tmp_path / "p")


def test_figures(tmp_path: Path) -> None:
    """A matplotlib figure is drawn as PNG, one of plotly is kept as its JSON."""
    matplotlib = pytest.importorskip("matplotlib.figure")
    figure = matplotlib.Figure()
    figure.add_subplot().plot([1, 2])
    data, ending = figure_bytes(figure)
    assert ending == ".png"
    Image.open(io.BytesIO(data)).verify()

    class Plotly:
        def to_json(self) -> str:
            return '{"data": []}'

    assert figure_bytes(Plotly()) == (b'{"data": []}', ".plotly.json")
    with pytest.raises(TypeError):
        figure_bytes("no figure")


# --- tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "columns", "cells"),
    [
        ([{"a": 1, "b": 2}, {"b": 3, "c": "x"}], ["a", "b", "c"], [[1, 2, None], [None, 3, "x"]]),
        ([[1, 2.5], [3, None]], ["0", "1"], [[1, 2.5], [3, None]]),
        ([], [], []),
        (iter([{"a": np.float32(0.5)}]), ["a"], [[0.5]]),
        ([{"a": [1, 2]}], ["a"], [["[1, 2]"]]),
        ([{"a": math.nan, "b": -math.inf}], ["a", "b"], [["nan", "-inf"]]),
    ],
)
def test_tables(rows: Any, columns: list[str], cells: list[list[Any]]) -> None:
    """Lists of dicts or of lists become columns and rows in strict JSON, without NaN."""
    found = json.loads(table_bytes(rows), parse_constant=pytest.fail)
    assert found == {"columns": columns, "rows": cells}


def test_data_frames() -> None:
    """A DataFrame becomes the same table as its records."""
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": [1, 2], "b": ["x", "y"]})
    assert json.loads(table_bytes(frame)) == {"columns": ["a", "b"], "rows": [[1, "x"], [2, "y"]]}
