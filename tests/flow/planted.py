"""A rank that has keys of every vendor in its environment and puts each where a text can be: a
line, its own output, params, tags, names of files, a checkpoint's, an exception.

Usage: python planted.py FOLDER NAME…, the names of the environment variables that hold the secrets.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import rank_client


def main() -> None:
    folder = Path(sys.argv[1])
    secrets = {name: os.environ[name] for name in sys.argv[2:]}
    run = rank_client.init(
        project="planted", tags=list(secrets.values()),
        config={"environment": dict(secrets), "lr": 0.1},
    )  # fmt: skip
    for step, (name, secret) in enumerate(secrets.items()):
        run.log({"loss": 1.0 / (step + 1), "epoch": step}, step=step)
        run.log_text(f"logged in with {secret} as told by {name}={secret}")
        sys.stdout.write(f"printed {secret}\n")
        run.log_params({f"note {step}": f"see {secret}", f"{secret}": step})
        run.log_summary({f"why {step}": f"https://me:{secret}@host/path"})
        bare = secret.replace("/", "_")  # as it can be in a file's name
        path = folder / f"weights-{bare[:80]}.pt"
        path.write_bytes(b"weights")
        run.log_file(path, name=f"{secret}.txt")
        run.log_checkpoint(path, metrics={"note": secret}, final=True, step=step)
    raise RuntimeError(f"cannot log in with {' or '.join(secrets.values())}")


if __name__ == "__main__":
    main()
