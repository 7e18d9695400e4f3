"""An in-memory `Memory` for tests of sinks."""

from __future__ import annotations

from typing import Any

import msgpack


class MemoryDict:
    """Keeps msgpack bytes, as the real one does, so that only what survives that is remembered."""

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}

    def get(self, key: str) -> Any:
        return msgpack.unpackb(self.data[key]) if key in self.data else None

    def put(self, key: str, value: Any) -> None:
        self.data[key] = msgpack.packb(value)

    put_now = put
