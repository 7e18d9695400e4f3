"""A rank that puts secrets into every text it can, then fails with one.

Usage: python canary.py FOLDER. The secrets are in variables: PLANT_SHAPE looks like one,
PLANT_NAMED is one by the name it goes by, SERVICE_SECRET is a value of the environment's.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import rank_client

SHAPE, NAMED = os.environ["PLANT_SHAPE"], os.environ["PLANT_NAMED"]
VALUE = os.environ["SERVICE_SECRET"]
ALL = f"{SHAPE} {VALUE} password={NAMED}"


def main() -> None:
    run = rank_client.init(
        project=f"p {VALUE}",
        name=f"n {SHAPE}",
        tags=[f"t {VALUE}", SHAPE, f"api_key={NAMED}"],
        config={"db": {"password": NAMED, "url": f"postgres://me:{NAMED}@db/x"}, "note": ALL,
                f"k {VALUE}": 1, "argv": ["--api-key", NAMED], "depth": 3},
    )  # fmt: skip
    run.log({"loss": 1.0}, step=1)
    run.log_text(f"line {ALL}", level=VALUE)
    run.log_text("x" * 14_990 + ALL)  # longer than one record
    run.log_params({"token": NAMED, "late": VALUE})
    run.log_summary({"best": 0.5, "client_secret": NAMED, "why": ALL})
    folder = Path(sys.argv[1])
    path = folder / f"results-{SHAPE}.csv"
    path.write_text("a,b\n")
    run.log_file(path)
    run.log_file(path, name=f"{VALUE}.csv")
    run.log_file(folder / f"missing-{SHAPE}")  # an error that names it
    run.log_table(f"table {VALUE}", [[1]])
    run.log_checkpoint(path, metrics={"note": ALL, "credentials": NAMED})
    run.log({f"bad {VALUE}": "no number", "good": 1.0}, step=2)
    run.log(f"not a dict {ALL}")
    raise RuntimeError(f"cannot log in with {ALL}")


if __name__ == "__main__":
    main()
