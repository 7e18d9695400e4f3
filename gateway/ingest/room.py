"""How much room there is: what each stream may send before it is acknowledged."""

from __future__ import annotations

from .streams import Stream

CREDIT_FLOOR_BYTES = 8 << 10
CREDIT_TOP_BYTES = 4 << 20


class Room:
    """Shares `budget_bytes` out among the streams, as credit.

    A stream may have `credit_bytes` unacknowledged, and a client has at most twice that on the
    way; so all together stay within `budget_bytes`, or 16 KiB a stream where those are more than
    8,192 (one record or chunk above its credit, at most 256 KiB, is on the way alone).

    `changed` holds the streams whose credit is another than they were told.
    """

    def __init__(self, streams: dict[bytes, Stream], budget_bytes: int) -> None:
        self.crowded = False  #: no descriptor is left for another run or file
        self.changed: dict[bytes, Stream] = {}
        self._streams = streams
        self._budget_bytes = budget_bytes
        self._full = False
        self._over_quota: frozenset[str] = frozenset()

    @property
    def full(self) -> bool:
        """The disk takes no more: credit 0. Everybody is told when that begins and ends."""
        return self._full

    @full.setter
    def full(self, full: bool) -> None:
        if full != self._full:
            self._full = full
            self.changed.update(self._streams)

    @property
    def over_quota(self) -> frozenset[str]:
        """Runs that have used up their share of the disk: credit 0 for their streams."""
        return self._over_quota

    @over_quota.setter
    def over_quota(self, runs: frozenset[str]) -> None:
        changed = runs ^ self._over_quota
        self._over_quota = runs
        if changed:
            self.changed.update({i: s for i, s in self._streams.items() if s.run in changed})

    @property
    def credit_bytes(self) -> int:
        """What a stream may have unacknowledged."""
        if self._full:
            return 0
        share = self._budget_bytes // (2 * max(1, len(self._streams)))
        return max(CREDIT_FLOOR_BYTES, min(CREDIT_TOP_BYTES, share))

    def lacking(self, run: str) -> str:
        """What keeps a run from being written: disk | quota, or nothing."""
        if self._full:
            return "disk"
        return "quota" if run in self._over_quota else ""
