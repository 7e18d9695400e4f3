"""The spool under real processes: caps, bad disks, deleted files, other journals, orphans."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest

from gateway.series.tables import StreamRow
from rank_client.rendezvous import ipc_address
from rank_client.run import ABSENT_SECONDS
from rank_client.wire.segments import segment_path

from .job import Job, free_port, wait_until

#: calls log() N times without a gateway, notes how often, ends as told
BUSY = """
import os, signal, sys
import rank_client
run = rank_client.init(project="flow", capture_console=False)
n = int(sys.argv[1])
for step in range(n):
    run.log({f"key/{i}": float(step) for i in range(20)}, step=step)
    if step == n // 2:
        run.log({"a": 1.0}, step="no number")
        run.log({"a": "no number", "b": 1.0}, step=step)
        run.log_text("half way")
if sys.argv[2] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
run.finish(seconds=60)
"""


def busy(job: Job, calls: int, end: str, **environ: str) -> subprocess.Popen[str]:
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "RANKGATE_RUN": "r1"}
    return job.start(sys.executable, "-c", BUSY, str(calls), end, **{**place, **environ})


def ended(process: subprocess.Popen[str], code: int = 0) -> str:
    """stderr of a process that ended as it should."""
    out, err = process.communicate(timeout=90)
    assert process.returncode == code, (out, err)
    assert "Traceback" not in err
    return err


def one(job: Job) -> StreamRow:
    [stream] = job.streams()
    return stream


def known(job: Job) -> list[StreamRow]:
    """The streams in the series; none while that is only being made."""
    try:
        return job.streams()
    except (apsw.Error, KeyError):
        return []


def stored(job: Job) -> int:
    return sum(s.stored for s in known(job))


def status(job: Job) -> dict[str, Any]:
    code, out, err = job.cli("status", "r1", "--json")
    assert code == 0, err
    [run] = json.loads(out)["runs"]
    return dict(run)


def kinds(run: dict[str, Any]) -> dict[str, str]:
    return {p["kind"]: p["text"] for p in run["problems"]}


# --- the cap -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("end", "code"), [("kill", -signal.SIGKILL), ("finish", 0)])
def test_every_call_beyond_the_cap_is_counted(tmp_path: Path, end: str, code: int) -> None:
    """No gateway, and more than the cap allows: calls = stored + refused, whether the process ends
    or is killed before it can tell; what it had left out is known after its end."""
    with Job(tmp_path, RANKGATE_SPOOL_CAP_MIB="1") as job:
        err = ended(busy(job, 20_000, end, RANKGATE_MODE="offline"), code)
        assert "metrics are refused" in err or end == "kill"
        held = sum(p.stat().st_size for p in job.spool.rglob("*.log"))
        assert held < 0.75 * (1 << 20) + (64 << 10)
        job.drain()
        job.assert_accounted()
        stream = one(job)
        assert stream.stored - stream.control + stream.refused == 20_000 + 3
        assert stream.refused > 15_000
        assert stream.bad == 1
        found = status(job)
        assert found["accounting"]["refused"] == stream.refused
        assert "metrics beyond the spool's cap" in " ".join(p["text"] for p in found["problems"])
        assert "1 value" in kinds(found)["values"]


# --- bad disks -----------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB; only root can mount one."""
    place = tmp_path / "tiny"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=2m", "rankgate-test", str(place)]
    if os.getuid() != 0 or subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("this user cannot mount a file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_file_system(tmp_path: Path, tiny: Path) -> None:
    """The spool's disk is far too small: the script ends as it would, its log goes through memory,
    and everything arrives while a gateway takes it."""
    with Job(tmp_path, RANKGATE_SPOOL_CAP_MIB="1000") as job:
        job.serve()
        process = busy(job, 20_000, "finish", RANKGATE_SPOOL=str(tiny))
        err = ended(process)
        job.drain()
        job.assert_accounted()
        stream = one(job)
        assert stream.stored - stream.control + stream.refused == 20_000 + 3, err
        assert stream.gaps == 0
        assert stream.status == "completed"


def test_a_file_size_limit(tmp_path: Path) -> None:
    """The same without root: no file may pass 256 KiB, and each write beyond it fails."""
    limit = f'ulimit -f {256 * 1024 // 1024}; exec "$@"'
    with Job(tmp_path) as job:
        job.serve()
        place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "RANKGATE_RUN": "r1"}
        words = ("bash", "-c", limit, "bash", sys.executable, "-c", BUSY, "8000", "finish")
        ended(job.start(*words, **place))
        job.drain()
        job.assert_accounted()
        stream = one(job)
        assert stream.stored - stream.control + stream.refused == 8000 + 3
        assert stream.gaps == 0


def test_a_read_only_file_system(tmp_path: Path, tiny: Path) -> None:
    """A spool that can never be written: memory, said so, and all arrives."""
    subprocess.run(["mount", "-o", "remount,ro", str(tiny)], check=True)
    with Job(tmp_path) as job:
        job.serve()
        err = ended(busy(job, 500, "finish", RANKGATE_SPOOL=str(tiny / "spool")))
        assert "memory only" in err
        job.drain()
        job.assert_accounted()
        stream = one(job)
        assert stream.stored - stream.control + stream.refused == 503
        assert (stream.gaps, stream.status) == (0, "completed")


#: logs, says that it ends, waits for a gateway
LATE_GATEWAY = """
import pathlib, sys
import rank_client
run = rank_client.init(project="flow", capture_console=False)
for step in range(50):
    run.log({"a": float(step)}, step=step)
pathlib.Path("ends").touch()
sys.exit(0 if run.finish(seconds=60) else 3)
"""


def test_no_spool_and_a_gateway_that_comes_late(tmp_path: Path) -> None:
    """What is in memory only is not given up before the time that `finish` has, though no gateway
    has answered yet; and it is said where no spool could be written."""
    (tmp_path / "file").touch()
    with Job(tmp_path) as job:
        job.data.mkdir()
        place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "RANKGATE_RUN": "r1"}
        nowhere = {"RANKGATE_SPOOL": str(tmp_path / "file"), "RANKGATE_ADDR": ipc_address(job.data)}
        process = job.start(sys.executable, "-c", LATE_GATEWAY, **place, **nowhere)
        wait_until((job.truth_dir / "ends").exists, what="it ends")
        time.sleep(ABSENT_SECONDS + 0.5)  # that long it would wait if the spool had all
        job.serve()
        err = ended(process)
        assert f"cannot write the spool in {tmp_path / 'file'}" in err
        job.drain()
        job.assert_accounted()
        stream = one(job)
        assert job.points().total() == 50
        assert (stream.gaps, stream.status) == (0, "completed")


def test_a_spool_deleted_under_a_running_rank(tmp_path: Path) -> None:
    """Somebody removes the whole spool while ranks run: the scripts end as ever, all arrives, and
    the spool is there again as if nothing had been."""
    with Job(tmp_path) as job:
        job.serve()
        ranks = [job.rank(r, 2, 600, "stop", 0.01) for r in range(2)]
        wait_until(lambda: len(known(job)) == 2, what="both streams")
        shutil.rmtree(job.spool)
        wait_until(lambda: len(list(job.spool.rglob("lock"))) == 2, what="two new spools")
        assert all(rank.poll() is None for rank in ranks)
        wait_until(lambda: len(list(job.truth_dir.glob("*.ready"))) == 2, what="all is logged")
        wait_until(lambda: len(list(job.spool.rglob("00000001.log"))) == 2, what="the old files")
        job.ask_stop()
        for rank in ranks:
            assert "deleted the spool" in ended(rank)
        job.drain()
        job.assert_all_there()
        assert all(s.status == "completed" for s in job.streams())


# --- another journal -----------------------------------------------------------------------------


def test_a_journal_restored_from_an_older_copy(tmp_path: Path) -> None:
    """The run's folder is put back as it was before the second life of its ranks: what that life
    logged comes again from its spool, once."""
    with Job(tmp_path) as job:
        run_dir, aside = job.data / "runs/r1", tmp_path / "aside"
        for launch in ("first", "second"):
            for rank in range(2):
                job.rank(rank, 2, 60, "finish", RANKGATE_LAUNCH=launch)
            for process in job.processes[-2:]:
                ended(process)
            job.drain()
            job.stop_gateway(signal.SIGTERM)
            if launch == "first":
                shutil.copytree(run_dir, aside)
        shutil.rmtree(run_dir)
        shutil.copytree(aside, run_dir)
        job.drain()
        wait_until(lambda: len(known(job)) == 4, what="four streams")
        job.drain()
        job.assert_all_there()
        assert "journal" in kinds(status(job))


def test_a_journal_deleted_under_a_running_rank(tmp_path: Path) -> None:
    """The run's folder is deleted while a rank and its gateway go on: all that the rank keeps is
    sent to the new journal, that of the life before it too, and `status` says so."""
    with Job(tmp_path) as job:
        job.serve()
        ended(job.rank(0, 1, 60, "finish", RANKGATE_LAUNCH="first"))
        job.rank(0, 1, 60, "stop", RANKGATE_LAUNCH="second")
        wait_until(lambda: (job.truth_dir / "0.ready").exists(), what="the rank waits")
        run_dir = job.data / "runs/r1"
        wait_until(lambda: stored(job) >= 122, what="all of it stored")
        before = (run_dir / "journal/00000001.log").stat().st_ino
        shutil.rmtree(run_dir)
        (job.data / "keep").touch()  # so that the inode is not given out again
        path = run_dir / "journal/00000001.log"
        wait_until(lambda: path.exists() and path.stat().st_ino != before, what="a new journal")
        wait_until(lambda: len(known(job)) == 2, what="both lives again")
        job.ask_stop()
        ended(job.processes[-1])
        job.drain()
        job.assert_all_there()
        assert "journal changed" in kinds(status(job))["journal"]


# --- orphans -------------------------------------------------------------------------------------


def test_the_next_life_ships_what_the_last_one_left(tmp_path: Path) -> None:
    """The gateway is on another node and cannot see the spool: the next rank of this node ships,
    beside its own log, what a killed one left."""
    with Job(tmp_path) as job:
        address = f"tcp://127.0.0.1:{free_port()}"
        killed = job.rank(0, 1, 200, "kill", RANKGATE_ADDR=address)
        assert killed.wait(60) == -signal.SIGKILL
        elsewhere = {"RANKGATE_SPOOL": str(tmp_path / "other-node")}
        process = job.start(
            sys.executable, "-m", "gateway", "serve", "--bind", address, "--insecure", **elsewhere
        )
        rank = job.rank(0, 1, 20, "stop", RANKGATE_ADDR=address, RANKGATE_LAUNCH="second")
        wait_until(lambda: list(job.spool.rglob("done")), 60, "the orphan is shipped")
        assert rank.poll() is None
        job.ask_stop()
        ended(rank)
        assert process.poll() is None
        wait_until(lambda: len(list(job.spool.rglob("done"))) == 2, what="both are shipped")
        wait_until(lambda: [s.bye for s in known(job)] == [True, True], what="both projected")
        job.assert_all_there(extra_allowed=4)
        assert sorted(s.generation for s in job.streams()) == [0, 1]


def test_a_spool_with_a_hole(tmp_path: Path) -> None:
    """A dead rank's spool is damaged in the middle: what stands before is shipped, `status` counts
    what can never be read and names the command that gives it up; then the rest arrives."""
    with Job(tmp_path) as job:
        ended(busy(job, 60_000, "kill", RANKGATE_MODE="offline"), -signal.SIGKILL)
        [directory] = [p.parent for p in job.spool.rglob("lock")]
        path = Path(segment_path(str(directory), 1))
        with path.open("r+b") as file:
            file.seek(path.stat().st_size // 2)
            file.write(b"\xff" * 4096)
        job.serve()
        wait_until(lambda: (directory / "hole").exists(), 60, "shipped up to the hole")
        wait_until(lambda: stored(job) > 1000, what="it is projected")
        wait_until(lambda: status(job)["accounting"]["unreachable"], what="status tells")
        found = status(job)
        book, problem = found["accounting"], kinds(found)["lost"]
        assert "rankgate sweep --accept-gap" in problem
        assert 0 < book["unreachable"] < 40
        assert book["logged"] == book["stored"] + book["on_the_way"] + book["lost"]
        code, out, err = job.cli("sweep")
        assert code == 1, err
        assert "--accept-gap" in out
        code, out, err = job.cli("sweep", "--accept-gap", "--json")
        assert code == 0, (out, err)
        assert json.loads(out)["left"] == 0
        job.drain()
        job.assert_accounted()
        stream = one(job)
        assert stream.gaps == book["unreachable"]
        assert stream.stored - stream.control + stream.gaps + stream.refused == 60_000 + 3
        assert not job.orphans()
