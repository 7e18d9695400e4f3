"""The gateway as people leave it: killed, starved, cut off, asked again after the job."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

from gateway.sinks.store import read_views
from rank_client.rendezvous import ipc_address
from tests.servers.clearml import ClearmlServer

from .job import RANKS, Job, wait_until

PLACE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}


def one_run(job: Job, run: str = "r1", steps: int = 20) -> None:
    process = job.rank(0, 1, steps, "finish", RANKGATE_RUN=run)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, (out, err)


def test_drain_delivers_runs_that_ended_long_ago(tmp_path: Path) -> None:
    """A sink given to `drain` after the gateway has left gets every run of the directory."""
    with Job(tmp_path) as job:
        for run in ("r1", "r2"):
            one_run(job, run)
        job.drain()
        job.stop_gateway(signal.SIGTERM)
        code, out, err = job.cli("drain", "--sink", "clearml=offline")
        assert code == 0, (out, err, job.log())
        for run in ("r1", "r2"):
            [view] = read_views(job.data / "runs" / run)
            assert (view.name, view.state) == ("clearml", "exported")
            assert Path(view.export).is_dir()
            job.assert_all_there(run)


def test_an_export_and_a_delivery_know_nothing_of_each_other(tmp_path: Path) -> None:
    """Exporting a run does not make the sink believe that the service has it."""
    with ClearmlServer() as clearml, Job(tmp_path, **clearml.env) as job:
        one_run(job)
        job.drain()
        job.stop_gateway(signal.SIGTERM)
        for to in ("clearml=offline", "clearml", "clearml=offline"):
            code, out, err = job.cli("replay", "r1", "--to", to)
            assert code == 0, (out, err)
        [task] = clearml.tasks
        assert len([k for k in clearml.scalars(task) if k[:2] == ("train", "loss")]) == 20
        assert sorted(v.state for v in read_views(job.data / "runs/r1")) == ["drained", "exported"]
        job.assert_all_there()


def test_sinks_of_the_command_line_survive_the_gateway(tmp_path: Path) -> None:
    """The gateway of `rankgate run --sink` is killed; the one that follows has the sink too."""
    with Job(tmp_path) as job:
        words = [sys.executable, str(RANKS), str(job.truth_dir), "200", "finish", "0.02"]
        process = job.start(
            sys.executable, "-m", "gateway", "run", "--run", "r1", "--sink", "clearml=offline",
            "--", *words, **PLACE,
        )  # fmt: skip
        wait_until(lambda: (job.data / "runs/r1/series.db").exists(), what="a first projection")
        for pid in job.gateway_pids():
            os.kill(pid, signal.SIGKILL)
        _, err = process.communicate(timeout=90)
        assert process.returncode == 0, err
        [view] = read_views(job.data / "runs/r1")
        assert view.state == "exported", (err, job.log())
        job.assert_all_there()


def test_one_bad_series_stops_no_other_run(tmp_path: Path) -> None:
    """Garbage in one run's series.db is made again from its journal; the others go on."""
    with Job(tmp_path) as job:
        one_run(job, "r1")
        job.drain()
        job.stop_gateway(signal.SIGTERM)
        for path in (job.data / "runs/r1").glob("series.db*"):
            path.unlink()
        (job.data / "runs/r1/series.db").write_bytes(b"garbage" * 5000)
        one_run(job, "r2")
        job.drain()
        job.assert_all_there("r1")
        job.assert_all_there("r2")


def test_a_socket_whose_path_was_removed(tmp_path: Path) -> None:
    """Ingest listens again where its socket was, new ranks find it, and it goes at the end."""
    with Job(tmp_path) as job:
        job.serve()
        path = Path(ipc_address(job.data).removeprefix("ipc://"))
        path.unlink()
        wait_until(path.exists, what="the socket is back")
        one_run(job)
        job.drain()
        job.assert_all_there()
        job.stop_gateway(signal.SIGTERM)
        assert not path.exists()  # nothing is left when the gateway has


def test_a_deleted_directory_ends_its_gateway(tmp_path: Path) -> None:
    """Nothing stays behind when a data directory is removed under its gateway."""
    with Job(tmp_path) as job:
        one_run(job)
        pids = job.gateway_pids()
        assert pids
        shutil.rmtree(job.data)
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 20)


def test_an_address_that_is_none_costs_nothing(tmp_path: Path) -> None:
    """A wrong RANKGATE_ADDR is said once; descriptors and threads do not grow."""
    with Job(tmp_path) as job:
        process = job.rank(0, 1, 50, "hang", RANKGATE_ADDR="localhost:5717")
        wait_until(lambda: (job.truth_dir / "0.ready").exists(), what="the rank hangs")
        folder = Path(f"/proc/{process.pid}/fd")
        before = len(list(folder.iterdir()))
        wait_until(lambda: _age(process.pid) >= 3.0, 10, "three seconds")
        assert len(list(folder.iterdir())) <= before + 2
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert err.count("an address is tcp://HOST:PORT") == 1
        job.drain()
        job.assert_all_there()


def test_a_port_that_there_is_not(tmp_path: Path) -> None:
    """Is said clearly and once; the training goes on, and its logs can be shipped elsewhere."""
    with Job(tmp_path) as job:
        rank = job.rank(0, 1, 5, "finish", RANKGATE_ADDR="tcp://127.0.0.1:99999")
        _, err = rank.communicate(timeout=60)
        assert rank.returncode == 0
        assert err.count("its port is not one of 1 to 65535") == 1
        code, out, err = job.cli("sweep", "--spool", str(job.spool))
        assert code == 0, (out, err)
        job.drain()
        job.assert_all_there()


def _age(pid: int) -> float:
    import time

    ticks = int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def test_a_deleted_working_directory(tmp_path: Path) -> None:
    """`init` in a directory that is gone raises nothing, and the run goes on."""
    gone = tmp_path / "gone"
    gone.mkdir()
    code = (
        f"import os; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r}); "
        "os.environ.pop('RANKGATE_DIR'); import rank_client; "
        "run = rank_client.init(run='r1'); run.log({'a': 1.0}); run.finish(); print('done')"
    )
    with Job(tmp_path) as job:
        process = job.start(sys.executable, "-c", code, RANKGATE_MODE="offline")
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (0, "done\n"), err
