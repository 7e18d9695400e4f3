"""A rank that logs in bursts, all kinds of calls, until it is killed or told that all is over.

Usage: python rank.py TRUTH_DIR SEED BURST PAUSE_SECONDS
It ends by itself (`finish`, exit code 0) once TRUTH_DIR/end exists. The truth file gets a line
after each call has returned: KIND NUMBER, of a file also its sha256.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import time
from pathlib import Path

import rank_client

KINDS = ("row", "odd", "text", "params", "summary", "file")
WEIGHTS = (900, 60, 25, 8, 4, 3)
FILE_BYTES = (10, 3000, 300_000)  #: the last one takes two chunks


def content(stream: str, n: int) -> bytes:
    """A file's bytes; every third is one that many streams log."""
    name = f"shared {n % 5}" if n % 3 == 0 else f"{stream} {n}"
    return (name.encode() * (1 + FILE_BYTES[n % len(FILE_BYTES)] // len(name)))[: 1 << 19]


def call(run: rank_client.Run, kind: str, n: int, path: Path) -> str:
    """One call; what to note of it beside its kind and number."""
    if kind == "row":
        run.log({"n": n, "x": n / 7}, step=n)
    elif kind == "odd":
        run.log({"n": n, "odd/x": -n / 7, "flag": n % 2 == 0}, step=n)
    elif kind == "text":
        run.log_text(f"text {n}")
    elif kind == "params":
        run.log_params({f"p/{n % 50}": n})
    elif kind == "summary":
        run.log_summary({f"s/{n % 50}": n})
    else:
        data = content(run.stream, n)
        path.write_bytes(data)
        run.log_file(path, name=f"file-{n}")
        return hashlib.sha256(data).hexdigest()
    return ""


def main() -> None:
    truth_dir, seed, burst, pause = Path(sys.argv[1]), *map(float, sys.argv[2:5])
    rng = random.Random(f"{seed} {os.getpid()}")
    run = rank_client.init(project="trial", config={"seed": seed})
    truth = os.open(truth_dir / f"{run.stream}.truth", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    about = {"run": run.id, "rank": run.rank, "stream": run.stream}
    os.write(truth, json.dumps(about).encode() + b"\n")
    path, end = truth_dir / f"{run.stream}.file", truth_dir / "end"
    n = 0
    while not end.exists():
        for kind in rng.choices(KINDS, WEIGHTS, k=1 + int(rng.expovariate(1 / burst))):
            n += 1
            note = call(run, kind, n, path)
            os.write(truth, f"{kind} {n} {note}\n".encode())
        time.sleep(rng.expovariate(1 / pause))
    run.finish(seconds=60)


if __name__ == "__main__":
    main()
