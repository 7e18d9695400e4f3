"""trackio, local: a thread of the same process writes to SQLite every half second."""

from __future__ import annotations

import os
from typing import Any

from .loop import main


class Trackio:
    def __init__(self, config: dict[str, Any]) -> None:
        os.environ["TRACKIO_DIR"] = config["directory"]
        os.environ["HF_HUB_OFFLINE"] = "1"
        import trackio

        self._run = trackio.init("bench", embed=False, auto_log_gpu=False, auto_log_cpu=False)
        self.log = self._run.log
        self.finish = trackio.finish

    @staticmethod
    def count(config: dict[str, Any]) -> int:
        """Rows of the project's database."""
        os.environ["TRACKIO_DIR"] = config["directory"]
        from trackio.sqlite_storage import SQLiteStorage

        found = 0
        for run in SQLiteStorage.get_runs("bench"):
            name = run["name"] if isinstance(run, dict) else run
            found += len(SQLiteStorage.get_logs("bench", name))
        return found


if __name__ == "__main__":
    main(Trackio)
