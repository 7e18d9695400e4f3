"""A sink that writes each run as one file of JSON lines, and its files beside it.

    [sinks.jsonl]
    folder = "/data/lines"

The file ends where the last receipt says: what stands behind that is of a delivery that may have
been cut short, and comes again. So nothing is written twice, whatever was killed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from gateway.sinks.base import (
    Item,
    Media,
    Memory,
    Off,
    Refused,
    Rows,
    RunInfo,
    Sent,
    SinkKind,
    Text,
    Unavailable,
)

SIZE = "bytes"  #: remembered with each receipt: where the file ends
STATE = "state"  #: the final state that stands at its end


class JsonlConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`[sinks.jsonl]`."""

    mode: Literal["online", "offline"] = "online"
    folder: str = ""  #: where `RUN.jsonl` and `files/` are made


class JsonlSink:
    """See `gateway.sinks.base.Sink`. Skips nothing."""

    stop_asked = ""

    def __init__(self, config: JsonlConfig) -> None:
        self._config = config
        self._path = Path()
        self._memory: Memory

    def open(self, run: RunInfo, memory: Memory) -> None:
        if not self._config.folder:
            raise Off("no folder: set `folder` in [sinks.jsonl]")
        self._memory = memory
        self._path = Path(self._config.folder) / f"{run.run_id}.jsonl"
        try:
            (self._path.parent / "files").mkdir(parents=True, exist_ok=True)
            self._path.touch()
        except OSError as error:
            raise Unavailable(f"cannot make {self._path}: {error.strerror}") from None

    def send(self, batch: Sequence[Item], again: bool) -> Sent:
        for item in batch:
            if isinstance(item, Media):
                self._keep_file(item)
        self._append([line for item in batch for line in lines(item)])
        return Sent(delivered=sum(item.items for item in batch))

    def close(self, state: str, reason: str) -> Sent:
        if self._memory.get(STATE) != state:
            self._append([{"kind": "end", "state": state, "reason": reason}])
            self._memory.put(STATE, state)
        return Sent()

    def _append(self, values: Sequence[dict[str, Any]]) -> None:
        """All of it, on the disk, behind what has a receipt. NaN is written as Python reads it."""
        text = "".join(f"{json.dumps(value)}\n" for value in values).encode()
        end = int(self._memory.get(SIZE) or 0)
        try:
            with self._path.open("r+b") as file:
                file.truncate(end)
                file.seek(end)
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise Unavailable(f"cannot write {self._path}: {error.strerror}") from None
        self._memory.put(SIZE, end + len(text))

    def _keep_file(self, item: Media) -> None:
        """By its content, so that the same file again changes nothing."""
        kept = self._path.parent / "files" / item.sha256
        part = kept.with_suffix(".part")
        try:
            if not kept.exists():
                shutil.copyfile(item.path, part)
                part.rename(kept)
        except FileNotFoundError:
            raise Refused(f"{item.name} is gone from the disk") from None
        except OSError as error:
            raise Unavailable(f"cannot write {kept}: {error.strerror}") from None


def lines(item: Item) -> Iterator[dict[str, Any]]:
    """An item as what stands in the file, one map for each line."""
    if isinstance(item, Rows):
        for i, seq in enumerate(item.seq.tolist()):
            values = {key: column[i].item() for key, column in item.columns.items()}
            yield {
                "kind": "row", "rank": item.rank, "seq": seq, "step": int(item.step[i]),
                "wall_ns": int(item.wall_ns[i]), "values": values,
            }  # fmt: skip
        return
    about: dict[str, Any] = {"rank": item.rank, "seq": item.seq, "wall_ns": item.wall_ns}
    if isinstance(item, Text):
        kind = "console" if item.console else "text"
        yield {"kind": kind, **about, "level": item.level, "text": item.text, "step": item.step}
    elif isinstance(item, Media):
        names = {"what": item.what, "key": item.key, "name": item.name, "step": item.step}
        yield {"kind": "file", **about, **names, "sha256": item.sha256, "meta": item.meta}
    else:
        yield {"kind": type(item).__name__.lower(), **about, "values": item.values}


def _export(config: JsonlConfig, folder: Path, final: Path) -> JsonlSink:
    return JsonlSink(msgspec.structs.replace(config, folder=str(folder)))


KIND = SinkKind(JsonlConfig, lambda config, _: JsonlSink(config), _export)
