"""`python -m bench [--quick] [--out FILE] [--only NAME…]`: one JSON document, a table on stderr."""

from __future__ import annotations

import argparse
import importlib
import json
import time
from pathlib import Path
from typing import Any

from .measure import machine, say, workplace

PARTS = ("log_cost", "throughput", "memory", "queries", "sinks", "files")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a minute or two; read ratios only")
    parser.add_argument("--out", type=Path, help="write the document here instead of printing it")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="NAME")
    args = parser.parse_args()
    document: dict[str, Any] = {"quick": args.quick, "machine": machine()}
    for name in args.only:
        start = time.monotonic()
        with workplace() as directory:
            part = importlib.import_module(f"bench.{name}").run(directory, args.quick)
        document[name] = {**part, "took_s": round(time.monotonic() - start, 1)}
    text = json.dumps(document, indent=1, ensure_ascii=False)
    if args.out:
        args.out.write_text(text + "\n")
        say(f"\nwritten to {args.out}")
    else:
        print(text)


if __name__ == "__main__":
    main()
