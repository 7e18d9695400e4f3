"""The sender: one daemon thread that owns the socket and carries a spool to the gateway."""

from __future__ import annotations

import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .link import Link, connect
from .rendezvous import LOCK_GATEWAY, ipc_address, locked, start_gateway
from .spool import Spool
from .wire.keys import BadKey
from .wire.session import ClientSession

TICK_SECONDS = 0.02
TICK_MAX_SECONDS = 0.5  #: each waking costs as much as five calls of `log`
FEW_RECORDS = 16  #: found by a tick: too few to be worth a shorter one
CLOSING_TICK_SECONDS = 0.02
SYNC_SECONDS = 1.0
ABSENT_WARN_SECONDS = 10.0
START_RETRY_SECONDS = 0.5
CONNECT_RETRY_SECONDS = 1.0  #: a handshake costs milliseconds of processor time
STUCK_SECONDS = 2.0  #: a link that takes nothing for so long has nobody at its end
START_RETRY_MAX_SECONDS = 60.0

Warn = Callable[[str, str], None]


class Carrier:
    """A session and a link, with the frames the link would not take yet."""

    def __init__(self, session: ClientSession, link: Link) -> None:
        self.session = session
        self.link = link
        self._outbox: deque[bytes] = deque()
        self._stuck_since = 0.0

    def step(self, now: float) -> None:
        """Take what came, send what is due."""
        for frame in self.link.receive():
            self.session.receive(now, frame)
        self._outbox.extend(self.session.tick(now))
        while self._outbox and self.link.send(self._outbox[0]):
            self._outbox.popleft()
            self._stuck_since = now
        if not self._outbox:
            self._stuck_since = now
        elif self.session.state == "open" and now - self._stuck_since > STUCK_SECONDS:
            self.session.disconnected(now)
        if self.session.state != "open" and len(self._outbox) > 1:
            self._outbox.clear()  # frames of a session that is over


class Sender:
    """Start it once per stream; `finish` waits for acknowledgement up to a deadline."""

    def __init__(
        self,
        session: ClientSession,
        spool: Spool,
        data_dir: Path,
        address: str | None,
        environ: Mapping[str, str],
        online: bool,
        may_start: bool,
        warn: Warn,
        each_tick: Callable[[], int],
    ) -> None:
        self.session = session
        self._spool = spool
        self._data_dir = data_dir
        self._address = address
        self._environ = environ
        self._online = online
        self._may_start = may_start
        self._warn = warn
        self._each_tick = each_tick  # settles deferred values; how many still wait
        self._closing = threading.Event()
        self._stop = threading.Event()
        self.started_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="rankgate-sender", daemon=True)
        self._thread.start()

    # --- called from the training thread -------------------------------------

    def finish(self, deadline: float, end: dict[str, Any] | None, absent_seconds: float) -> bool:
        """Say BYE once all is acknowledged (`end` None: only wait for that); False when the
        deadline came first.

        A gateway that never answered is waited for `absent_seconds` only: the spool stays.
        """
        if end is not None:
            self.session.end(end)
        self._closing.set()
        now = time.monotonic()
        absent_deadline = min(deadline, now + absent_seconds)
        while self._thread.is_alive():
            limit = deadline if self.session.welcomed else absent_deadline
            over = self.session.state in ("closed", "rejected")
            if time.monotonic() >= limit or over or (end is None and self.session.idle):
                break
            self._thread.join(0.01)
        self._stop.set()
        self._thread.join(max(0.0, min(1.0, deadline - time.monotonic())) + 0.2)
        return self.session.state == "closed"

    # --- the thread ----------------------------------------------------------

    def _run(self) -> None:
        pause = CONNECT_RETRY_SECONDS
        while not self._stop.is_set() and self.session.state != "closed":
            try:
                self._loop()
                return
            except Exception as error:  # nothing may escape into the training process
                self._warn("sender", f"sending failed ({error!r}) and is tried again")
                self._stop.wait(pause)
                pause = min(pause * 2, START_RETRY_MAX_SECONDS)

    def _loop(self) -> None:
        with ExitStack() as stack:
            self._carry_on(stack)

    def _carry_on(self, stack: ExitStack) -> None:
        link: Link | None = None
        carrier: Carrier | None = None
        connect_at, connect_pause = 0.0, CONNECT_RETRY_SECONDS
        tick, last, synced = TICK_SECONDS, self._spool.last, time.monotonic()
        start_at, start_pause = synced, START_RETRY_SECONDS
        stack.callback(lambda: link.close() if link else None)
        while not self._stop.is_set():
            now = time.monotonic()
            if link is None and self._online and now >= connect_at:
                connect_at, connect_pause = now + connect_pause, min(connect_pause * 2, 60.0)
                link = self._connect()
                if link:
                    carrier = Carrier(self.session, link)
            waiting = self._each_tick()
            if carrier:
                carrier.step(now)
            self._spool.acknowledge(self.session.durable)
            if self.session.state == "closed":
                break
            self._tell_trouble()
            if link and link.refused():
                self._tell_refused()
                link.close()
                link = carrier = None
            if now - synced >= SYNC_SECONDS:
                synced = now
                self._upkeep()
            if self._online and self.session.state == "hello" and now >= start_at:
                start_at = now + start_pause
                start_pause = min(start_pause * 2, START_RETRY_MAX_SECONDS)
                self._look_for_gateway(now)
            # What costs is each waking, in caches that the training has filled meanwhile.
            found, last = self._spool.last - last, self._spool.last
            many = found > FEW_RECORDS or waiting
            tick = TICK_SECONDS if many else min(tick * 1.5, TICK_MAX_SECONDS)
            if self._closing.is_set() and link:
                link.wait(CLOSING_TICK_SECONDS)  # what is left to do, an answer allows
            elif self._closing.is_set():
                self._stop.wait(CLOSING_TICK_SECONDS)
            elif link and (self.session.blocked or self.session.asked):
                link.wait(tick)  # for the answer
            else:
                self._closing.wait(tick)
        self._upkeep()

    def _tell_trouble(self) -> None:
        session = self.session
        if session.state == "rejected":
            self._warn(
                "rejected",
                f"the gateway refuses this process: {session.reject_reason}. The spool keeps all",
            )
        elif session.reject_code and session.state == "hello":
            self._warn(
                f"rejected {session.reject_code}",
                f"the gateway takes nothing for now: {session.reject_reason}. The spool keeps all",
            )
        elif session.full:
            what = "disk is full" if session.full == "disk" else "quota for this run is used up"
            self._warn(
                f"full {session.full}",
                f"the gateway's {what}; training goes on, the spool keeps all until there is room",
            )
        if session.journal_changed:
            self._warn("journal", "another journal answers than before; all that is kept is sent")

        if closed := self._spool.closed:
            self._warn(
                f"cap {len(closed)}",
                f"{self._spool.unacknowledged_bytes >> 20} MiB wait for a gateway in "
                f"{self._spool.directory}: {', '.join(sorted(closed))} are refused, and counted, "
                "until it has taken some (RANKGATE_SPOOL_CAP_MIB sets the limit per node)",
            )

    def _tell_refused(self) -> None:
        self._warn(
            "key",
            f"no encrypted connection to {self._address}: this process has no key, or not the "
            "gateway's (or that is served --insecure). Set RANKGATE_KEYFILE to a copy of the "
            "gateway's keyfile; training goes on, the spool keeps everything",
        )

    def _connect(self) -> Link | None:
        try:
            return connect(self._address or ipc_address(self._data_dir), self._environ)
        except BadKey as error:
            self._warn("key", f"{error}. Not connecting without it; the spool keeps everything")
            return None
        except OSError as error:
            self._warn(
                "connect",
                f"cannot connect to {self._address or self._data_dir}: {error.strerror or error}; "
                "it is tried again, and the spool keeps everything",
            )
            return None
        except Exception as error:
            self._warn(
                "address",
                f"cannot connect to {self._address or self._data_dir} ({error}); an address is "
                "tcp://HOST:PORT or ipc://PATH. The spool keeps everything",
            )
            return None

    def _look_for_gateway(self, now: float) -> None:
        late = now - self.started_at > ABSENT_WARN_SECONDS
        if late and not self.session.reject_code and not self._closing.is_set():
            self._warn(
                "absent",
                "no gateway answers yet; training goes on and nothing is lost. Later: "
                + (
                    f"rankgate sweep --address {self._address}"
                    if self._address
                    else f"rankgate drain --dir {self._data_dir}"
                ),
            )
        if self._address or not self._may_start:
            return
        try:
            if not locked(self._data_dir / "gateway.lock", LOCK_GATEWAY):
                start_gateway(self._data_dir, self._environ)
        except OSError as error:
            self._warn(
                "start",
                f"cannot start a gateway in {self._data_dir}: {error.strerror or error}; "
                "the spool keeps everything",
            )

    def _upkeep(self) -> None:
        try:
            if self._spool.volatile:
                self._warn("volatile", f"{self._spool.volatile}; logs are kept in memory only")
                self._spool.heal()
            self._spool.sync()
            self._spool.trim(self.session.durable)
        except OSError as error:
            self._warn("disk", f"the spool's disk: {error.strerror or error}")


def jitter() -> float:
    """Not security: it keeps a thousand ranks from saying HELLO in one instant."""
    return random.random()  # noqa: S311


def new_stream_id() -> bytes:
    return os.urandom(16)
