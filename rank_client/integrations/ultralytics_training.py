"""One training of Ultralytics in this process, as the events of one run.

Steps are the trainer's epochs, from 0. What is logged when is told by what a trainer has, never by
a rank: losses and times are there on every rank, validation results, weights and plots where
Ultralytics makes them. The whole list is in docs/ultralytics.md.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import exits, identity
from ..capture import source
from ..run import Run, init
from ..wire.source import ENVIRONMENT, GPU, GPU_COUNT, ULTRALYTICS
from .ultralytics_tables import noted, tables

log = logging.getLogger("rankgate")

SOURCE = "ultralytics"
CHECKPOINT_SECONDS = 900.0  #: between two checkpoints while training, as HUB has always had it
PLOTS_SECONDS = 5.0  #: the most that is waited, at the end, for pictures still being drawn
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
EPOCH_SECONDS = "time/epoch_seconds"
#: what the losses of a task are called, in their order
LOSSES = {
    "detect": ("box_loss", "cls_loss", "dfl_loss"),
    "segment": ("box_loss", "seg_loss", "cls_loss", "dfl_loss"),
    "pose": ("box_loss", "pose_loss", "kobj_loss", "cls_loss", "dfl_loss"),
    "obb": ("box_loss", "cls_loss", "dfl_loss"),
    "classify": ("loss",),
}

#: what follows the `?` of a signed URL is as good as a password
_QUERY = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]{0,20}://[^\s?'\"]*)\?[^\s'\"]*")

_made: weakref.WeakSet[Run] = weakref.WeakSet()  #: by trainings, not by the script


class Training:
    """What the run of one trainer has been told so far. Methods are called in the trainer's thread;
    any may raise, and the caller catches."""

    def __init__(self, trainer: Any, number: int) -> None:
        self.trainer = weakref.ref(trainer)
        self.thread = threading.get_ident()
        self._around = sys.exc_info()[1]  #: being handled when we began; no failure of ours
        self._began_seconds = time.time()
        self._checkpoint_at = time.monotonic() + CHECKPOINT_SECONDS
        self._in_epoch = False
        self._validated = False  #: since the epoch began
        self._model_told = False
        self._pictures: dict[Path, float] = {}  #: those that are logged → when they were drawn
        found = _run_of_the_script()
        self._ours = found is None
        self.run = found or _begin(trainer.args, number)
        self.run.log_params(arguments(trainer.args))
        if source.wanted(os.environ, self.run.rank):
            self.run.log_params(surroundings())

    # --- epochs ----------------------------------------------------------------------------------

    def epoch_begins(self) -> None:
        self._in_epoch, self._validated = True, False

    def trained(self, trainer: Any) -> None:
        """This rank's own losses and learning rates, never reduced."""
        self.run.log({**_losses(trainer), **trainer.lr}, step=trainer.epoch)
        self._log_pictures(trainer)

    def validated(self, trainer: Any) -> None:
        self._validated = True
        self._log_pictures(trainer)

    def epoch_ends(self, trainer: Any) -> None:
        """The row that closes the epoch. Once more than there are epochs it ends the final
        evaluation, whose results `results` tells: they are of no epoch."""
        if not self._in_epoch:
            return
        self._in_epoch = False
        row = dict(trainer.metrics or {}) if self._validated else {}
        if self._validated and trainer.fitness is not None:
            row["fitness"] = trainer.fitness
        if self._validated and not self._model_told:
            self._log_model(trainer)
        self._log_pictures(trainer)
        row |= {EPOCH_SECONDS: trainer.epoch_time, "epoch": trainer.epoch}
        self.run.log(row, step=trainer.epoch)

    def _log_model(self, trainer: Any) -> None:
        """Its size and speed, which are known after a validation, where there was one."""
        self._model_told = True
        try:
            from ultralytics.utils.torch_utils import model_info_for_loggers

            self.run.log_summary(model_info_for_loggers(trainer))
        except Exception as error:  # a model of somebody's own may not be measured so
            log.warning("rankgate: ultralytics cannot tell the model's size and speed: %r", error)

    # --- files -----------------------------------------------------------------------------------

    def saved(self, trainer: Any) -> None:
        """The weights now and then, if the training should not get to its end."""
        now = time.monotonic()
        if now < self._checkpoint_at or not trainer.last.exists():
            return
        self._checkpoint_at = now + CHECKPOINT_SECONDS
        best = trainer.best_fitness == trainer.fitness
        self.run.log_checkpoint(
            trainer.last, best=best, metrics=_numbers(trainer.metrics), step=trainer.epoch
        )

    def results(self, trainer: Any) -> None:
        """The results of the best weights, all plots, the weights. Only where validations are."""
        metrics = _numbers(getattr(trainer.validator.metrics, "results_dict", None))
        summary: dict[str, Any] = {f"final/{key}": value for key, value in metrics.items()}
        if names := _class_names(trainer):
            summary["model/names"] = json.dumps(names)
        self.run.log_summary(summary)
        _wait_for_pictures()
        self._log_pictures(trainer)
        for path in self._plots(trainer):
            self.run.log_figure(f"Plots/{path.stem}", path, step=trainer.epoch)
        last, best = trainer.last.exists(), trainer.best.exists()
        if last:
            self.run.log_checkpoint(
                trainer.last, final=not best, metrics=metrics, step=trainer.epoch
            )
        if best:
            self.run.log_checkpoint(
                trainer.best, best=True, final=True, metrics=metrics, step=trainer.epoch
            )
        for key, rows in tables(trainer):
            self.run.log_table(key, rows, step=trainer.epoch)

    def _log_pictures(self, trainer: Any) -> None:
        """Those of batches that have been drawn since, in whichever epoch. They are drawn by
        threads, which note them in `plots` when the file is whole."""
        for path, at in _drawn(trainer):
            if self._pictures.get(path, 0.0) < at and (key := _picture_key(path)):
                self._pictures[path] = at
                self.run.log_image(key, path, step=trainer.epoch)

    def _plots(self, trainer: Any) -> list[Path]:
        """All that this training drew, by what is there: older versions do not note each."""
        noted = [path for path, _ in _drawn(trainer)]
        there = [
            path for path in Path(trainer.save_dir).iterdir()
            if path.suffix in PICTURES and path.stat().st_mtime >= self._began_seconds
        ]  # fmt: skip
        plots = {path.resolve(): path for path in (*there, *noted) if path.exists()}
        return sorted(path for path in plots.values() if not _picture_key(path))

    # --- the end ---------------------------------------------------------------------------------

    def end(self) -> None:
        """The trainer tears down, from 8.4.125 also because of an exception that is on its way."""
        if not self._ours:
            return
        error = sys.exc_info()[1]
        if error is None or error is self._around:
            self.run.finish()
        else:
            self.run.__exit__(type(error), error, error.__traceback__)

    def abandon(self) -> None:
        """It never came to its end. What the exception was, if one ended the process, the run is
        told by itself."""
        if self._ours and getattr(sys, "last_value", None) is None:
            error = RuntimeError("the training did not come to its end")
            self.run.__exit__(RuntimeError, error, None)


def _run_of_the_script() -> Run | None:
    """The run that the script has made by itself: the training's events go there."""
    for run in list(exits.live):
        if isinstance(run, Run) and run not in _made and not run._dead:
            return run
    return None


def _begin(args: Any, number: int) -> Run:
    """A run of its own for each training of a process."""
    run_id = None
    if number > 1:
        base = identity.run_id(os.environ, identity.place(os.environ), None)
        run_id = identity.safe_run_id(f"{base}-{number}")
    project = os.environ.get("RANKGATE_PROJECT") or str(args.project or "").lstrip("/") or _brand()
    name = str(args.name) if args.name else None
    made = init(project=project, name=name, run=run_id, tags=[_brand()], _source=SOURCE)
    _made.add(made)
    return made


def _brand() -> str:
    """The project and tag that this version's own callbacks use."""
    version = getattr(sys.modules.get("ultralytics"), "__version__", "")
    return "YOLOv8" if version.startswith(("8.0.", "8.1.", "8.2.")) else "Ultralytics"


def arguments(args: Any) -> dict[str, Any]:
    """The trainer's arguments, without what a URL in them is signed with."""
    return {key: _unsigned(value) for key, value in vars(args).items()}


def surroundings() -> dict[str, str | int]:
    """What Ultralytics and torch alone know of where they run; both are loaded when we are called.

    GPUs are told of only where the training has made CUDA ready, which nobody else should do.
    """
    found: dict[str, str | int] = {}
    try:
        ultralytics, torch = sys.modules["ultralytics"], sys.modules["torch"]
        found[ULTRALYTICS] = str(ultralytics.__version__)
        found[ENVIRONMENT] = str(sys.modules["ultralytics.utils"].ENVIRONMENT)
        if torch.cuda.is_initialized():
            first = torch.cuda.get_device_properties(0)
            found[GPU_COUNT] = torch.cuda.device_count()
            found[GPU] = f"{first.name}, {first.total_memory / 2**20:.0f}MiB"
    except Exception as error:  # a training without it is as good
        log.debug("rankgate: ultralytics does not tell where it runs: %r", error)
    return found


def _unsigned(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _unsigned(inner) for key, inner in value.items()}
    if value is None or isinstance(value, bool | int | float):
        return value
    return _QUERY.sub(r"\1?[redacted]", str(value))


def _losses(trainer: Any) -> dict[str, float]:
    """The mean losses of this rank in this epoch, by their names; none where no batch was seen."""
    named = trainer.label_loss_items(trainer.tloss, prefix="train")
    if not isinstance(named, Mapping):
        return {}
    if list(trainer.loss_names) != ["Loss"]:
        return dict(named)
    # Before 8.3.220 only the rank that validates learns the names.
    values = [round(float(value), 5) for value in trainer.tloss.reshape(-1)]
    names: Sequence[str] = LOSSES.get(trainer.args.task, ())
    if len(names) != len(values):
        names = [f"loss_{index}" for index in range(len(values))]
    return {f"train/{name}": value for name, value in zip(names, values, strict=True)}


def _numbers(values: Mapping[str, Any] | None) -> dict[str, float]:
    return {key: float(value) for key, value in (values or {}).items()}


def _class_names(trainer: Any) -> list[str]:
    names = (getattr(trainer, "data", None) or {}).get("names") or ()
    return [str(name) for name in (names.values() if isinstance(names, Mapping) else names)]


def _drawn(trainer: Any) -> Iterator[tuple[Path, float]]:
    """(file, when) of the pictures that trainer and validator have noted."""
    for path, about in noted(trainer):
        yield Path(path), float(about["timestamp"])


def _picture_key(path: Path) -> str:
    """Of a picture of a batch; empty for a plot."""
    if path.stem.startswith("train_batch"):
        return f"Mosaic/{path.stem}"
    return f"Validation/{path.stem}" if path.stem.startswith("val_batch") else ""


def _wait_for_pictures() -> None:
    """Until the threads that draw batches are done. Nobody waits for this rank any more."""
    deadline = time.monotonic() + PLOTS_SECONDS
    for thread in threading.enumerate():
        if thread.name.endswith("(plot_images)"):
            thread.join(max(0.0, deadline - time.monotonic()))
