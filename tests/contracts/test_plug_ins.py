"""Sinks of third parties: found by entry point, checked like our own, and harmless when broken."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from gateway.config import build
from gateway.errors import BadConfig
from gateway.sinks import registry
from gateway.sinks.store import read_views
from tests.flow.job import ROOT, Job, wait_until
from tests.servers.clearml import ClearmlServer

from .deaths import EXAMPLE, entry_point


@pytest.fixture(scope="session")
def jsonl_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the import path with the example installed in it, as pip installs it."""
    folder = tmp_path_factory.mktemp("jsonl")
    source = shutil.copytree(EXAMPLE, folder / "source")  # pip leaves its build there
    options = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation")
    command = [sys.executable, "-m", "pip", "install", *options, "--target"]
    subprocess.run([*command, str(folder / "site"), str(source)], check=True, timeout=100)
    return folder / "site"


def plug_in(folder: Path, name: str, module: str, code: str) -> Path:
    """An installed package that brings the sink `name`, made by hand."""
    entry_point(folder, name, module)
    (folder / f"{module}.py").write_text(code)
    return folder


def test_an_installed_sink_gets_the_whole_run(tmp_path: Path, jsonl_site: Path) -> None:
    """The example, through the real gateway: every point of rank 0 once, files, the end."""
    config = tmp_path / "gateway.toml"
    config.write_text(f"[sinks.jsonl]\nfolder = '{tmp_path}/lines'\n")
    path = {"PYTHONPATH": f"{ROOT}:{jsonl_site}"}
    with Job(tmp_path, RANKGATE_CONFIG=str(config), **path) as job:
        job.rank(0, 1, 100, "finish")
        for process in job.processes:
            process.communicate(timeout=60)
        job.drain()
        [view] = read_views(job.data / "runs/r1")
        assert (view.name, view.state, view.skipped) == ("jsonl", "drained", {})
        lines = (tmp_path / "lines/r1.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        [truth] = job.truth().values()
        want = {line["step"]: line["train/loss"] for line in truth if "step" in line}
        rows = [line for line in found if line["kind"] == "row" and "train/loss" in line["values"]]
        assert Counter(r["step"] for r in rows) == Counter(want.keys())
        assert {r["step"]: r["values"]["train/loss"] for r in rows} == want
        assert found[-1] == {"kind": "end", "state": "completed", "reason": ""}
        job.assert_all_there()


def test_an_installed_sink_exports(tmp_path: Path, jsonl_site: Path) -> None:
    """Its export factory is used like ours: one folder under the run, whole or not there."""
    path = {"PYTHONPATH": f"{ROOT}:{jsonl_site}"}
    with Job(tmp_path, RANKGATE_SINKS="jsonl=offline", **path) as job:
        job.rank(0, 1, 20, "finish").communicate(timeout=60)
        job.drain()
        [view] = read_views(job.data / "runs/r1")
        assert view.state == "exported", (view, job.log())
        assert (Path(view.export) / "r1.jsonl").stat().st_size > 0
        job.assert_all_there()


def test_a_plug_ins_table_is_checked_like_ours(
    jsonl_site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unknown keys and wrong values are told by their full path; a name nobody has, with a hint."""
    monkeypatch.syspath_prepend(str(jsonl_site))
    assert build({"sinks": {"jsonl": {"folder": "/x"}}}, "f").sinks["jsonl"].mode == "online"
    for raw, text in (
        ({"foldr": "/x"}, "f: unknown key sinks.jsonl.foldr; did you mean sinks.jsonl.folder?"),
        ({"mode": "sometimes"}, "sinks.jsonl.mode: .* one of 'online', 'offline'"),
    ):
        with pytest.raises(BadConfig, match=text.replace("?", r"\?")):
            build({"sinks": {"jsonl": raw}}, "f")
    with pytest.raises(BadConfig, match=r"unknown key sinks.jsonll; did you mean sinks.jsonl"):
        build({"sinks": {"jsonll": {}}}, "f")
    with pytest.raises(BadConfig, match=r"^there is no sink 'jsonll'; did you mean jsonl\?"):
        build({}, "the defaults", ("jsonll=offline",))


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import a_package_that_is_not_there", "cannot be imported: ModuleNotFoundError"),
        ("raise SystemExit(3)", "cannot be imported: SystemExit: 3"),
        ("KIND = 7", "is a int, not a gateway.sinks.base.SinkKind"),
        (
            "from gateway.sinks.base import SinkKind\nKIND = SinkKind(dict, dict)",
            "has a config without defaults",
        ),
        (
            "from gateway.sinks.base import SinkKind\nKIND = SinkKind(dict, None)",
            "has no factory in `online`",
        ),
    ],
)
def test_a_broken_plug_in_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, told: str
) -> None:
    """Whatever is wrong with it, its sink is off with a text, and the config can be read."""
    monkeypatch.syspath_prepend(str(plug_in(tmp_path, "broken", "broken_sink", code)))
    monkeypatch.delitem(sys.modules, "broken_sink", raising=False)
    found = build({"sinks": {"broken": {"any": "thing"}, "hub": {}}}, "f").sinks
    sink = registry.online("broken", found["broken"], tmp_path)
    with pytest.raises(registry.Off, match=told) as caught:
        sink.open(None, None)  # type: ignore[arg-type]
    assert "Repair or uninstall the package broken_sink-package" in str(caught.value)


def test_a_broken_plug_in_stops_nobody_else(tmp_path: Path, jsonl_site: Path) -> None:
    """The gateway serves, the other sink delivers all, and the status tells of the broken one."""
    config = tmp_path / "gateway.toml"
    config.write_text(f"[sinks.broken]\nx = 1\n[sinks.jsonl]\nfolder = '{tmp_path}/lines'\n")
    site = plug_in(tmp_path / "site", "broken", "broken_sink", "1 / 0")
    path = {"PYTHONPATH": f"{ROOT}:{jsonl_site}:{site}"}
    with Job(tmp_path, RANKGATE_CONFIG=str(config), **path) as job:
        job.rank(0, 1, 20, "finish").communicate(timeout=60)
        job.drain()
        states = {view.name: (view.state, view.reason) for view in read_views(job.data / "runs/r1")}
        assert states["jsonl"] == ("drained", "")
        assert states["broken"][0] == "off"
        assert "ZeroDivisionError" in states["broken"][1]
        _, out, _ = job.cli("status")
        assert "broken" in out
        job.assert_all_there()


def test_a_plug_in_does_not_take_the_place_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name of ours stays ours; a name that could be another file's is not there at all."""
    site = plug_in(tmp_path, "clearml", "false_sink", "raise SystemExit")
    (site / "false_sink-1.0.dist-info/entry_points.txt").write_text(
        "[rankgate.sinks]\nclearml = false_sink:KIND\n../up = false_sink:KIND\n"
    )
    monkeypatch.syspath_prepend(str(site))
    assert registry.names().count("clearml") == 1
    assert registry.kind("clearml") is registry.BUILT_IN["clearml"]()
    assert "../up" not in registry.names()


def test_a_backend_that_hangs_holds_no_other_sink(tmp_path: Path, jsonl_site: Path) -> None:
    """ClearML answers nothing for long; the run is whole in the other sink meanwhile."""
    config = tmp_path / "gateway.toml"
    config.write_text(f"[sinks.clearml]\n[sinks.jsonl]\nfolder = '{tmp_path}/lines'\n")
    path = {"PYTHONPATH": f"{ROOT}:{jsonl_site}", "RANKGATE_CONFIG": str(config)}
    with ClearmlServer() as server, Job(tmp_path, **server.env, **path) as job:
        server.fail(".", mode="delay", seconds=2.0, times=1 << 30)
        job.rank(0, 1, 50, "finish").communicate(timeout=60)

        def states() -> dict[str, str]:
            return {view.name: view.state for view in read_views(job.data / "runs/r1")}

        wait_until(lambda: states().get("jsonl") == "drained", 60, "the other sink is done")
        assert states().get("clearml") != "drained"
        server.heal()
        job.drain()
        assert states() == {"clearml": "drained", "jsonl": "drained"}
        job.assert_all_there()
