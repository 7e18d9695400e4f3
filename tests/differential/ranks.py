"""A training of several ranks through one gateway to three backends at once.

`torchrun` starts the ranks, which meet over gloo; each notes for itself what its trainer had.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from gateway.journal.writer import Journal
from gateway.rules.gate import KINDS, Rule
from gateway.sinks.store import read_views
from rank_client.wire.disk import OsDisk
from rank_client.wire.records import Kind
from tests.flow.job import Job
from tests.integrations import dataset
from tests.integrations.environment import python_of

from .trainings import RUN, Case, access, environ

VERSION = "8.4.190"
BACKENDS = ("clearml", "neptune", "hub")
CONFIG = "[sinks.clearml]\n[sinks.neptune]\n[sinks.hub]\nprotocol = 'legacy'\n"
TRAINING_SECONDS = 400

Losses = dict[tuple[str, int], float]  #: (key, step) → value of train/*_loss
EVERY_RANK = Rule("every-rank", KINDS, "all")


class Ranks(Job):
    """Use as a context manager; `servers` holds what the three backends have accepted."""

    def __init__(self, folder: Path) -> None:
        self.work = folder / "work"
        self._stack = ExitStack()
        self.servers: dict[str, Any] = {}
        self._keys: dict[str, str] = {}  #: the gateway's alone: with them the originals log too
        for name in BACKENDS:
            case = Case(name, VERSION)
            self.servers[name] = self._stack.enter_context(case.server())
            self._keys |= access(case, self.servers[name])
        super().__init__(folder, **(environ(folder) | self._keys))
        dataset.write(self.work / "data")

    def __exit__(self, *raised: object) -> None:
        super().__exit__(*raised)
        self._stack.close()

    def let_every_rank_pass(self) -> None:
        """Begin the run's journal with a rule set of its own, before there is a gateway."""
        directory = self.data / "runs" / RUN / "journal"
        directory.parent.mkdir(parents=True, mode=0o700)
        journal = Journal(OsDisk(), str(directory), os.urandom(16))
        journal.append_map(Kind.RULES, time.time_ns(), {"rules": [EVERY_RANK.as_map()]})
        journal.commit()
        journal.mark()
        journal.close()

    def train(self, ranks: int) -> None:
        """Run to the end and until all is delivered. Raises AssertionError."""
        config = self.work / "gateway.toml"
        config.write_text(CONFIG)
        self.serve("--config", str(config))
        torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
        words = (*torchrun, "-m", "tests.integrations.train", str(self.work))
        keyless = ("env", *(f"--unset={name}" for name in self._keys))
        training = self.start(*keyless, str(python_of(VERSION)), *words, RANKGATE_RUN=RUN)
        _, err = training.communicate(timeout=TRAINING_SECONDS)
        assert training.returncode == 0, err
        code, out, err = self.cli("drain", "--config", str(config), "--seconds", "60")
        assert code == 0, (out, err, self.log())
        views = read_views(self.data / "runs" / RUN)
        assert {view.name: view.state for view in views} == dict.fromkeys(BACKENDS, "drained")
        assert not any(view.quarantined for view in views), views
        self.assert_accounted(RUN)

    # --- what there is ---------------------------------------------------------------------------

    def had(self, rank: int) -> Losses:
        """What a rank's trainer had, as it noted itself."""
        lines = (self.work / f"witness-{rank}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return {(k, r["step"]): v for r in rows for k, v in r.items() if k.startswith("train/")}

    def in_gateway(self, rank: int) -> Losses:
        return {
            (key, step): value
            for (_, found, key, step, value) in self.points(RUN)
            if found == rank and key.startswith("train/")
        }

    def in_clearml(self, rank: int) -> Losses:
        """Raises ValueError unless there is one task."""
        [task] = self.servers["clearml"].tasks
        end = f" (rank {rank})" if rank else ""
        scalars = self.servers["clearml"].scalars(task)
        return {
            (series.removesuffix(end), step): value
            for (title, series, step), value in scalars.items()
            if title == "train" and series.endswith(f"_loss{end}")
        }

    def in_neptune(self, rank: int) -> Losses:
        """Raises ValueError unless there is one run. Its steps are the epoch + 1."""
        [run] = self.servers["neptune"].runs
        start = f"ranks/{rank}/" if rank else ""
        return {
            (path.removeprefix(start), int(step) - 1): value
            for path, points in self.servers["neptune"].series(run).items()
            for step, value, _ in points
            if path.startswith(f"{start}train/")
        }

    def in_hub(self, rank: int) -> Losses:
        """Raises ValueError unless there is one model."""
        epochs = self.servers["hub"].epochs(self.servers["hub"].only())
        start = f"rank{rank}/" if rank else ""
        return {
            (key.removeprefix(start), epoch): value
            for epoch, values in epochs.items()
            for key, value in values.items()
            if key.startswith(f"{start}train/")
        }

    def in_backends(self, rank: int) -> dict[str, Losses]:
        return {
            "clearml": self.in_clearml(rank),
            "neptune": self.in_neptune(rank),
            "hub": self.in_hub(rank),
        }


def check(folder: Path, ranks: int, every_rank_passes: bool) -> int:
    """How many losses were compared, all equal. Raises AssertionError or ValueError."""
    with Ranks(folder) as job:
        if every_rank_passes:
            job.let_every_rank_pass()
        job.train(ranks)
        compared = 0
        for rank in range(ranks):
            had = job.had(rank)
            assert len(had) == 6, had  # three losses in each of two epochs
            assert job.in_gateway(rank) == had
            passes = rank == 0 or every_rank_passes
            expected = had if passes else {}
            assert job.in_backends(rank) == dict.fromkeys(BACKENDS, expected), f"rank {rank}"
            compared += len(had) * (1 + len(BACKENDS) * passes)
        return compared
