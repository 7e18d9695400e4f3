"""Secrets planted in every text a rank can log: none is in anything that anybody else reads."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from rank_client.redact import MARK

from .job import Job

CANARY = str(Path(__file__).with_name("canary.py"))
SECRETS = {
    "PLANT_SHAPE": "ghp_CanaryCanaryCanary0123456789abcdef01",
    "PLANT_NAMED": "hidden-canary-by-name",
    "SERVICE_SECRET": "plain-canary-of-the-environment",
}
LOOKS = [("status", "--json"), ("show", "r1"), ("tail", "r1"), ("query", "r1", "*")]


def contents(root: Path) -> Iterator[tuple[str, bytes]]:
    """Every file below a folder, and what is in the archives; names too."""
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        yield f"the name of {path}", bytes(path)
        yield str(path), path.read_bytes()
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    yield f"{path}:{name}", name.encode() + archive.read(name)


@pytest.mark.timeout(180)
def test_no_planted_secret_is_found_anywhere(tmp_path: Path) -> None:
    """Spool, journal, series, sinks, offline exports, logs, all that commands print: what the
    rank logged is there, with the mark in the place of each secret."""
    with Job(tmp_path) as job:
        mine = tmp_path / "mine"
        mine.mkdir()
        job.serve("--sink", "clearml=offline", "--sink", "neptune=offline")
        place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        rank = job.start(
            sys.executable, CANARY, str(mine), **{**place, "RANKGATE_RUN": "r1", **SECRETS}
        )
        _, err = rank.communicate(timeout=60)
        assert rank.returncode == 1, err
        said = "\n".join(line for line in err.splitlines() if line.startswith("rankgate:"))
        assert "missing-" in said
        job.drain()
        job.assert_accounted()
        printed = {" ".join(words): "".join(map(str, job.cli(*words))) for words in LOOKS}
        found = [("stderr", said.encode()), *((w, t.encode()) for w, t in printed.items())]
        found += [*contents(job.data), *contents(job.spool)]
    hits = [(where, s) for where, data in found for s in SECRETS.values() if s.encode() in data]
    assert hits == []
    assert MARK in printed["tail r1"]
    assert any("exports" in where for where, _ in found)
    marks = [where for where, data in found if MARK.encode() in data]
    for part in ("journal", "series.db", "spool", "exports/clearml", "exports/neptune"):
        assert any(part in where for where in marks), (part, marks)
