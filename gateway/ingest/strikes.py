"""Peers whose frames are bad: one with many of them has to pause, so that others do not pay."""

from __future__ import annotations

from dataclasses import dataclass

STRIKES = 20  #: bad frames of one peer within STRIKE_NS, after which it has to pause
STRIKE_NS = 60 * 10**9
STRIKE_PAUSE_SECONDS = 30
STRUCK_PEERS = 4096  #: so many are remembered


@dataclass(slots=True)
class Struck:
    """A peer's bad frames; while `pause` it is not listened to."""

    n: int
    since_ns: int
    pause: bool = False


class Strikes:
    """Bad frames by peer, of the last STRIKE_NS; only the newest STRUCK_PEERS are remembered."""

    def __init__(self) -> None:
        self.struck: dict[bytes, Struck] = {}

    def add(self, now_ns: int, peer: bytes) -> bool:
        """One more bad frame; True when the peer has to pause from now on."""
        struck = self.struck.get(peer)
        if struck is None or not 0 <= now_ns - struck.since_ns < STRIKE_NS:
            if len(self.struck) >= STRUCK_PEERS:
                del self.struck[next(iter(self.struck))]
            struck = self.struck[peer] = Struck(0, now_ns)
        struck.n += 1
        if struck.n < STRIKES:
            return False
        struck.pause, struck.since_ns = True, now_ns
        return True

    def pausing(self, now_ns: int, peer: bytes) -> bool:
        """Is this peer not to be listened to? (A clock that was set back ends the pause.)"""
        struck = self.struck.get(peer)
        if struck is None or not struck.pause:
            return False
        if 0 <= now_ns - struck.since_ns < STRIKE_PAUSE_SECONDS * 10**9:
            return True
        del self.struck[peer]
        return False

    def forget(self, now_ns: int) -> None:
        """Those whose last bad frame is long ago."""
        for peer, struck in list(self.struck.items()):
            if not 0 <= now_ns - struck.since_ns < STRIKE_NS:
                del self.struck[peer]
