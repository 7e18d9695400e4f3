"""Files that policy drops: asked for in `requests/drop`, entered in the journal, then removed.

Ingest alone removes from `media/`, by the thread that also writes there. Who asks says how much of
which journal it knew: a file that came in again since then stays. A request is gone once it is
read; who asked looks again, and asks again for what is still there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rank_client.wire.records import Kind

from .media import Blob, Job, blob_path, is_sha256

if TYPE_CHECKING:
    from .opening import Runs
    from .peers import Peers

REQUEST = "drop"


class Request(NamedTuple):
    """Files to drop, as of entry `cursor` of the journal of that name."""

    journal: bytes
    cursor: int
    reasons: dict[str, str]  #: by the files' sha256


def ask(run_dir: Path, request: Request) -> None:
    """Leave a request, in the place of one that was not read yet. Raises OSError."""
    folder = run_dir / "requests"
    folder.mkdir(mode=0o700, exist_ok=True)
    part = folder / f".{REQUEST}.{os.getpid()}"
    journal, cursor, reasons = request
    part.write_text(json.dumps({"journal": journal.hex(), "cursor": cursor, "files": reasons}))
    part.rename(folder / REQUEST)


def take(path: Path) -> Request:
    """A request, which is gone then; an empty one when it is no such."""
    try:
        found = json.loads(path.read_text())
        path.unlink()
        reasons = {str(sha256): str(reason) for sha256, reason in found["files"].items()}
        return Request(bytes.fromhex(found["journal"]), int(found["cursor"]), reasons)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        path.unlink(missing_ok=True)
        return Request(b"", 0, {})


class Drops:
    """Carries out what was asked: only what the journal is sure to tell of goes.

    `commit` brings to the disk what journals hold, where there is room for it; `work` takes a
    removal to the thread that also writes files, and `done` is told when that is over.
    """

    def __init__(
        self, peers: Peers, runs: Runs, commit: Callable[[], None], work: Callable[[Job], None]
    ) -> None:
        self._peers = peers
        self._runs = runs
        self._commit = commit
        self._work = work
        self._leaving: set[tuple[str, str]] = set()  # files on their way out

    def carry_out(self, now_ns: int, run: str, request: Request) -> None:
        """What is buffered is committed before, where there is room. Raises JournalDamaged,
        OSError."""
        journal = self._runs.journal(run)
        newest = self._peers.newest_blob.setdefault(run, journal.seq)
        if request.journal != journal.uuid or not newest <= request.cursor <= journal.seq:
            return  # who asked did not know of all files, or looked at what is no more
        directory = self._runs.directory(run)
        for sha256, reason in request.reasons.items():
            there = is_sha256(sha256) and self._runs.disk.exists(str(blob_path(directory, sha256)))
            if there and (run, sha256) not in self._leaving:
                self._drop(
                    now_ns, Blob.announced(self._runs.disk, run, directory, sha256, 0), reason
                )

    def _drop(self, now_ns: int, blob: Blob, reason: str) -> None:
        journal = self._runs.journal(blob.run)
        no_room = journal.durable_seq < journal.seq
        if no_room or not self._peers.let_go(blob.run, blob.sha256):
            return
        body = {"sha256": blob.sha256, "reason": reason}
        entry = journal.append_map(Kind.DROP, now_ns, body)
        self._commit()
        if journal.durable_seq >= entry:  # else it is said, and asked for again
            self._leaving.add((blob.run, blob.sha256))
            self._work(Job(b"", blob, "drop"))

    def done(self, job: Job) -> None:
        """A removal is over, whether it worked or not."""
        self._leaving.discard((job.blob.run, job.blob.sha256))
