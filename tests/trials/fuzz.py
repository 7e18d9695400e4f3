"""Hostile frames, connections and files, by the million.

Frames go straight into the cores of both sides; raw TCP connections to a real gateway; damage into
journals and spools. Nothing may raise, memory stays, the good rank beside is served in time, and
nothing with a wrong checksum is stored.

Run: python -m tests.trials.fuzz [--frames N] [--connections N] [--files N] [--seed S]
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from . import fuzz_connections, fuzz_files, fuzz_frames, trial

GROWTH_KIB = 8 << 10  #: that a process may grow once it is warm
WARM = 0.2  #: of the worlds, before memory counts
ACK_P99_MS = 50.0
WORKERS = max(1, min(8, os.cpu_count() or 1))


def spread(part: Any, seed: int, n: int, folder: Path) -> trial.Figures:
    """The frames or files of all workers, each with a seed of its own."""
    counts: Counter[str] = Counter()
    broken: list[str] = []
    grown = 0
    folders = [folder / f"{part.__name__.rpartition('.')[2]}{w}" for w in range(WORKERS)]
    for path in folders:
        path.mkdir()
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        seeds = [seed * 1000 + w for w in range(WORKERS)]
        sizes = [n // WORKERS] * WORKERS
        for found, resident, faults in pool.map(part.fuzz, seeds, sizes, folders):
            counts += found
            broken += faults
            grown = max(grown, growth_kib(resident))
    if grown > GROWTH_KIB:
        broken.append(f"memory grew by {grown >> 10} MiB")
    return {**counts, "grown_kib": grown, "broken": broken}


def growth_kib(resident: list[int]) -> int:
    """From the warm part to the end, by medians: one world is larger than another."""
    warm = int(len(resident) * WARM)
    rest = resident[warm:]
    if len(rest) < 6:
        return 0
    third = len(rest) // 3
    first, last = sorted(rest[:third]), sorted(rest[-third:])
    return max(0, last[third // 2] - first[third // 2])


def connections(seed: int, n: int, folder: Path, keyed: bool) -> trial.Figures:
    figures = fuzz_connections.fuzz(seed, n, folder, keyed)
    broken = figures["broken"]
    if figures["ack_p99_ms"] > ACK_P99_MS:
        broken.append(f"the good rank waited {figures['ack_p99_ms']} ms (p99)")
    if figures["ingest_end_kib"] - figures["ingest_warm_kib"] > GROWTH_KIB:
        broken.append("ingest grew")
    return figures


def fuzz(options: Any, folder: Path) -> trial.Figures:
    figures: trial.Figures = {"broken": []}
    parts = [
        ("frames", lambda n: spread(fuzz_frames, options.seed, n, folder)),
        ("files", lambda n: spread(fuzz_files, options.seed, n, folder)),
        ("connections", lambda n: connections(options.seed, n // 2, folder / "open", False)),
        ("connections", lambda n: connections(options.seed, n // 2, folder / "keyed", True)),
    ]
    for name, part in parts:
        if n := getattr(options, name):
            found = part(n)
            figures["broken"] += found.pop("broken")
            figures.setdefault(name, []).append(found)
    return figures


if __name__ == "__main__":
    parser = trial.parser(__doc__.splitlines()[0], seconds=600)
    parser.add_argument("--frames", type=int, default=10_000_000)
    parser.add_argument("--connections", type=int, default=200_000)
    parser.add_argument("--files", type=int, default=20_000)
    chosen = parser.parse_args()
    sys.exit(trial.run("fuzz", chosen.seed, lambda folder: fuzz(chosen, folder)))
