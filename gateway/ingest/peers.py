"""The gateway's side of the protocol, without socket or clock.

Feed it frames with the peer they came from (`receive`); it appends to journals. After the shell
has committed those, `committed` gives the answers that may go out. Understands of a batch only
its checksum, stream, `first` and `n`: it accepts what follows what is stored, and nothing else.
Work on files is handed to the shell as `Job`s, which tells when they are `done`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from rank_client.wire import frames
from rank_client.wire.frames import BadFrame, Code, Type
from rank_client.wire.records import Kind

from .answers import Answers, Reply
from .hello import SPEAKS, Rejected, check_hello, check_same, had_more, refusals
from .media import BadBlob, BlobLost, Job, Verb
from .opening import RETRY_SECONDS, Opening, Runs
from .room import Room
from .streams import ABOUT, PROGRESS, Arriving, Stream, told
from .strikes import STRIKE_PAUSE_SECONDS, STRIKES, Strikes

QUEUED_TOP_BYTES = 32 << 20  #: of chunks of files that wait for the disk, whatever peers send
SILENT_NS = 15 * 10**9  #: three pings missed
GONE_NS = 75 * 10**9  #: 60 s of ticks after that the rules call it lost; then it is forgotten here
FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Peers:
    """All streams of all runs. `counts` tells of what was dropped and why.

    Memory is bounded by credit (`Room`). Peers that ignore it are bounded by the shell's socket
    (RCVHWM) and by QUEUED_TOP_BYTES.
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
        self.room = Room(self.streams, budget_bytes)
        self.opening = Opening(self.streams, runs, self.room)
        self.newest_blob: dict[str, int] = {}  #: run → the entry that told of its newest file
        self.counts: dict[str, int] = {}
        self.duplicates: dict[str, int] = {}  #: run → records that were already stored
        self._runs = runs
        self._answers = Answers(session, self.room, stop)
        self._work = work
        self._queued_bytes = 0
        self._dirty: dict[bytes, Stream] = {}
        self._finished: list[Stream] = []
        self._changed: list[Stream] = []  # of which no tick has told yet
        self.strikes = Strikes()

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
            out.append(self._answers.pong(now_ns, stream, message.body.get("t")))
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
            out.append(self._answers.back(stream))
            return
        if self.room.lacking(stream.run):
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
                stream = self.opening.new_stream(now_ns, peer, id_, body)
                self.streams[id_] = stream
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
            self.room.full = True
            return Code.FULL
        return Code.STORAGE

    def _welcome(self, now_ns: int, stream: Stream, out: list[Reply]) -> None:
        self._dirty[stream.id] = stream
        out.append(self._answers.welcome(now_ns, stream))

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
            self.room.full = True
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
            self.room.changed.pop(stream.id, None)
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
        tell, due = self.room.changed, self._dirty
        self.room.changed, self._dirty = {}, {}
        for stream in {**tell, **due}.values():
            if stream.run in failed:
                if stream.id in due:
                    self._dirty[stream.id] = stream
                if stream.id not in tell:
                    continue
            else:
                stream.durable = stream.stored
            if stream.bye_peer is not None and stream.run not in failed:
                out.append(self._answers.bye_ack(stream, stream.bye_peer))
                stream.bye_peer = None
                stream.ended = True
                self._finished.append(stream)
            elif stream.welcome_ns and stream.run not in failed:
                self._welcome(stream.welcome_ns, stream, out)
                stream.welcome_ns = 0
            elif stream.peer:
                out.append(self._answers.ack(stream))
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

    # --- refusing ------------------------------------------------------------

    def _unknown(self, peer: bytes, stream: bytes, out: list[Reply]) -> None:
        out.append(self._answers.unknown(peer, stream))

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
        self.count(f"rejected: {code.value}")
        out.append(self._answers.reject(peer, stream, code, text, retry_seconds, nonce))
