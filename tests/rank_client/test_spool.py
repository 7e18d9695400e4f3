"""The spool: what was logged can be read from any number, whatever the disk does."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rank_client import spool as spool_module
from rank_client.counts import COUNTS, read_counts
from rank_client.rows import Rows
from rank_client.spool import Spool
from rank_client.spool_place import spool_root, spool_share
from rank_client.wire.disk import OsDisk
from rank_client.wire.frames import MAX_DATA_BYTES, MAX_FRAME_BYTES
from rank_client.wire.records import Kind, Schema, walk
from tests.rank_client.read import Written, decode, on_disk
from tests.rank_client.wire.disks import FullDisk


def read_all(spool: Spool, first: int = 1, max_bytes: int = MAX_DATA_BYTES) -> list[Written]:
    """What a session would send from `first` on to a gateway that knows nothing."""
    out: list[Written] = []
    schemas: dict[int, Schema] = {}
    at = first
    while at <= spool.last:
        n, data = spool.read(at, max_bytes)
        assert n > 0
        found = decode(data, schemas)
        assert [w.seq for w in found] == list(range(at, at + n))
        out += found
        at += n
    return out


def text(spool: Spool, size: int = 20) -> int:
    return spool.append_map(Kind.TEXT, {"t": "x" * size})


@pytest.fixture
def disk() -> FullDisk:
    return FullDisk()


@pytest.fixture
def spool(tmp_path: Path, disk: FullDisk) -> Iterator[Spool]:
    made = Spool(str(tmp_path / "s"), {"run": "r"}, disk, segment_bytes=4096)
    yield made
    made.close()


@pytest.fixture
def small_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames may be cut each 200 bytes, so that a test is small and has many."""
    monkeypatch.setattr(spool_module, "MARK_BYTES", 200)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 900), min_size=1, max_size=60),
    max_bytes=st.sampled_from([1, 300, 1000, 1 << 16]),
    data=st.data(),
)
def test_what_was_written_is_read_from_any_number(
    sizes: list[int], max_bytes: int, data: st.DataObject
) -> None:
    """Reading from any first number, in pieces of any size, across segments, in jumps back and
    forth, gives exactly the records from there on."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as directory:
        patch.setattr(spool_module, "MARK_BYTES", 200)
        spool = Spool(directory, {}, segment_bytes=2000)
        for size in sizes:
            text(spool, size)
        expected = on_disk(directory)
        assert [len(w.values["t"]) for w in expected] == sizes
        for _ in range(4):
            first = data.draw(st.integers(1, len(sizes)))
            assert read_all(spool, first, max_bytes) == expected[first - 1 :]
        spool.close()


def test_reading_beyond_the_end_gives_nothing_until_more_is_written(spool: Spool) -> None:
    """A reader that has everything gets nothing, and the next record when it is written."""
    text(spool)
    assert spool.read(1, 1000)[0] == 1
    assert spool.read(2, 1000) == (0, b"")
    text(spool)
    assert spool.read(2, 1000)[0] == 1


@pytest.mark.usefixtures("small_marks")
def test_every_segment_can_be_read_without_those_before(tmp_path: Path) -> None:
    """Each segment opens with the whole head and all schemas in force, on disk and when read."""
    spool = Spool(str(tmp_path), {"run": "r", "rank": 3}, segment_bytes=1000)
    rows = Rows(spool, lambda *_: None)
    for step in range(60):
        rows.log({"a": 1.0} if step % 2 else {"b": step, "c": 0.5}, step)
    assert len(list(tmp_path.glob("*.log"))) > 3
    assert len(on_disk(tmp_path)) == 60  # decodes each segment on its own
    second = spool.segments[1].first
    assert [w.step for w in read_all(spool, second)] == list(range(second - 1, 60))
    spool.close()


def test_a_frame_is_no_longer_than_it_may_be(tmp_path: Path) -> None:
    """Frames of a spool stay near their target, and below the limit with the largest record."""
    spool = Spool(str(tmp_path), {})
    for size in [100] * 2000 + [200_000, 200_000] + [100] * 100:
        text(spool, size)
    at, sizes = 1, []
    while at <= spool.last:
        n, data = spool.read(at, MAX_DATA_BYTES)
        sizes.append(len(data))
        at += n
    assert max(sizes) < MAX_FRAME_BYTES // 2
    assert sorted(sizes)[len(sizes) // 2] <= MAX_DATA_BYTES
    spool.close()


def test_a_record_too_large_for_a_frame_is_refused(spool: Spool) -> None:
    """A record that no frame could carry gets no number and is counted."""
    assert spool.append_map(Kind.TEXT, {"t": "x" * MAX_FRAME_BYTES}) == 0
    assert spool.refused == {"too large": 1}
    assert text(spool) == 2  # after the LOSS record
    assert [w.kind for w in read_all(spool)] == [Kind.LOSS, Kind.TEXT]


# --- a full disk ---------------------------------------------------------------------------------


@pytest.mark.parametrize("partly", [0, 30])
@pytest.mark.usefixtures("small_marks")
def test_a_full_disk_loses_nothing(
    spool: Spool, disk: FullDisk, tmp_path: Path, partly: int
) -> None:
    """While the disk is full records wait in memory and can be read; when there is room they are
    brought to the disk, in order."""
    for _ in range(5):
        text(spool)
    disk.is_full, disk.partly = True, partly
    for _ in range(30):
        assert text(spool)
    assert "space" in spool.volatile
    assert [w.seq for w in read_all(spool)] == list(range(1, 36))
    assert [w.seq for w in read_all(spool, 20)] == list(range(20, 36))
    spool.heal()
    assert spool.volatile, "there is still no room"
    disk.is_full = False
    spool.heal()
    assert not spool.volatile
    text(spool)
    assert [w.seq for w in read_all(spool)] == list(range(1, 37))
    assert [w.seq for w in on_disk(tmp_path / "s")] == list(range(1, 37))


def test_a_healed_ring_is_cut_into_frames(tmp_path: Path) -> None:
    """A ring of megabytes that was brought to the disk still leaves in frames below the limit."""
    disk = FullDisk()
    spool = Spool(str(tmp_path), {}, disk)
    disk.is_full = True
    for _ in range(3000):
        text(spool, 1000)
    disk.is_full = False
    spool.heal()
    at = 1
    while at <= spool.last:
        n, data = spool.read(at, MAX_DATA_BYTES)
        assert len(data) <= 2 * MAX_DATA_BYTES
        at += n
    spool.close()


def test_schemas_made_while_the_disk_is_full_are_not_lost(tmp_path: Path) -> None:
    """Rows whose schema was new while the disk was full can be read then and after healing."""
    disk = FullDisk()
    spool = Spool(str(tmp_path), {}, disk)
    rows = Rows(spool, lambda *_: None)
    rows.log({"a": 1.0}, 0)
    disk.is_full = True
    rows.log({"b": 1.0}, 1)
    rows.log({"b": 2.0}, 2)
    assert [w.values for w in read_all(spool)] == [{"a": 1.0}, {"b": 1.0}, {"b": 2.0}]
    disk.is_full = False
    spool.heal()
    rows.log({"a": 2.0}, 3)
    assert [w.step for w in on_disk(tmp_path)] == [0, 1, 2, 3]
    spool.close()


def test_a_full_ring_refuses_and_counts_each_call_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When memory is full too, calls are refused: each counted once, all told of when there is
    room again, so that what was logged is what is stored plus what is told as lost."""
    monkeypatch.setattr(spool_module, "RING_BYTES", 1000)
    disk = FullDisk()
    spool = Spool(str(tmp_path), {}, disk)
    text(spool)
    disk.is_full = True
    given_ = [text(spool, 100) for _ in range(50)]
    kept = sum(1 for n in given_ if n)
    assert 0 < kept < 50
    assert sum(spool.refused.values()) == 50 - kept
    disk.is_full = False
    spool.heal()
    text(spool)
    found = on_disk(tmp_path)
    assert [w.seq for w in found] == list(range(1, spool.last + 1))
    told = sum(w.values["n"] for w in found if w.kind == Kind.LOSS)
    assert told == 50 - kept
    assert sum(w.kind == Kind.TEXT for w in found) == kept + 2
    spool.close()


@pytest.mark.usefixtures("small_marks")
def test_numbers_that_were_only_in_memory_are_gone_once_acknowledged(
    spool: Spool, disk: FullDisk
) -> None:
    """After acknowledged records were dropped from memory, what is kept starts behind them, so
    that nobody is offered numbers that cannot be read."""
    for _ in range(5):
        text(spool)
    disk.is_full = True
    for _ in range(10):
        text(spool)
    spool.trim(9)
    assert spool.first_kept == 10
    assert [w.seq for w in read_all(spool, 10)] == list(range(10, 16))
    disk.is_full = False
    spool.heal()
    assert spool.first_kept == 10
    assert [w.seq for w in read_all(spool, 10)] == list(range(10, 16))


def test_a_spool_without_a_directory_is_in_memory(tmp_path: Path) -> None:
    """A rank that has no spool directory, or one it cannot write, logs to memory and says so."""
    blocker = tmp_path / "file"
    blocker.touch()
    for directory in (None, str(blocker / "s")):
        spool = Spool(directory, {})
        assert spool.volatile
        assert text(spool) == 1
        assert [w.seq for w in read_all(spool)] == [1]
        spool.trim(1)
        assert spool.first_kept == 2
        spool.close()


# --- the cap -------------------------------------------------------------------------------------


def capped(directory: Path, cap_bytes: int = 20_000) -> Spool:
    return Spool(str(directory), {}, segment_bytes=4000, cap_bytes=cap_bytes)


def console(spool: Spool, size: int = 20) -> int:
    return spool.append_map(Kind.TEXT, {"t": "x" * size}, console=True)


@pytest.mark.usefixtures("small_marks")
def test_classes_are_refused_one_after_the_other(tmp_path: Path) -> None:
    """With nobody to take it, console lines end at half the cap, metrics at three quarters, the
    rest at the cap; END and LOSS are always taken, and what is refused gets no number."""
    spool = capped(tmp_path)
    rows = Rows(spool, lambda *_: None)
    ended: dict[str, int] = {}
    for step in range(2000):
        before = dict(spool.refused)
        console(spool)
        rows.log({"a": 1.0}, step)
        text(spool)
        for reason in spool.refused:
            if reason not in before:
                ended[reason.split()[0]] = spool.unacknowledged_bytes
    assert list(ended) == ["console", "metrics", "records"]
    for found, part in zip(ended.values(), (0.5, 0.75, 1.0), strict=True):
        assert part * 20_000 <= found < part * 20_000 + 600
    assert spool.closed == {"console", "metrics", "records"}
    last, refused = spool.last, sum(spool.refused.values())
    assert spool.append_map(Kind.END, {"status": "ended", **spool.final_counts()}) > last
    found_ = on_disk(tmp_path)
    assert [w.seq for w in found_] == list(range(1, spool.last + 1))
    assert sum(w.values["n"] for w in found_ if w.kind == Kind.LOSS) == refused
    assert found_[-1].values["refused"] == refused
    spool.close()


@pytest.mark.usefixtures("small_marks")
def test_a_class_opens_again_when_the_gateway_has_taken_some(tmp_path: Path) -> None:
    """As soon as enough is acknowledged calls are taken again, after a LOSS record that tells how
    many were not: logged = what has a number + what is told as refused."""
    spool = capped(tmp_path)
    rows = Rows(spool, lambda *_: None)
    for step in range(500):
        rows.log({"a": 1.0}, step)
    kept, refused = spool.last, sum(spool.refused.values())
    assert kept + refused == 500
    assert "metrics" in spool.closed
    spool.acknowledge(kept // 2)
    assert not spool.closed
    rows.log({"a": 1.0}, 500)
    assert spool.last == kept + 2
    loss = on_disk(tmp_path)[kept]
    assert (loss.kind, loss.values["n"]) == (Kind.LOSS, refused)
    assert not spool.watchful, "the fast path is fast again"
    spool.close()


@pytest.mark.usefixtures("small_marks")
def test_the_cap_holds_between_two_looks_of_the_sender(tmp_path: Path) -> None:
    """A rank that writes as fast as it can, with no tick of the sender, ends near its cap."""
    spool = capped(tmp_path, 50_000)
    rows = Rows(spool, lambda *_: None)
    for step in range(20_000):
        rows.log({"a": 1.0, "b": 2.0}, step)
    assert spool.unacknowledged_bytes <= 0.75 * 50_000 + 200 + 200
    on_the_disk = sum(f.stat().st_size for f in tmp_path.glob("*.log"))
    assert on_the_disk <= 0.75 * 50_000 + 200 + 200
    spool.close()


@pytest.mark.usefixtures("small_marks")
def test_only_what_is_unacknowledged_counts(tmp_path: Path) -> None:
    """A spool that keeps more than its cap of what is acknowledged refuses nothing."""
    spool = Spool(str(tmp_path), {}, segment_bytes=4000, cap_bytes=20_000, keep_bytes=1 << 20)
    for _ in range(1000):
        text(spool, 100)
        spool.acknowledge(spool.last)
    assert spool.kept_bytes > 3 * 20_000
    assert not spool.refused
    spool.acknowledge(0)  # another journal, that has nothing: all of it waits again
    assert spool.closed
    spool.close()


def test_files_are_refused_when_the_cap_is_reached(tmp_path: Path) -> None:
    """Files that wait count with the records, but a large file never closes a class: metrics
    beside a checkpoint larger than the cap are taken."""
    spool = capped(tmp_path)
    assert spool.admit_file(0)
    assert not spool.admit_file(20_000)
    assert spool.refused == {"files beyond the spool's cap": 1}
    assert not spool.closed
    spool.close()


def test_refusals_by_class_and_reason_survive_a_kill(tmp_path: Path) -> None:
    """What was refused, and what no LOSS record tells of yet, stands in the counts file at once;
    after the LOSS records nothing is owed any more."""
    spool = Spool(str(tmp_path), {}, cap_bytes=1)
    console(spool)
    spool.acknowledge(0)
    rows = Rows(spool, lambda *_: None)
    rows.log({"a": 1.0}, 0)
    console(spool)
    spool.refuse("bad step", 2)
    spool.count_bad(7)
    found = read_counts(OsDisk(), str(tmp_path))
    owed = {
        "metrics beyond the spool's cap": 1,
        "console beyond the spool's cap": 1,
        "bad step": 2,
    }
    assert found == (4, 7, owed)
    spool.append_map(Kind.END, {"status": "ended"})
    assert read_counts(OsDisk(), str(tmp_path)) == (4, 7, {})
    spool.close()


def test_counts_that_are_no_counts_are_zero(tmp_path: Path) -> None:
    """No counts file, an empty one, one with a damaged map: no exception, and the sums if any."""
    assert read_counts(OsDisk(), str(tmp_path)) == (0, 0, {})
    (tmp_path / "counts").write_bytes(b"")
    assert read_counts(OsDisk(), str(tmp_path)) == (0, 0, {})
    (tmp_path / "counts").write_bytes(COUNTS.pack(3, 4) + b"\1" * 100)
    assert read_counts(OsDisk(), str(tmp_path)) == (3, 4, {})


def test_the_share_of_one_stream(tmp_path: Path) -> None:
    """The ranks of a node divide the cap and what is kept; the variable sets the cap; a value
    that is none changes nothing."""
    whole = spool_share(tmp_path, {}, 1)
    stats = os.statvfs(tmp_path)
    assert 0 < whole.cap <= min(1 << 30, stats.f_blocks * stats.f_frsize // 10)
    assert whole.keep == 256 << 20
    assert spool_share(tmp_path, {"RANKGATE_SPOOL_CAP_MIB": "80"}, 8) == (10 << 20, 32 << 20)
    for nonsense in ("", "0", "-1", "much"):
        share = spool_share(tmp_path, {"RANKGATE_SPOOL_CAP_MIB": nonsense}, 1)
        assert abs(share.cap - whole.cap) < 64 << 20
    assert spool_share(tmp_path / "not there", {}, 0).cap == 1 << 30


# --- somebody else's hands -----------------------------------------------------------------------


@pytest.mark.usefixtures("small_marks")
def test_a_deleted_directory_comes_back(tmp_path: Path) -> None:
    """Somebody deletes the spool's directory under a rank: `volatile` says so, no call fails, and
    the next look brings everything that was read before, and all that follows, to a new one,
    which is locked as the first was."""
    directory = tmp_path / "s"
    spool = Spool(str(directory), {}, segment_bytes=1000)
    for _ in range(50):
        text(spool)
    assert len(read_all(spool)) == 50  # as the sender does, within milliseconds
    shutil.rmtree(directory)
    text(spool)
    spool.refuse("bad step")
    spool.sync()
    assert "deleted" in spool.volatile
    text(spool)
    spool.heal()
    assert not spool.volatile
    spool.sync()
    text(spool)
    assert [w.seq for w in read_all(spool)] == list(range(1, spool.last + 1))
    assert [w.seq for w in on_disk(directory)] == list(range(1, spool.last + 1))
    assert read_counts(OsDisk(), str(directory)).refused == 1
    assert tried_by_another_process(directory / "lock") == "held"
    spool.close()


@pytest.mark.usefixtures("small_marks")
def test_a_deleted_file_that_nobody_had_read_is_given_up(tmp_path: Path) -> None:
    """A sealed segment is deleted before it was sent: what stands before it is read, then what is
    kept starts behind it, and the rest is read as ever."""
    spool = Spool(str(tmp_path), {}, segment_bytes=1000)
    for _ in range(100):
        text(spool)
    gone = spool.segments[1]
    assert gone.end is not None
    Path(gone.path).unlink()
    at = 1
    while True:
        n, _ = spool.read(at, 1000)
        if n == 0:
            break
        at += n
    assert at == gone.first
    assert spool.first_kept == 1, "not before all of it is acknowledged"
    spool.acknowledge(at - 2)
    assert spool.first_kept == 1
    spool.acknowledge(at - 1)
    assert spool.first_kept == gone.end[0]
    assert [w.seq for w in read_all(spool, gone.end[0])] == list(range(gone.end[0], 101))
    spool.close()


@pytest.mark.usefixtures("small_marks")
def test_a_cut_file_gives_what_is_whole(tmp_path: Path) -> None:
    """Somebody cuts the file that is being written: the whole records before the cut are read,
    what follows goes to another file, and what was cut off is given up."""
    spool = Spool(str(tmp_path), {}, segment_bytes=100_000)
    for _ in range(100):
        text(spool)
    path = Path(spool.segments[0].path)
    os.truncate(path, path.stat().st_size // 2)
    spool.sync()
    assert "cut" in spool.volatile
    spool.heal()
    text(spool)
    at = 1
    while n := spool.read(at, 1000)[0]:
        at += n
    assert 30 < at < 60
    spool.acknowledge(at - 1)
    assert spool.first_kept == 101
    assert [w.seq for w in read_all(spool, 101)] == [101]
    spool.close()


def test_a_read_only_disk_is_told_and_heals(tmp_path: Path) -> None:
    """A disk that refuses every write with another error than `full`: as with a full one."""

    class ReadOnlyDisk(FullDisk):
        def _maybe(self, fd: int, data: bytes) -> int:
            if self.is_full:
                raise OSError(30, os.strerror(30))
            return os.write(fd, data)

    disk = ReadOnlyDisk()
    spool = Spool(str(tmp_path), {}, disk)
    text(spool)
    disk.is_full = True
    assert text(spool) == 2
    assert "Read-only" in spool.volatile
    disk.is_full = False
    spool.heal()
    assert [w.seq for w in on_disk(tmp_path)] == [1, 2]
    spool.close()


# --- another journal -----------------------------------------------------------------------------


def test_schemas_are_restated_after_a_jump(tmp_path: Path) -> None:
    """A journal that has nothing is sent rows from the middle of a segment, or from memory, with
    every schema they need before them; a reader that goes on gets none twice."""
    disk = FullDisk()
    spool = Spool(str(tmp_path), {}, disk)
    rows = Rows(spool, lambda *_: None)
    for step in range(10):
        rows.log({"a": 1.0}, step)
        rows.log({"b": 1.0}, step)
    assert [w.values for w in decode(spool.read(16, 1 << 16)[1])][:2] == [{"b": 1.0}, {"a": 1.0}]
    disk.is_full = True
    for step in range(10):
        rows.log({"a": 1.0}, step)
    assert [w.values for w in decode(spool.read(25, 1 << 16)[1])] == [{"a": 1.0}] * 6
    rows.log({"a": 1.0}, 11)
    schemas = {0: Schema(0, ("a",), ("f8",))}
    n, data = spool.read(31, 1 << 16)
    assert n == 1
    assert [h.kind for h in walk(data)] == [Kind.ROW]
    assert decode(data, schemas)
    spool.close()


def test_schemas_are_restated_before_the_first_that_is_kept(tmp_path: Path) -> None:
    """Records in memory go when they are acknowledged. A journal that begins anew just then has
    none of their schemas, and asks for the very next number: that is no jump for the reader."""
    disk = FullDisk()
    disk.is_full = True
    spool = Spool(str(tmp_path), {}, disk)
    rows = Rows(spool, lambda *_: None)
    for step in range(5):
        rows.log({"a": 1.0}, step)
    assert spool.read(1, 1 << 16)[0] == 5
    spool.trim(5)
    rows.log({"a": 6.0}, 5)
    assert [w.values for w in decode(spool.read(6, 1 << 16)[1])] == [{"a": 6.0}]
    spool.close()


# --- the lock ------------------------------------------------------------------------------------

TRY_LOCK = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
try:
    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    print("held")
else:
    print("free")
"""


def tried_by_another_process(path: Path) -> str:
    out = subprocess.run(
        [sys.executable, "-S", "-c", TRY_LOCK, str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    return out.stdout.strip()


def test_the_lock_is_held_as_long_as_the_spool_lives(spool: Spool, tmp_path: Path) -> None:
    """Another process sees the spool as taken until it is closed, also after much writing."""
    for _ in range(200):
        text(spool, 100)
    spool.sync()
    read_all(spool)
    assert tried_by_another_process(tmp_path / "s" / "lock") == "held"
    spool.close()
    assert tried_by_another_process(tmp_path / "s" / "lock") == "free"


def test_a_spool_somebody_else_holds_is_not_written(tmp_path: Path) -> None:
    """While another process has the lock nothing is written to the directory; afterwards it is."""
    hold = (
        "import fcntl, os, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n"
        "fcntl.lockf(fd, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-S", "-c", hold, str(tmp_path / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdin is not None
    assert other.stdout is not None
    with other:
        assert other.stdout.readline() == b"held\n"
        spool = Spool(str(tmp_path), {})
        assert spool.volatile
        text(spool)
        spool.heal()
        assert spool.volatile
        assert not list(tmp_path.glob("*.log"))
    spool.heal()
    assert not spool.volatile
    assert [w.seq for w in on_disk(tmp_path)] == [1]
    spool.close()


FORKING = """
import os, signal, sys, time
from rank_client.spool import Spool
from rank_client.wire.records import Kind
spool = Spool(sys.argv[1], {})
spool.append_map(Kind.TEXT, {"t": "x"})
child = os.fork()
if child == 0:
    os.close(1)
    time.sleep(60)
    os._exit(0)
print(child, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_forked_child_does_not_keep_the_spool_alive(tmp_path: Path) -> None:
    """A DataLoader worker that outlives its SIGKILLed rank has the rank's descriptors, but not
    its lock: the spool is seen as an orphan."""
    rank = subprocess.Popen(
        [sys.executable, "-c", FORKING, str(tmp_path / "s")], stdout=subprocess.PIPE
    )
    with rank:
        assert rank.stdout is not None
        child = int(rank.stdout.readline())
    try:
        assert rank.returncode == -signal.SIGKILL
        os.kill(child, 0)
        held = [link.readlink() for link in Path(f"/proc/{child}/fd").iterdir()]
        assert tmp_path / "s" / "lock" in held, "it does hold the descriptor"
        assert tried_by_another_process(tmp_path / "s" / "lock") == "free"
    finally:
        os.kill(child, signal.SIGKILL)


# --- what is kept --------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_marks")
def test_trim_removes_only_what_is_acknowledged(tmp_path: Path) -> None:
    """Segments are removed past the size to keep, oldest first, never one with a record that is
    not acknowledged, never the one being written."""
    spool = Spool(str(tmp_path), {}, segment_bytes=1000, keep_bytes=2500)
    for _ in range(200):
        text(spool)
    spool.trim(0)
    assert spool.first_kept == 1
    spool.trim(100)
    assert 1 < spool.first_kept <= 101
    assert [w.seq for w in read_all(spool, 101)] == list(range(101, 201))
    spool.trim(200)
    assert spool.kept_bytes <= 2500 + 1500
    assert spool.first_kept <= 200
    assert len(list(tmp_path.glob("*.log"))) == len(spool.segments)
    spool.close()


def test_acknowledged_segments_are_kept_below_the_limit(spool: Spool, tmp_path: Path) -> None:
    """What is acknowledged stays for a gateway that lost its journal, while there is room."""
    for _ in range(100):
        text(spool, 500)
    spool.trim(100)
    assert [w.seq for w in read_all(spool)] == list(range(1, 101))


@pytest.mark.usefixtures("small_marks")
def test_reading_goes_on_after_a_trim_at_the_end_of_a_segment(tmp_path: Path) -> None:
    """A reader that stands exactly at the end of a segment that is then removed reads on."""
    spool = Spool(str(tmp_path), {}, segment_bytes=1000, keep_bytes=0)
    for _ in range(100):
        text(spool)
    end = spool.segments[1].first
    at = 1
    while at < end:
        at += spool.read(at, 300)[0]
    assert at == end
    spool.trim(end - 1)
    assert spool.first_kept == end
    assert [w.seq for w in read_all(spool, end)] == list(range(end, 101))
    spool.close()


# --- counts and places ---------------------------------------------------------------------------


def test_refusals_are_counted_on_disk_at_once(spool: Spool, tmp_path: Path) -> None:
    """Refused calls and bad values stand in a file at once, so that they survive a kill."""
    spool.refuse("bad step", 2)
    spool.count_bad(3)
    counts = (tmp_path / "s" / "counts").read_bytes()
    assert COUNTS.unpack_from(counts) == (2, 3)
    assert struct.calcsize("<QQ") <= len(counts) == 4096


def test_losses_are_told_before_the_next_record(spool: Spool) -> None:
    """Each reason of refusal becomes one LOSS record before the next one that is written."""
    spool.refuse("a", 2)
    spool.refuse("b")
    spool.refuse("a")
    text(spool)
    found = [(w.kind, w.values) for w in read_all(spool)]
    assert found[:2] == [
        (Kind.LOSS, {"n": 3, "reason": "a"}),
        (Kind.LOSS, {"n": 1, "reason": "b"}),
    ]
    assert found[2][0] == Kind.TEXT


def test_everything_is_private(spool: Spool, tmp_path: Path) -> None:
    """The directory is 0700 and every file in it 0600."""
    text(spool)
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o700
    assert {f.stat().st_mode & 0o777 for f in (tmp_path / "s").iterdir()} == {0o600}


def test_closing_lets_go_of_every_descriptor(tmp_path: Path) -> None:
    """After `close` no file of the spool is open any more."""
    before = len(os.listdir("/proc/self/fd"))
    spool = Spool(str(tmp_path), {}, segment_bytes=500)
    for _ in range(50):
        text(spool, 100)
    read_all(spool)
    spool.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_segment_opens_with_the_head_it_was_given(spool: Spool, tmp_path: Path) -> None:
    """The first record of each segment is the HEAD map, from which a stream can be adopted."""
    text(spool)
    buf = (tmp_path / "s" / "00000001.log").read_bytes()
    head = next(walk(buf))
    assert (head.kind, head.seq) == (Kind.HEAD, 1)
    assert b"run" in buf[head.body]


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"RANKGATE_SPOOL": "/a", "TMPDIR": "/t"}, "/a"),
        ({"SLURM_TMPDIR": "/s", "TMPDIR": "/t"}, f"/s/rankgate-{os.getuid()}"),
        ({"TMPDIR": "/t"}, f"/t/rankgate-{os.getuid()}"),
        ({"TMPDIR": ""}, f"/var/tmp/rankgate-{os.getuid()}"),
    ],
)
def test_where_a_spool_lives(environ: dict[str, str], expected: str) -> None:
    """The explicit place wins, then Slurm's and a local temporary directory, then /var/tmp."""
    assert str(spool_root(environ)) == expected
