"""One stream's talk with the gateway, as a state machine without clock, socket or thread.

Feed it frames (`receive`) and the time (`tick`, seconds, monotonic); it answers with the frames to
send. Retransmission is go-back-N: the gateway accepts only what follows what it has.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from . import frames
from .frames import BadFrame, Code, Type

HELLO_FIRST_SECONDS = 0.5
HELLO_MAX_SECONDS = 5.0
RTO_FIRST_SECONDS = 1.0
RTO_MAX_SECONDS = 30.0
PING_SECONDS = 5.0
SILENT_SECONDS = 16.0  #: three pings without an answer: say HELLO again
CREDIT_MAX_BYTES = 16 << 20  #: however much a gateway allows: a tick holds it all in memory
RETRY_MAX_SECONDS = 600  #: however long a gateway tells us to stay away
BACK_SECONDS = 0.1  #: at most one go-back in this time, as several refusals arrive at once
CLOCK_SAMPLES = 8  #: of the last pings the one with the quickest answer tells the clocks' offset


class Source(Protocol):
    """Where a session reads what it sends: a spool, an orphan's spool, a file in chunks."""

    @property
    def first_kept(self) -> int:
        """The lowest number that can still be read."""

    @property
    def last(self) -> int:
        """The highest number there is, 0 if none."""

    def read(self, first: int, max_bytes: int) -> tuple[int, bytes]:
        """(n, bytes) of the records from `first` on; at least one if there is one."""


class ClientSession:
    """States: `hello` (nobody has answered), `open`, `rejected`, `closed`.

    Read `durable` for what the gateway has on disk, `stop` for a wish to end the training,
    `journal_changed` for a gateway that lost or never had what another acknowledged, `full` for
    why a gateway that is there takes nothing (`disk`, `quota`, or empty), `offset_seconds` for how
    far its clock is ahead of ours (None: not known yet).

    On the way are at most twice the gateway's credit, or one record that is larger than it.
    """

    def __init__(
        self,
        stream: bytes,
        hello: Callable[[], dict[str, Any]],
        source: Source,
        random: Callable[[], float],
    ) -> None:
        self.stream = stream
        self.state = "hello"
        self.durable = 0
        self.journal: bytes | None = None
        self.journal_changed = False
        self.stop = False
        self.reject_reason = ""
        self.reject_code = ""
        self.full = ""
        self.offset_seconds: float | None = None
        self.resent_total = 0
        self.welcomed = False  #: somebody answered at least once
        self._hello = hello
        self._source = source
        self._random = random
        self._session = 0
        self._cursor = 1  # the next number to send
        self._told_first = 1  # what the last HELLO said is the first we have
        self._credit = 0
        self._in_flight: deque[tuple[int, int]] = deque()  # (last number, bytes) of each frame
        self._in_flight_bytes = 0
        self._nonce = b""  # of the HELLOs said since we went into that state; WELCOME echoes it
        self._nonces = 0
        self._hello_at = 0.0
        self._hello_said_at = -HELLO_FIRST_SECONDS
        self._hello_wait = HELLO_FIRST_SECONDS
        self._rto = RTO_FIRST_SECONDS
        self._rto_at = 0.0
        self._ping_at = 0.0
        self._pinged: tuple[float, float] | None = None  # the last PING: our time, our wall clock
        self._clock: deque[tuple[float, float]] = deque(maxlen=CLOCK_SAMPLES)  # (rtt, offset)
        self._bye_at = 0.0
        self._back_at = 0.0
        self._heard_at = 0.0
        self._ending: dict[str, Any] | None = None
        self._stats: Callable[[], dict[str, Any]] = dict

    def on_ping(self, stats: Callable[[], dict[str, Any]]) -> None:
        """Give the map that every PING carries (spool bytes, progress, refusals); with its `wall`,
        the wall clock in ns, the offset to the gateway's clock is found."""
        self._stats = stats

    def end(self, body: dict[str, Any]) -> None:
        """No more will be written; say BYE once all is acknowledged."""
        self._ending = body

    @property
    def idle(self) -> bool:
        """Everything there is has been acknowledged."""
        return self.state == "open" and self.durable >= self._source.last

    @property
    def blocked(self) -> bool:
        """There is more to send, and only an answer allows it."""
        return self.state == "open" and self._cursor <= self._source.last

    @property
    def asked(self) -> bool:
        """A PING has no answer yet: what the clocks tell is the truer, the sooner it is read."""
        return self.state == "open" and self._pinged is not None

    # --- time ----------------------------------------------------------------

    def tick(self, now: float) -> list[bytes]:
        """The frames to send now. Call it every tick and after each `receive`."""
        if self.state == "hello":
            return self._say_hello(now) if now >= self._hello_at else []
        if self.state != "open":
            return []
        if now - self._heard_at > SILENT_SECONDS:
            self._restart(now)
            return []
        out: list[bytes] = []
        if self._in_flight and now >= self._rto_at:
            self._go_back(self.durable + 1)
            self._rto = min(self._rto * 2, RTO_MAX_SECONDS)
        self._send_data(now, out)
        if now >= self._ping_at:
            self._ping_at = now + PING_SECONDS
            out.append(self._ping(now))
        if self._ending is not None and self.idle and now >= self._bye_at:
            self._bye_at = now + RTO_FIRST_SECONDS
            final = {"final": self._source.last, **self._stats(), **self._ending}
            out.append(self._control(Type.BYE, final))
        return out

    def _say_hello(self, now: float) -> list[bytes]:
        if not self._nonce:
            self._nonces += 1
            chance = int(self._random() * (1 << 48))
            self._nonce = (chance << 16 | self._nonces & 0xFFFF).to_bytes(8, "little")
        self._hello_said_at = now
        self._told_first = self._source.first_kept
        self._hello_at = now + self._hello_wait * (0.75 + 0.5 * self._random())
        self._hello_wait = min(self._hello_wait * 2, HELLO_MAX_SECONDS)
        body = {
            "v": [frames.MAJOR, frames.MAJOR],
            "nonce": self._nonce,
            "first": self._source.first_kept,
            "last": self._source.last,
            "acked": self.durable,
            "journal": self.journal,
            **self._hello(),
        }
        return [frames.control(Type.HELLO, 0, self.stream, body)]

    def _send_data(self, now: float, out: list[bytes]) -> None:
        source = self._source
        while self._cursor <= source.last and self._in_flight_bytes < self._credit:
            n, records = source.read(self._cursor, min(self._credit, frames.MAX_DATA_BYTES))
            if n == 0:
                if source.first_kept > self._told_first:
                    self._restart(now)  # lost since the last HELLO: say from where on there is more
                return
            out.append(frames.data(self._session, self.stream, self._cursor, n, records))
            if not self._in_flight:
                self._rto_at = now + self._rto
            self._cursor += n
            self._in_flight.append((self._cursor - 1, len(records)))
            self._in_flight_bytes += len(records)

    def _ping(self, now: float) -> bytes:
        stats = self._stats()
        wall_ns = stats.get("wall")
        self._pinged = (now, wall_ns / 1e9) if isinstance(wall_ns, int) else None
        if self.offset_seconds is not None:
            stats = {**stats, "offset": self.offset_seconds}
        return self._control(Type.PING, {"t": now, **stats})

    def _control(self, type_: Type, body: dict[str, Any]) -> bytes:
        return frames.control(type_, self._session, self.stream, body)

    # --- frames --------------------------------------------------------------

    def receive(self, now: float, frame: bytes) -> None:
        """Take one frame from the gateway; what is not for us or not a frame is ignored."""
        try:
            frames.type_of(frame)
            message = frames.read_control(frame)
        except BadFrame:
            return
        if message.stream != self.stream or self.state in ("rejected", "closed"):
            return
        body = message.body
        if message.type == Type.WELCOME:
            self._on_welcome(now, message.session, body)
        elif message.type == Type.REJECT:
            self._on_reject(now, body)
        elif message.type == Type.UNKNOWN:
            if self.state == "open":
                self._restart(now)
        elif message.session == self._session and self.state == "open":
            self._on_answer(now, message.type, body)

    def _on_welcome(self, now: float, session: int, body: dict[str, Any]) -> None:
        durable, journal = body.get("durable"), body.get("journal")
        if not isinstance(durable, int) or durable < 0 or not isinstance(journal, bytes):
            return
        if not self._nonce or body.get("nonce") != self._nonce:
            return  # a second answer, or a late one to what we said to an older gateway
        self._nonce = b""
        if self.journal is not None and (journal != self.journal or durable < self.durable):
            self.journal_changed = True
        self.journal = journal
        self._session = session
        self.state, self.welcomed = "open", True
        self.reject_reason = self.reject_code = ""
        self.durable = durable
        self._go_back(durable + 1)
        # Frames the gateway has turned out to hold no longer count against its credit.
        self._in_flight.clear()
        self._in_flight_bytes = 0
        self._credit = min(_int(body.get("credit"), frames.MAX_DATA_BYTES), CREDIT_MAX_BYTES)
        self._note_full(body)
        self._clock.clear()
        self._rto = RTO_FIRST_SECONDS
        self._hello_wait = HELLO_FIRST_SECONDS
        self._heard_at = now
        self._ping_at = now

    def _on_reject(self, now: float, body: dict[str, Any]) -> None:
        if "nonce" in body and body["nonce"] != self._nonce:
            return  # a late answer to what we said to an older gateway
        self.reject_reason = str(body.get("text", "no reason given"))
        self.reject_code = str(body.get("code", ""))
        self.full = "disk" if self.reject_code == Code.FULL else ""
        if body.get("fatal", True):
            self.state = "rejected"
        else:
            pause = min(_int(body.get("retry_seconds"), 5), RETRY_MAX_SECONDS)
            self._restart(now, pause * (1 + 0.25 * self._random()))

    def _on_answer(self, now: float, type_: int, body: dict[str, Any]) -> None:
        if type_ == Type.DRAIN:
            self._restart(now, self._hello_wait * (0.75 + 0.5 * self._random()))
            return
        self._heard_at = now
        if body.get("stop"):
            self.stop = True
        if type_ == Type.PONG:
            self._on_pong(now, body)
        if type_ == Type.BYE_ACK:
            self.state = "closed"
        durable = body.get("durable")
        if not isinstance(durable, int):
            return
        if "credit" in body:
            self._credit = min(_int(body["credit"], self._credit), CREDIT_MAX_BYTES)
            self._note_full(body)
        if durable > self.durable:
            self.durable = durable
            self._rto = RTO_FIRST_SECONDS
            self._rto_at = now + self._rto
            while self._in_flight and self._in_flight[0][0] <= durable:
                self._in_flight_bytes -= self._in_flight.popleft()[1]
            # After a go-back: what is acknowledged is not sent again, as no answer would ever
            # take it out of the credit.
            self._cursor = max(self._cursor, durable + 1)
        back = body.get("back")
        if isinstance(back, int) and self.durable < back < self._cursor and now >= self._back_at:
            self._back_at = now + BACK_SECONDS
            self._go_back(back)

    def _on_pong(self, now: float, body: dict[str, Any]) -> None:
        """Our clock at the middle of the exchange against the gateway's, as NTP does it."""
        their_ns = body.get("now")
        if self._pinged is None or body.get("t") != self._pinged[0]:
            return
        if not isinstance(their_ns, int):
            return
        pinged, wall = self._pinged
        self._pinged = None
        self._clock.append((now - pinged, their_ns / 1e9 - wall - (now - pinged) / 2))
        self.offset_seconds = min(self._clock)[1]

    def _note_full(self, body: dict[str, Any]) -> None:
        full = body.get("full")
        self.full = full if isinstance(full, str) else ""

    def disconnected(self, now: float) -> None:
        """The link has nobody at its end: say HELLO to whoever comes."""
        if self.state == "open":
            self._restart(now)

    # --- turning back --------------------------------------------------------

    def _restart(self, now: float, pause_seconds: float = 0.0) -> None:
        """Say HELLO after a pause, and never two within half a second, whatever we are told."""
        self.state = "hello"
        self._nonce = b""
        self._hello_at = max(now + pause_seconds, self._hello_said_at + HELLO_FIRST_SECONDS)
        self._go_back(self.durable + 1)

    def _go_back(self, to: int) -> None:
        self.resent_total += max(0, self._cursor - to)
        self._cursor = to
        while self._in_flight and self._in_flight[-1][0] >= to:
            self._in_flight_bytes -= self._in_flight.pop()[1]


def _int(value: Any, otherwise: int) -> int:
    return value if isinstance(value, int) and value >= 0 else otherwise
