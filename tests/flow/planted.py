"""A rank that puts secrets wherever a text can be: lines and its own output in every way there is,
params, tags, names of files, a checkpoint's, an exception.

Usage: python planted.py FOLDER HOW SECRET…, the secrets also standing in FOLDER/secrets.json by
name. HOW: `raise` waits for FOLDER/go and ends with an exception; `die` ends with SIGKILL.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import rank_client

libc = ctypes.CDLL(None)


def in_two(secret: str, between: str = "") -> None:
    half = len(secret) // 2
    sys.stdout.write(f"half {secret[:half]}{between}")
    sys.stdout.flush()
    time.sleep(0.05)  # the copier reads the halves one by one
    sys.stdout.write(f"{secret[half:]}\n")
    sys.stdout.flush()


def on_stdout(secret: str) -> None:
    sys.stdout.write(f"out {secret}\n")


def on_stderr(secret: str) -> None:
    sys.stderr.write(f"err {secret}\n")


def as_bytes(secret: str) -> None:
    os.write(1, f"raw {secret}\n".encode())


def from_c(secret: str) -> None:
    libc.printf(b"c %s\n", secret.encode())
    libc.fflush(None)


def in_a_progress_bar(secret: str) -> None:
    for percent in (10, 50, 100):
        sys.stderr.write(f"\r{percent}% of {secret}")
        sys.stderr.flush()
    sys.stderr.write("\n")


def in_colours(secret: str) -> None:
    in_two(secret, "\x1b[31m")


def as_a_list(secret: str) -> None:
    sys.stdout.write(f"{[secret]} {json.dumps([secret])}\n")


def by_a_child(secret: str) -> None:
    subprocess.run(["echo", "child", secret], check=True)


WAYS: tuple[Callable[[str], None], ...] = (
    on_stdout, on_stderr, as_bytes, from_c, in_two, in_a_progress_bar, in_colours, as_a_list,
    by_a_child,
)  # fmt: skip


def log(run: rank_client.Run, folder: Path, step: int, name: str, secret: str) -> None:
    """Everything that a call takes a text for."""
    run.log({"loss": 1.0 / (step + 1), "epoch": step}, step=step)
    run.log_text(f"logged in with {secret} as told by {name}={secret}", level=secret)
    run.log_text("x" * 14_990 + secret)  # longer than one record
    run.log_params({f"note {step}": f"see {secret}", f"{secret}": step, "list": [secret, {1: 2}]})
    run.log_summary({f"why {step}": f"https://me:{secret}@host/path", secret: step})
    bare = secret.replace("/", "_")  # as it can be in a file's name
    path = folder / f"weights-{bare[:80]}.pt"
    path.write_bytes(b"weights")
    run.log_file(path, name=f"{secret}.txt")
    run.log_file(folder / f"missing-{secret}")
    run.log_checkpoint(path, metrics={"note": secret, secret: 1}, final=True, step=step)
    run.log_image(f"picture {secret}", np.zeros((4, 4), np.uint8), step=step)
    run.log_table(f"table {secret}", [{"a": 1}], step=step)
    run.log({f"bad {secret}": "no number"}, step=step)


def main() -> None:
    folder, how = Path(sys.argv[1]), sys.argv[2]
    secrets: dict[str, str] = json.loads((folder / "secrets.json").read_text())
    every = " or ".join(secrets.values())
    run = rank_client.init(
        project=f"planted {every}", name=f"planted {every}", tags=list(secrets.values()),
        config={"environment": dict(secrets), "all": every, "argv": sys.argv[1:], "lr": 0.1},
    )  # fmt: skip
    for step, (name, secret) in enumerate(secrets.items()):
        for way in WAYS:
            way(secret)
        if how == "raise":
            log(run, folder, step, name, secret)
    if how == "die":
        sys.stdout.write(f"last words {every}")
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    run.log_text("all is said")
    while not (folder / "go").exists():
        time.sleep(0.02)
    raise RuntimeError(f"cannot log in with {every}")


if __name__ == "__main__":
    main()
