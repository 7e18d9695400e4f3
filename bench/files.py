"""Does a large checkpoint delay a metric? How long rows take to be acknowledged, alone and beside
a file on its way: in chunks as from another node, and from the same node's disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rank_client.rendezvous import ipc_address

from .gateway import Gateway
from .measure import ROOT, percentile, say

PIECE_BYTES = 8 << 20


def run(directory: Path, quick: bool) -> dict[str, Any]:
    size_mib, files, steps = (256, 1, 100) if quick else (2048, 3, 500)
    out: dict[str, Any] = {"unit": "ms", "file_mib": size_mib, "files": files}
    for how in ("chunks", "same node"):
        folder = directory / how.replace(" ", "-")
        folder.mkdir()
        address = "tcp://127.0.0.1:5797" if how == "chunks" else ipc_address(folder)
        paths = [str(_file(folder / f"{n}.pt", size_mib)) for n in range(files)]
        with Gateway(folder, address) as gateway:
            config = {
                "address": address,
                "directory": str(folder),
                "spool": str(folder / "spool"),
                "files": paths,
                "steps": steps,
            }
            command = [sys.executable, "-m", "bench.file_client", json.dumps(config)]
            found = json.loads(subprocess.check_output(command, cwd=ROOT, text=True))
            out[how] = {
                **{case: _spread(times) for case, times in found["ack_ms"].items()},
                "mib_per_s": round(size_mib * files / sum(found["file_seconds"])),
                "rank": found["memory"],
                "gateway": gateway.memory(),
            }
    _table(out)
    return out


def _file(path: Path, size_mib: int) -> Path:
    """Bytes that are in no other file: what a gateway has, it is not sent again."""
    with path.open("wb") as file:
        for _ in range((size_mib << 20) // PIECE_BYTES):
            file.write(os.urandom(PIECE_BYTES))
    return path


def _spread(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    shares = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    found = {name: round(percentile(ordered, share), 1) for name, share in shares.items()}
    return {"steps": len(ordered), **found}


def _table(out: dict[str, Any]) -> None:
    say(f"\nA row acknowledged, ms, alone and beside {out['file_mib']:,} MiB files")
    say(f"{'':22}{'steps':>7}{'p50':>9}{'p99':>9}{'max':>9}")
    for how in ("chunks", "same node"):
        for case in ("alone", "beside"):
            values = "".join(f"{v:9}" for k, v in out[how][case].items() if k != "steps")
            say(f"{how + ', ' + case:22}{out[how][case]['steps']:7}{values}")
        say(f"{how:22}{out[how]['mib_per_s']:7} MiB/s")
