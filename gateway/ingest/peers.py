"""The gateway's side of the protocol, without socket or clock.

Feed it frames with the peer they came from (`receive`); it appends to journals. After the shell
has committed those, `committed` gives the answers that may go out. Understands of a batch only
its checksum, stream, `first` and `n`: it accepts what follows what is stored, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rank_client.wire import frames
from rank_client.wire.disk import Disk
from rank_client.wire.frames import BadFrame, Type
from rank_client.wire.keys import valid_run_id
from rank_client.wire.records import MAX_DEPTH, BadRecord, Kind, check_nesting

from ..journal.writer import Journal, JournalDamaged, Mark
from .media import BadBlob, Blob

CREDIT_FLOOR_BYTES = 64 << 10
CREDIT_TOP_BYTES = 4 << 20
SILENT_NS = 15 * 10**9  #: three pings missed
GONE_NS = 75 * 10**9  #: 60 s of ticks after that the rules call it lost; then it is forgotten here
MAX_NUMBER = 1 << 62  #: sums of numbers still fit the 64 bits of a column
HELLO_KINDS = ("live", "replay", "tool", "worker", "blob")

Reply = tuple[bytes, bytes]  #: (peer, frame)


class Runs(Protocol):
    """Gives the journal of a run, opening or making it."""

    @property
    def disk(self) -> Disk: ...
    def journal(self, run: str) -> Journal: ...
    def directory(self, run: str) -> Path: ...


@dataclass(slots=True, eq=False)
class Stream:
    """What is known of one sender while this gateway lives."""

    id: bytes
    run: str
    kind: str
    journal: Journal
    peer: bytes
    heard_ns: int
    durable: int = 0
    silent: bool = False
    ended: bool = False
    blob: Blob | None = None
    bye_peer: bytes | None = None
    about: dict[str, Any] = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)

    @property
    def high_water(self) -> int:
        return self.blob.high_water if self.blob else self.journal.streams[self.id].high_water


class Peers:
    """All streams of all runs. `counts` tells of what was dropped and why."""

    def __init__(
        self, session: int, runs: Runs, budget_bytes: int, stop: Callable[[str], bool]
    ) -> None:
        self.session = session
        self.streams: dict[bytes, Stream] = {}
        self.counts: dict[str, int] = {}
        self.duplicates: dict[str, int] = {}  #: run → records that were already stored
        self.full = False  #: the disk takes no more: credit 0
        self._runs = runs
        self._budget_bytes = budget_bytes
        self._stop = stop
        self._dirty: dict[bytes, Stream] = {}
        self._finished: list[Stream] = []

    @property
    def credit_bytes(self) -> int:
        if self.full:
            return 0
        share = self._budget_bytes // max(1, len(self.streams))
        return max(CREDIT_FLOOR_BYTES, min(CREDIT_TOP_BYTES, share))

    def expect(self, now_ns: int, run: str) -> bool:
        """After a restart: the streams that had not ended when the journal was written. They
        come back, or fall silent and are told of by ticks. False when there is none."""
        journal = self._runs.journal(run)
        open_ = [id_ for id_, mark in journal.streams.items() if not mark.ended]
        for id_ in open_:
            stream = Stream(id_, run, "live", journal, b"", now_ns)
            stream.durable = stream.high_water
            self.streams[id_] = stream
        return bool(open_)

    # --- frames in -----------------------------------------------------------

    def receive(self, now_ns: int, peer: bytes, frame: bytes, out: list[Reply]) -> None:
        """Take one frame; immediate answers go to `out`. What is no frame is counted, dropped."""
        try:
            if len(frame) > 3 and frame[3] == Type.DATA:
                frames.type_of(frame)
                self._on_data(now_ns, peer, frame, out)
                return
            type_ = frames.type_of(frame)
            message = frames.read_control(frame)
        except BadFrame as error:
            self.count(f"bad frame: {error}")
            return
        if type_ == Type.HELLO:
            self._on_hello(now_ns, peer, message, out)
            return
        stream = self.streams.get(message.stream)
        if stream is None or message.session != self.session:
            self._unknown(peer, message.stream, out)
            return
        self._heard(stream, now_ns, peer)
        if type_ == Type.PING:
            stream.progress = message.body
            body = self._ack_body(stream)
            out.append((peer, self._frame(Type.PONG, stream, body | {"t": message.body.get("t")})))
        elif type_ == Type.BYE:
            self._on_bye(now_ns, peer, stream, message.body)
        else:
            self.count("bad frame: type")

    def count(self, what: str, n: int = 1) -> None:
        self.counts[what] = self.counts.get(what, 0) + n

    def _heard(self, stream: Stream, now_ns: int, peer: bytes) -> None:
        stream.heard_ns = now_ns
        stream.peer = peer  # after a reconnect the answers must go to the new one

    def _on_data(self, now_ns: int, peer: bytes, frame: bytes, out: list[Reply]) -> None:
        head = frames.read_data(frame)
        stream = self.streams.get(head.stream)
        if stream is None or head.session != self.session:
            self._unknown(peer, head.stream, out)
            return
        stream.heard_ns = now_ns
        stream.peer = peer
        high = stream.high_water
        if head.first != high + 1:
            if head.first <= high:
                dropped = min(head.n, high - head.first + 1)
                self.duplicates[stream.run] = self.duplicates.get(stream.run, 0) + dropped
            body = {**self._ack_body(stream), "back": high + 1}
            out.append((peer, self._frame(Type.ACK, stream, body)))
            return
        if self.full:
            return
        if stream.blob:
            self._on_chunk(stream, frame)
        else:
            stream.journal.append_batch(now_ns, frame)
            stream.journal.streams[stream.id].high_water = high + head.n
        self._dirty[stream.id] = stream

    def _on_chunk(self, stream: Stream, frame: bytes) -> None:
        assert stream.blob is not None
        try:
            stream.blob.write(memoryview(frame)[frames.DATA_HEAD_BYTES :])
        except BadBlob as error:
            self.count(f"bad blob: {error}")
        except OSError:
            self.count("blob chunk not written")  # not acknowledged, so it comes again

    # --- hello and bye -------------------------------------------------------

    def _on_hello(
        self, now_ns: int, peer: bytes, message: frames.Control, out: list[Reply]
    ) -> None:
        body = message.body
        problem = self._problem(body)
        if problem:
            self._reject(peer, message.stream, problem, out)
            return
        stream = self.streams.get(message.stream)
        if stream is not None:
            problem = _mismatch(stream, body)
            if problem:
                self._reject(peer, message.stream, problem, out)
                return
            stream.kind = body["kind"]
        try:
            if stream is None:
                stream = self._new_stream(now_ns, peer, message.stream, body)
        except (BadBlob, JournalDamaged) as error:
            self._reject(peer, message.stream, str(error), out)
            return
        except OSError as error:
            text = f"the gateway cannot write run {body['run']}: {error.strerror}"
            out.append((peer, self._reject_frame(message.stream, text, fatal=False)))
            return
        self._heard(stream, now_ns, peer)
        stream.about = body
        stream.progress = {k: body.get(k) for k in ("last", "step", "logged", "refused", "bad")}
        if stream.blob:
            self._want(stream.blob, body)
        else:
            self._gap(now_ns, stream, body)
        self._dirty[stream.id] = stream
        welcome = {
            "v": frames.MAJOR,
            "journal": stream.journal.uuid,
            "durable": min(stream.durable, stream.high_water),
            "credit": self.credit_bytes,
            "now": now_ns,
        }
        out.append((peer, self._frame(Type.WELCOME, stream, welcome)))

    @staticmethod
    def _problem(body: dict[str, Any]) -> str:
        versions, run = body.get("v"), body.get("run")
        if not (isinstance(versions, list) and [type(v) for v in versions] == [int, int]):
            return "no protocol versions"
        if not versions[0] <= frames.MAJOR <= versions[1]:
            return f"this gateway speaks protocol {frames.MAJOR}"
        if not (isinstance(run, str) and valid_run_id(run)):
            return "a run id must match [A-Za-z0-9._-]{1,64}"
        if body.get("kind") not in HELLO_KINDS:
            return "an unknown kind of stream"
        first = body.get("first", 1)
        if not (isinstance(first, int) and 0 <= first <= MAX_NUMBER):
            return "a first number that cannot be"
        try:
            check_nesting(body, MAX_DEPTH - 1)  # the journal's `open` entry is one level around it
        except BadRecord as error:
            return str(error)
        return ""

    def _new_stream(self, now_ns: int, peer: bytes, id_: bytes, body: dict[str, Any]) -> Stream:
        run, kind = body["run"], body["kind"]
        journal = self._runs.journal(run)
        stream = Stream(id_, run, kind, journal, peer, now_ns)
        if kind == "blob":
            stream.blob = Blob.open(
                self._runs.disk,
                run,
                self._runs.directory(run),
                body.get("sha256"),
                body.get("size"),
            )
            stream.durable = stream.blob.high_water
        else:
            known = id_ in journal.streams
            if not known:
                journal.streams[id_] = Mark()
                journal.append_map(Kind.OPEN, now_ns, {"stream": id_, "hello": body})
            stream.durable = journal.streams[id_].high_water
        self.streams[id_] = stream
        return stream

    @staticmethod
    def _want(blob: Blob, body: dict[str, Any]) -> None:
        of, media = body.get("of"), body.get("media")
        if isinstance(of, bytes) and isinstance(media, int) and (of, media) not in blob.refs:
            blob.refs.append((of, media))

    def _gap(self, now_ns: int, stream: Stream, body: dict[str, Any]) -> None:
        """Numbers that its own process no longer has will never come: say so, and go on."""
        first, high = body.get("first"), stream.high_water
        if stream.kind == "live" and isinstance(first, int) and first > high + 1:
            entry = {"stream": stream.id, "from": high + 1, "to": first - 1}
            stream.journal.append_map(Kind.GAP, now_ns, entry)
            stream.journal.streams[stream.id].high_water = first - 1
            stream.durable = first - 1

    def _on_bye(self, now_ns: int, peer: bytes, stream: Stream, body: dict[str, Any]) -> None:
        final = body.get("final")
        stream.progress = body
        if not isinstance(final, int) or stream.high_water < final:
            return  # the client goes on sending, and says it again
        if stream.blob:
            if not self._finish_blob(now_ns, stream, stream.blob):
                return  # it is told to say HELLO, and sends the file again
        elif not stream.journal.streams[stream.id].ended:
            stream.journal.streams[stream.id].ended = True
            entry = {"stream": stream.id, "final": final, "status": str(body.get("status"))[:32]}
            stream.journal.append_map(Kind.BYE, now_ns, entry)
        stream.bye_peer = peer
        self._dirty[stream.id] = stream

    def _finish_blob(self, now_ns: int, stream: Stream, blob: Blob) -> bool:
        """False when the file is not what was announced, or cannot be kept."""
        try:
            blob.finish()
        except (BadBlob, OSError) as error:
            self.count(f"bad blob: {error}")
            blob.close()
            del self.streams[stream.id]
            self._dirty.pop(stream.id, None)
            return False
        for of, media in blob.refs:
            entry = {"stream": of, "media": media, "sha256": blob.sha256, "size": blob.size_bytes}
            stream.journal.append_map(Kind.BLOB, now_ns, entry)
        blob.refs.clear()
        return True

    # --- after a commit ------------------------------------------------------

    def committed(self) -> list[Reply]:
        """The acknowledgements due now that every journal is on disk."""
        out: list[Reply] = []
        for stream in self._dirty.values():
            stream.durable = stream.high_water
            if stream.bye_peer is not None:
                out.append((stream.bye_peer, self._frame(Type.BYE_ACK, stream, {
                    "durable": stream.durable})))  # fmt: skip
                stream.bye_peer = None
                stream.ended = True
                self._finished.append(stream)
            else:
                out.append((stream.peer, self._frame(Type.ACK, stream, self._ack_body(stream))))
        self._dirty.clear()
        return out

    def forget(self, run: str) -> None:
        """After a failed commit of a run's journal: its streams say HELLO again, and send again
        what was not acknowledged."""
        for stream in [s for s in self.streams.values() if s.run == run]:
            if stream.blob:
                stream.blob.close()
            del self.streams[stream.id]
            self._dirty.pop(stream.id, None)

    def tick(self, now_ns: int) -> dict[str, dict[str, Any]]:
        """run → body of a TICK entry, for the runs that have an open stream or had news."""
        out: dict[str, dict[str, Any]] = {}
        for stream in self.streams.values():
            if now_ns - stream.heard_ns > GONE_NS:
                self._finished.append(stream)  # should it speak again, it is told to say HELLO
            if stream.blob or stream.ended:
                continue
            dup = self.duplicates.get(stream.run, 0)
            body = out.setdefault(stream.run, {"quiet": [], "back": [], "dup": dup})
            quiet = now_ns - stream.heard_ns > SILENT_NS
            if quiet != stream.silent:
                stream.silent = quiet
                body["quiet" if quiet else "back"].append(stream.id)
        for stream in self._finished:
            self.streams.pop(stream.id, None)
            if stream.blob:
                stream.blob.close()
        self._finished.clear()
        return out

    # --- frames out ----------------------------------------------------------

    def _ack_body(self, stream: Stream) -> dict[str, Any]:
        body: dict[str, Any] = {"durable": stream.durable, "credit": self.credit_bytes}
        if not stream.blob and self._stop(stream.run):
            body["stop"] = True
        return body

    def _frame(self, type_: Type, stream: Stream, body: dict[str, Any]) -> bytes:
        return frames.control(type_, self.session, stream.id, body)

    def _unknown(self, peer: bytes, stream: bytes, out: list[Reply]) -> None:
        out.append((peer, frames.control(Type.UNKNOWN, self.session, stream, {})))

    def _reject(self, peer: bytes, stream: bytes, text: str, out: list[Reply]) -> None:
        self.count("rejected")
        out.append((peer, self._reject_frame(stream, text, fatal=True)))

    def _reject_frame(self, stream: bytes, text: str, fatal: bool) -> bytes:
        return frames.control(Type.REJECT, self.session, stream, {"text": text, "fatal": fatal})


def _mismatch(stream: Stream, body: dict[str, Any]) -> str:
    """Why this HELLO cannot be of the stream that has its id, or nothing."""
    if stream.run != body["run"]:
        return "this stream belongs to another run"
    if (stream.blob is not None) != (body["kind"] == "blob"):
        return "this stream is of another kind"
    return ""
