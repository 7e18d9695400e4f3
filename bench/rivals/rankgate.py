"""rankgate's own `run.log`, with its sender running; `config["address"]` may lead nowhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .loop import main


class Rankgate:
    def __init__(self, config: dict[str, Any]) -> None:
        os.environ["RANKGATE_DIR"] = config["directory"]
        os.environ["RANKGATE_SPOOL"] = f"{config['directory']}/spool"
        import rank_client

        self._run = rank_client.init(run="bench", gateway=config["address"], rank=0, world_size=1)
        self.log = self._run.log

    def finish(self) -> None:
        self._run.finish(seconds=10 if self._run._sender.session.welcomed else 0)

    @staticmethod
    def count(config: dict[str, Any]) -> int:
        """Whole rows in the spools that the killed process left."""
        from rank_client.wire.records import Kind, scan
        from rank_client.wire.segments import SPOOL_KINDS

        files = sorted(Path(config["directory"]).glob("spool/*/*/*.log"))
        heads = [head for path in files for head in scan(path.read_bytes(), SPOOL_KINDS).heads]
        return sum(head.kind == Kind.ROW for head in heads)


if __name__ == "__main__":
    main(Rankgate)
