"""No logger at all: what the loop and its two clock readings cost."""

from __future__ import annotations

from typing import Any

from .loop import main


class Nothing:
    def __init__(self, config: dict[str, Any]) -> None:
        pass

    def log(self, values: dict[str, float], step: int) -> None:
        pass

    def finish(self) -> None:
        pass

    @staticmethod
    def count(config: dict[str, Any]) -> int:
        return 0


if __name__ == "__main__":
    main(Nothing)
