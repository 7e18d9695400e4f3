"""Hostile names and values: everything is kept, every sink goes on, nothing is unaccounted for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gateway.sinks.store import read_views
from tests.servers.clearml import ClearmlServer
from tests.servers.neptune import NeptuneServer, token
from tests.servers.platform import PlatformServer

from .hostile import KEYS
from .job import Job

SCRIPT = str(Path(__file__).with_name("hostile.py"))
UL_KEY = "ul_" + "0" * 40


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_hostile_names_pass_through_every_sink(tmp_path: Path, mode: str) -> None:
    """Each sink ends drained or exported; its items are delivered, skipped or quarantined."""
    config = tmp_path / "gateway.toml"
    config.write_text(
        f"[sinks.clearml]\nmode = '{mode}'\n[sinks.neptune]\nmode = '{mode}'\n"
        f"[sinks.hub]\nmode = '{mode}'\nproject = 'team/x'\n"
    )
    with ClearmlServer() as clearml, NeptuneServer() as neptune, PlatformServer(UL_KEY) as hub:
        environ = {
            **clearml.env,
            "NEPTUNE_API_TOKEN": token(neptune.url),
            "NEPTUNE_PROJECT": "team/digits",
            "OAUTHLIB_INSECURE_TRANSPORT": "1",
            "ULTRALYTICS_PLATFORM_URL": hub.url,
            "ULTRALYTICS_API_KEY": UL_KEY,
        }
        with Job(tmp_path, **environ) as job:
            words = ["run", "--run", "r1", "--config", str(config), "--", sys.executable, SCRIPT]
            code, out, err = job.cli(*words)
            assert code == 0, (out, err)
            assert "\x1b" not in err
            views = {v.name: v for v in read_views(job.data / "runs/r1")}
            want = "drained" if mode == "online" else "exported"
            assert {n: v.state for n, v in views.items()} == dict.fromkeys(views, want), job.log()
            assert len(views) == 3
            job.assert_accounted()
            with job.reader() as reader:
                assert reader.quarantine() == []
                assert len(reader.points("emoji/🔥")) == 5
                assert reader.points("int").value.tolist() == [2**62 + 1]
                assert reader.points("inf").value.tolist() == [float("-inf")]
                assert len(reader.points("wide/49")) == 1
                assert len({name for _, name, _ in reader.keys()}) > len(KEYS)
            for name in ("etc", "picture"):
                assert not (job.data / name).exists()


def test_reading_commands_show_hostile_names_harmlessly(tmp_path: Path) -> None:
    """No escape sequence of a user's text reaches the terminal."""
    with Job(tmp_path) as job:
        code, out, err = job.cli("run", "--run", "r1", "--", sys.executable, SCRIPT)
        assert code == 0, (out, err)
        for words in (("show", "r1"), ("tail", "r1"), ("status",), ("runs",), ("query", "r1", "*")):
            code, out, err = job.cli(*words)
            assert code == 0, (words, err)
            assert "\x1b" not in out + err
            assert "\u202e" not in out + err
