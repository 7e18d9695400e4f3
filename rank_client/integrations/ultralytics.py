"""Ultralytics on every rank: what its trainer does becomes events of a run.

    from rank_client.integrations.ultralytics import attach
    model = YOLO("yolo11n.yaml")
    attach(model)
    model.train(...)

The callbacks are plain functions, so they survive the pickling with which Ultralytics (from
8.4.140) hands them to the workers of its own DDP; each process makes its run when its trainer
first calls. For the command line and older versions there are the hook (`ultralytics_hook/`) and
the trainer classes (`ultralytics_trainers.py`). Nothing here raises into the training, waits for
a network or imports Ultralytics.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

from .ultralytics_training import Training

log = logging.getLogger("rankgate")

Callback = Callable[[Any], None]

_trainings: dict[int, Training] = {}  #: those under way in this process, by id of the trainer
_begun = 0  #: trainings of this process so far
_told: set[str] = set()


def attach(model: Any) -> None:
    """Log the trainings of a model (`YOLO(…)`) or a trainer from now on; twice is once.

    Nothing is connected before a training begins, and never in a process that only starts the
    workers of one. Raises ValueError for what is neither, and nothing else.
    """
    there = getattr(model, "callbacks", None)
    if not isinstance(there, Mapping) or not callable(getattr(model, "add_callback", None)):
        what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise ValueError(  # noqa: TRY004 - as `init` does
            f"attach takes an Ultralytics model, as YOLO(...) gives it, or a trainer, not {what}"
        )
    for event, callback in CALLBACKS.items():
        if callback not in there.get(event, ()):
            model.add_callback(event, callback)


def with_callbacks(callbacks: Mapping[str, list[Callback]]) -> dict[str, list[Callback]]:
    """A copy of a trainer's callbacks, ours among them once, of the mapping's own kind."""
    copy: Any = callbacks.copy()  # type: ignore[attr-defined]
    for event, callback in CALLBACKS.items():
        there = list(callbacks.get(event, ()))
        copy[event] = there if callback in there else [*there, callback]
    return copy  # type: ignore[no-any-return]


def _guarded(call: Callback) -> Callback:
    """An exception in a callback would end the training on this rank, and then on all."""

    @functools.wraps(call)
    def event(subject: Any) -> None:
        try:
            call(subject)
        except Exception as error:
            _tell(call.__name__, error)

    return event


def _tell(event: str, error: Exception) -> None:
    """Once per event and process."""
    if event not in _told:
        _told.add(event)
        log.warning("rankgate: ultralytics %s: %r; the training goes on", event, error)


# --- what the trainer calls -----------------------------------------------------------------------


@_guarded
def on_pretrain_routine_start(trainer: Any) -> None:
    if not only_starts_workers(trainer):
        _training(trainer)


@_guarded
def on_pretrain_routine_end(trainer: Any) -> None:
    """The first event of the ranks above 0 in newer versions; a process that only starts workers
    never comes here."""
    _training(trainer)


@_guarded
def on_train_epoch_start(trainer: Any) -> None:
    _training(trainer).epoch_begins()


@_guarded
def on_train_epoch_end(trainer: Any) -> None:
    _training(trainer).trained(trainer)


@_guarded
def on_val_end(validator: Any) -> None:
    """A validation on its own (`model.val()`) belongs to no training."""
    for training in list(_trainings.values()):
        trainer = training.trainer()
        if trainer is not None and getattr(trainer, "validator", None) is validator:
            training.validated(trainer)


@_guarded
def on_model_save(trainer: Any) -> None:
    _training(trainer).saved(trainer)


@_guarded
def on_fit_epoch_end(trainer: Any) -> None:
    training = _training(trainer)
    training.epoch_ends(trainer)
    # Only here, between validation and the broadcast of rank 0's `stop`, may it be set: set before,
    # some ranks would validate and others not, and wait for each other for ever.
    if training.run.should_stop():
        trainer.stop = True


@_guarded
def on_train_end(trainer: Any) -> None:
    _training(trainer).results(trainer)


@_guarded
def teardown(trainer: Any) -> None:
    training = _trainings.pop(id(trainer), None)
    if training is not None:
        training.end()


CALLBACKS: dict[str, Callback] = {
    call.__name__: call
    for call in (
        on_pretrain_routine_start,
        on_pretrain_routine_end,
        on_train_epoch_start,
        on_train_epoch_end,
        on_val_end,
        on_model_save,
        on_fit_epoch_end,
        on_train_end,
        teardown,
    )
}


# --- trainings of this process --------------------------------------------------------------------


def only_starts_workers(trainer: Any) -> bool:
    """Does this process train nothing itself, as several devices get a worker each?"""
    if "LOCAL_RANK" in os.environ:
        return False
    if hasattr(trainer, "ddp"):  # from 8.3.200
        return bool(trainer.ddp)
    device = trainer.args.device
    devices = device if isinstance(device, list | tuple) else str(device or "").split(",")
    return len(devices) > 1


def _training(trainer: Any) -> Training:
    """The training this trainer leads, begun now if this is the first that is heard of it."""
    global _begun  # noqa: PLW0603 - trainings are counted per process
    found = _trainings.get(id(trainer))
    if found is None or found.trainer() is not trainer:
        _end_left(threading.get_ident())
        if _begun == 0:
            atexit.register(_end_at_exit)  # before the handler of rank_client, which ends all runs
        _begun += 1
        found = _trainings[id(trainer)] = Training(trainer, _begun)
    return found


def _end_left(thread: int) -> None:
    """Another training begins in this thread, so those before it have failed, if older versions
    did not say so."""
    for key, training in list(_trainings.items()):
        if training.thread == thread:
            del _trainings[key]
            training.abandon()


def _end_at_exit() -> None:
    for training in list(_trainings.values()):
        training.abandon()
