"""Trainings against a stand-in server: by Ultralytics' own callbacks, or through a gateway."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.sinks.store import read_views
from tests.flow.job import Job
from tests.integrations.environment import python_of, training_environ
from tests.servers import hub_legacy, platform
from tests.servers.base import StandIn
from tests.servers.clearml import ClearmlServer
from tests.servers.hub_legacy import HubLegacyServer
from tests.servers.neptune import NeptuneServer, token
from tests.servers.platform import PlatformServer

from . import dataset

PROJECT, NAME, RUN = "team/digits", "exp", "r1"
CONFIG = {
    "clearml": "[sinks.clearml]\n",
    "neptune": "[sinks.neptune]\n",
    "hub": "[sinks.hub]\nprotocol = 'legacy'\n",
    "platform": f"[sinks.hub]\nproject = '{PROJECT}'\n",
}
SCRIPT = Path(__file__).with_name("train.py")
TRAINING_SECONDS = 400  #: a training takes about 15 on a free core
EPOCHS = 3
#: the original sends an epoch only 3 s after the last; slower epochs show all it would ever send
HUB_PAUSE_SECONDS = 3.2


@dataclass(frozen=True)
class Case:
    """One backend and one version of Ultralytics that speaks to it by itself."""

    sink: str  #: clearml | neptune | hub | platform
    version: str

    def server(self) -> StandIn:
        if self.sink == "neptune":
            return NeptuneServer(projects=(PROJECT,))
        kinds = {"clearml": ClearmlServer, "hub": HubLegacyServer, "platform": PlatformServer}
        server = kinds[self.sink]()
        # Task.init forks: parent and child read each other's answers from one connection, and
        # what was refused by mistake is dropped
        server.keep_alive = self.sink != "clearml"
        return server


CASES = (
    Case("clearml", "8.4.190"),
    Case("clearml", "8.2.50"),
    Case("neptune", "8.2.50"),
    Case("hub", "8.2.50"),
    Case("platform", "8.4.190"),
)


def access(case: Case, server: StandIn) -> dict[str, str]:
    """The variables by which a vendor's own client, or our sink, finds the server."""
    if isinstance(server, ClearmlServer):
        return server.env
    if case.sink == "neptune":
        return {
            "NEPTUNE_API_TOKEN": token(server.url),
            "NEPTUNE_PROJECT": PROJECT,
            "OAUTHLIB_INSECURE_TRANSPORT": "1",
        }
    if case.sink == "hub":
        return {"ULTRALYTICS_HUB_API": server.url, "HUB_API_KEY": hub_legacy.KEY}
    return {"ULTRALYTICS_PLATFORM_URL": server.url, "ULTRALYTICS_API_KEY": platform.KEY}


def environ(folder: Path) -> dict[str, str]:
    """A training's: nothing of ours, a home and settings of its own."""
    home = folder / "home"
    home.mkdir(parents=True, exist_ok=True)
    kept = training_environ(dict(os.environ), folder / "settings")
    strange = ("CLEARML_", "TRAINS_", "NEPTUNE_", "HUB_", "ULTRALYTICS_", "RANKGATE_")
    kept = {name: value for name, value in kept.items() if not name.startswith(strange)}
    return {**kept, "HOME": str(home)}


def train(
    case: Case, how: str, folder: Path, settings: dict[str, Any], variables: dict[str, str]
) -> Path:
    """Run one training in `folder` to its end; its save_dir. Raises AssertionError."""
    data = dataset.write(folder / "data")
    pause = HUB_PAUSE_SECONDS if case.sink == "hub" else 0
    order = {"how": how, "settings": settings, "data": str(data), "epochs": EPOCHS, "pause": pause}
    words = (str(python_of(case.version)), str(SCRIPT), json.dumps(order))
    log = folder / "train.log"
    with log.open("wb") as out:
        done = subprocess.run(
            words,
            cwd=folder,
            env={**environ(folder), **variables},
            stdout=out,
            stderr=subprocess.STDOUT,
            timeout=TRAINING_SECONDS,
            check=False,
        )
    assert done.returncode == 0, log.read_text(errors="replace")[-4000:]
    [save_dir] = (path.parent for path in folder.glob(f"**/{NAME}/results.csv"))
    return save_dir


def original(case: Case, server: StandIn, folder: Path) -> Path:
    """Train with Ultralytics' own callbacks and the vendor's own package; its save_dir."""
    settings: dict[str, Any] = {case.sink: True}
    if case.sink == "hub":
        settings["api_key"] = hub_legacy.KEY
    return train(case, "original", folder, settings, access(case, server))


def through_gateway(case: Case, server: StandIn, folder: Path) -> Path:
    """Train with rankgate alone, a gateway carries it to the server; the training's save_dir.

    Returns when the sink has delivered all. Raises AssertionError, also when items are missing
    from the sink's account or went to its quarantine.
    """
    (folder / "job").mkdir(parents=True)
    config = folder / "gateway.toml"
    config.write_text(CONFIG[case.sink])
    with Job(folder / "job", **{**environ(folder), **access(case, server)}) as job:
        job.serve("--config", str(config))
        variables = {"RANKGATE_DIR": str(job.data), "RANKGATE_SPOOL": str(job.spool)}
        save_dir = train(case, "rankgate", folder, {}, {**variables, "RANKGATE_RUN": RUN})
        code, out, err = job.cli("drain", "--config", str(config), "--seconds", "60")
        assert code == 0, (out, err, job.log())
        [view] = read_views(job.data / "runs" / RUN)
        assert (view.state, view.quarantined) == ("drained", 0), (view, job.log())
        job.assert_accounted(RUN)
    return save_dir
