"""Names are data: whatever a rank calls a run, a file or a key, nothing is written outside."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gateway.ingest import hello, media
from gateway.ingest.journals import RunStore
from gateway.ingest.peers import Peers
from gateway.sinks import clearml_events, clearml_export
from gateway.sinks.base import Media, RunInfo, SinkError
from gateway.sinks.clearml import ClearmlConfig
from gateway.sinks.clearml_export import ClearmlExport
from gateway.sinks.hub.config import HubConfig
from gateway.sinks.hub.export import HubExport, Recorder
from rank_client.wire import frames
from rank_client.wire.frames import Type
from rank_client.wire.keys import valid_run_id
from tests.sinks.fakes import MemoryDict

from .row import Remove, Row, without

NASTY = (
    "../../../../x", "../x", "..", ".", "", "/x", "a/../../../x", "x\0y", "a/../../x.pt", "./x",
    "~/x", "..\\x", "x" * 300, "a." + "x" * 300, "x.\0", "con", "%2e%2e/x", "\u2024\u2024/x", "x\n",
    "x/",
)  # fmt: skip
NAMES = st.sampled_from(NASTY) | st.text(st.sampled_from("./\\~ax\0\n%é"), max_size=12)


def tree(place: Path) -> set[Path]:
    """All there is, but for what lies in `inside`."""
    inside = place / "a" / "b" / "inside"
    return {p for p in place.rglob("*") if p != inside and inside not in p.parents}


def stays_inside(*strategies: Any) -> Callable[[Callable[..., Any]], Callable[[Path], None]]:
    """Run an action on a folder with many names: nothing around the folder may change."""

    def decorate(action: Callable[..., Any]) -> Callable[[Path], None]:
        @settings(
            max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck)
        )
        @given(st.tuples(*strategies))
        @example((NASTY[0],) * len(strategies))
        def attempt(names: tuple[str, ...]) -> None:
            with tempfile.TemporaryDirectory() as folder:
                place = Path(folder)
                inside = place / "a" / "b" / "inside"
                inside.mkdir(parents=True)
                (place / "picture").write_bytes(b"bytes")
                before = tree(place)
                problem = ""
                try:
                    action(inside, place / "picture", *names)
                except (OSError, ValueError) as error:
                    problem = repr(error)  # who calls it would try again, for ever
                assert tree(place) == before, names
                assert problem == "", names

        return lambda _: attempt()

    return decorate


def say_hello(inside: Path, stream: bytes, **more: Any) -> Peers:
    known = Peers(1, RunStore(inside), 1 << 20, lambda _: False)
    body = {"v": [1, 1], "kind": "live", "first": 1, **more}
    known.receive(1, b"p", frames.control(Type.HELLO, 0, stream, body), [])
    for journal in known._runs.open.values():  # type: ignore[attr-defined]
        journal.close()
    return known


@stays_inside(NAMES)
def runs(inside: Path, _: Path, run: str) -> None:
    known = say_hello(inside, b"s" * 16, run=run)
    assert valid_run_id(run) == bool(known.streams), run


@stays_inside(NAMES)
def files(inside: Path, _: Path, sha256: str) -> None:
    known = say_hello(inside, b"f" * 16, run="r", kind="blob", sha256=sha256, size=5)
    for stream in list(known.streams.values()):
        known._drop(stream)


def a_file(picture: Path, what: str, key: str, name: str) -> Media:
    return Media(b"s" * 16, 0, 1, 1, what, key, name, 1, picture, "a" * 64, 5, {})


def export(sink: Any, picture: Path, project: str, key: str, name: str) -> None:
    """All that can be exported under these names; nothing is left waiting for better times."""
    sink.open(RunInfo("r", project, project, (), 1), MemoryDict())
    for what in ("image", "file", "table", "checkpoint"):
        try:
            sink.send([a_file(picture, what, key, name)], again=False)
        except SinkError:
            pass  # refused: not an image, no table
    sink.close("completed", "")


@stays_inside(NAMES, NAMES, NAMES)
def clearml(inside: Path, picture: Path, *names: str) -> None:
    export(ClearmlExport(ClearmlConfig(), inside / "c", inside / "final"), picture, *names)


@stays_inside(NAMES, NAMES, NAMES)
def hub(inside: Path, picture: Path, *names: str) -> None:
    config = HubConfig(mode="offline", project="team/x")
    export(HubExport(config, inside / "h"), picture, *names)


def as_they_come(patch: Any) -> None:
    for module in (clearml_events, clearml_export.wire):
        patch.setattr(module, "path_part", lambda name: name)


def by_name(patch: Any) -> None:
    real = Recorder._keep

    def keep(self: Any, file: Path) -> str:
        (self._folder / NASTY[0]).write_bytes(b"")
        return real(self, file)

    patch.setattr(Recorder, "_keep", keep)


ANY_HASH: Remove = without(media, "_SHA256", re.compile(r"[^\0]*", re.DOTALL))
THREAT = "path traversal"

ROWS = [
    Row(THREAT, "runs", runs, without(hello, "valid_run_id", lambda _: True)),
    Row(THREAT, "files", files, ANY_HASH),
    Row(THREAT, "exports for ClearML", clearml, as_they_come),
    Row(THREAT, "exports for HUB", hub, by_name),
]
