"""Every sink with its backend, as the contract suite sees them: one run to deliver, and what the
backend's own record says of it afterwards.

The real packages and our real HTTP code against the stand-in servers; the example of a third party
and the in-memory twin against a folder and a list.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np

from gateway.sinks import registry
from gateway.sinks.base import Media, Rows, Sink, SinkConfig, SinkKind, Text
from gateway.sinks.clearml import ClearmlConfig
from gateway.sinks.hub import legacy, platform
from gateway.sinks.hub.config import HubConfig
from gateway.sinks.hub.pace import Pace
from gateway.sinks.memory import MemorySink
from gateway.sinks.neptune import NeptuneConfig, NeptuneSink
from gateway.sinks.neptune_run import Package
from tests.build import RunBuilder
from tests.flow.job import ROOT
from tests.servers.base import StandIn
from tests.servers.clearml import ClearmlServer
from tests.servers.hub_legacy import HubLegacyServer
from tests.servers.neptune import NeptuneServer, token
from tests.servers.platform import KEY, PlatformServer

RUN = "run-1"
FASTER = 100  #: waits inside a package or a pace, by so much
STEPS, EPOCH_STEPS, TEXT_STEPS = 20, 5, 4
WEIGHTS = b"weights" * 1000
NOTES = b"notes\n" * 100


def loss(step: int) -> float:
    return (step + 1) / 4


def accuracy(epoch: int) -> float:
    return epoch / 8


LOSSES = {step: loss(step) for step in range(STEPS)}
ACCURACIES = {s: accuracy(s // EPOCH_STEPS) for s in range(EPOCH_STEPS - 1, STEPS, EPOCH_STEPS)}
LINES = [f"line {step}" for step in range(0, STEPS, TEXT_STEPS)]


def build_run(root: Path, steps: int = STEPS) -> Path:
    """One rank that logs a little of everything, each value following from its step."""
    made = RunBuilder(root, RUN, project="digits", name="first-run")
    rank = made.rank(0).params({"lr": 0.5, "model/name": "tiny"})
    for step in range(steps):
        rank.log({"train/loss": loss(step)}, step=step)
        if step % EPOCH_STEPS == EPOCH_STEPS - 1:
            epoch = step // EPOCH_STEPS
            rank.log({"epoch": epoch, "val/accuracy": accuracy(epoch)}, step=step)
        if step % TEXT_STEPS == 0:
            rank.text(f"line {step}")
        rank.flush()  # many short entries: a delivery takes several batches
    rank.media("notes.txt", NOTES, step=steps - 1)
    rank.media("best.pt", WEIGHTS, what="checkpoint", step=steps - 1, meta={"best": True})
    rank.summary({"best": 0.5}).end()
    return made.close()


@dataclass
class Record:
    """What a backend has: how many times each thing."""

    points: Counter[tuple[str, int, float]] = field(default_factory=Counter)
    lines: Counter[str] = field(default_factory=Counter)
    params: Counter[tuple[str, str]] = field(default_factory=Counter)
    files: Counter[bytes] = field(default_factory=Counter)
    state: str = ""
    runs: int = 1

    def lost(self, want: Record) -> list[str]:
        """What of `want` is not here, in a few words each."""
        found = [f"{k} {v} instead of {w}" for k, v, w in (("state", self.state, want.state),)
                 if v != w]  # fmt: skip
        for name in ("points", "lines", "params", "files"):
            missing = getattr(want, name) - getattr(self, name)
            found += [f"{name}: {str(one)[:60]}" for one in missing]
        return found

    def doubled(self, want: Record) -> list[str]:
        """What is here more often than it was logged."""
        found = ["a run"] * (self.runs - want.runs)
        for name in ("points", "lines", "params", "files"):
            over = getattr(self, name) - getattr(want, name)
            found += [f"{name}: {str(one)[:60]}" for one in over.elements()]
        return found


class Backend:
    """`name` tells it apart in the suite, `kind` is the sink's name in a config. `writes` matches
    the paths of requests that bring items, `uploads` those that bring files."""

    name = kind = ""
    writes = uploads = ""
    server: Any = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scratch = folder / "runs" / RUN / "sinks" / f"{self.kind}.scratch"

    @property
    def config(self) -> SinkConfig:
        raise NotImplementedError

    @property
    def environment(self) -> dict[str, str]:
        """What the sink's process finds in its environment."""
        return {}

    @contextmanager
    def compressed(self) -> Iterator[None]:
        """Waits inside a vendor's package take a moment only."""
        yield

    def expire_token(self) -> None:
        """The server forgets what it gave out or accepted until now."""

    def renew_token(self) -> None:
        """Whatever people have to do about it is done."""

    def sink(self) -> Sink:
        """Another life of the sink."""
        if not self.scratch.exists():  # a fault may have put a file in its place
            self.scratch.mkdir(parents=True)
        return registry.online(self.kind, self.config, self.scratch)

    def export_sink(self) -> Sink:
        """The sink that writes an export, into an empty folder."""
        folder = self.folder / "exports"
        folder.mkdir(exist_ok=True)
        return registry.export(self.kind, self.config, folder, folder)

    def let_go(self, sink: Sink) -> None:
        """What the end of its process would do to a sink that was not closed."""

    def want(self) -> Record:
        """The sample run, as this backend should have it."""
        raise NotImplementedError

    def have(self) -> Record:
        raise NotImplementedError


def everything(state: str = "completed") -> Record:
    points = [("train/loss", step, value) for step, value in LOSSES.items()]
    points += [("val/accuracy", step, value) for step, value in ACCURACIES.items()]
    return Record(Counter(points), Counter(LINES), state=state, files=Counter((NOTES, WEIGHTS)))


class Twin(Backend):
    """The sink of tests, in memory."""

    name = kind = "memory"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._sink = MemorySink()

    def sink(self) -> Sink:
        return self._sink

    def want(self) -> Record:
        return everything()

    def have(self) -> Record:
        found = Record(state=self._sink.closed[-1][0] if self._sink.closed else "")
        for item in self._sink.received:
            if isinstance(item, Rows):
                found.points.update(points(item))
            elif isinstance(item, Text):
                found.lines[item.text] += 1
            elif isinstance(item, Media):
                found.files[item.path.read_bytes()] += 1
        return found


def points(rows: Rows) -> Iterator[tuple[str, int, float]]:
    for key in rows.columns.keys() - {"epoch"}:
        values = rows.columns[key].astype(np.float64).tolist()
        for step, value in zip(rows.step.tolist(), values, strict=True):
            yield key, step, value


class Jsonl(Backend):
    """The example of docs/sinks.md."""

    name = kind = "jsonl"

    @property
    def config(self) -> SinkConfig:
        return self._module().JsonlConfig(folder=str(self.folder / "lines"))

    @staticmethod
    def _module() -> Any:
        source = str(ROOT / "examples/jsonl_sink")
        if source not in sys.path:
            sys.path.append(source)
        import rankgate_jsonl

        return rankgate_jsonl

    def sink(self) -> Sink:
        kind: SinkKind = self._module().KIND
        return kind.online(self.config, self.scratch)

    def export_sink(self) -> Sink:
        return self.sink()

    def want(self) -> Record:
        return everything()

    def have(self) -> Record:
        found = Record()
        folder = self.folder / "lines"
        for text in (folder / f"{RUN}.jsonl").read_text().splitlines():
            line = json.loads(text)
            if line["kind"] == "row":
                values = line["values"].items()
                found.points.update((k, line["step"], v) for k, v in values if k != "epoch")
            elif line["kind"] == "text":
                found.lines[line["text"]] += 1
            elif line["kind"] == "file":
                found.files[(folder / "files" / line["sha256"]).read_bytes()] += 1
            elif line["kind"] == "end":
                found.state = line["state"]
        return found


class Clearml(Backend):
    name = kind = "clearml"
    writes = r"events\.add_batch"
    uploads = r"^/(files/)?$"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.server: ClearmlServer = ClearmlServer()

    @property
    def config(self) -> SinkConfig:
        return ClearmlConfig()

    @property
    def environment(self) -> dict[str, str]:
        conf = self.folder / "empty.conf"
        conf.write_text("{}")
        own = {"CLEARML_CONFIG_FILE": str(conf), "CLEARML_CACHE_DIR": str(self.folder / "cache")}
        return {**self.server.env, **own}

    def expire_token(self) -> None:
        with self.server.lock:
            self.server.tokens.clear()

    def want(self) -> Record:
        found = everything()
        found.params = Counter({("lr", "0.5"): 1, ("model/name", "tiny"): 1})
        return found

    def have(self) -> Record:
        server = self.server
        found = Record(runs=len(server.tasks))
        for task, about in server.tasks.items():
            found.state = about["status"]
            for (title, series, step), value in server.scalars(task).items():
                if f"{title}/{series}" in ("train/loss", "val/accuracy"):
                    found.points[f"{title}/{series}", step, value] += 1
            found.lines.update(server.log_lines(task))
            found.params.update(server.params(task).get("General", {}).items())
            for artifact in server.artifacts(task).values():
                found.files[server.file_at(artifact["uri"])] += 1
            for model in server.output_models(task).values():
                found.files[server.file_at(model["uri"])] += 1
        found.params = Counter({p: n for p, n in found.params.items() if p in self.want().params})
        return found


class Neptune(Backend):
    name = kind = "neptune"
    writes = r"/attributes/operations$"
    uploads = r"/storage/file/upload"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.server: NeptuneServer = NeptuneServer()

    @property
    def config(self) -> SinkConfig:
        return NeptuneConfig()

    @property
    def environment(self) -> dict[str, str]:
        return {
            "NEPTUNE_API_TOKEN": token(self.server.url),
            "NEPTUNE_PROJECT": "team/digits",
            "OAUTHLIB_INSECURE_TRANSPORT": "1",
        }

    @contextmanager
    def compressed(self) -> Iterator[None]:
        Package.load("neptune")  # in its own way: its dependencies warn when imported
        Package.load("neptune")
        from neptune.common.backends import utils

        clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda s: time.sleep(s / FASTER))
        with patch.object(utils, "time", clock), patch.object(utils, "retries_timeout", 0.005):
            yield

    def expire_token(self) -> None:
        self.server.revoke()

    def let_go(self, sink: Sink) -> None:
        if isinstance(sink, NeptuneSink):
            sink._drop()

    def want(self) -> Record:
        found = everything()
        found.params = Counter({("lr", "0.5"): 1, ("model/name", "tiny"): 1})
        return found

    def have(self) -> Record:
        runs = list(self.server.runs.values())
        found = Record(runs=len(runs))
        for run in runs:
            for path, series in self.server.series(run.id).items():
                if path in ("train/loss", "val/accuracy"):
                    found.points.update((path, int(step), value) for step, value, _ in series)
            for series in self.server.string_series(run.id).values():
                found.lines.update(line for _, line, _ in series if line in LINES)
            atoms = self.server.atoms(run.id)
            for path, value in atoms.items():
                if path.startswith("parameters/"):
                    found.params[path.removeprefix("parameters/"), str(value)] += 1
            found.state = str(atoms.get("rankgate/state"))
            files = self.server.files(run.id)
            found.files.update(
                b for p, b in files.items() if p.startswith(("files", "checkpoints"))
            )
        return found


class Hub(Backend):
    """What both protocols keep of the sample run: the last values of each epoch, checkpoints."""

    kind = "hub"

    _key = ""

    @contextmanager
    def compressed(self) -> Iterator[None]:
        began = time.time()
        pace = partial(
            Pace,
            clock=lambda: began + (time.time() - began) * FASTER,
            sleep=lambda seconds: time.sleep(seconds / FASTER),
        )
        with patch.object(legacy, "Pace", pace), patch.object(platform, "Pace", pace):
            yield

    def expire_token(self) -> None:
        self._key, self.server.key = self.server.key, "another"

    def renew_token(self) -> None:
        self.server.key = self._key

    def want(self) -> Record:
        closed = [EPOCH_STEPS * (e + 1) - 1 for e in range(STEPS // EPOCH_STEPS)]
        found = Record(files=Counter([WEIGHTS]))
        for epoch, step in enumerate(closed):
            found.points["train/loss", epoch, loss(step)] = 1
            found.points["val/accuracy", epoch, accuracy(epoch)] = 1
        return found

    def _epochs(self, model: str) -> Iterator[tuple[str, int, float]]:
        for epoch, values in self.server.epochs(model).items():
            for key in ("train/loss", "val/accuracy"):
                if values.get(key) is not None:
                    yield key, epoch, values[key]


class Platform(Hub):
    name = "platform"
    writes = r"/training/metrics$"
    uploads = r"^/storage/"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.server: PlatformServer = PlatformServer()

    @property
    def config(self) -> SinkConfig:
        return HubConfig(project="team/digits")

    @property
    def environment(self) -> dict[str, str]:
        return {"ULTRALYTICS_API_KEY": KEY, "ULTRALYTICS_PLATFORM_URL": self.server.url}

    def want(self) -> Record:
        found = super().want()
        found.lines, found.state = Counter(LINES), "completed"
        return found

    def have(self) -> Record:
        found = Record(runs=len(self.server.models))
        for model in self.server.models:
            found.points.update(self._epochs(model))
            found.lines.update(line for line in self.server.console(model) if line in LINES)
            found.files.update(body for _, body in self.server.checkpoints(model))
            found.state = self.server.status(model)
        return found


class Legacy(Hub):
    name = "legacy"
    writes = r"^/v1/models"
    uploads = r"/upload$"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.server: HubLegacyServer = HubLegacyServer()

    @property
    def config(self) -> SinkConfig:
        return HubConfig(protocol="legacy")

    @property
    def environment(self) -> dict[str, str]:
        return {"HUB_API_KEY": self.server.key, "ULTRALYTICS_HUB_API": self.server.url}

    def want(self) -> Record:
        found = super().want()
        found.state = "training"  # only a final checkpoint makes a model `trained`
        return found

    def have(self) -> Record:
        found = Record(runs=len(self.server.models))
        for model in self.server.models:
            found.points.update(self._epochs(model))
            found.files.update(one.body for one in self.server.checkpoints(model))
            found.state = self.server.status(model)
        return found


BACKENDS: tuple[type[Backend], ...] = (Twin, Jsonl, Clearml, Neptune, Platform, Legacy)
SERVED: tuple[type[Backend], ...] = (Clearml, Neptune, Platform, Legacy)


@contextmanager
def standing(made: type[Backend], folder: Path) -> Iterator[Backend]:
    """The backend, up and in this process's environment."""
    folder.mkdir(exist_ok=True)
    backend = made(folder)
    with ExitStack() as stack:
        if isinstance(backend.server, StandIn):
            stack.enter_context(backend.server)
        stack.enter_context(patch.dict("os.environ", backend.environment))
        stack.enter_context(backend.compressed())
        yield backend
