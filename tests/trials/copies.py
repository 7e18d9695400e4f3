"""A run's directory copied again and again while it is written: each copy can be read.

A copy holds the beginning of the journal, byte for byte, and opens for people, read-only too.

Run: python -m tests.trials.copies [--copies N] [--seed S] [--seconds MAX]
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

from gateway import view
from gateway.errors import RankgateError
from gateway.journal.reader import JournalReader
from rank_client.wire.disk import OsDisk
from tests.flow.job import Job, wait_until

from . import trial
from .kill import Slot

RUN = "r1"
RANKS = 2
BURST = 200.0  #: of a rank's calls: so many that files change while they are copied
SHOWN = 5  #: of so many copies one is shown by the command line too


class Digest:
    """The journal's entries one after the other: after entry k, `at(k)`."""

    def __init__(self, run_dir: Path) -> None:
        self._after: list[bytes] = []
        digest = hashlib.sha256()
        reader = JournalReader(OsDisk(), str(run_dir / "journal"))
        while entries := reader.read():
            for entry in entries:
                digest.update(b"%d %d " % (entry.seq, entry.kind))
                digest.update(entry.body)
                self._after.append(digest.digest())
        reader.close()
        self.damage = reader.damage

    def __len__(self) -> int:
        return len(self._after)

    def at(self, entries: int) -> bytes:
        return self._after[entries - 1] if entries else b""


class Copy:
    """One copy, made at a random moment; what reading it gave."""

    def __init__(self, run_dir: Path, folder: Path, how: str) -> None:
        self.path = folder / RUN
        self._how = how
        copied = subprocess.run(
            ["cp", "-r", str(run_dir), str(folder)], capture_output=True, text=True, check=False
        )
        # A file that was there when cp looked and was renamed since is no fault of the copy.
        self.complaint = copied.stderr if copied.returncode else ""
        if how == "modes":
            for path in (*folder.rglob("*"), folder):
                path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
        elif how == "mount":
            subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)

    def read(self, shown: bool, environ: dict[str, str]) -> list[str]:
        """What is wrong with it, in sentences."""
        broken = []
        self.journal = Digest(self.path)
        broken += [f"journal: {text}" for text in self.journal.damage]
        try:
            run = view.open(self.path)
            run.state()
            found = run.points("n", attempts="all")
            if not np.array_equal(found.step, found.value):
                broken.append("points that nobody logged")
        except Exception as error:
            broken.append(f"it does not open: {type(error).__name__}: {error}")
        if shown:
            words = [sys.executable, "-m", "gateway", "show", str(self.path)]
            done = subprocess.run(words, env=environ, capture_output=True, text=True, check=False)
            if done.returncode:
                broken.append(f"show ends with {done.returncode}: {done.stderr[-300:]}")
        return broken

    def remove(self) -> None:
        folder = self.path.parent
        if self._how == "mount":
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
        for path in (folder, *folder.rglob("*")):
            if path.is_dir():
                path.chmod(0o700)
        shutil.rmtree(folder)


def ways() -> list[str]:
    """How a copy may be made read-only here: root ignores modes, but may mount."""
    return ["as it is", "modes", "mount"] if os.getuid() == 0 else ["as it is", "modes"]


def attempt(folder: Path, seed: int, copies: int, seconds: float) -> trial.Figures:
    """The whole trial in `folder`; its figures, with `broken`."""
    rng = random.Random(seed)
    made: list[tuple[int, bytes]] = []
    broken: list[str] = []
    hows: Counter[str] = Counter()
    with Job(folder) as job:
        slots = [Slot(job, RUN, rank, rng, BURST) for rank in range(RANKS)]
        run_dir = job.data / "runs" / RUN
        try:
            for slot in slots:
                slot.revive()
            wait_until(lambda: (run_dir / "series.db").exists() and _has_points(run_dir), 60,
                       "first points")  # fmt: skip
            until = time.monotonic() + seconds
            while len(made) < copies and time.monotonic() < until:
                time.sleep(rng.expovariate(1 / 0.2))
                here = folder / f"copy-{len(made)}"
                here.mkdir()
                how = rng.choice(ways())
                copy = Copy(run_dir, here, how)
                try:
                    found = copy.read(len(made) % SHOWN == 0, job.environ)
                finally:
                    copy.remove()
                hows[how] += 1
                broken += [f"copy {len(made)} ({how}): {text}" for text in found]
                made.append((len(copy.journal), copy.journal.at(len(copy.journal))))
            (job.truth_dir / "end").touch()
            for slot in slots:
                slot.end()
        finally:
            for slot in slots:
                slot.kill()
        job.drain()
        job.stop_gateway(signal.SIGTERM)
        final = Digest(run_dir)
        for number, (entries, digest) in enumerate(made):
            if entries > len(final) or final.at(entries) != digest:
                broken.append(f"copy {number}: its {entries} entries are not the journal's first")
    return {
        "copies": len(made),
        "ways": dict(sorted(hows.items())),
        "entries": len(final),
        "shortest": min(entries for entries, _ in made),
        "longest": max(entries for entries, _ in made),
        "broken": broken,
    }


def _has_points(run_dir: Path) -> bool:
    try:
        return "n" in view.open(run_dir).keys()
    except RankgateError:
        return False


def main() -> int:
    parser = trial.parser(__doc__.split("\n")[0], 300.0)
    parser.add_argument("--copies", type=int, default=100)
    given = parser.parse_args()
    body = lambda f: attempt(f, given.seed, given.copies, given.seconds)  # noqa: E731
    return trial.run("copies", given.seed, body)


if __name__ == "__main__":
    sys.exit(main())
