"""Real trainings of Ultralytics, and what of each rank is in the series afterwards.

`make test` runs the newest version; `make ultralytics` all of them (`environment.VERSIONS`).
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.series.tables import MediaRow
from tests.flow.job import Job, wait_until
from tests.integrations import dataset
from tests.integrations.environment import VERSIONS, python_of, training_environ
from tests.integrations.train import settings

CHOSEN = os.environ.get("ULTRALYTICS_VERSIONS", VERSIONS[-1]).split()
TRAIN = ("-m", "tests.integrations.train")
#: from this version on its own DDP brings the callbacks of `attach` to the workers
PICKLES = (8, 4, 140)

_PLOTS = {f"Curves/{name}_curve" for name in ("pr", "f1", "precision", "recall")}
_PLOTS |= {"Results/confusion_matrix", "Results/average_precision"}
#: what a version tells of its plots in numbers
TABLES: dict[str, set[str]] = {
    "8.2.50": set(),
    "8.3.253": _PLOTS,
    "8.4.190": _PLOTS | {"Results/images"},
}


def unplotted(version: str) -> dict[str, int]:
    """What a training without plots leaves."""
    return dict.fromkeys({"last.pt", "best.pt", *(TABLES[version] - _PLOTS)}, 1)


pytestmark = [pytest.mark.torch, pytest.mark.timeout(600)]


class Trainings(Job):
    """Trainings of one version of Ultralytics in `work`; their first run is `r1`."""

    def __init__(self, tmp_path: Path, version: str) -> None:
        super().__init__(tmp_path, RANKGATE_RUN="r1")
        self.version = version
        self.work = tmp_path / "work"
        self.python = str(python_of(version))
        self.environ = training_environ(self.environ, tmp_path / "yolo")
        dataset.write(self.work / "data")

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.terminate()  # torchrun ends its workers only when it is asked to end
                process.wait(60)
        super().__exit__(*error)

    def train(self, *options: str, ranks: int = 0, **environ: str) -> tuple[int, str]:
        """(exit code, stderr) of `train.py`, by torchrun for several ranks."""
        torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
        words = (*(torchrun if ranks else ()), *TRAIN, str(self.work), *options)
        process = self.start(self.python, *words, **environ)
        _, err = process.communicate(timeout=240)
        return process.returncode, err

    def witnessed(self, rank: int) -> Counter[tuple[int, str, int, float]]:
        """(rank, key, step, value) of what a rank's trainer had."""
        lines = (self.work / f"witness-{rank}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return Counter(
            (rank, k, row["step"], v) for row in rows for k, v in row.items() if k != "step"
        )

    def trained(self, run: str = "r1") -> Counter[tuple[int, str, int, float]]:
        """The same of what is in the series."""
        found: Counter[tuple[int, str, int, float]] = Counter()
        for (_, rank, key, step, value), n in self.points(run).items():
            if key.startswith(("train/", "lr/")):
                found[rank, key, step, value] += n
        return found

    def media(self, run: str = "r1") -> list[MediaRow]:
        with self.reader(run) as reader:
            return reader.media()

    def left(self) -> Counter[str]:
        """What there is of weights by their names and of tables by their keys, and how often."""
        return Counter(m.key if m.what == "table" else m.name for m in self.media())

    def maps(self, kind: str, run: str = "r1") -> dict[str, Any]:
        """All that was logged of `params` or `summary`, by any rank."""
        with self.reader(run) as reader:
            return {key: value for *_, values in reader.maps(kind) for key, value in values.items()}

    def state(self, run: str = "r1") -> tuple[str, str]:
        with self.reader(run) as reader:
            about = reader.about()
            return about.state, about.reason


@pytest.fixture(scope="module", params=CHOSEN)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def job(tmp_path: Path, version: str) -> Iterator[Trainings]:
    with Trainings(tmp_path, version) as trainings:
        yield trainings


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, version: str) -> Iterator[Trainings]:
    """A training of two epochs with plots, in one process, delivered and over."""
    with Trainings(tmp_path_factory.mktemp("one"), version) as trainings:
        code, err = trainings.train("--plots", RANKGATE_CAPTURE_SOURCE="1")
        assert code == 0, err
        trainings.drain()
        yield trainings


# --- one process ----------------------------------------------------------------------------------


def test_each_value_of_each_epoch_arrives_once_as_in_results_csv(one: Trainings) -> None:
    """Losses, rates, results of the validation: those of the trainer's own table, nothing twice."""
    with (one.work / "runs" / "exp" / "results.csv").open() as file:
        table = [{k.strip(): v for k, v in row.items()} for row in csv.DictReader(file)]
    points = {(key, step): value for (_, _, key, step, value) in one.points()}
    assert set(one.points().values()) == {1}
    expected = {
        (key, int(row["epoch"]) - 1): float(value)
        for row in table
        for key, value in row.items()
        if key not in ("epoch", "time")
    }
    assert len(expected) == 2 * 13
    for place, value in expected.items():
        assert points[place] == pytest.approx(value, rel=1e-4, abs=1e-5), place
    others = {key for key, _ in points.keys() - expected.keys() if not key.startswith("system/")}
    assert others == {"epoch", "fitness", "time/epoch_seconds"}
    one.assert_accounted()


def test_the_first_rank_is_witnessed_exactly(one: Trainings) -> None:
    """Values are the trainer's to the last bit, and attaching twice is attaching once."""
    assert one.trained() == one.witnessed(-1)


def test_the_trainers_arguments_arrive(one: Trainings) -> None:
    """Every argument is a parameter; the run is named by them and says where it comes from."""
    written = (one.work / "runs" / "exp" / "args.yaml").read_text().splitlines()
    names = {line.partition(":")[0] for line in written if line[:1].isalpha()}
    params = one.maps("params")
    assert names <= {key.partition("/")[0] for key in params}
    assert params["epochs"] == 2 and params["imgsz"] == 64 and params["time"] is None
    assert params["source/ultralytics"] == one.version and params["source/environment"]
    [stream] = one.streams()
    assert stream.hello["source"] == "ultralytics"
    assert stream.hello["name"] == "exp"
    assert one.state() == ("completed", "")


def test_pictures_plots_and_weights_arrive(one: Trainings) -> None:
    """Each file that the training left, once per drawing; the result's bytes are the file's."""
    folder = one.work / "runs" / "exp"
    there = {path.stem for path in folder.iterdir() if path.suffix in (".png", ".jpg")}
    media = [m for m in one.media() if m.what in ("image", "figure")]
    assert {m.key.partition("/")[2] for m in media} == there
    assert all(m.lost is None and m.sha256 for m in media)
    groups = Counter(m.key.partition("/")[0] for m in media)
    assert groups["Mosaic"] == 3 and groups["Validation"] >= 2
    assert {m.key for m in media} >= {"Plots/results", "Plots/confusion_matrix", "Plots/labels"}
    assert {m.key for m in one.media() if m.what == "table"} == TABLES[one.version]
    weights = {m.name: m for m in one.media() if m.what == "checkpoint"}
    for name in ("last.pt", "best.pt"):
        data = (folder / "weights" / name).read_bytes()
        assert weights[name].sha256 == hashlib.sha256(data).hexdigest()
        assert weights[name].meta["final"] is (name == "best.pt")


def test_the_final_evaluation_is_a_record_of_its_own(one: Trainings) -> None:
    """The results of the best weights are a summary; no epoch's values are replaced by them."""
    summary = one.maps("summary")
    assert summary["model/parameters"] > 1_000_000
    assert {"model/GFLOPs", "model/speed_PyTorch(ms)", "final/fitness"} <= summary.keys()
    assert {"final/metrics/mAP50(B)", "final/metrics/mAP50-95(B)"} <= summary.keys()
    assert json.loads(summary["model/names"]) == ["square"]
    steps = {step for (_, _, key, step, _) in one.points() if key.startswith("metrics/")}
    assert steps == {0, 1}


# --- several ranks --------------------------------------------------------------------------------


def test_each_rank_of_torchrun_logs_its_own(job: Trainings) -> None:
    """Both ranks' own losses are in one run; what Ultralytics makes on one rank comes once."""
    code, err = job.train(ranks=2)
    assert code == 0, err
    job.drain()
    assert job.trained() == job.witnessed(0) + job.witnessed(1)
    assert job.witnessed(0) != job.witnessed(1)
    keys = {(rank, key) for (_, rank, key, _, _) in job.points()}
    assert {rank for rank, key in keys if key == "time/epoch_seconds"} == {0, 1}
    assert {rank for rank, key in keys if key.startswith("metrics/")} == {0}
    assert job.left() == unplotted(job.version)
    assert job.state() == ("completed", "")
    job.assert_accounted()


@pytest.mark.parametrize("way", ["attach", "hook", "class"])
def test_the_workers_of_its_own_ddp_log(job: Trainings, way: str) -> None:
    """The file that Ultralytics writes for its workers, run by torchrun: each way to be called
    there. `attach` needs that it pickles the callbacks; the others are for when it does not."""
    pickles = tuple(map(int, job.version.split("."))) >= PICKLES
    if pickles != (way == "attach"):
        pytest.skip(f"not the way for {job.version}")
    words = ("-m", "tests.integrations.parent", str(job.work), way)
    parent = job.start(job.python, *words, RANKGATE_MODE="disabled")
    out, err = parent.communicate(timeout=120)
    assert parent.returncode == 0, err
    file = out.split()[-1]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", file)
    if way == "hook":
        code, _, err = job.cli("run", "--ultralytics", "--", job.python, *torchrun, seconds=240)
    else:
        process = job.start(job.python, *torchrun)
        _, err = process.communicate(timeout=240)
        code = process.returncode
    assert code == 0, err
    job.drain()
    ranks = Counter(rank for rank, key, _, _ in job.trained() if key == "train/box_loss")
    assert ranks == {0: 1, 1: 1}
    sources = {stream.hello.get("source") for stream in job.streams() if stream.kind != "tool"}
    assert sources == {"ultralytics"}
    job.assert_accounted()


def test_asked_to_stop_both_ranks_end_together(job: Trainings) -> None:
    """A request to stop is kept at the end of an epoch, on all ranks, and nothing hangs."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    words = (*torchrun, *TRAIN, str(job.work), "--epochs", "200")
    process = job.start(job.python, *words)
    seen, run = job.work / "witness-1.jsonl", job.data / "runs" / "r1"
    wait_until(lambda: seen.exists() and (run / "live.json").exists(), 240, "an epoch has ended")
    requests = run / "requests"
    requests.mkdir(mode=0o700, exist_ok=True)
    (requests / ".stop").write_text("seen enough")
    (requests / ".stop").rename(requests / "stop")
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    job.drain()
    epochs = [sum(1 for _, k, _, _ in job.witnessed(r) if k == "lr/pg0") for r in (0, 1)]
    assert epochs[0] == epochs[1] < 200
    assert job.trained() == job.witnessed(0) + job.witnessed(1)
    assert job.state() == ("completed", "")
    job.assert_accounted()


# --- the command line, failures, several trainings ------------------------------------------------


def test_the_hook_logs_the_command_line(job: Trainings) -> None:
    """`rankgate run --ultralytics -- yolo train …` needs no change of anybody's code."""
    yolo = str(Path(job.python).with_name("yolo"))
    given = settings(job.work, epochs=1)
    words = [f"{key}={value}" for key, value in given.items()]
    code, _, err = job.cli(
        "run", "--ultralytics", "--", yolo, "train", "model=yolov8n.yaml", *words, seconds=240
    )
    assert code == 0, err
    job.drain()
    assert {step for _, _, step, _ in job.trained()} == {0}
    assert job.left() == unplotted(job.version)
    assert job.state() == ("completed", "")
    job.assert_accounted()


def test_a_training_that_fails_has_failed_until_it_is_resumed(job: Trainings) -> None:
    """A failure leaves the exception's text, all that was logged before it, and the weights of its
    last epoch; resumed, the run goes on where it was, and tells of its model."""
    code, _ = job.train("--fail-at", "1", "--epochs", "3", "--checkpoint-seconds", "0")
    assert code == 1
    job.drain()
    state, reason = job.state()
    assert state == "failed"
    assert "no more pictures" in reason
    assert job.trained() == job.witnessed(-1)
    assert {step for _, _, step, _ in job.trained()} == {0}
    data = (job.work / "runs" / "exp" / "weights" / "last.pt").read_bytes()
    [weights] = job.media()
    assert (weights.name, weights.step, weights.meta["final"]) == ("last.pt", 0, False)
    assert weights.sha256 == hashlib.sha256(data).hexdigest()

    code, err = job.train("--resume")
    assert code == 0, err
    job.drain()
    assert job.state() == ("completed", "")
    assert job.trained() == job.witnessed(-1)
    assert {step for _, _, step, _ in job.trained()} == {0, 1, 2}
    with job.reader() as reader:
        told = [s for s, _, _, values in reader.maps("summary") if "model/GFLOPs" in values]
    assert len(told) == len(set(told)) == 2
    job.assert_accounted()


def test_each_training_of_a_process_has_a_run_of_its_own(job: Trainings) -> None:
    """Two trainings one after the other do not mix."""
    code, err = job.train("--trainings", "2", "--epochs", "1")
    assert code == 0, err
    job.drain()
    assert job.trained("r1") + job.trained("r1-2") == job.witnessed(-1)
    for run in ("r1", "r1-2"):
        assert {step for _, _, step, _ in job.trained(run)} == {0}
        assert job.state(run) == ("completed", "")
        job.assert_accounted(run)


def test_a_script_with_a_run_of_its_own_keeps_it(job: Trainings) -> None:
    """The training's events go there, and the run goes on after it."""
    code, err = job.train("--own-run", "--epochs", "1")
    assert code == 0, err
    job.drain()
    [stream] = job.streams()
    assert stream.hello["project"] == "mine"
    assert job.trained() == job.witnessed(-1)
    with job.reader() as reader:
        assert "still mine" in {text for *_, text in reader.texts()}
    job.assert_accounted()


def test_trainer_classes_are_found_by_their_names(version: str, tmp_path: Path) -> None:
    """Workers import them by module and name, so a class is the same each time, and pickles so."""
    code = (
        "import pickle\n"
        "from rank_client.integrations import ultralytics_trainers as ours\n"
        "for name in ours.TRAINERS:\n"
        "    made = getattr(ours, name)\n"
        "    assert made.__name__ == name and issubclass(made, made.__mro__[1]), made\n"
        "    assert pickle.loads(pickle.dumps(made)) is made is getattr(ours, name), name\n"
    )
    environ = training_environ(dict(os.environ), tmp_path / "yolo")
    subprocess.run((str(python_of(version)), "-c", code), env=environ, check=True)
