"""A process that logs 1000 events and then ends in one of many ways.

Usage: python leave.py TRUTH_DIR HOW
The truth file is written when all calls have returned; `at` is when the process began to end.
"""

from __future__ import annotations

import atexit
import ctypes
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import rank_client

EVENTS = 1000


def main() -> None:
    truth_dir, how = Path(sys.argv[1]), sys.argv[2]
    if how == "atexit_before":
        atexit.register(lambda: log(EVENTS - 1))
    run = rank_client.init(project="flow")
    if how == "atexit_after":
        atexit.register(lambda: log(EVENTS - 1))
    truth = (truth_dir / f"{run.stream}.jsonl").open("a", buffering=1)
    truth.write(json.dumps({"run": run.id, "rank": run.rank, "stream": run.stream}) + "\n")

    def log(step: int) -> None:
        run.log({"loss": float(step)}, step=step)
        truth.write(json.dumps({"step": step, "loss": float(step)}) + "\n")

    for step in range(EVENTS - how.startswith("atexit_")):
        log(step)
        if how == "stuck" and step == EVENTS // 2:
            while not (truth_dir / "go").exists():
                time.sleep(0.01)
    (truth_dir / f"{run.id}.ends").write_text(str(time.time()))
    end(how, run, log)


def end(how: str, run: rank_client.Run, log: Callable[[int], None]) -> None:
    if how.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, how))
        time.sleep(60)
    elif how == "with":
        with run:
            explode()
    elif how == "daemon":
        threading.Thread(target=log_for_ever, args=(run,), daemon=True).start()
        time.sleep(0.05)
    elif how == "killed_in_finish":
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        run.finish(seconds=60)
        os._exit(99)  # not reached: nobody answers
    elif how in WAYS:
        WAYS[how](run)


def explode() -> None:
    raise RuntimeError("the loss exploded")


def explode_unseen() -> None:
    sys.excepthook = lambda *_: None
    explode()


WAYS: dict[str, Callable[[rank_client.Run], object]] = {
    "finish": lambda run: run.finish(),
    "exit_0": lambda _: sys.exit(0),
    "exit_3": lambda _: sys.exit(3),
    "raise": lambda _: explode(),
    "stuck": lambda _: explode(),
    "raise_with_another_hook": lambda _: explode_unseen(),
    "os_exit": lambda _: os._exit(7),
    "abort": lambda _: os.abort(),
    "segfault": lambda _: ctypes.string_at(0),
    "exec": lambda _: os.execv(sys.executable, [sys.executable, "-c", "raise SystemExit(5)"]),
}


def log_for_ever(run: rank_client.Run) -> None:
    """Not in the truth: what comes after the end is not logged, and said."""
    for step in itertools.count(EVENTS):
        run.log({"loss": float(step)}, step=step)


if __name__ == "__main__":
    main()
