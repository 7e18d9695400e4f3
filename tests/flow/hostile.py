"""A rank that logs under the worst names there are. Usage: python hostile.py"""

from __future__ import annotations

import numpy as np

import rank_client

KEYS = [
    "loss", "a/b/c", "", "/", "//", "a//b", "/lead", "trail/", "../../etc/passwd", "a-b/c", "a_b/c",
    "sys/id", "sys/state", "emoji/🔥", "zero\0byte", "new\nline", "<script>alert(1)</script>",
    "=cmd()", "\x1b[31mred", "\u202ertl", "x" * 600, "lone\ud800surrogate", "ranks/3/loss", "Ω≈ç",
    "loss/loss", "parameters/lr",
]  # fmt: skip


def main() -> None:
    run = rank_client.init(project="hostile <b>", name="../\x1b[1m", tags=["<i>", "ü"], config={
        "nested": {"a": [1, 2], "b": None}, "": 1, "huge": 2**80, "path/../x": object(),
    })  # fmt: skip
    for step in range(5):
        run.log({key: float(i) for i, key in enumerate(KEYS)}, step=step)
    run.log({f"wide/{i}": i for i in range(50)}, step=5)
    run.log({"bad": "text", "good": 1.0, "too/large": 2**64, "nan": float("nan")}, step=6)
    run.log({"inf": float("-inf"), "int": 2**62 + 1, "bool": True}, step=7)
    run.log_text("\x1b[2J<b>bold</b>\u202e" + "long " * 5000)
    run.log_summary({"best": 1.0, "why": "=1+1", "nan": float("nan")})
    run.log_image("../../picture", np.zeros((4, 4, 3), np.uint8), step=1)
    run.log_table("tables/<t>", [{"a": 1, "b": "=x"}, {"a": float("inf")}])
    assert run.finish()


if __name__ == "__main__":
    main()
