"""Runs for tests, made as the gateway makes them: a real journal, projected by the real rules.

    run = RunBuilder(tmp_path, "7f3a9c21d04e", project="digits")
    for rank in run.ranks(4, nodes=2):
        rank.log({"train/loss": 0.5}, step=0).text("hello").end()
    run_dir = run.close()

Time is the builder's own: it starts at `START_NS`, each record takes a millisecond.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gateway.ingest.media import blob_path
from gateway.journal.writer import Journal, Mark
from gateway.rules.follow import rebuild
from gateway.sinks.quarantine import Kept
from gateway.sinks.store import Store
from rank_client.values import column_type
from rank_client.wire import frames
from rank_client.wire.disk import OsDisk
from rank_client.wire.records import (
    COLUMN_CODES,
    ROW_HEAD,
    Kind,
    Schema,
    pack,
    pack_map,
)

START_NS = 1_790_000_000 * 10**9
RECORD_NS = 10**6
SESSION = 1
FRAME_BYTES = 32 << 10


class RankBuilder:
    """One life of one process. Every verb gives itself back; `last` is its highest number."""

    def __init__(self, run: RunBuilder, stream: bytes, hello: dict[str, Any]) -> None:
        self.run = run
        self.stream = stream
        self.hello = hello
        self.rank: int = hello["rank"]
        self.last = 0
        self.step = -1
        self.ended = False
        self._schemas: dict[tuple[tuple[str, str], ...], Schema] = {}
        self._records: list[bytes] = []
        self._first = 1
        self._calls = 0

    # --- what a rank logs ------------------------------------------------------------------------

    def log(self, values: Mapping[str, Any], step: int | None = None) -> RankBuilder:
        if step is None:
            step, self._calls = self._calls, self._calls + 1
        columns = tuple((key, column_type(value)) for key, value in values.items())
        schema = self._schemas.get(columns)
        if schema is None:
            keys, types = zip(*columns, strict=True)
            schema = self._schemas[columns] = Schema(len(self._schemas), keys, types)
            self._records.append(schema.pack(self.last + 1))
        codes = "".join(COLUMN_CODES[t] for t in schema.types)
        now = self.run.tock()
        body = ROW_HEAD.pack(step, now, now) + struct.pack(f"<{codes}", *values.values())
        self.step = step
        return self._numbered(pack(Kind.ROW, self.last + 1, body, schema.id))

    def log_map(self, values: Mapping[str, Any], step: int) -> RankBuilder:
        """As `log` beyond the limit of schemas: a map instead of a row."""
        now = self.run.tock()
        return self._map(Kind.KV, {"s": step, "w": now, "m": now, "v": dict(values)})

    def text(self, text: str, level: str = "info", step: int | None = None) -> RankBuilder:
        return self._map(Kind.TEXT, {"t": text, "l": level, "w": self.run.tock(), "s": step})

    def params(self, values: Mapping[str, Any]) -> RankBuilder:
        return self._map(Kind.PARAMS, {"v": dict(values), "w": self.run.tock()})

    def summary(self, values: Mapping[str, Any]) -> RankBuilder:
        return self._map(Kind.SUMMARY, {"v": dict(values), "w": self.run.tock()})

    def media(
        self,
        key: str,
        data: bytes,
        what: str = "file",
        step: int | None = None,
        meta: Mapping[str, Any] | None = None,
        arrives: bool = True,
    ) -> RankBuilder:
        """A file; its bytes are in the run's media folder, unless they never arrive."""
        name = key.rpartition("/")[2]
        body = {"what": what, "key": key, "name": name, "s": step, "meta": dict(meta or {})}
        self._map(Kind.MEDIA, {**body, "w": self.run.tock()})
        return self.arrive(self.last, data) if arrives else self

    def arrive(self, number: int, data: bytes) -> RankBuilder:
        """The bytes of the file that record `number` told of."""
        self.flush()
        sha256 = hashlib.sha256(data).hexdigest()
        path = blob_path(self.run.path, sha256)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        blob = {"media": number, "sha256": sha256, "size": len(data)}
        self.run.entry(Kind.BLOB, {"stream": self.stream, **blob})
        return self

    def refuse(self, calls: int, reason: str) -> RankBuilder:
        """Calls that got no number, told of by a LOSS record."""
        return self._map(Kind.LOSS, {"n": calls, "reason": reason})

    def lose_media(self, number: int, reason: str = "media lost (rewritten)") -> RankBuilder:
        return self._map(Kind.LOSS, {"n": 0, "media": number, "reason": reason})

    def gap(self, records: int) -> RankBuilder:
        """Numbers that its process no longer has."""
        self.flush()
        first, self.last = self.last + 1, self.last + records
        self._first = self.last + 1
        self.run.journal.streams[self.stream].high_water = self.last
        self.run.entry(Kind.GAP, {"stream": self.stream, "from": first, "to": self.last})
        return self

    def end(self, status: str = "completed", text: str = "", bye: bool = True) -> RankBuilder:
        """How it ended: the END record, and the BYE after all was acknowledged."""
        self._map(Kind.END, {"status": status, "text": text, "w": self.run.tock()})
        self.flush()
        self.ended = True
        if bye:
            self.run.journal.streams[self.stream].ended = True
            self.run.entry(Kind.BYE, {"stream": self.stream, "final": self.last, "status": status})
        return self

    # --- to the journal --------------------------------------------------------------------------

    def _map(self, kind: Kind, body: dict[str, Any]) -> RankBuilder:
        return self._numbered(pack_map(kind, self.last + 1, body))

    def _numbered(self, record: bytes) -> RankBuilder:
        self._records.append(record)
        self.last += 1
        if sum(map(len, self._records)) > FRAME_BYTES:
            self.flush()
        return self

    def flush(self) -> RankBuilder:
        """Bring what was logged to the journal, as one frame."""
        n = self.last - self._first + 1
        if n:
            frame = frames.data(SESSION, self.stream, self._first, n, b"".join(self._records))
            self.run.journal.append_batch(self.run.now_ns, frame)
            self.run.journal.streams[self.stream].high_water = self.last
            self._records, self._first = [], self.last + 1
        return self


class RunBuilder:
    """A run in `root/runs/ID`. `close` writes its journal and series and gives its folder; a
    closed builder may go on logging and be closed again."""

    def __init__(
        self, root: Path, run: str = "7f3a9c21d04e", project: str = "digits", name: str = ""
    ) -> None:
        self.root = root
        self.id = run
        self.path = root / "runs" / run
        self.project = project
        self.name = name
        self.now_ns = START_NS
        self.lives: list[RankBuilder] = []
        self._uuid = hashlib.sha256(run.encode()).digest()[:16]
        self.path.mkdir(mode=0o700, parents=True)
        self.journal = Journal(OsDisk(), str(self.path / "journal"), self._uuid)

    # --- time and entries ------------------------------------------------------------------------

    def tock(self) -> int:
        self.now_ns += RECORD_NS
        return self.now_ns

    def wait(self, seconds: float) -> RunBuilder:
        self.now_ns += int(seconds * 1e9)
        return self

    def entry(self, kind: Kind, body: dict[str, Any]) -> None:
        self.journal.append_map(kind, self.now_ns, body)

    # --- who takes part --------------------------------------------------------------------------

    def rank(
        self,
        rank: int,
        world_size: int = 1,
        node: str = "node-0",
        local_rank: int | None = None,
        launch: str = "launch-1",
        restart: int = 0,
        kind: str = "live",
        earlier: Iterable[bytes] = (),
        **more: Any,
    ) -> RankBuilder:
        """A process that says HELLO. Another one of the same rank opens the next generation."""
        stream = hashlib.sha256(f"{self.id}/{len(self.lives)}".encode()).digest()[:16]
        hello = {
            "kind": kind, "run": self.id, "rank": rank, "world_size": world_size,
            "local_rank": rank if local_rank is None else local_rank, "node": node,
            "boot": f"boot-{node}", "agent": f"{node}:{launch}:{restart}", "launch": launch,
            "restart": restart, "earlier": list(earlier), "started": self.tock(),
            "project": self.project, "name": self.name, "tags": [], "v": [1, 1], **more,
        }  # fmt: skip
        self.journal.streams[stream] = Mark()
        self.entry(Kind.OPEN, {"stream": stream, "hello": hello})
        life = RankBuilder(self, stream, hello)
        self.lives.append(life)
        return life

    def ranks(
        self, n: int, nodes: int = 1, launch: str = "launch-1", restart: int = 0
    ) -> list[RankBuilder]:
        """One launch of the whole group, its ranks spread over nodes in blocks."""
        each = -(-n // nodes)
        return [
            self.rank(
                r, n, f"node-{r // each}", local_rank=r % each, launch=launch, restart=restart
            )
            for r in range(n)
        ]

    def launcher(self, code: int, launch: str = "launch-1") -> RunBuilder:
        """The launcher's exit, as `rankgate run` tells it."""
        tool = self.rank(-1, launch=launch, kind="tool")
        tool._map(Kind.END, {"status": "ended", "w": self.tock(), "code": code})
        tool.flush()
        tool.ended = True
        self.entry(Kind.BYE, {"stream": tool.stream, "final": tool.last, "status": "ended"})
        return self

    def tick(
        self,
        quiet: Iterable[RankBuilder] = (),
        back: Iterable[RankBuilder] = (),
        duplicates: int = 0,
    ) -> RunBuilder:
        """What ingest notes each second: who fell silent, who is back."""
        for life in self.lives:
            life.flush()
        names = {"quiet": [r.stream for r in quiet], "back": [r.stream for r in back]}
        self.entry(Kind.TICK, {**names, "dup": duplicates})
        return self

    # --- what stands beside the journal ----------------------------------------------------------

    def serve(
        self,
        now_ns: int,
        silent: Mapping[int, float] | None = None,
        behind: Mapping[int, int] | None = None,
        told: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> RunBuilder:
        """Leave the files of a gateway that serves this run at `now_ns`. `silent`: rank → seconds;
        `behind`: rank → records it has logged and not sent; `told`: rank → more of its entry."""
        silent, behind, told = silent or {}, behind or {}, told or {}
        streams = [
            {
                "stream": life.stream.hex(), "kind": life.hello["kind"], "rank": life.rank,
                "node": life.hello["node"], "local_rank": life.hello["local_rank"],
                "heard_ns": now_ns - int(silent.get(life.rank, 0.5) * 1e9),
                "silent": life.rank in silent, "ended": False, "durable": life.last,
                "last": life.last + behind.get(life.rank, 0), "step": life.step,
                "logged": now_ns - int(silent.get(life.rank, 0.5) * 1e9), "refused": 0, "bad": 0,
                "volatile": "", **told.get(life.rank, {}),
            }
            for life in self.lives
            if not life.ended
        ]  # fmt: skip
        live = {"at_ns": now_ns, "pid": os.getpid(), "duplicates": 0, "streams": streams}
        (self.path / "live.json").write_text(json.dumps(live))
        serve_dir(self.root, now_ns, {self.id: self.journal.durable_seq})
        return self

    def sink(
        self,
        name: str,
        state: str = "delivering",
        delivered: int = 0,
        skipped: Mapping[str, int] | None = None,
        quarantined: int = 0,
        **about: Any,
    ) -> RunBuilder:
        """A sink's file."""
        store = Store(self.path / "sinks" / f"{name}.db")
        kept = Kept("rows", bytes(16), 1, "a", quarantined, "a step 1 rank 0", "refused")
        store.receipt(
            delivered=delivered, skipped=dict(skipped or {}), maybe_duplicate=0, spans={}, media=[],
            quarantine=[kept] if quarantined else [],
            intended={}, about={"state": state, **about},
        )  # fmt: skip
        store.close()
        return self

    def close(self) -> Path:
        """Everything to the disk and through the rules; the run's folder."""
        for life in self.lives:
            life.flush()
        self.journal.commit()
        self.journal.mark()
        rebuild(self.path)
        return self.path


def serve_dir(root: Path, now_ns: int, journals: Mapping[str, int] | None = None) -> None:
    """The files of a gateway that answers at `now_ns`, with this process for its own."""
    pid, host = os.getpid(), socket.gethostname()
    ingest = {"at_ns": now_ns, "pid": pid, "full": False, "journals": dict(journals or {})}
    (root / "ingest.json").write_text(json.dumps(ingest))
    note = {"pid": pid, "addresses": ["tcp://10.0.0.4:5717"], "host": host}
    (root / "gateway.json").write_text(json.dumps(note))
