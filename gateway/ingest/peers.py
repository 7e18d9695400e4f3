"""The gateway's side of the protocol, without socket or clock.

Feed it frames with the peer they came from (`receive`); it appends to journals. After the shell
has committed those, `committed` gives the answers that may go out. Understands of a batch only
its checksum, stream, `first` and `n`: it accepts what follows what is stored, and nothing else.
Work on files is handed to the shell as `Job`s, which tells when they are `done`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from rank_client.wire import frames
from rank_client.wire.disk import Disk
from rank_client.wire.frames import BadFrame, Code, Type
from rank_client.wire.records import Kind

from ..journal.writer import Journal, JournalDamaged, Mark
from .hello import SPEAKS, Rejected, check_hello, check_same, had_more, refusals
from .media import BadBlob, Blob, BlobLost, Job, Verb
from .streams import ABOUT, PROGRESS, Arriving, Stream, told
from .strikes import STRIKE_PAUSE_SECONDS, STRIKES, Strikes

CREDIT_FLOOR_BYTES = 8 << 10
CREDIT_TOP_BYTES = 4 << 20
QUEUED_TOP_BYTES = 32 << 20  #: of chunks of files that wait for the disk, whatever peers send
PENDING_TOP_BYTES = 1 << 20  #: of entries that wait for room, when the disk is full
UNHEARD_NS = 6 * 10**9  #: a ping missed: is it connected at all?
SILENT_NS = 15 * 10**9  #: three pings missed
GONE_NS = 75 * 10**9  #: 60 s of ticks after that the rules call it lost; then it is forgotten here
MAX_STREAMS = 1 << 16  #: of a run: the table that opens a journal segment holds no more
RETRY_SECONDS = 5  #: after a rejection that may pass
FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

Reply = tuple[bytes, bytes]  #: (peer, frame)


class Runs(Protocol):
    """Gives the journal of a run, opening or making it."""

    @property
    def disk(self) -> Disk: ...
    def journal(self, run: str) -> Journal: ...
    def directory(self, run: str) -> Path: ...


class Peers:
    """All streams of all runs. `counts` tells of what was dropped and why.

    Memory: a stream may have `credit_bytes` unacknowledged, and a client has at most twice that on
    the way; so all together stay within `budget_bytes`, or 16 KiB a stream where those are more
    than 8,192 (one record or chunk above its credit, at most 256 KiB, is on the way alone). Peers
    that ignore credit are bounded by the shell's socket (RCVHWM) and by QUEUED_TOP_BYTES.
    """

    def __init__(
        self,
        session: int,
        runs: Runs,
        budget_bytes: int,
        stop: Callable[[str], bool],
        work: Callable[[Job], None] | None = None,
    ) -> None:
        """`work` takes a job to another thread; without it files are worked on at once."""
        self.session = session
        self.streams: dict[bytes, Stream] = {}
        self.newest_blob: dict[str, int] = {}  #: run → the entry that told of its newest file
        self.counts: dict[str, int] = {}
        self.duplicates: dict[str, int] = {}  #: run → records that were already stored
        self.is_near: Callable[[bytes], bool] = lambda _: False  #: a peer of this node and user
        self.crowded = False  #: no descriptor is left for another run or file
        self._full = False
        self._over_quota: frozenset[str] = frozenset()
        self._runs = runs
        self._budget_bytes = budget_bytes
        self._stop = stop
        self._work = work
        self._queued_bytes = 0
        self._dirty: dict[bytes, Stream] = {}
        self._tell: dict[bytes, Stream] = {}  # whose credit has changed
        self._finished: list[Stream] = []
        self._changed: list[Stream] = []  # of which no tick has told yet
        self.strikes = Strikes()

    # --- room ----------------------------------------------------------------

    @property
    def full(self) -> bool:
        """The disk takes no more: credit 0. Everybody is told when that begins and ends."""
        return self._full

    @full.setter
    def full(self, full: bool) -> None:
        if full != self._full:
            self._full = full
            self._tell.update(self.streams)

    @property
    def over_quota(self) -> frozenset[str]:
        """Runs that have used up their share of the disk: credit 0 for their streams."""
        return self._over_quota

    @over_quota.setter
    def over_quota(self, runs: frozenset[str]) -> None:
        changed = runs ^ self._over_quota
        self._over_quota = runs
        if changed:
            self._tell.update({i: s for i, s in self.streams.items() if s.run in changed})

    @property
    def credit_bytes(self) -> int:
        """What a stream may have unacknowledged."""
        if self._full:
            return 0
        share = self._budget_bytes // (2 * max(1, len(self.streams)))
        return max(CREDIT_FLOOR_BYTES, min(CREDIT_TOP_BYTES, share))

    def _no_room(self, stream: Stream) -> str:
        if self._full:
            return "disk"
        return "quota" if stream.run in self._over_quota else ""

    # --- after a restart -----------------------------------------------------

    def expect(self, now_ns: int, run: str) -> bool:
        """After a restart: the streams that had not ended when the journal was written. They
        come back, or fall silent and are told of by ticks. False when there is none."""
        journal = self._runs.journal(run)
        open_ = [id_ for id_, mark in journal.streams.items() if not mark.ended]
        for id_ in open_:
            stream = Stream(id_, run, "live", journal, b"", now_ns, now_ns)
            stream.durable = stream.high_water
            self.streams[id_] = stream
        return bool(open_)

    # --- frames in -----------------------------------------------------------

    def receive(self, now_ns: int, peer: bytes, frame: bytes, out: list[Reply]) -> None:
        """Take one frame; immediate answers go to `out`. What is no frame is counted, dropped."""
        if self.strikes.struck and self.strikes.pausing(now_ns, peer):
            self.count("dropped: too many bad frames")
            return
        try:
            if len(frame) > 3 and frame[3] == Type.DATA:
                frames.type_of(frame)
                self._on_data(now_ns, peer, frame, out)
                return
            type_ = self._control_type(now_ns, peer, frame, out)
            message = frames.read_control(frame)
        except BadFrame as error:
            self.bad(now_ns, peer, str(error), out)
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
            stream.progress = told(message.body, PROGRESS)
            body = {**self._ack_body(stream), "t": message.body.get("t"), "now": now_ns}
            out.append((peer, self._frame(Type.PONG, stream, body)))
        elif type_ == Type.BYE:
            self._on_bye(now_ns, peer, stream, message.body, out)
        else:
            self.bad(now_ns, peer, "type", out)

    def _control_type(self, now_ns: int, peer: bytes, frame: bytes, out: list[Reply]) -> int:
        """Raises BadFrame; of a HELLO whose map is not looked at, its sender is told why."""
        stream = frame[frames.COMMON_BYTES - 16 : frames.COMMON_BYTES]
        hello = len(frame) >= frames.COMMON_BYTES and frame[3] == Type.HELLO
        try:
            type_ = frames.type_of(frame)
        except BadFrame as error:
            if hello and str(error) == "version":
                self._reject(peer, stream, Code.VERSION, SPEAKS, out)
            raise
        if hello and len(frame) > frames.COMMON_BYTES + frames.MAX_HELLO_BYTES:
            text = f"a HELLO of more than {frames.MAX_HELLO_BYTES >> 10} KiB: use fewer tags"
            self._reject(peer, stream, Code.SIZE, text, out)
            raise BadFrame("too long")
        return type_

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
        if self._full or stream.run in self._over_quota:
            stream.dropped = True
            return
        if stream.file:
            self._on_chunk(now_ns, stream, stream.file, frame, out)
            return
        stream.journal.append_batch(now_ns, frame)
        stream.journal.streams[stream.id].high_water = high + head.n
        self._dirty[stream.id] = stream

    # --- bad frames ----------------------------------------------------------

    def bad(self, now_ns: int, peer: bytes, reason: str, out: list[Reply]) -> None:
        """Count a frame that is none. A peer that sends many has to pause, and its streams are
        told: whatever its bug, the others must not pay for it."""
        self.count(f"bad frame: {reason}")
        if not self.strikes.add(now_ns, peer):
            return
        text = f"{STRIKES} bad frames within a minute, the last one: {reason}"
        for stream in [s for s in self.streams.values() if s.peer == peer]:
            self._reject(peer, stream.id, Code.STRIKES, text, out, STRIKE_PAUSE_SECONDS)

    # --- hello and bye -------------------------------------------------------

    def _on_hello(
        self, now_ns: int, peer: bytes, message: frames.Control, out: list[Reply]
    ) -> None:
        body, id_ = message.body, message.stream
        nonce = body.get("nonce")
        try:
            check_hello(body)
            stream = self.streams.get(id_)
            new = stream is None
            if stream is None:
                stream = self._new_stream(now_ns, peer, id_, body)
            check_same(stream, body)
        except Rejected as error:
            self._reject(peer, id_, error.code, str(error), out, error.retry_seconds, nonce)
            return
        except OSError as error:
            text = f"the gateway cannot write run {body['run']}: {error.strerror}"
            self._reject(peer, id_, self._disk_code(error), text, out, RETRY_SECONDS, nonce)
            return
        self._heard(stream, now_ns, peer)
        stream.kind, stream.nonce = body["kind"], nonce
        stream.about = told(body, ABOUT)
        stream.progress = told(body, PROGRESS)
        if stream.file:
            stream.file.want(body)
            if stream.file.state == "opening":
                if new:
                    self._hand(now_ns, stream, "open", out)
                return  # WELCOME follows when it is open
        else:
            if not stream.changed and had_more(stream, body):
                stream.changed = True
                self._changed.append(stream)
            if self._gap(now_ns, stream, body) or stream.welcome_ns:
                stream.welcome_ns = now_ns  # it claims the gap, which is not on disk yet
                self._dirty[stream.id] = stream
                return
        self._welcome(now_ns, stream, out)

    def _disk_code(self, error: Exception | None) -> Code:
        if isinstance(error, OSError) and error.errno in FULL_ERRNOS:
            self.full = True
            return Code.FULL
        return Code.STORAGE

    def _welcome(self, now_ns: int, stream: Stream, out: list[Reply]) -> None:
        self._dirty[stream.id] = stream
        body = {
            "v": frames.MAJOR,
            "nonce": stream.nonce,
            "journal": stream.journal.uuid,
            "durable": min(stream.durable, stream.high_water),
            "now": now_ns,
            **self._credit_body(stream),
        }
        out.append((stream.peer, self._frame(Type.WELCOME, stream, body)))

    def _new_stream(self, now_ns: int, peer: bytes, id_: bytes, body: dict[str, Any]) -> Stream:
        """Raises Rejected, OSError."""
        run, kind = body["run"], body["kind"]
        blob = self._announced(peer, body) if kind == "blob" else None
        if self.crowded and (blob or all(s.run != run for s in self.streams.values())):
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
        self.streams[id_] = stream
        return stream

    def _announced(self, peer: bytes, body: dict[str, Any]) -> Blob:
        run, sha256 = body["run"], body.get("sha256")
        directory = self._runs.directory(run)
        try:
            blob = Blob.announced(self._runs.disk, run, directory, sha256, body.get("size"))
        except BadBlob as error:
            raise Rejected(Code.HELLO, str(error)) from None
        for other in self.streams.values():  # two writers of one part file would spoil it
            if other.file and other.run == run and other.file.blob.sha256 == sha256:
                raise Rejected(Code.STREAM, "another stream is bringing this file", RETRY_SECONDS)
        path = body.get("path")
        if isinstance(path, str) and self.is_near(peer) and not self._full:
            blob.near = path if run not in self._over_quota else ""
        return blob

    def _open(self, now_ns: int, journal: Journal, id_: bytes, body: dict[str, Any]) -> None:
        if len(journal.streams) >= MAX_STREAMS:
            text = f"this run has had {MAX_STREAMS:,} processes, and a run can have no more"
            raise Rejected(Code.STREAMS, text)
        if self._full and journal.pending_bytes > PENDING_TOP_BYTES:
            raise Rejected(Code.FULL, "the gateway's disk is full", RETRY_SECONDS)
        journal.streams[id_] = Mark()
        hello = {name: value for name, value in body.items() if name != "nonce"}
        journal.append_map(Kind.OPEN, now_ns, {"stream": id_, "hello": hello})

    def _gap(self, now_ns: int, stream: Stream, body: dict[str, Any]) -> bool:
        """Numbers that its own process no longer has will never come: say so, and go on. Who
        ships the spool of a dead one says `gap` when a person has given them up."""
        first, high = body.get("first"), stream.high_water
        may = stream.kind == "live" or body.get("gap") is True
        if not (may and isinstance(first, int) and first > high + 1):
            return False
        entry = {"stream": stream.id, "from": high + 1, "to": first - 1}
        stream.journal.append_map(Kind.GAP, now_ns, entry)
        stream.journal.streams[stream.id].high_water = first - 1
        return True

    def _on_bye(
        self, now_ns: int, peer: bytes, stream: Stream, body: dict[str, Any], out: list[Reply]
    ) -> None:
        final = body.get("final")
        stream.progress = told(body, PROGRESS)
        if not isinstance(final, int) or stream.high_water < final:
            return  # the client goes on sending, and says it again
        if stream.file:
            stream.file.want(body)
            if stream.file.state == "open":
                stream.file.state = "finishing"
                self._hand(now_ns, stream, "finish", out)
            elif stream.file.state == "whole":
                self._is_whole(now_ns, stream, stream.file)
            return
        if not stream.journal.streams[stream.id].ended:
            stream.journal.streams[stream.id].ended = True
            entry = {"stream": stream.id, "final": final, "status": str(body.get("status"))[:32]}
            stream.journal.append_map(Kind.BYE, now_ns, entry | refusals(body))
        stream.bye_peer = peer
        self._dirty[stream.id] = stream

    # --- files ---------------------------------------------------------------

    def _on_chunk(
        self, now_ns: int, stream: Stream, file: Arriving, frame: bytes, out: list[Reply]
    ) -> None:
        piece = memoryview(frame)[frames.DATA_HEAD_BYTES :]
        if file.state != "open" or self._queued_bytes + len(piece) > QUEUED_TOP_BYTES:
            self.count("chunk of a file not taken")  # not acknowledged, so it comes again
            return
        file.taken += 1
        self._hand(now_ns, stream, "write", out, file.taken, piece)

    def _hand(
        self,
        now_ns: int,
        stream: Stream,
        verb: Verb,
        out: list[Reply],
        number: int = 0,
        piece: bytes | memoryview = b"",
    ) -> None:
        assert stream.file is not None
        job = Job(stream.id, stream.file.blob, verb, number, piece)
        self._queued_bytes += len(piece)
        if self._work is not None:
            self._work(job)
            return
        job.run()
        self.done(now_ns, job, out)

    def done(self, now_ns: int, job: Job, out: list[Reply]) -> None:
        """A job was carried out; answers go to `out`, or to what `committed` gives."""
        self._queued_bytes -= len(job.piece)
        stream = self.streams.get(job.stream)
        file = stream.file if stream else None
        if stream is None or file is None or file.blob is not job.blob:
            return  # it was forgotten in the meantime
        if isinstance(job.error, OSError) and job.error.errno in FULL_ERRNOS:
            self.full = True
        if job.verb == "write":
            self._written(now_ns, stream, file, job, out)
        elif job.error is not None:
            self._file_failed(stream, job, out)
        elif job.verb == "open":
            file.taken = file.written = stream.durable = job.blob.high_water
            file.state = "whole" if job.blob.whole else "open"
            self._welcome(now_ns, stream, out)
        elif job.verb == "finish":
            file.state = "whole"
            self._is_whole(now_ns, stream, file)

    def _written(
        self, now_ns: int, stream: Stream, file: Arriving, job: Job, out: list[Reply]
    ) -> None:
        self._dirty[stream.id] = stream
        if job.error is None:
            file.written = job.number
            return
        if isinstance(job.error, BlobLost):
            self._file_failed(stream, job, out)
            return
        file.taken = file.written  # what was handed over after it fails as well
        if isinstance(job.error, BadBlob):
            self.count(f"bad blob: {job.error}")
        else:
            self.count("blob chunk not written")
            stream.dropped = True

    def _file_failed(self, stream: Stream, job: Job, out: list[Reply]) -> None:
        """It is not what was announced, or cannot be kept: begin again with HELLO."""
        self.count(f"bad blob: {job.error}")
        self._drop(stream)
        if job.verb == "open":
            text = f"the gateway cannot write a file of run {stream.run}: {job.error}"
            code, nonce = self._disk_code(job.error), stream.nonce
            self._reject(stream.peer, stream.id, code, text, out, RETRY_SECONDS, nonce)
        else:
            self._unknown(stream.peer, stream.id, out)

    def _is_whole(self, now_ns: int, stream: Stream, file: Arriving) -> None:
        blob = file.blob
        for of, media in file.refs:
            entry = {"stream": of, "media": media, "sha256": blob.sha256, "size": blob.size_bytes}
            self.newest_blob[blob.run] = stream.journal.append_map(Kind.BLOB, now_ns, entry)
        file.refs.clear()
        stream.bye_peer = stream.peer
        self._dirty[stream.id] = stream

    def let_go(self, run: str, sha256: str) -> bool:
        """Forget that a file is here, as it is about to go; False while somebody brings it."""
        mine = (s for s in self.streams.values() if s.run == run)
        found = [s for s in mine if s.file and s.file.blob.sha256 == sha256]
        if any(not stream.ended for stream in found):
            return False
        for stream in found:
            self._drop(stream)
        return True

    def _drop(self, stream: Stream) -> None:
        if self.streams.get(stream.id) is stream:
            del self.streams[stream.id]
            self._dirty.pop(stream.id, None)
            self._tell.pop(stream.id, None)
        if stream.file:
            job = Job(stream.id, stream.file.blob, "close")
            if self._work is not None:
                self._work(job)
            else:
                job.run()

    # --- after a commit ------------------------------------------------------

    def committed(self, failed: frozenset[str] = frozenset()) -> list[Reply]:
        """The acknowledgements due now that every journal is on disk, but for those of the runs
        that `failed` for want of room: theirs wait."""
        out: list[Reply] = []
        tell, due = self._tell, self._dirty
        self._tell, self._dirty = {}, {}
        for stream in {**tell, **due}.values():
            if stream.run in failed:
                if stream.id in due:
                    self._dirty[stream.id] = stream
                if stream.id not in tell:
                    continue
            else:
                stream.durable = stream.stored
            if stream.bye_peer is not None and stream.run not in failed:
                body = {"durable": stream.durable}
                out.append((stream.bye_peer, self._frame(Type.BYE_ACK, stream, body)))
                stream.bye_peer = None
                stream.ended = True
                self._finished.append(stream)
            elif stream.welcome_ns and stream.run not in failed:
                self._welcome(stream.welcome_ns, stream, out)
                stream.welcome_ns = 0
            elif stream.peer:
                out.append((stream.peer, self._ack(stream)))
        return out

    def forget(self, run: str) -> None:
        """After a failed commit of a run's journal: its streams say HELLO again, and send again
        what was not acknowledged."""
        for stream in [s for s in self.streams.values() if s.run == run]:
            self._drop(stream)

    def tick(self, now_ns: int) -> dict[str, dict[str, Any]]:
        """run → body of a TICK entry, for the runs that have an open stream or had news."""
        out: dict[str, dict[str, Any]] = {}
        for stream in self.streams.values():
            if now_ns - stream.heard_ns > GONE_NS and stream.durable >= stream.stored:
                self._finished.append(stream)  # should it speak again, it is told to say HELLO
            if stream.file or stream.ended:
                continue
            dup = self.duplicates.get(stream.run, 0)
            body = out.setdefault(stream.run, {"quiet": [], "back": [], "dup": dup})
            quiet = now_ns - stream.heard_ns > SILENT_NS
            if quiet != stream.silent:
                stream.silent = quiet
                body["quiet" if quiet else "back"].append(stream.id)
        for stream in self._changed:
            body = out.setdefault(stream.run, {})
            body["changed"] = body.get("changed", 0) + 1
        self._changed.clear()
        for stream in self._finished:
            self._drop(stream)
        self._finished.clear()
        self.strikes.forget(now_ns)
        return out

    def unheard(self, now_ns: int) -> Iterator[tuple[Stream, bytes]]:
        """Streams that should have been heard, each with a frame that it ignores, as it is of no
        session: the shell sends that, and notes on the stream whether it can."""
        for stream in self.streams.values():
            if stream.file or stream.ended or not stream.peer:
                continue
            if now_ns - stream.heard_ns > UNHEARD_NS:
                yield stream, frames.control(Type.ACK, 0, stream.id, {})
            else:
                stream.link = "up"

    def superseded(self, run: str) -> dict[bytes, Stream]:
        """Older stream → the newer one, where two processes that live say they are one rank.

        Which is older is told by the journal, which has their openings in order.
        """
        ranks: dict[Any, list[Stream]] = {}
        for s in self.streams.values():
            if s.run == run and s.kind == "live" and not (s.ended or s.silent):
                ranks.setdefault(s.about["rank"], []).append(s)
        out: dict[bytes, Stream] = {}
        for rank, streams in ranks.items():
            if rank is not None and len(streams) > 1:
                order = {id_: n for n, id_ in enumerate(streams[0].journal.streams)}
                streams.sort(key=lambda s: order[s.id])
                out.update({s.id: streams[-1] for s in streams[:-1]})
        return out

    # --- frames out ----------------------------------------------------------

    def _credit_body(self, stream: Stream) -> dict[str, Any]:
        full = self._no_room(stream)
        return {"credit": 0, "full": full} if full else {"credit": self.credit_bytes}

    def _ack_body(self, stream: Stream) -> dict[str, Any]:
        body = {"durable": stream.durable, **self._credit_body(stream)}
        if not stream.file and self._stop(stream.run):
            body["stop"] = True
        return body

    def _ack(self, stream: Stream) -> bytes:
        body = self._ack_body(stream)
        if stream.dropped and body["credit"]:
            body["back"] = stream.high_water + 1
            stream.dropped = False
        return self._frame(Type.ACK, stream, body)

    def _frame(self, type_: Type, stream: Stream, body: dict[str, Any]) -> bytes:
        return frames.control(type_, self.session, stream.id, body)

    def _unknown(self, peer: bytes, stream: bytes, out: list[Reply]) -> None:
        out.append((peer, frames.control(Type.UNKNOWN, self.session, stream, {})))

    def _reject(
        self,
        peer: bytes,
        stream: bytes,
        code: Code,
        text: str,
        out: list[Reply],
        retry_seconds: int = 0,
        nonce: Any = None,
    ) -> None:
        """For good, or with `retry_seconds` until then."""
        self.count(f"rejected: {code.value}")
        body: dict[str, Any] = {"code": code.value, "text": text, "fatal": not retry_seconds}
        if retry_seconds:
            body["retry_seconds"] = retry_seconds
        if code is Code.VERSION:
            body["v"] = [frames.MAJOR, frames.MAJOR]
        if nonce is not None:
            body["nonce"] = nonce
        out.append((peer, frames.control(Type.REJECT, self.session, stream, body)))
