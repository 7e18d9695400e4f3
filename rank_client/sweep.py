"""Shipping what dead processes left in the spool, under their own stream ids.

Read-only towards the records: only its own process ever appends to a stream, so a number is never
used twice, and two shippers of one stream are harmless. What became of a stream is noted beside
its records (`orphans.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .counts import read_counts
from .link import Link
from .media import send_file
from .orphan_source import OrphanSource
from .orphans import Orphan, held, write_note
from .sender import Carrier, jitter
from .wire.disk import OsDisk
from .wire.keys import Key
from .wire.session import ClientSession

STALL_SECONDS = 10.0  #: without an acknowledgement, a stream is left for a later try


@dataclass
class Shipped:
    """What became of an orphan. `damage` names what could not be read; `unreachable` counts the
    records that a gap would have to be opened for."""

    records: int = 0
    files: int = 0
    unreachable: int = 0
    whole: bool = False
    journal_changed: bool = False
    damage: list[str] = field(default_factory=list)

    @property
    def over(self) -> bool:
        """Nothing can be done about it any more by trying again."""
        return self.whole or self.unreachable > 0


def ship(
    orphan: Orphan,
    address: str,
    seconds: float,
    key: Key | None = None,
    accept_gap: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Shipped:
    """Send one orphan's records and files. Neither whole nor `unreachable` when the time was too
    short, or somebody else ships it.

    Only with `accept_gap` are numbers given up that cannot be read, so that those behind them
    can be shipped.
    """
    deadline = time.monotonic() + seconds
    late = lambda: stop() or time.monotonic() >= deadline  # noqa: E731
    with held(orphan.directory) as ours:
        if not ours:
            return Shipped()
        link = Link(address, key)
        try:
            return _Shipment(orphan, link, late).run(accept_gap)
        finally:
            link.close()


class _Shipment:
    """One try to ship one orphan over a link."""

    def __init__(self, orphan: Orphan, link: Link, late: Callable[[], bool]) -> None:
        self.orphan = orphan
        self.link = link
        self.late = late
        self.source = OrphanSource(orphan.directory)
        self.shipped = Shipped(damage=self.source.damage)
        self.gap = False

    def run(self, accept_gap: bool) -> Shipped:
        carrier = self._session()
        done = self._records(carrier)
        while done and accept_gap and self.source.skip_hole():
            self.gap = True
            carrier = self._session()
            done = self._records(carrier)
        session = carrier.session
        self.shipped.records = session.durable
        if session.state == "rejected":
            write_note(self.orphan.directory, "rejected", session.reject_reason)
            self.shipped.damage.append(f"refused by the gateway: {session.reject_reason}")
        if not done or not self._files():
            return self.shipped
        unreachable = self.source.unreachable(session.durable)
        if unreachable or self._say_bye(carrier):
            try:
                self._note(session, unreachable)
            except OSError as error:  # shipped once more, and dropped as duplicates
                self.shipped.damage.append(f"{self.orphan.directory}: {error.strerror or error}")
        return self.shipped

    def _session(self) -> Carrier:
        session = ClientSession(self.orphan.stream, self._hello, self.source, jitter)
        if self.orphan.acked and not self.gap:
            session.journal, session.durable = self.orphan.acked
        return Carrier(session, self.link)

    def _hello(self) -> dict[str, Any]:
        more = {"gap": True} if self.gap else {}
        return {**self.orphan.hello, "last": self.source.end, **more}

    def _records(self, carrier: Carrier) -> bool:
        """Ship the stretch that goes on from what the gateway has; False when it took too long."""
        session = carrier.session

        def enough() -> bool:
            if session.state == "open":
                self.source.follow(session.durable)
            return session.idle

        self._carry(carrier, enough)
        self.shipped.journal_changed |= session.journal_changed
        return session.idle

    def _files(self) -> bool:
        orphan = self.orphan
        for media in orphan.media:
            path = orphan.directory / "media" / str(media)
            try:
                if not send_file(path, orphan.run, orphan.stream, media, self.link, self.late):
                    return False
            except OSError as error:
                self.shipped.damage.append(f"{path}: {error.strerror or error}")
                return False
            path.unlink()
            self.shipped.files += 1
        return True

    def _say_bye(self, carrier: Carrier) -> bool:
        """Nothing more will come of this life; what its LOSS records could not tell is told."""
        counts = read_counts(OsDisk(), str(self.orphan.directory))
        carrier.session.end(
            {
                "status": "adopted",
                "refused": counts.refused,
                "bad": counts.bad_values,
                "owed": counts.owed,
            }
        )
        self._carry(carrier, lambda: False)
        self.shipped.whole = carrier.session.state == "closed"
        return self.shipped.whole

    def _note(self, session: ClientSession, unreachable: int) -> None:
        directory = self.orphan.directory
        text = f"{(session.journal or b'').hex()} {session.durable}"
        self.shipped.unreachable = unreachable
        if unreachable:
            write_note(directory, "hole", f"{text} {unreachable} {self.source.end}\n")
            (directory / "done").unlink(missing_ok=True)
        else:
            write_note(directory, "done", f"{text}\n")
            (directory / "hole").unlink(missing_ok=True)

    def _carry(self, carrier: Carrier, enough: Callable[[], bool]) -> None:
        session = carrier.session
        moved_at, durable = time.monotonic(), -1
        while not self.late() and session.state not in ("closed", "rejected"):
            carrier.step(time.monotonic())
            if enough():
                return
            if session.durable != durable:
                moved_at, durable = time.monotonic(), session.durable
            if time.monotonic() - moved_at > STALL_SECONDS:
                return
            self.link.wait(0.01)
