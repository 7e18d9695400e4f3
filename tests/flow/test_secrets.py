"""The keys of every vendor, in everything a rank logs and in what their servers answer: none is in
anything that is kept, shown, exported or sent on."""

from __future__ import annotations

import logging
import sys
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from gateway.sinks.quarantine import Kept, read_quarantine
from gateway.sinks.store import Store, read_view, read_views
from gateway.telemetry import CleanFormatter
from rank_client.redact import MARK
from tests.servers.clearml import ClearmlServer
from tests.servers.neptune import NeptuneServer, token
from tests.servers.platform import PlatformServer

from .job import Job
from .records import record

PLANTED = str(Path(__file__).with_name("planted.py"))
#: by the name of its variable, each a way to know a secret: shape, name, place in a URL
SECRETS = {
    "ULTRALYTICS_API_KEY": "ul_" + "ca0a" * 10,
    "HUB_API_KEY": "canary0123456789abcdef0123456789abcdef01",
    "WANDB_API_KEY": "canaryffffffffffffffffffffffffffffffffff",
    "DATABASE_PASSWORD": "canary-of-a-database",
    "GITHUB_TOKEN": "ghp_CanaryCanaryCanary0123456789abcdef01",
}
SINKS = ("clearml", "neptune", "hub")
LOOKS = [
    ("status", "--json"), ("sinks", "status", "--json"), ("show", "r1", "--json"),
    ("tail", "r1", "--lines", "100"), ("query", "r1", "*", "--json"),
]  # fmt: skip


def contents(root: Path) -> Iterator[tuple[str, bytes]]:
    """Every file below a folder, and what is in the archives; names too."""
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        yield f"the name of {path}", bytes(path)
        yield str(path), path.read_bytes()
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    yield f"{path}:{name}", name.encode() + archive.read(name)


@pytest.mark.timeout(300)
def test_no_key_of_a_vendor_is_found_anywhere(tmp_path: Path) -> None:
    """Spool, journal, series, what sinks remember, log, every command's output, the exports, and
    what the servers got: everything of the run is there, a mark in the place of each key."""
    with ExitStack() as stack:
        clearml, neptune = ClearmlServer(), NeptuneServer()
        platform = PlatformServer(key=SECRETS["ULTRALYTICS_API_KEY"])
        servers = [stack.enter_context(s) for s in (clearml, neptune, platform)]
        keys = {name: value for name, value in clearml.env.items() if name.endswith("KEY")}
        secrets = {**SECRETS, **keys, "NEPTUNE_API_TOKEN": token(neptune.url)}
        quoted = " ".join(secrets.values())
        for server, path in zip(servers, ("events.add", "operations", "webhooks"), strict=True):
            answer = {"meta": {"result_msg": quoted}, "message": quoted, "title": quoted}
            server.fail(path, status=500, body={**answer, "error": quoted}, times=2)
        environ = {
            **clearml.env,
            **secrets,
            "NEPTUNE_PROJECT": "team/digits",
            "OAUTHLIB_INSECURE_TRANSPORT": "1",
            "ULTRALYTICS_PLATFORM_URL": platform.url,
        }
        job = stack.enter_context(Job(tmp_path, **environ))
        printed = {}
        config = tmp_path / "gateway.toml"
        config.write_text("[sinks.hub]\nproject = 'team/digits'\n")
        job.serve("--config", str(config), *(w for name in SINKS for w in ("--sink", name)))
        mine = tmp_path / "mine"
        mine.mkdir()
        place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "RANKGATE_RUN": "r1"}
        rank = job.start(sys.executable, PLANTED, str(mine), *secrets, **place)
        _, err = rank.communicate(timeout=90)
        assert rank.returncode == 1
        said = "\n".join(line for line in err.splitlines() if line.startswith("rankgate:"))
        printed["drain"] = "".join(map(str, job.cli("drain", "--config", str(config))))
        for name in SINKS:
            words = ("replay", "r1", "--to", f"{name}=offline", "--config", str(config))
            printed[f"replay {name}"] = "".join(map(str, job.cli(*words)))
            assert "exported" in printed[f"replay {name}"]
        printed |= {" ".join(words): "".join(map(str, job.cli(*words))) for words in LOOKS}
        job.assert_accounted()
        found = [("stderr", said.encode()), *((w, t.encode()) for w, t in printed.items())]
        found += [*contents(job.data), *contents(job.spool)]
        found += [(f"server {type(s).__name__}", repr(record(s)).encode()) for s in servers]
    hits = [(where, n) for where, data in found for n, s in secrets.items() if s.encode() in data]
    assert hits == []
    assert {v.name for v in read_views(job.data / "runs/r1")} == set(SINKS)
    marks = [where for where, data in found if MARK.encode() in data]
    for part in ("journal", "series.db", "spool", "exports/clearml", "exports/neptune",
                 "exports/hub", "tail r1", "ClearmlServer", "NeptuneServer"):  # fmt: skip
        assert any(part in where for where in marks), (part, marks)


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HUB_API_KEY", SECRETS["HUB_API_KEY"])
    return SECRETS["HUB_API_KEY"]


def test_a_backends_reason_that_quotes_a_key(key: str, tmp_path: Path) -> None:
    """A sink's file keeps the words, not the key: as its state, and with an item set aside."""
    store = Store(tmp_path / "hub.db")
    store.note(state="retrying", reason=f"401: {key} is not known")
    store.quarantine.add([Kept("text", b"", 1, "", 1, "a line", f"refused for {key}")])
    store.quarantine.settle([], [(1, f"refused again for {key}")])
    assert read_view(tmp_path / "hub.db").reason == f"401: {MARK} is not known"
    assert [r.reason for r in read_quarantine(tmp_path / "hub.db")] == [f"refused again for {MARK}"]
    assert [where for where, data in contents(tmp_path) if key.encode() in data] == []
    store.close()


def test_a_log_line_that_quotes_a_key(key: str) -> None:
    """The gateway's log has the line and its traceback, not the key."""
    try:
        raise ValueError(f"cannot log in with {key}")
    except ValueError:
        about = ("rankgate", logging.ERROR, __file__, 1, "sink of %s failed", (key,))
        record = logging.LogRecord(*about, sys.exc_info())
    text = CleanFormatter("%(message)s").format(record)
    assert key not in text
    assert f"sink of {MARK} failed" in text
    assert f"ValueError: cannot log in with {MARK}" in text
