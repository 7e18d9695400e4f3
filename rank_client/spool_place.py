"""Where a node's spools stand, and how much each may hold."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

SPOOL_KEEP_BYTES = (
    256 << 20
)  #: per node, kept after acknowledgement: a gateway may lose its journal
SPOOL_CAP_BYTES = 1 << 30  #: per node, of what no gateway has acknowledged
SPOOL_CAP_FREE = 0.1  #: and no more than this part of the disk's free space
OLDER_STREAMS = 256  #: told to the gateway, at most


class Share(NamedTuple):
    """What one stream may hold, in bytes: unacknowledged, and kept after acknowledgement."""

    cap: int
    keep: int


def spool_share(root: Path, environ: Mapping[str, str], streams: int) -> Share:
    """The part that each of a node's `streams` has of the cap (`RANKGATE_SPOOL_CAP_MIB` is per
    node) and of what is kept."""
    cap = SPOOL_CAP_BYTES
    try:
        stats = os.statvfs(root)
        cap = min(cap, int(stats.f_bavail * stats.f_frsize * SPOOL_CAP_FREE))
    except OSError:
        pass  # there is no spool then, and the memory ring has its own bound
    wanted = environ.get("RANKGATE_SPOOL_CAP_MIB", "")
    if wanted.isdecimal() and int(wanted):
        cap = int(wanted) << 20
    return Share(cap // max(1, streams), SPOOL_KEEP_BYTES // max(1, streams))


def spool_root(environ: Mapping[str, str]) -> Path:
    """Node-local, never shared memory: `RANKGATE_SPOOL`, Slurm's or a local TMPDIR, /var/tmp."""
    if environ.get("RANKGATE_SPOOL"):
        return Path(environ["RANKGATE_SPOOL"])
    for name in ("SLURM_TMPDIR", "TMPDIR"):
        if environ.get(name):
            return Path(environ[name]) / f"rankgate-{os.getuid()}"
    return Path(f"/var/tmp/rankgate-{os.getuid()}")  # noqa: S108 - 0700, and the owner is checked


def spool_dir(
    environ: Mapping[str, str], run_id: str, warn: Callable[[str, str], None]
) -> str | None:
    """The run's directory in the spool, this user's alone; None when it cannot be had."""
    root = spool_root(environ)
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if root.lstat().st_uid != os.getuid():
            warn("spool", f"{root} belongs to somebody else; logs are kept in memory only")
            return None
        (root / run_id).mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        warn("spool", f"cannot write {root} ({error.strerror}); logs are kept in memory only")
        return None
    return str(root / run_id)


def older_streams(run_dir: str | None) -> list[bytes]:
    """Streams of this run that this node has seen: what an adopted life is ordered by."""
    if run_dir is None:
        return []
    try:
        return sorted(bytes.fromhex(n) for n in os.listdir(run_dir) if len(n) == 32)[:OLDER_STREAMS]
    except (OSError, ValueError):
        return []
