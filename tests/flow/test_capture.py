"""What ranks print arrives, told apart by rank, and where it went before nothing has changed."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import apsw
import pytest

from rank_client.capture.console import LATE
from rank_client.capture.record import REFUSED

from .job import Job, wait_until
from .printing import BURST_LINES, GIL_BYTES

PRINTING = str(Path(__file__).with_name("printing.py"))
PLACE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}


def start(job: Job, how: str, *more: str, **environ: str) -> subprocess.Popen[str]:
    words = (sys.executable, PRINTING, how, *more)
    return job.start(*words, **{"RANKGATE_RUN": "r1", **PLACE, **environ})


def printed(job: Job, run: str = "r1", rank: int = 0) -> list[tuple[str, str]]:
    """(level, text) of every line of a rank, in the order of its stream."""
    with job.reader(run) as reader:
        streams = [s.index for s in reader.streams() if s.rank == rank and s.kind != "tool"]
        rows = [row for index in streams for row in reader.texts_of(index, 0)]
    return [(level, text) for _, _, _, _, level, text in rows if level in ("stdout", "stderr")]


#: torchrun starts Python with -u, so that C holds nothing back
EVERYTHING_OUT = ["rank {} prints", "a bare write", "an echo", "C printf, held back",
                  "red and api_key=[redacted]", "a forked child", "no newline"]  # fmt: skip
EVERYTHING_ERR = ["to stderr", "a warning", "100%|######### | 100/100"]


@pytest.mark.torch
@pytest.mark.timeout(180)
def test_every_ranks_own_lines_arrive(tmp_path: Path) -> None:
    """Under torchrun: prints, bare writes, C, children, a progress bar; in order, by level, with
    the rank, without secrets; `rankgate tail` shows them, and the rules pass them all."""
    with Job(tmp_path, OMP_NUM_THREADS="1") as job:
        torchrun = ["torchrun", "--standalone", "--nproc-per-node", "2", PRINTING, "all"]
        code, out, err = job.cli("run", "--run", "r1", "--", *torchrun)
        assert code == 0, (out, err)
        for rank in range(2):
            lines = printed(job, rank=rank)
            want = [line.format(rank) for line in EVERYTHING_OUT]
            assert [text for level, text in lines if level == "stdout"] == want
            assert [text for level, text in lines if level == "stderr"] == EVERYTHING_ERR
        _, shown, _ = job.cli("tail", "r1", "--rank", "1", "--json")
        assert {"an echo", "to stderr"} <= {json.loads(s)["text"] for s in shown.splitlines()}
        with job.reader() as reader:
            assert reader.about().counters["passed console"] == 2 * len(
                EVERYTHING_OUT + EVERYTHING_ERR
            )
        job.assert_accounted()


#: how a rank prints and ends → its exit code
WAYS = {"all": 0, "raise": 1, "os_exit": 7, "kill": -9, "segfault": -11,
        "gil": 0, "burst": 0, "merged": 0, "two_runs": 0, "child": 0}  # fmt: skip
#: C and Python hold back what goes to a pipe, as they do outside of this test
OFFLINE = {"RANKGATE_MODE": "offline", "PYTHONUNBUFFERED": ""}
AT_ONCE = 3  #: processes at a time


@dataclass(frozen=True)
class Printed:
    """All ways, each in a run of its own. `got`: (exit code, stdout, stderr) of each."""

    job: Job
    got: dict[str, tuple[int, str, str]]

    def lines(self, how: str) -> list[tuple[str, str]]:
        self.job.assert_accounted(how)
        return printed(self.job, how)


READ_AT_ONCE = 100_000  #: lines, about: what one look at a descriptor may hold


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Printed]:
    with Job(tmp_path_factory.mktemp("printing"), **OFFLINE) as job:
        go, got = job.truth_dir / "go", {}
        names = list(WAYS)
        for at in range(0, len(names), AT_ONCE):
            started = {how: begin(job, how, go) for how in names[at : at + AT_ONCE]}
            for how, process in started.items():
                if how == "child":
                    assert process.wait(60) == 0  # the rank's end waits for no child
                    go.touch()
                out, err = process.communicate(timeout=60)
                got[how] = process.returncode, out, err
        job.drain()
        yield Printed(job, got)


def begin(job: Job, how: str, go: Path) -> subprocess.Popen[str]:
    more = [str(go)] if how == "child" else []
    words = [sys.executable, PRINTING, how, *more]
    if how == "merged":
        words = ["/bin/sh", "-c", 'exec "$@" 2>&1', "sh", *words]
    return job.start(*words, **{"RANKGATE_RUN": how, **PLACE})


@pytest.mark.parametrize("how", ["all", "raise", "os_exit", "kill", "segfault"])
def test_output_and_exit_code_are_as_without(ways: Printed, tmp_path: Path, how: str) -> None:
    """Byte for byte on both descriptors, and the same code, however the process ends."""
    with Job(tmp_path, **OFFLINE) as job:
        process = start(job, how, "nocapture")
        out, err = process.communicate(timeout=60)
    code, with_out, with_err = ways.got[how]
    assert (code, with_out) == (process.returncode, out)
    assert code == WAYS[how]
    if how == "segfault":  # which threads there are differs
        assert "Segmentation fault" in with_err
    else:
        assert with_err == err


@pytest.mark.parametrize(
    ("how", "last"),
    [
        ("all", [("stdout", "no newlineC printf, held back")]),
        ("kill", [("stdout", f"line {i}") for i in range(1000)] + [("stdout", "half a line")]),
        ("os_exit", [("stdout", "last words")]),
        ("raise", [("stderr", "RuntimeError: the loss exploded")]),
    ],
)
def test_last_words_are_not_lost(ways: Printed, how: str, last: list[tuple[str, str]]) -> None:
    """All that was printed before an exit, a SIGKILL, `os._exit` or an exception is there once."""
    lines = ways.lines(how)
    its = [line for line in lines if line[0] == last[0][0]]
    assert its[-len(last) :] == last
    assert len(set(lines)) == len(lines)


def test_a_crash_tells_where_it_was(ways: Printed) -> None:
    """What faulthandler writes while the interpreter dies is in the log."""
    lines = ways.lines("segfault")
    assert ("stderr", "Fatal Python error: Segmentation fault") in lines
    assert any("printing.py" in text for _, text in lines)


@pytest.mark.parametrize(
    ("how", "size", "count"),
    [("gil", GIL_BYTES, -(-GIL_BYTES // 11)), ("burst", BURST_LINES * 80, BURST_LINES)],
)
def test_a_flood_blocks_nothing_and_is_counted(
    ways: Printed, how: str, size: int, count: int
) -> None:
    """More than can be kept, even while nobody else in the process can run, comes out as it is;
    what is not kept is counted, and the rest is there."""
    code, out, err = ways.got[how]
    assert (code, len(out)) == (0, size), err
    kept = sum(level == "stdout" for level, _ in ways.lines(how))
    with ways.job.reader(how) as reader:
        losses = reader.losses()
    refused = sum(n for _, _, _, n, reason in losses if reason == REFUSED)
    if any(reason == LATE for *_, reason in losses):  # a busy machine: it says that it cannot tell
        assert count - READ_AT_ONCE < kept + refused <= count
    else:
        assert kept + refused == count
    assert min(kept, refused) > 1000
    [stream] = ways.job.streams(how)
    assert stream.refused == sum(n for _, _, _, n, _ in losses)


def test_one_destination_keeps_its_order(ways: Printed) -> None:
    """With 2>&1 what goes to stdout and stderr comes out, and is recorded, as it was written."""
    want = [f"{name} {i}" for i in range(300) for name in ("out", "err")]
    assert ways.got["merged"][1].splitlines() == want
    assert [text for _, text in ways.lines("merged")] == want


def test_a_child_that_outlives_its_rank(ways: Printed) -> None:
    """What a child prints after the rank's end still comes out."""
    assert ways.got["child"][:2] == (0, "parent\nchild\n")
    assert ways.lines("child") == [("stdout", "parent")]


def test_two_runs_share_one_console(ways: Printed) -> None:
    """Lines go to the first run of a process, and to the next one when that has finished."""
    assert ways.got["two_runs"][:2] == (0, "of the first\nof the third\n")
    assert ways.lines("two_runs") == [("stdout", "of the first")]
    assert ways.lines("r2") == []
    assert ways.lines("r3") == [("stdout", "of the third")]


def test_a_terminal_stays_a_terminal(tmp_path: Path) -> None:
    """Programs still see a terminal of its width, and it gets the same bytes."""
    code = (
        "import os, sys, rank_client\n"
        "rank_client.init(capture_console=sys.argv[1] == 'True')\n"
        "print(sys.stdout.isatty(), sys.stderr.isatty(), os.get_terminal_size(2).columns)\n"
        "sys.stderr.write('\\rbar 1\\rbar 2\\n'); os.system('echo child')\n"
    )
    with Job(tmp_path, RANKGATE_MODE="offline") as job:
        environ = {**job.environ, "RANKGATE_RUN": "r1", **PLACE}
        with_it = under_terminal([sys.executable, "-c", code, "True"], environ)
        without = under_terminal([sys.executable, "-c", code, "False"], environ)
        assert with_it == without
        assert with_it.startswith(b"True True 100\r\n")
        job.drain()
        want = ["True True 100", "bar 2", "child"]
        with job.reader() as reader:
            assert [row[5] for row in reader.texts()] == want
        job.assert_accounted()


def under_terminal(words: list[str], environ: dict[str, str]) -> bytes:
    """What a program writes to a terminal of 100 columns."""
    import fcntl
    import struct
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    process = subprocess.Popen(words, env=environ, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    out = b""
    while True:
        try:
            out += os.read(master, 65536)
        except OSError:  # the last writer has gone
            break
    os.close(master)
    assert process.wait(30) == 0, out
    return out


def test_a_lost_copier_blocks_nothing(tmp_path: Path) -> None:
    """When the process that copies is killed, the training goes on, prints where it did before,
    and says so once."""
    with Job(tmp_path) as job:
        process = start(job, "copier")
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        after = [line for line in out.splitlines() if line.startswith("after")]
        assert after[-1] == "after 999"
        assert len(after) > 900  # a pipe that the killed one had read from may have lost some
        assert err.count("the process that records printed lines is gone") == 1
        job.drain()
        assert ("stdout", "before") in printed(job)
        job.assert_accounted()


def test_no_process_stays_behind(tmp_path: Path) -> None:
    """The one that copies ends with the last that can print, and is nobody's child."""
    with Job(tmp_path, RANKGATE_MODE="offline") as job:
        process = job.rank(0, 1, 5, "hang")
        wait_until(lambda: (job.truth_dir / "0.ready").exists(), what="the rank hangs")
        wait_until(lambda: copiers(job), what="a copier")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        wait_until(lambda: not children.read_text().strip(), what="no child")
        process.kill()
        process.communicate(timeout=30)
        wait_until(lambda: not copiers(job), what="no copier")
        job.drain()
        job.assert_all_there()


def copiers(job: Job) -> list[str]:
    found = []
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            words = (proc / "cmdline").read_bytes()
        except OSError:
            continue
        if b"capture.copier" in words and os.fsencode(job.spool) in words:
            found.append(proc.name)
    return found


@pytest.mark.timeout(180)
def test_one_rank_of_a_node_tells_how_the_machine_is(tmp_path: Path) -> None:
    """The lowest local rank samples, and when it is killed another; the rules pass it on under a
    name of its own, and no step of the training changes by it."""
    go = tmp_path / "go"
    with Job(tmp_path) as job:
        job.serve()
        place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        ranks = []
        for rank in ("0", "1"):
            more = {**place, "RANK": rank, "LOCAL_RANK": rank}
            ranks.append(start(job, "machine", str(go), **more))
            wait_until(lambda: samplers(job) == {0}, what="samples of rank 0 alone")
        ranks[0].kill()
        wait_until(lambda: 1 in samplers(job), what="samples of rank 1")
        go.touch()
        ranks[1].communicate(timeout=60)
        job.drain()
        with job.reader() as reader:
            assert reader.about().counters["passed system"] > 10
        assert [s.last_step for s in job.streams()] == [0, 0]
        job.assert_accounted()


def samplers(job: Job) -> set[int]:
    """The ranks that have told how their machine is, three times."""
    try:
        with job.reader() as reader:
            ranks = {s.index: s.rank for s in reader.streams()}
            found = reader.points("system/cpu_percent")
            pairs = zip(found.stream.tolist(), found.step.tolist(), strict=True)
            return {ranks[index] for index, step in pairs if step == 2}
    except (OSError, KeyError, apsw.Error):
        return set()  # no series yet, or no such key
