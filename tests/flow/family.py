"""A process that forks, spawns, threads and interrupts itself while it logs.

Usage: python family.py TRUTH_DIR HOW
The parent notes in its truth file what its calls returned for; its children's calls do nothing.
"""

from __future__ import annotations

import gc
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rank_client

THREADS = 16
CALLS = 300  #: of each thread
FORKS = 50
CHILD_SECONDS = 20.0  #: a child that takes longer hangs


class Truth:
    """Logs a step under a key, then writes it down."""

    def __init__(self, run: rank_client.Run, truth_dir: Path) -> None:
        self.run = run
        self._file = (truth_dir / f"{run.stream}.jsonl").open("a", buffering=1)
        self._file.write(json.dumps({"run": run.id, "rank": run.rank, "stream": run.stream}) + "\n")

    def log(self, key: str, step: int) -> None:
        self.run.log({key: step}, step=step)
        self._file.write(json.dumps({"step": step, key: step}) + "\n")


def child(run: rank_client.Run) -> None:
    """All that a child might do with what it got from its parent."""
    run.log({"child": 1.0})
    run.log_text("child")
    run.log_table("child", [[1]])
    assert run.finish() is True
    assert not run.should_stop()


def start_method(truth: Truth, _dir: Path, method: str) -> None:
    """A child by each start method, with the run handed over."""
    truth.log("before", 0)
    context: Any = multiprocessing.get_context(method)
    process = context.Process(target=child, args=(truth.run,))
    process.start()
    process.join(CHILD_SECONDS)
    assert process.exitcode == 0, process.exitcode
    truth.log("after", 1)


def threads(truth: Truth, _dir: Path) -> None:
    """Many threads log at once, while signal handlers and dying objects log in their midst."""
    seed = random.randrange(1 << 30)
    sys.stderr.write(f"seed {seed}\n")
    randomly = random.Random(seed)
    counts = {"handler": 0}
    deaths = itertools.count()  # one step: threads must not take the same number

    def again(*_: object) -> None:
        truth.run.log({"handler": counts["handler"]}, step=counts["handler"])
        counts["handler"] += 1
        signal.setitimer(signal.ITIMER_REAL, randomly.uniform(1e-4, 1e-3))

    class Dying:
        """In a cycle, so that the collector calls this wherever it happens to run."""

        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            number = next(deaths)
            truth.run.log({"del": number}, step=number)

    def work(number: int) -> None:
        for step in range(CALLS):
            truth.log(f"thread{number}", step)
            Dying()

    signal.signal(signal.SIGALRM, again)
    gc.set_threshold(20, 2, 2)
    workers = [threading.Thread(target=work, args=(n,)) for n in range(THREADS)]
    again()
    for worker in workers:
        worker.start()
    for step in range(CALLS):
        truth.log("main", step)
        Dying()
    for worker in workers:
        worker.join()
    signal.setitimer(signal.ITIMER_REAL, 0)
    gc.disable()
    assert counts["handler"] > 10
    for step in range(counts["handler"]):
        truth._file.write(json.dumps({"step": step, "handler": step}) + "\n")
    for step in range(next(deaths)):
        truth._file.write(json.dumps({"step": step, "del": step}) + "\n")


def forks(truth: Truth, truth_dir: Path) -> None:
    """Quick forks while threads log and files are sent; each child ends by itself, soon."""
    stop = threading.Event()

    def work(number: int) -> None:
        step = 0
        while not stop.is_set():
            truth.log(f"thread{number}", step)
            step += 1
            time.sleep(0.001)

    def send_files() -> None:
        while not stop.is_set():
            truth.run.log_file(truth_dir / "file.bin")
            time.sleep(0.01)

    (truth_dir / "file.bin").write_bytes(os.urandom(1 << 20))
    workers = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    workers.append(threading.Thread(target=send_files))
    for worker in workers:
        worker.start()
    pids = []
    for number in range(FORKS):
        pid = os.fork()
        if pid == 0:
            stop.set()
            child(truth.run)
            if number % 2:
                os._exit(0)
            return  # through the interpreter's whole end
        pids.append(pid)
    slow = wait_for(pids)
    stop.set()
    for worker in workers:
        worker.join()
    assert not slow, f"children that hang: {slow}"


def wait_for(pids: list[int]) -> list[int]:
    """The children that do not end by themselves; those are killed."""
    deadline = time.monotonic() + CHILD_SECONDS
    left = list(pids)
    while left and time.monotonic() < deadline:
        for pid in left[:]:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                assert status == 0, status
                left.remove(pid)
        time.sleep(0.01)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return left


def forked_rank(truth: Truth, truth_dir: Path) -> None:
    """A forked child that is a rank of its own, said so."""
    truth.log("x", 0)
    time.sleep(0.3)  # the parent's sender has its socket by now
    pid = os.fork()
    if pid == 0:
        run = rank_client.init(run=truth.run.id, rank=1, world_size=2)
        mine = Truth(run, truth_dir)
        for step in range(100):
            mine.log("x", step)
        (truth_dir / "delivered").write_text(str(run.finish(seconds=CHILD_SECONDS)))
        os._exit(0)
    assert not wait_for([pid])


def outlived(truth: Truth, truth_dir: Path) -> None:
    """A worker that outlives its parent, which is killed."""
    for step in range(100):
        truth.log("x", step)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.close(1)
        os.close(2)
        while not (truth_dir / "go").exists():
            time.sleep(0.01)
        os._exit(0)
    (truth_dir / "worker").write_text(str(pid))
    os.kill(os.getpid(), signal.SIGKILL)


def notebook(truth: Truth, truth_dir: Path) -> None:
    """A cell that is run twice, and one that fails."""
    import code

    sys.ps1 = ">>> "
    truth.log("x", 0)
    again = Truth(rank_client.init(run=truth.run.id), truth_dir)
    again.log("x", 0)
    again.log("x", 1)
    code.InteractiveInterpreter().runsource("1 / 0")


def two_runs(truth: Truth, truth_dir: Path) -> None:
    """Two runs in one process, in turns."""
    other = Truth(rank_client.init(run="the_other"), truth_dir)
    for step in range(100):
        truth.log("x", step)
        other.log("y", step)


def refused(truth: Truth, _dir: Path) -> None:
    """A child of multiprocessing calls init() without a rank, several times."""
    truth.log("x", 0)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=init_thrice)
    process.start()
    process.join(CHILD_SECONDS)


def init_thrice() -> None:
    for _ in range(3):
        rank_client.init().log({"child": 1.0})


WAYS: dict[str, Callable[[Truth, Path], None]] = {
    "fork": lambda t, d: start_method(t, d, "fork"),
    "spawn": lambda t, d: start_method(t, d, "spawn"),
    "forkserver": lambda t, d: start_method(t, d, "forkserver"),
    "threads": threads,
    "forks": forks,
    "forked_rank": forked_rank,
    "outlived": outlived,
    "notebook": notebook,
    "two_runs": two_runs,
    "refused": refused,
}


def main() -> None:
    truth_dir, how = Path(sys.argv[1]), sys.argv[2]
    WAYS[how](Truth(rank_client.init(project="flow"), truth_dir), truth_dir)


if __name__ == "__main__":
    main()
