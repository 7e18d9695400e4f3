"""What a stand-in server has, without what no two runs share: ids, times, machine metrics."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from tests.servers.clearml import ClearmlServer
from tests.servers.hub_legacy import HubLegacyServer
from tests.servers.neptune import NeptuneServer
from tests.servers.platform import PlatformServer

#: names that come from the machine, the process or its clock
_OF_THE_MACHINE = re.compile(r"(^|/|:)(system|monitoring)(/|:|$)|^sys/")

Record = dict[str, Any]


def _shared(found: Mapping[Any, Any]) -> dict[Any, Any]:
    return {
        key: value
        for key, value in found.items()
        if not _OF_THE_MACHINE.search("/".join(map(str, key)) if isinstance(key, tuple) else key)
    }


def of_clearml(server: ClearmlServer) -> Record:
    [task] = server.tasks
    images = Counter(
        (i["metric"], i["variant"], i["iter"], server.file_at(i["url"]))
        for i in server.images(task)
    )
    return {
        "scalars": _shared(server.scalars(task)),
        "lines": Counter(server.log_lines(task)),
        "params": server.params(task),
        "images": images,
        "plots": _shared(server.plots(task)),
        "artifacts": {k: server.file_at(a["uri"]) for k, a in server.artifacts(task).items()},
        "models": {k: server.file_at(m["uri"]) for k, m in server.output_models(task).items()},
        "status": server.tasks[task]["status"],
        "tags": sorted(t for t in server.tasks[task]["tags"] if "rankgate" not in t),
    }


def of_neptune(server: NeptuneServer) -> Record:
    [run] = server.runs

    def points(found: Mapping[str, list[tuple[int, Any, Any]]]) -> dict[str, Any]:
        return _shared({path: [(s, v) for s, v, _ in values] for path, values in found.items()})

    return {
        "series": points(server.series(run)),
        "strings": points(server.string_series(run)),
        "images": points(server.image_series(run)),
        "atoms": _shared(server.atoms(run)),
        "files": _shared(server.files(run)),
        "tags": server.tags(run),
    }


def of_platform(server: PlatformServer) -> Record:
    model = server.only()
    return {
        "epochs": {e: _shared(values) for e, values in server.epochs(model).items()},
        "console": Counter(server.console(model)),
        "checkpoints": server.checkpoints(model),
        "finals": (server.finals(model) or {}).get("metrics"),
        "arguments": server.models[model].train_args,
        "status": server.status(model),
    }


def of_legacy(server: HubLegacyServer) -> Record:
    model = server.only()
    return {
        "epochs": {e: _shared(values) for e, values in server.epochs(model).items()},
        "finals": [(one.type, one.body) for one in server.finals(model)],
        "status": server.status(model),
    }


READERS: dict[type[Any], Callable[[Any], Record]] = {
    ClearmlServer: of_clearml,
    NeptuneServer: of_neptune,
    PlatformServer: of_platform,
    HubLegacyServer: of_legacy,
}


def record(server: Any) -> Record:
    """All that a server was given for its one run."""
    with server.lock:
        return READERS[type(server)](server)
