"""A stream that says HELLO for the first time: may it come in, and with what does it begin?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from rank_client.wire.disk import Disk
from rank_client.wire.frames import Code
from rank_client.wire.records import Kind

from ..journal.writer import Journal, JournalDamaged, Mark
from .hello import Rejected
from .media import BadBlob, Blob
from .room import Room
from .streams import Arriving, Stream

PENDING_TOP_BYTES = 1 << 20  #: of entries that wait for room, when the disk is full
MAX_STREAMS = 1 << 16  #: of a run: the table that opens a journal segment holds no more
RETRY_SECONDS = 5  #: after a rejection that may pass


class Runs(Protocol):
    """Gives the journal of a run, opening or making it."""

    @property
    def disk(self) -> Disk: ...
    def journal(self, run: str) -> Journal: ...
    def directory(self, run: str) -> Path: ...


class Opening:
    """Makes new streams; those that are here are looked at, and only `Peers` adds to them."""

    def __init__(self, streams: dict[bytes, Stream], runs: Runs, room: Room) -> None:
        self.is_near: Callable[[bytes], bool] = lambda _: False  #: a peer of this node and user
        self._streams = streams
        self._runs = runs
        self._room = room

    def new_stream(self, now_ns: int, peer: bytes, id_: bytes, body: dict[str, Any]) -> Stream:
        """Raises Rejected, OSError."""
        run, kind = body["run"], body["kind"]
        blob = self._announced(peer, body) if kind == "blob" else None
        if self._room.crowded and (blob or all(s.run != run for s in self._streams.values())):
            text = "the gateway has no descriptor left for another run or file"
            raise Rejected(Code.CROWDED, text, RETRY_SECONDS)
        try:
            journal = self._runs.journal(run)
        except JournalDamaged as error:
            raise Rejected(Code.JOURNAL, str(error)) from None
        stream = Stream(id_, run, kind, journal, peer, now_ns, now_ns)
        if blob:
            stream.file = Arriving(blob)
        else:
            if id_ not in journal.streams:
                self._open(now_ns, journal, id_, body)
            stream.durable = journal.streams[id_].high_water
        return stream

    def _announced(self, peer: bytes, body: dict[str, Any]) -> Blob:
        run, sha256 = body["run"], body.get("sha256")
        directory = self._runs.directory(run)
        try:
            blob = Blob.announced(self._runs.disk, run, directory, sha256, body.get("size"))
        except BadBlob as error:
            raise Rejected(Code.HELLO, str(error)) from None
        for other in self._streams.values():  # two writers of one part file would spoil it
            if other.file and other.run == run and other.file.blob.sha256 == sha256:
                raise Rejected(Code.STREAM, "another stream is bringing this file", RETRY_SECONDS)
        path = body.get("path")
        if isinstance(path, str) and self.is_near(peer) and not self._room.lacking(run):
            blob.near = path
        return blob

    def _open(self, now_ns: int, journal: Journal, id_: bytes, body: dict[str, Any]) -> None:
        if len(journal.streams) >= MAX_STREAMS:
            text = f"this run has had {MAX_STREAMS:,} processes, and a run can have no more"
            raise Rejected(Code.STREAMS, text)
        if self._room.full and journal.pending_bytes > PENDING_TOP_BYTES:
            raise Rejected(Code.FULL, "the gateway's disk is full", RETRY_SECONDS)
        journal.streams[id_] = Mark()
        hello = {name: value for name, value in body.items() if name != "nonce"}
        journal.append_map(Kind.OPEN, now_ns, {"stream": id_, "hello": hello})
