"""Weights & Biases in its offline mode: the call hands the row to the `wandb-core` process."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path
from typing import Any

from .loop import main

_BLOCK, _HEAD = 32768, struct.Struct("<IHB")


class Wandb:
    def __init__(self, config: dict[str, Any]) -> None:
        for name in ("DATA_DIR", "CACHE_DIR", "CONFIG_DIR"):
            os.environ[f"WANDB_{name}"] = config["directory"]
        os.environ |= {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
        import wandb

        quiet = wandb.Settings(console="off", x_disable_stats=True, x_disable_meta=True)
        self._run = wandb.init(
            mode="offline", project="bench", dir=config["directory"], settings=quiet
        )
        self.finish = self._run.finish

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    @staticmethod
    def count(config: dict[str, Any]) -> int:
        """History records in the run's file, once `wandb-core` has seen that its user is gone."""
        from wandb.proto.wandb_internal_pb2 import Record

        time.sleep(3)
        found = 0
        for path in Path(config["directory"]).glob("wandb/offline-run-*/*.wandb"):
            for data in _records(path.read_bytes()):
                found += Record.FromString(data).HasField("history")
        return found


def _records(buf: bytes) -> list[bytes]:
    """The file is a LevelDB log: blocks of 32 KiB, records in fragments, after 7 bytes."""
    out, parts, at = [], b"", 7
    while at + _HEAD.size <= len(buf):
        if _BLOCK - at % _BLOCK < _HEAD.size:
            at += _BLOCK - at % _BLOCK
            continue
        _, size, kind = _HEAD.unpack_from(buf, at)
        at += _HEAD.size
        parts = (b"" if kind in (1, 2) else parts) + buf[at : at + size]
        if kind in (1, 4):
            out.append(parts)
        at += size
    return out


if __name__ == "__main__":
    main(Wandb)
