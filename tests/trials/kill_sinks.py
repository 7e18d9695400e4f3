"""Sinks killed while they deliver, many of them in the middle of a request.

Rounds of several runs at once deliver to stand-in servers. What counts is the servers' own record:
everything once, or told of as `maybe duplicate` where a backend cannot be asked (docs/sinks.md).

Run: python -m tests.trials.kill_sinks [--kills N] [--seed S] [--seconds MAX]
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gateway.series.db import open_reader
from gateway.series.reader import Reader
from gateway.sinks.store import SinkView, read_view
from tests.flow.job import Job
from tests.servers.base import StandIn
from tests.servers.clearml import ClearmlServer
from tests.servers.hub_legacy import HubLegacyServer
from tests.servers.neptune import NeptuneServer, token
from tests.servers.platform import PlatformServer

from . import sinks_rank, trial
from .sinks_rank import EPOCH_STEPS, FILE_STEPS, PARAM_STEPS, TEXT_STEPS

SINKS = ("clearml", "neptune", "hub")
RUNS, STEPS = 5, 400  #: of a round, and of each run
PAUSE_SECONDS = 0.2  #: of a rank, after each step
ROUND_KILLS = 50  #: the supervisor waits ever longer before it starts a sink again
PACE_SECONDS = 0.6
REQUEST_SECONDS = 2.0  #: until a sink has something to send
LATENCY_SECONDS = 0.04  #: of every answer, so that kills find requests on their way
FAULTY = {"clearml": "add_batch", "neptune": "operations", "hub": "."}  #: what goes wrong
FAULTS = ("apply_then_cut", "apply_then_cut", "cut", "status")


class Round:
    """Several runs, three sinks each, one gateway; the servers outlive all of it."""

    def __init__(
        self, folder: Path, rng: random.Random, protocol: str, runs: int, steps: int
    ) -> None:
        folder.mkdir()
        self.runs = [f"run-{letter}" for letter in "abcde"[:runs]]
        self.steps = steps
        self.protocol = protocol
        self.clearml, self.neptune = ClearmlServer(), NeptuneServer()
        self.hub = PlatformServer() if protocol == "platform" else HubLegacyServer()
        self.kills: Counter[str] = Counter()
        self.in_request = 0
        self._rng = rng
        config = folder / "gateway.toml"
        project = "project = 'team/digits'\n" if protocol == "platform" else ""
        config.write_text(
            "[gateway]\nmax_sink_processes = 16\n[sinks.clearml]\n[sinks.neptune]\n"
            f"[sinks.hub]\nprotocol = '{protocol}'\n{project}"
        )
        self.job = Job(
            folder,
            RANKGATE_CONFIG=str(config),
            **self.clearml.env,
            NEPTUNE_API_TOKEN=token(self.neptune.url),
            NEPTUNE_PROJECT="team/digits",
            OAUTHLIB_INSECURE_TRANSPORT="1",
            ULTRALYTICS_PLATFORM_URL=self.hub.url,
            ULTRALYTICS_HUB_API=self.hub.url,
            ULTRALYTICS_API_KEY=self.hub.key,
        )

    @property
    def servers(self) -> dict[str, StandIn]:
        return {"clearml": self.clearml, "neptune": self.neptune, "hub": self.hub}

    def play(self, kills: int, until: float) -> list[str]:
        """Run, kill, drain; what is broken then."""
        for server in self.servers.values():
            server.latency_seconds = LATENCY_SECONDS
        with self.clearml, self.neptune, self.hub, self.job:
            ranks = [self._rank(run) for run in self.runs]
            while sum(self.kills.values()) < kills and time.monotonic() < until:
                time.sleep(self._rng.expovariate(1 / PACE_SECONDS))
                self._strike()
            for server in self.servers.values():
                server.heal()
                server.latency_seconds = 0.0
            codes = [rank.wait(120) for rank in ranks]
            code, out, err = self.job.cli("drain", "--seconds", "240", seconds=300)
            broken = [] if not any((code, *codes)) else [f"drain: {code} {codes} {out}{err}"]
            self.job.stop_gateway(signal.SIGTERM)
            for run in self.runs if not broken else ():
                broken += self._read_back(run)
            return broken

    def _rank(self, run: str) -> subprocess.Popen[str]:
        place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        words = (str(self.job.truth_dir), str(self.steps), str(PAUSE_SECONDS))
        return self.job.start(
            sys.executable, str(Path(sinks_rank.__file__)), *words, RANKGATE_RUN=run, **place
        )

    # --- killing -------------------------------------------------------------

    def _strike(self) -> None:
        """Kill one sink; mostly while a request of its kind is on its way, that may go wrong."""
        found = [(pid, name) for pid in self.job.gateway_pids() if (name := _sink_of(pid))]
        if not found:
            return
        carefully = self._rng.random() < 0.8
        if carefully:  # not one that imports its package still
            found = [one for one in found if ports(one[0])]
            if not found:
                return
        pid, name = self._rng.choice(sorted(found))
        server = self.servers[name]
        if carefully:
            self._wait_for_request(pid, server)
            if self._rng.random() < 0.5:
                server.fail(FAULTY[name], mode=self._rng.choice(FAULTS), times=1)
                self._wait_for_request(pid, server)
            time.sleep(self._rng.uniform(0, LATENCY_SECONDS))
        with server.lock:
            caught = bool(server.answering & ports(pid))
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.kills[name] += 1
        self.in_request += caught

    @staticmethod
    def _wait_for_request(pid: int, server: StandIn) -> None:
        """Until the server has one of this process's, or it seems to have none."""
        deadline = time.monotonic() + REQUEST_SECONDS
        while time.monotonic() < deadline:
            if server.answering & ports(pid):
                return
            time.sleep(0.002)

    # --- reading back --------------------------------------------------------

    def _read_back(self, run: str) -> list[str]:
        run_dir = self.job.data / "runs" / run
        found = Findings(f"{run} ({self.protocol})")
        with Reader(run_dir) as reader:
            passed = sum(n for c, n in reader.about().counters.items() if c.startswith("passed "))
        for name in SINKS:
            path = run_dir / "sinks" / f"{name}.db"
            view = read_view(path)
            found.sums(view, passed)
            db = open_reader(path)
            found.same(f"{name}.db integrity", db.execute("PRAGMA integrity_check").fetchall(),
                       [("ok",)])  # fmt: skip
            db.close()
            getattr(self, f"_read_{name}")(run, view, found)
        return found.broken

    def _read_clearml(self, run: str, view: SinkView, found: Findings) -> None:
        tag = f"rankgate:{run}"
        tasks = [t for t, about in self.clearml.tasks.items() if tag in about["tags"]]
        found.same("clearml tasks", len(tasks), 1)
        task = tasks[0]
        scalars = self.clearml.scalars(task)
        for title, series, want in (
            ("train", "loss", {s: sinks_rank.loss(s) for s in range(self.steps)}),
            ("lr", "lr", {s: s for s in range(self.steps)}),
            (
                "val",
                "accuracy",
                {s: sinks_rank.accuracy(s // EPOCH_STEPS) for s in closers(self.steps)},
            ),
        ):
            have = {s: v for (t, n, s), v in scalars.items() if (t, n) == (title, series)}
            found.same(f"clearml {title}/{series}", have, want)
        lines = [str(line) for line in self.clearml.log_lines(task)]
        found.once("clearml lines", lines, texts(run, self.steps))
        params = self.clearml.params(task)["General"]
        found.same(
            "clearml params", params, {f"p{s}": str(s) for s in every(PARAM_STEPS, self.steps)}
        )
        names = {f"file-{s}.bin" for s in every(FILE_STEPS, self.steps)}
        found.same("clearml artifacts", set(self.clearml.artifacts(task)), names)
        found.same("clearml maybe duplicate", view.maybe_duplicate, 0)
        found.same("clearml skipped", (view.skipped, view.quarantined), ({}, 0))
        found.same("clearml status", self.clearml.tasks[task]["status"], "completed")

    def _read_neptune(self, run: str, view: SinkView, found: Findings) -> None:
        runs = [r.id for r in self.neptune.runs.values()]
        found.same("neptune runs", len(runs), len(self.runs))
        logs = {r: self.neptune.string_series(r).get("logs", []) for r in runs}
        [mine] = [r for r in runs if any(line.endswith(f" of {run}") for _, line, _ in logs[r])]
        series = self.neptune.series(mine)
        for path, want in (
            ("train/loss", [(s, sinks_rank.loss(s)) for s in range(self.steps)]),
            ("lr", [(s, s) for s in range(self.steps)]),
            (
                "val/accuracy",
                [(s, sinks_rank.accuracy(s // EPOCH_STEPS)) for s in closers(self.steps)],
            ),
        ):
            have = [(step, value) for step, value, _ in series.get(path, [])]
            found.same(f"neptune {path}", have, want)
        found.once("neptune lines", [line for _, line, _ in logs[mine]], texts(run, self.steps))
        atoms = self.neptune.atoms(mine)
        have = {p: v for p, v in atoms.items() if p.startswith("parameters/")}
        found.same(
            "neptune params", have, {f"parameters/p{s}": s for s in every(PARAM_STEPS, self.steps)}
        )
        files = set(self.neptune.files(mine))
        missing = {f"files/file-{s}.bin" for s in every(FILE_STEPS, self.steps)} - files
        found.same("neptune files", missing, set())
        found.same("neptune maybe duplicate", view.maybe_duplicate, 0)
        found.same("neptune skipped", (view.skipped, view.quarantined), ({}, 0))

    def _read_hub(self, run: str, view: SinkView, found: Findings) -> None:
        hub = self.hub
        doubted = 0
        models = [m for m in hub.models if self._is_of(hub.models[m], run)]
        doubted += len(models) - 1
        epochs: dict[int, Any] = {}
        for model in models:
            epochs.update(hub.epochs(model))
        want = {
            s // EPOCH_STEPS: (sinks_rank.loss(s), sinks_rank.accuracy(s // EPOCH_STEPS))
            for s in closers(self.steps)
        }
        have = {e: (v.get("train/loss"), v.get("val/accuracy")) for e, v in epochs.items()}
        found.same("hub epochs", have, want)
        saved = Counter(body for m in models for body in checkpoints(hub, m))
        found.same("hub checkpoints", set(saved), set(map(sinks_rank.file_bytes,
                   every(FILE_STEPS, self.steps))))  # fmt: skip
        doubted += sum(n > 1 for n in saved.values())
        lines: Counter[str] = Counter()
        if self.protocol == "platform":
            wanted = set(texts(run, self.steps))  # what ranks print is there too
            lines = Counter(line for m in models for line in hub.console(m) if line in wanted)
            found.same("hub lines", set(lines), wanted)
            doubted += sum(n > 1 for n in lines.values())
        if doubted > view.maybe_duplicate:
            twice = [line for line, n in lines.items() if n > 1]
            twice += [body[:20].decode() for body, n in saved.items() if n > 1]
            told = f"{len(models)} models, twice {twice[:5]}"
            found.say(f"hub tells of {view.maybe_duplicate} maybe twice, and has {told}")
        found.doubled += doubted
        found.same("hub quarantined", view.quarantined, 0)

    @staticmethod
    def _is_of(model: Any, run: str) -> bool:
        name = model.slug if hasattr(model, "slug") else str(model.meta.get("name"))
        return run in name


def _sink_of(pid: int) -> str:
    """The name of the sink that a process carries, or nothing."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return ""
    return next((name for name in SINKS if name in words and "sink" in words), "")


def ports(pid: int) -> set[int]:
    """This machine's ports of a process's connections."""
    try:
        names = {str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()}
    except OSError:
        return set()
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {int(row[1].split(":")[1], 16) for row in rows if f"socket:[{row[9]}]" in names}


class Findings:
    """What is wrong with one run, in sentences."""

    def __init__(self, run: str) -> None:
        self.broken: list[str] = []
        self.doubled = 0
        self._run = run

    def say(self, text: str) -> None:
        self.broken.append(f"{self._run}: {text}")

    def same(self, what: str, have: Any, want: Any) -> None:
        if have == want:
            return
        if isinstance(have, dict) and isinstance(want, dict):
            keys = sorted(k for k in have.keys() | want.keys() if have.get(k) != want.get(k))
            shown: Any = [(k, have.get(k), want.get(k)) for k in keys[:3]]
        else:
            shown = f"{str(have)[:200]} instead of {str(want)[:200]}"
        self.say(f"{what}: {shown}")

    def once(self, what: str, lines: list[str], want: Iterable[str]) -> None:
        have, wanted = Counter(lines), set(want)
        lost = sorted(wanted - have.keys())
        twice = sorted(line for line in wanted if have[line] > 1)
        if lost or twice:
            self.say(f"{what}: {len(lost)} lost {lost[:3]}, {len(twice)} twice {twice[:3]}")

    def sums(self, view: SinkView, passed: int) -> None:
        done = view.delivered + sum(view.skipped.values()) + view.quarantined
        if view.state != "drained" or done != passed:
            self.say(f"{view.name} is {view.state} with {done} of {passed} items: {view.reason}")


def every(each: int, steps: int) -> range:
    return range(0, steps, each)


def closers(steps: int) -> range:
    """The steps that close an epoch."""
    return range(EPOCH_STEPS - 1, steps, EPOCH_STEPS)


def texts(run: str, steps: int) -> list[str]:
    return [f"line {step} of {run}" for step in every(TEXT_STEPS, steps)]


def checkpoints(hub: Any, model: str) -> list[bytes]:
    found = hub.checkpoints(model)
    return [c[1] if isinstance(c, tuple) else c.body for c in found]


def attempt(
    folder: Path, seed: int, kills: int, seconds: float, runs: int = RUNS, steps: int = STEPS
) -> trial.Figures:
    """Rounds, of both HUB protocols in turn, until there were so many kills."""
    rng = random.Random(seed)
    until = time.monotonic() + seconds * 0.8
    totals: Counter[str] = Counter()
    broken: list[str] = []
    in_request = rounds = 0
    while totals.total() < kills and time.monotonic() < until and not broken:
        protocol = ("platform", "legacy")[rounds % 2]
        played = Round(folder / f"{rounds}", rng, protocol, runs, steps)
        broken += played.play(min(ROUND_KILLS, kills - totals.total()), until)
        totals.update(played.kills)
        in_request += played.in_request
        rounds += 1
    return {
        "kills": dict(sorted(totals.items())),
        "in_a_request": in_request,
        "rounds": rounds,
        "broken": broken,
    }


def main() -> int:
    parser = trial.parser(__doc__.split("\n")[0], 900.0)
    parser.add_argument("--kills", type=int, default=200)
    given = parser.parse_args()
    body = lambda f: attempt(f, given.seed, given.kills, given.seconds)  # noqa: E731
    return trial.run("kill_sinks", given.seed, body)


if __name__ == "__main__":
    sys.exit(main())
