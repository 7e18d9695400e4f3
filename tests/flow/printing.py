# ruff: noqa: T201 - printing is what it is for
"""A rank that prints in every way there is, and then ends as it is told.

Usage: python printing.py HOW [nocapture | FILE]
HOW: all | merged | kill | os_exit | segfault | raise | gil | burst | child | copier | two_runs |
machine; the child of `child` waits for FILE, and so does `machine`, which samples often.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import rank_client
from rank_client.capture import machine

BURST_LINES = 250_000
GIL_BYTES = 20_000_000


def main() -> None:
    how = sys.argv[1]
    if how == "machine":
        machine.SAMPLE_SECONDS = 0.2
    run = rank_client.init(project="flow", capture_console=sys.argv[2:] != ["nocapture"])
    run.log({"loss": 1.0}, step=0)
    if how == "all":
        print_everything(run.rank)
    elif how == "merged":
        print_in_turn()
    elif how == "gil":  # nobody else in this process can run until all of it is printed
        ctypes.PyDLL(None).system(f"yes 0123456789 2>/dev/null | head -c {GIL_BYTES}".encode())
    elif how == "burst":
        line = "x" * 79 + "\n"
        for _ in range(BURST_LINES // 1000):
            sys.stdout.write(line * 1000)
    elif how == "child":
        print("parent", flush=True)
        if os.fork() == 0:
            wait_for(Path(sys.argv[2]))
            os.write(1, b"child\n")
            os._exit(0)
    elif how == "machine":
        wait_for(Path(sys.argv[2]))
    elif how == "copier":
        lose_copier(run)
    elif how == "two_runs":
        use_two_runs(run)
    end(how)


def use_two_runs(run: rank_client.Run) -> None:
    other = rank_client.init(run="r2")
    print("of the first", flush=True)
    other.finish()
    run.finish()
    rank_client.init(run="r3")
    print("of the third", flush=True)


def print_in_turn() -> None:
    for i in range(300):
        print("out", i, flush=True)
        print("err", i, file=sys.stderr, flush=True)


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.02)


def print_everything(rank: int) -> None:
    print(f"rank {rank} prints")
    print("to stderr", file=sys.stderr)
    sys.stdout.flush()
    os.write(1, b"a bare write\n")
    subprocess.run(["echo", "an echo"], check=True)
    ctypes.CDLL(None).printf(b"C printf, held back\n")
    logging.getLogger("train").warning("a warning")
    print("\x1b[1;31mred\x1b[0m and api_key=hunter2222222", flush=True)
    for i in range(100):
        sys.stderr.write(f"\r{i + 1:3}%|{'#' * (i // 10):10}| {i + 1}/100")
        sys.stderr.flush()
    sys.stderr.write("\n")
    if os.fork() == 0:
        os.write(1, b"a forked child\n")
        os._exit(0)
    os.wait()
    print("no newline", end="")


def lose_copier(run: rank_client.Run) -> None:
    """Kill the process that copies: it has the spool's lock file open, as we have."""
    print("before", flush=True)
    time.sleep(0.5)
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            words = (proc / "cmdline").read_bytes()
        except OSError:
            continue
        if b"capture.copier" in words and run.stream.encode() in words:
            os.kill(int(proc.name), signal.SIGKILL)
    for i in range(1000):
        print("after", i, flush=True)
        time.sleep(0.0005)


def end(how: str) -> None:
    if how == "kill":
        for i in range(1000):
            print("line", i, flush=True)
        sys.stdout.write("half a line")
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "os_exit":
        print("last words", flush=True)
        os._exit(7)
    elif how == "segfault":
        faulthandler.enable()
        ctypes.string_at(0)
    elif how == "raise":
        raise RuntimeError("the loss exploded")


if __name__ == "__main__":
    main()
