"""A rank without torch: logs, writes down what `log` returned for, and ends as it is told.

Usage: python ranks.py TRUTH_DIR STEPS END [PAUSE_SECONDS]
END: finish | exit | os_exit | raise | kill | hang | gil | stop | until | checkpoint
`stop` waits for the wish to stop after its steps, `until` takes steps until it is there.
The truth file gets a line after each call has returned: what is in it must arrive.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

import rank_client


def main() -> None:
    truth_dir, steps, end = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    pause = float(sys.argv[4]) if len(sys.argv) > 4 else 0.0
    run = rank_client.init(project="flow", config={"steps": steps, "rank": os.environ["RANK"]})
    with (truth_dir / f"{run.stream}.jsonl").open("a", buffering=1) as truth:
        about = {"run": run.id, "rank": run.rank, "stream": run.stream}
        truth.write(json.dumps(about) + "\n")
        for step in range(steps):
            values = {"train/loss": 1.0 / (step + 1) + run.rank, "lr": 0.1, "n": step}
            if step % 10 == 9:
                values["epoch"] = step // 10
            run.log(values, step=step)
            truth.write(json.dumps({"step": step, **values}) + "\n")
            if end == "kill" and step == steps // 2:
                os.kill(os.getpid(), signal.SIGKILL)
            if end == "until" and run.should_stop():
                break
            time.sleep(pause)
        run.log_text(f"rank {run.rank} did {step + 1} steps")
        truth.write(json.dumps({"text": f"rank {run.rank} did {step + 1} steps"}) + "\n")
        come_to(end, run, truth_dir, steps)


def come_to(end: str, run: rank_client.Run, truth_dir: Path, steps: int) -> None:
    if end == "checkpoint":
        path = truth_dir / f"rank{run.rank}.pt"
        path.write_bytes(os.urandom(1 << 20) * 100)
        run.log_checkpoint(path, best=True, step=steps)
        run.finish(seconds=60)
    elif end in ("finish", "until"):
        run.finish()
    elif end == "os_exit":
        os._exit(7)
    elif end == "raise":
        raise RuntimeError("the loss exploded")
    elif end == "stop":
        Path(truth_dir / f"{run.rank}.ready").touch()
        while not run.should_stop():
            time.sleep(0.01)
        run.finish()
    elif end == "hang":
        Path(truth_dir / f"{run.rank}.ready").touch()
        time.sleep(600)
    elif end == "gil":
        Path(truth_dir / f"{run.rank}.ready").touch()
        ctypes.PyDLL(None).sleep(600)  # as any C call that does not let go of the GIL


if __name__ == "__main__":
    main()
