"""Files that policy drops: what of a request is carried out, and in which order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.ingest.drop import Drops, Request, ask, take
from gateway.ingest.media import Job, blob_path
from gateway.ingest.peers import Peers
from gateway.journal.writer import Journal
from rank_client.wire.disk import OsDisk
from rank_client.wire.records import Kind
from tests.gateway.journal.made import make, read_all
from tests.rank_client.wire.disks import MemoryDisk

SHA256 = "ab" * 32


class OneRun:
    """A run whose journal is in memory, and whose one file is in `root`."""

    disk = OsDisk()

    def __init__(self, root: Path) -> None:
        self.root = root
        self.memory = MemoryDisk()
        self.made = make(self.memory)
        self.made.append_map(Kind.BLOB, 0, {"stream": b"s" * 16, "media": 1, "sha256": SHA256})
        self.made.commit()
        self.file = blob_path(root, SHA256)
        self.file.parent.mkdir(parents=True)
        self.file.write_bytes(b"weights")
        self.peers = Peers(1, self, 1 << 20, lambda run: False)
        self.jobs: list[Job] = []

    def journal(self, run: str) -> Journal:
        return self.made

    def directory(self, run: str) -> Path:
        return self.root

    def drops(self, commit: Callable[[], None] | None = None) -> Drops:
        return Drops(self.peers, self, commit or self.made.commit, self.jobs.append)

    def request(self) -> Request:
        return Request(self.made.uuid, self.made.durable_seq, {SHA256: "why"})

    def told(self) -> list[int]:
        self.made.mark()
        return [entry.kind for entry in read_all(self.memory)]


def test_a_file_goes_after_the_journal_has_told_of_it(tmp_path: Path) -> None:
    """The entry is on the disk before the removal is handed over; it is handed over once."""
    run = OneRun(tmp_path)
    drops = run.drops()
    drops.carry_out(0, "r", run.request())
    drops.carry_out(0, "r", run.request())
    assert [job.verb for job in run.jobs] == ["drop"]
    assert run.told() == [Kind.BLOB, Kind.DROP]
    assert run.file.exists()
    run.jobs[0].run()
    drops.done(run.jobs[0])
    assert not run.file.exists()


def test_without_room_for_the_entry_the_file_stays(tmp_path: Path) -> None:
    """A commit that finds no room leaves the file; it goes when it is asked for with room."""
    run = OneRun(tmp_path)
    run.drops(commit=lambda: None).carry_out(0, "r", run.request())
    run.drops().carry_out(0, "r", run.request())  # what is buffered still waits
    assert run.jobs == []
    run.made.commit()
    run.drops().carry_out(0, "r", run.request())
    assert [job.verb for job in run.jobs] == ["drop"]


@pytest.mark.parametrize("stale", ["another journal", "more than there is", "a newer file"])
def test_a_stale_request_drops_nothing(tmp_path: Path, stale: str) -> None:
    """Who asked looked at a journal that is no more, or did not see the newest file."""
    run = OneRun(tmp_path)
    request = run.request()
    if stale == "another journal":
        request = request._replace(journal=b"o" * 16)
    elif stale == "more than there is":
        request = request._replace(cursor=run.made.seq + 1)
    else:
        run.peers.newest_blob["r"] = request.cursor + 1
    run.drops().carry_out(0, "r", request)
    assert run.jobs == []
    assert run.told() == [Kind.BLOB]


def test_a_request_is_read_once(tmp_path: Path) -> None:
    """What was asked is found once; what is no request is taken away."""
    request = Request(b"j" * 16, 7, {SHA256: "why"})
    ask(tmp_path, request)
    path = tmp_path / "requests" / "drop"
    assert take(path) == request
    path.write_text('{"cursor": 7, "files": {}}')
    assert take(path) == Request(b"", 0, {})
    assert not path.exists()
