"""What a stand-in server has accepted of one training, as plain facts: name → value.

A fact's name is its kind and what tells it apart, joined with ` | `. Bytes become the name of the
training's own file that holds them, or else their hash; measured durations become `measured`.
Not read is what depends on the moment: console lines, machine metrics, and the repository, which
the original's thread does not always find in time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.servers.base import StandIn
from tests.servers.clearml import ClearmlServer
from tests.servers.hub_legacy import HubLegacyServer
from tests.servers.neptune import NeptuneServer
from tests.servers.platform import PlatformServer

Record = dict[str, Any]
Fact = tuple[str, Any]

SINGLE_VALUE = -(2**31)  #: the iteration ClearML gives a value without one
MEASURED = ("speed_PyTorch(ms)", "Epoch Time", "speedMs")
#: of Platform's environment: each training has its own command, the original shortens what some
#: processors are called, and tells the repository that its package lies in as it is then
TOLD_BY_EACH = ("command", "cpu", "gitRepository", "gitBranch", "gitCommit")
#: said of a machine and a process, not of the training
SURROUNDINGS = ("monitoring/", "sys/", "source_code/", "source/", "rankgate/")


class Files:
    """The files a training left, by their bytes."""

    def __init__(self, save_dir: Path, folder: Path) -> None:
        self.folder = folder
        found = sorted(path for path in save_dir.rglob("*") if path.is_file())
        self._names = {_sha(path.read_bytes()): path.name for path in found}

    def name_of(self, body: bytes) -> str:
        sha = _sha(body)
        return self._names.get(sha, f"sha256:{sha[:12]}")

    def plain(self, value: Any) -> Any:
        """The same value for two trainings that ran in different folders."""
        return value.replace(str(self.folder), "FOLDER") if isinstance(value, str) else value


def _sha(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def read(server: StandIn, save_dir: Path, folder: Path) -> Record:
    """All facts of the one run the server has. Raises AssertionError when one comes twice."""
    files = Files(save_dir, folder)
    record: Record = {}
    with server.lock:
        for name, value in _facts(server, files):
            assert name not in record, f"{name} twice"
            timed = name.split(" | ")[1].endswith(MEASURED) and value
            record[name] = "measured" if timed else files.plain(value)
    return record


def _facts(server: StandIn, files: Files) -> Iterator[Fact]:
    if isinstance(server, ClearmlServer):
        return _clearml(server, files)
    if isinstance(server, NeptuneServer):
        return _neptune(server, files)
    if isinstance(server, HubLegacyServer):
        return _hub(server, files)
    assert isinstance(server, PlatformServer)
    return _platform(server, files)


def _clearml(server: ClearmlServer, files: Files) -> Iterator[Fact]:
    yield "runs | ", len(server.tasks)
    [(ident, task)] = server.tasks.items()
    yield "run | name", task["name"]
    yield "run | project", server.projects[task["project"]]["name"]
    yield "run | status", task["status"]
    for tag in task["tags"]:
        yield f"tag | {tag}", True
    for section, values in server.params(ident).items():
        for name, value in values.items():
            yield f"param | {section}/{name}", value
    for (title, series, step), value in server.scalars(ident).items():
        if title.startswith(":monitor:"):
            continue
        if step == SINGLE_VALUE:
            yield f"single value | {series}", value
        else:
            yield f"scalar | {title} | {series} | {step}", value
    yield from _clearml_pictures(server, ident, files)
    for name, model in server.output_models(ident).items():
        yield f"model | {name} | name", model["name"]
        yield f"model | {name} | framework", model.get("framework")
        yield f"model | {name} | file", files.name_of(server.file_at(model["uri"]))
    for name in server.artifacts(ident):
        yield f"artifact | {name}", True


def _clearml_pictures(server: ClearmlServer, task: str, files: Files) -> Iterator[Fact]:
    pictures: dict[str, list[str]] = {}
    for image in server.images(task):
        name = f"image | {image['metric']} | {image['variant']} | {image['iter']}"
        pictures.setdefault(name, []).append(files.name_of(server.file_at(image["url"])))
    for (title, series, step), plot in server.plots(task).items():
        found = [_bytes_of(server, one["source"]) for one in plot["layout"].get("images", ())]
        pictures[f"plot | {title} | {series} | {step}"] = [files.name_of(one) for one in found]
    for name, bodies in pictures.items():
        yield name, sorted(bodies)


def _bytes_of(server: ClearmlServer, source: str) -> bytes:
    return server.file_at(source.replace(" ", "%20"))


def _neptune(server: NeptuneServer, files: Files) -> Iterator[Fact]:
    yield "runs | ", len(server.runs)
    [ident] = server.runs
    yield "run | name", server.atoms(ident).get("sys/name")
    yield "run | failed", server.atoms(ident).get("sys/failed")
    for tag in sorted(server.tags(ident)):
        yield f"tag | {tag}", True
    for path, attribute in server.run(ident).attributes.items():
        if path.startswith(SURROUNDINGS):
            continue
        if attribute.type == "file":
            yield f"file | {path}", files.name_of(attribute.value)
        elif attribute.type == "floatSeries":
            for step, value, _ in attribute.points:
                yield f"scalar | {path} | {step:g}", value
        elif attribute.type == "imageSeries":
            yield f"images | {path}", len(attribute.points)
        elif attribute.type != "stringSeries":
            yield f"atom | {path}", attribute.value
    for path, _ in server.refused:
        yield f"refused | {path}", True


def _hub(server: HubLegacyServer, files: Files) -> Iterator[Fact]:
    yield "runs | ", len(server.models)
    model = server.models[server.only()]
    yield "run | status", model.status
    for part in ("config", "dataset", "lineage", "meta"):
        for name, value in getattr(model, part).items():
            yield f"model | {part}/{name}", files.plain(json.dumps(value, sort_keys=True))
    for epoch, values in model.metrics.items():
        for key, value in values.items():
            yield f"scalar | {key} | {epoch}", value
    for one in model.checkpoints:
        name = f"checkpoint | {one.type} | {one.epoch}"
        yield name, (files.name_of(one.body), one.is_best, one.map)


def _platform(server: PlatformServer, files: Files) -> Iterator[Fact]:
    yield "runs | ", len(server.models)
    model = server.models[server.only()]
    yield "run | name", f"{model.project}/{model.slug}"
    yield "run | status", model.status
    for name, value in model.train_args.items():
        yield f"param | {name}", value
    yield "run | completes", model.completes
    for name in ("epochs", "device"):
        yield f"run | {name}", model.start.get(name)
    for name, value in model.start.get("environment", {}).items():
        if name != "gitCommitMessage":  # the original finds one while no `git gc` has packed it
            yield f"environment | {name}", name in TOLD_BY_EACH or value
    for epoch, data in model.events.items():
        for key, value in data["metrics"].items():
            yield f"scalar | {key} | {epoch}", value
        for key in ("fitness", "best_fitness"):
            yield f"epoch | {key} | {epoch}", data.get(key)
        for key, value in data.get("modelInfo", {}).items():
            yield f"single value | {key} | {epoch}", value
    for name, body in model.checkpoints:
        yield f"checkpoint | {name}", files.name_of(body)
    yield from _platform_results(model.complete)


def _platform_results(complete: dict[str, Any]) -> Iterator[Fact]:
    results = complete.get("results", {})
    for key, value in results.get("metrics", {}).items():
        yield f"result | {key}", value
    for key in ("bestEpoch", "bestFitness", "validation", "modelSize"):
        yield f"result | {key}", results.get(key)
    yield "result | classNames", complete.get("classNames")
    for plot in complete.get("plots") or ():
        yield f"plot | {plot['type']}", json.dumps(plot, sort_keys=True)
