"""What may run out, watched once a second: room on the disk, a run's share of it, descriptors."""

from __future__ import annotations

import logging
import os
import resource
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rank_client.wire.disk import tree_bytes

RESERVE_BYTES = 256 << 20  #: kept free, so that the databases and the node live on
MORE_ROOM_BYTES = 4 << 20  #: above the reserve, before a full gateway goes on
LOOK_SECONDS = 5.0  #: between two countings of files and descriptors
ALARM_SHARE = 0.8  #: of the descriptors
CROWDED_SHARE = 0.95  #: the rest is for those who are here already

log = logging.getLogger("rankgate.ingest")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a gateway keeps to. `run_quota_bytes` 0: a run may have the whole disk."""

    reserve_bytes: int = RESERVE_BYTES
    run_quota_bytes: int = 0


class Watch:
    """`alarms` says in words what has run out; each is logged when it begins and ends."""

    def __init__(self, root: Path, limits: Limits) -> None:
        self.alarms: list[str] = []
        self.over_quota: frozenset[str] = frozenset()
        self._root = root
        self._limits = limits
        self._look_at = 0.0
        self._descriptors = 0

    def full(self, was_full: bool) -> bool:
        """Is there less room than must stay free? Once full, some more is asked for."""
        try:
            stats = os.statvfs(self._root)
        except OSError:
            return was_full  # it is being removed, and the supervisor leaves
        more = MORE_ROOM_BYTES if was_full else 0
        return stats.f_bavail * stats.f_frsize < self._limits.reserve_bytes + more

    @property
    def crowded(self) -> bool:
        return self._descriptors > CROWDED_SHARE * _descriptor_limit()

    def look(self, full: bool, runs: Iterable[str]) -> None:
        """Once a second; counts only now and then."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + LOOK_SECONDS
            self._descriptors = len(os.listdir("/dev/fd"))
            quota = self._limits.run_quota_bytes
            if quota:
                used = {run: stored_bytes(self._root / "runs" / run) for run in runs}
                self.over_quota = frozenset(run for run, size in used.items() if size >= quota)
        self._tell(self._found(full))

    def _found(self, full: bool) -> list[str]:
        out = []
        if full:
            reserve = self._limits.reserve_bytes >> 20
            left = f" (less than {reserve} MiB left)" if reserve else ""
            out.append(f"the disk is full{left}: ranks keep their logs until there is room")
        for run in sorted(self.over_quota):
            quota = self._limits.run_quota_bytes / (1 << 30)
            out.append(
                f"run {run} has filled its {quota:g} GiB: its ranks keep their logs; raise "
                "gateway.run_quota_gib"
            )
        limit = _descriptor_limit()
        if self._descriptors > ALARM_SHARE * limit:
            out.append(
                f"more than {ALARM_SHARE:.0%} of {limit:,} descriptors are in use: above that no "
                "rank can connect; raise the limit (ulimit -n) and start the gateway again"
            )
        return out

    def _tell(self, alarms: list[str]) -> None:
        for text in alarms:
            if text not in self.alarms:
                log.error("%s", text)
        for text in self.alarms:
            if text not in alarms:
                log.info("no more: %s", text)
        self.alarms = alarms


def stored_bytes(run_dir: Path) -> int:
    """What ingest has written for a run: its journal and files."""
    return tree_bytes(run_dir / "journal") + tree_bytes(run_dir / "media")


def _descriptor_limit() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft if soft > 0 else 1 << 30
