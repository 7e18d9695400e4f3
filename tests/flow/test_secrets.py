"""The keys of every vendor, in everything a rank logs and in what their servers answer: none is in
anything that is kept, shown, exported or sent on."""

from __future__ import annotations

import base64
import json
import logging
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

import pytest

from gateway.sinks.quarantine import Kept, read_quarantine
from gateway.sinks.store import Store, read_view, read_views
from gateway.telemetry import CleanFormatter
from rank_client.redact import MARK
from tests.servers.base import Reply, Request, StandIn
from tests.servers.clearml import ClearmlServer
from tests.servers.neptune import NeptuneServer, token
from tests.servers.platform import PlatformServer

from .job import ROOT, Job, wait_until

PLANTED = Path(__file__).with_name("planted.py")
#: by the name of its variable, each a way to know a secret: shape, name, place in a URL
SECRETS = {
    "ULTRALYTICS_API_KEY": "ul_" + "ca0a" * 10,
    "HUB_API_KEY": "canary0123456789abcdef0123456789abcdef01",
    "WANDB_API_KEY": "canaryffffffffffffffffffffffffffffffffff",
    "DATABASE_PASSWORD": "canary 'of' \"a\" data\\base+100%&äöü",
    "GITHUB_TOKEN": "ghp_CanaryCanaryCanary0123456789abcdef01",
}
FILES_PASSWORD, SETTINGS_KEY = "canary-of-the-file-server", "canary-of-the-settings-file"
PRINTED = ("out", "err", "raw", "c", "half", "100% of", "child")  #: how `planted.py` begins lines
SINKS = ("clearml", "neptune", "hub")
LOOKS = [
    ("status", "--json"), ("sinks", "status", "--json"), ("show", "r1", "--json"), ("show", "r1"),
    ("tail", "r1", "--lines", "1000"), ("query", "r1", "*", "--json"), ("runs", "--json"),
    ("query", "r1", "*", "--format", "csv"), ("doctor", "--json"),
]  # fmt: skip
CONF = """
api {{
    api_server: {CLEARML_API_HOST}
    web_server: {CLEARML_WEB_HOST}
    credentials {{
        "access_key": "{CLEARML_API_ACCESS_KEY}", "secret_key": "{CLEARML_API_SECRET_KEY}"
    }}
}}
"""
#: where a key is meant to be
LOGINS = {"authorization", "x-neptune-api-token"}


def contents(root: Path) -> Iterator[tuple[str, bytes]]:
    """Every file below a folder, and what is in the archives; names too."""
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        yield f"the name of {path}", bytes(path)
        try:
            yield str(path), path.read_bytes()
        except FileNotFoundError:  # of a run that goes on
            continue
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    yield f"{path}:{name}", name.encode() + archive.read(name)


def forms(secret: str) -> set[bytes]:
    """A secret as it may stand somewhere: plain, in a list's text, in JSON, in a URL, in base64."""
    shown = {secret, repr(secret)[1:-1], quote(secret), quote(secret, safe="")}
    shown |= {json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]}
    return {text.encode() for text in shown} | {base64.b64encode(secret.encode())}


class Heard:
    """All that a server is sent, but for the headers of a login."""

    def __init__(self, server: StandIn) -> None:
        self.parts: list[bytes] = []
        self._handle, server.handle = server.handle, self.handle  # type: ignore[method-assign]
        self._tokens: set[str] = getattr(server, "tokens", set())

    def handle(self, request: Request) -> Reply:
        headers = {k: v for k, v in request.headers.items() if k not in LOGINS}
        about = f"{request.method} {request.path} {request.query} {headers}"
        self.parts += [about.encode(), unquote(about).encode(), request.body]
        if request.headers.get("authorization") == FILES_LOGIN:  # what stands before file servers
            request.headers["authorization"] = f"Bearer {next(iter(self._tokens))}"
        return self._handle(request)


FILES_LOGIN = "Basic " + base64.b64encode(f"me:{FILES_PASSWORD}".encode()).decode()


@dataclass
class Planted:
    """A job with three services, whose keys stand in its environment, in files and in a URL."""

    job: Job
    servers: list[StandIn]
    heard: list[Heard]
    secrets: dict[str, str]
    mine: Path  #: of the ranks
    script: Path

    def rank(self, rank: int, how: str) -> subprocess.Popen[str]:
        place = {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2",
                 "LOCAL_WORLD_SIZE": "2", "RANKGATE_RUN": "r1"}  # fmt: skip
        words = ["--api-key", *self.secrets.values()]
        return self.job.start(
            sys.executable, str(self.script), str(self.mine), how, *words, **place
        )

    def look(self, found: list[tuple[str, bytes]], looks: Sequence[tuple[str, ...]]) -> None:
        """What is there now, and what commands print of it."""
        found += [*contents(self.job.data), *contents(self.job.spool)]
        found += [(" ".join(w), "".join(map(str, self.job.cli(*w))).encode()) for w in looks]


def repository(folder: Path, secrets: dict[str, str]) -> Path:
    """The rank's script in a repository whose remote, branch, message and changes have secrets."""
    folder.mkdir()
    script = folder / "train.py"
    shutil.copy(PLANTED, script)
    token = secrets["GITHUB_TOKEN"]
    every = " ".join(secrets.values())
    for words in (
        ["init", "-q", "-b", f"fix-{token}"],
        ["remote", "add", "origin", f"https://me:{token}@example.org/digits.git"],
        ["add", "."],
        ["-c", "user.name=n", "-c", "user.email=e@example.org", "commit", "-qm", every],
    ):
        subprocess.run(["git", "-C", str(folder), *words], check=True)
    lines = "".join(f"# {name} = {value}\n" for name, value in secrets.items())
    script.write_text(script.read_text() + lines)
    return script


@pytest.fixture
def planted(tmp_path: Path) -> Iterator[Planted]:
    with ExitStack() as stack:
        clearml, neptune = ClearmlServer(), NeptuneServer()
        platform = PlatformServer(key=SECRETS["ULTRALYTICS_API_KEY"])
        servers = [stack.enter_context(s) for s in (clearml, neptune, platform)]
        heard = [Heard(server) for server in servers]
        home, mine = tmp_path / "home", tmp_path / "mine"
        (home / ".config/Ultralytics").mkdir(parents=True)
        mine.mkdir()
        (home / "clearml.conf").write_text(CONF.format(**clearml.env))
        settings = json.dumps({"openai_api_key": SETTINGS_KEY})
        (home / ".config/Ultralytics/settings.json").write_text(settings)
        files = clearml.files_url.replace("://", f"://me:{FILES_PASSWORD}@")
        environ = {
            **SECRETS,
            "NEPTUNE_API_TOKEN": token(neptune.url),
            "NEPTUNE_PROJECT": "team/digits",
            "OAUTHLIB_INSECURE_TRANSPORT": "1",
            "ULTRALYTICS_PLATFORM_URL": platform.url,
            "CLEARML_FILES_HOST": files,
            "HOME": str(home),
            "RANKGATE_CAPTURE_SOURCE": "1",
        }
        secrets = {
            **SECRETS,
            "NEPTUNE_API_TOKEN": environ["NEPTUNE_API_TOKEN"],
            "clearml.conf, access": clearml.env["CLEARML_API_ACCESS_KEY"],
            "clearml.conf, secret": clearml.env["CLEARML_API_SECRET_KEY"],
            "CLEARML_FILES_HOST": FILES_PASSWORD,
            "settings.json": SETTINGS_KEY,
        }
        (mine / "secrets.json").write_text(json.dumps(secrets))
        script = repository(tmp_path / "repository", secrets)
        quoted = " ".join(secrets.values())
        for server, path in zip(servers, ("events.add", "operations", "webhooks"), strict=True):
            answer = {"meta": {"result_msg": quoted}, "message": quoted, "title": quoted}
            server.fail(path, status=500, body={**answer, "error": quoted}, times=2)
        job = stack.enter_context(Job(tmp_path, **environ))
        yield Planted(job, servers, heard, secrets, mine, script)


@pytest.mark.timeout(300)
def test_no_key_of_a_vendor_is_found_anywhere(planted: Planted, tmp_path: Path) -> None:
    """Spool, journal, series, what sinks remember, live.json, log, every command's output, the
    exports, and what the servers got: everything of the run is there, a mark in the place of each
    key, while the run goes on and after it."""
    job, found = planted.job, []
    config = tmp_path / "gateway.toml"
    config.write_text("[sinks.hub]\nproject = 'team/digits'\n")
    gateway = job.serve("--config", str(config), *(w for n in SINKS for w in ("--sink", n)))
    first, second = planted.rank(0, "raise"), planted.rank(1, "die")
    _, said = second.communicate(timeout=60)
    assert second.returncode == -9
    wait_until(lambda: "all is said" in job.cli("tail", "r1", "--rank", "0")[1], 60, "it is said")
    planted.look(found, LOOKS[:1])
    assert any(where.endswith("live.json") for where, _ in found)
    (planted.mine / "go").touch()
    _, err = first.communicate(timeout=90)
    assert first.returncode == 1
    ours = [line for line in (said + err).splitlines() if line.startswith("rankgate:")]
    assert any("missing-" in line for line in ours)
    found.append(("warnings", "\n".join(ours).encode()))
    found.append(("drain", "".join(map(str, job.cli("drain", "--config", str(config)))).encode()))
    for name in SINKS:
        words = ("replay", "r1", "--to", f"{name}=offline", "--config", str(config))
        told = "".join(map(str, job.cli(*words)))
        assert "exported" in told
        found.append((f"replay {name}", told.encode()))
    planted.look(found, LOOKS)
    job.assert_accounted()
    job.stop_gateway(signal.SIGTERM)
    found.append(("gateway's log", "".join(gateway.communicate(timeout=30)).encode()))
    for server, heard in zip(planted.servers, planted.heard, strict=True):
        found.append((f"{type(server).__name__} got", b"\n".join(heard.parts)))
    logins = {"basic of clearml": ":".join(list(planted.secrets.values())[6:8]),
              "basic of the file server": f"me:{FILES_PASSWORD}"}  # fmt: skip
    hits = [
        (where, name, form)
        for name, secret in {**planted.secrets, **logins}.items()
        for form in forms(secret)
        for where, data in found
        if form in data
    ]
    assert hits == []
    assert b"rankgate.ingest" in dict(found)["gateway's log"]
    views = {view.name: view for view in read_views(job.data / "runs/r1")}
    assert {name: views[name].quarantined for name in SINKS} == dict.fromkeys(SINKS, 0)
    marks = [where for where, data in found if MARK.encode() in data]
    for part in ("journal", "series.db", "spool", "exports/clearml", "exports/neptune",
                 "exports/hub", "tail r1", "ClearmlServer", "NeptuneServer", "PlatformServer",
                 "warnings"):  # fmt: skip
        assert any(part in where for where in marks), (part, marks)
    everything = b"".join(data for _, data in found)
    for text in (f"+# HUB_API_KEY = {MARK}", f"fix-{MARK}", f"https://{MARK}@example.org",
                 f"last words {MARK}", *(f"{word} {MARK}" for word in PRINTED)):  # fmt: skip
        assert text.encode() in everything, text


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


VENDOR = """
import os, sys, threading, faulthandler
from gateway import telemetry
telemetry.configure()
telemetry.clean_output()
key = os.environ["HUB_API_KEY"]
print("printed", key)
sys.stderr.write("warned ")
sys.stderr.write(key + "\\n")
sys.stdout.write(f"not ended {key}")
def fail(where):
    raise ValueError(f"{where} does not know {key}")
thread = threading.Thread(target=fail, args=["thread"], name="vendor")
thread.start()
thread.join()
faulthandler.dump_traceback_later(60)
fail("process")
"""


def test_what_a_vendors_package_prints_or_dies_of(key: str) -> None:
    """In a sink's process lines on stdout and stderr, and tracebacks, are there without the key."""
    words = [sys.executable, "-c", VENDOR]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert key not in done.stdout + done.stderr
    assert done.stdout == f"printed {MARK}\nnot ended {MARK}"
    for text in (f"warned {MARK}\n", "vendor ended by", "MainThread ended by",
                 f"ValueError: thread does not know {MARK}",
                 f"ValueError: process does not know {MARK}"):  # fmt: skip
        assert text in done.stderr
