"""A rank that lives until it is told otherwise by files in TRUTH_DIR; needs no torch.

Usage: python elastic.py TRUTH_DIR [STEPS]
With STEPS it logs so many and ends. Else it logs until `finish` is there, or fails when it finds
`fail-AGENT`, which it removes. AGENT and LIFE are variables of the test's.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import rank_client


def main() -> None:
    truth_dir = Path(sys.argv[1])
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 1 << 30
    agent, world = os.environ.get("AGENT", ""), int(os.environ["WORLD_SIZE"])
    run = rank_client.init(project="flow")
    about = {"run": run.id, "rank": run.rank, "stream": run.stream, "agent": agent, "world": world,
             "began": time.time(),
             "restart": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))}  # fmt: skip
    with (truth_dir / f"{run.stream}.jsonl").open("a", buffering=1) as truth:
        truth.write(json.dumps(about) + "\n")
        for step in range(steps):
            values = {"world": world, "life": int(os.environ.get("LIFE", 0))}
            run.log(values, step=step)
            truth.write(json.dumps({"step": step, **values}) + "\n")
            if (truth_dir / "finish").exists():
                break
            if (truth_dir / f"fail-{agent}").exists():
                (truth_dir / f"fail-{agent}").unlink()
                raise RuntimeError(f"the worker of {agent} fails")
            if len(sys.argv) <= 2:
                time.sleep(0.02)
    run.finish()


if __name__ == "__main__":
    main()
