"""What both protocols of HUB share: sorting a batch, holding what has to wait, accounting for it.

A point waits until its epoch closes, a summary until the end, a checkpoint until its interval has
passed. So `send` may report fewer items than it got; a later `send` or `close` reports the rest,
and after `close` delivered + skipped is the sum of all items of all batches.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gateway.sinks.base import (
    Item,
    Media,
    Memory,
    Params,
    Rows,
    RunInfo,
    Sent,
    SinkError,
    Summary,
    Text,
    Unavailable,
)
from gateway.sinks.hub import machine
from gateway.sinks.hub.config import HubConfig
from gateway.sinks.hub.epochs import NO_EPOCH, Closed, OpenEpochs
from gateway.sinks.hub.http import Gone, NoAnswer, Wire
from gateway.sinks.hub.turn import Turn, item_mark
from gateway.sinks.keep import HOLDS
from gateway.sinks.naming import hub_key

NEWER_CHECKPOINT = "a newer checkpoint within the interval"
FILE_GONE = "file is gone"
NOT_NUMBERS = "summary holds more than finite numbers"

FINAL = "final/"  #: before what is known of a run as a whole

#: Ultralytics' names for what is known of the model → the field of Platform's `modelInfo`.
MODEL_INFO = {
    "model/parameters": "parameters",
    "model/GFLOPs": "gflops",
    "model/speed_PyTorch(ms)": "speedMs",
}

NO_PLACE = {what: f"no place in HUB ({what})" for what in ("image", "figure", "table", "file")}

log = logging.getLogger(__name__)


class HubSink:
    """A sink (see `gateway.sinks.base`) without a protocol; a subclass fills in the hooks.

    `shared` is the folder where all runs keep the limits of a key together. `wire` replaces the
    network, `monotonic` the clock of heartbeats.
    """

    stop_asked = ""

    def __init__(
        self,
        config: HubConfig,
        wire: Wire | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        shared: Path | None = None,
    ) -> None:
        self.config = config
        self._shared = shared
        self._own_wire = wire
        self._monotonic = monotonic
        self._wire: Wire
        self._run: RunInfo
        self._memory: Memory

    def open(self, run: RunInfo, memory: Memory) -> None:
        """Check what can be checked. The model is made with the first delivery: it needs params."""
        self._run, self._memory = run, memory
        self._wire = self._own_wire or self._connect()
        self._greet()

    def send(self, batch: Sequence[Item], again: bool) -> Sent:
        turn = Turn(self._memory)  # it knows of each request whether it may be there already
        if batch and turn.get("closed"):
            self._reopen(turn)
            turn.put("closed", None)
        self._fill_new_model(turn)
        self._take_params([item for item in batch if isinstance(item, Params)], turn)
        for item in batch:
            if isinstance(item, Summary):
                self._take_summary(item, turn)
        self._take_rows([item for item in batch if isinstance(item, Rows)], turn)
        self._take_texts([item for item in batch if isinstance(item, Text)], turn)
        for item in batch:
            if isinstance(item, Media):
                self._take_media(item, turn)
        turn.commit(batch)
        self._beat()
        return turn.sent

    def close(self, state: str, reason: str) -> Sent:
        turn = Turn(self._memory)
        if turn.get("closed") != state:
            self._fill_new_model(turn)
            self._send_held(turn)
            self._finish(state, reason, turn)
            opened = OpenEpochs(turn.get("open"))
            turn.sent.skip(NO_EPOCH, opened.points)
            turn.put("open", None)
            turn.put("closed", state)
            turn.commit(None)
        self._wire.close()
        return turn.sent

    # Hooks of a protocol.

    def _connect(self) -> Wire:
        raise NotImplementedError

    def _greet(self) -> None:
        """Ask whether the key is good, where the protocol has a way to."""

    def _reopen(self, turn: Turn) -> None:
        """A run that had ended goes on: a new launch of the job joined it."""

    def _take_params(self, params: Sequence[Params], turn: Turn) -> None:
        raise NotImplementedError

    def _post_epochs(self, closed: Sequence[Closed], turn: Turn) -> None:
        """Send each epoch's whole record and account for its `points`."""
        raise NotImplementedError

    def _take_texts(self, texts: Sequence[Text], turn: Turn) -> None:
        raise NotImplementedError

    def _take_machine(self, rows: Sequence[Rows], turn: Turn) -> None:
        """Rows of `system/…` keys alone."""
        raise NotImplementedError

    def _upload(self, media: Media, turn: Turn) -> None:
        raise NotImplementedError

    def _take_table(self, media: Media, turn: Turn) -> bool:
        """Keep a table that has a place; False when it has none."""
        return False

    def _finish(self, state: str, reason: str, turn: Turn) -> None:
        """Tell the state and settle the summary."""
        raise NotImplementedError

    def _beat(self) -> None:
        """Say that the run lives, where the protocol has a way to."""

    def _name_of(self, key: str, rank: int) -> str | None:
        return hub_key(key, rank, self._run.source, self.config.protocol)

    # Shared steps.

    def _create(self, turn: Turn, request: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Make the model; its description is durable before anything is sent to it.

        Neither protocol can be asked whether an unanswered request made one, so each further
        attempt may make another model, and is counted as that.
        """
        unanswered = int(turn.get("creating", 0))
        turn.put_now("creating", unanswered + 1)
        try:
            model = request()
        except NoAnswer:
            raise
        except SinkError:
            turn.put_now("creating", unanswered)
            raise
        turn.doubt(unanswered)
        turn.put_now("model", model)
        return model

    @contextmanager
    def _there(self, turn: Turn) -> Iterator[None]:
        """Around requests to the model. One that somebody deleted over there is given up, and a
        new one gets all epochs. One that never answered is waited for: the address may be wrong.
        """
        try:
            yield
        except Gone as error:
            model = turn.get("model")
            if not model or not model.get("seen"):
                raise
            self._give_up_model(turn)
            text = f"{error} - the model was deleted there; a new one gets all epochs so far"
            raise Unavailable(text) from None
        model = turn.get("model")
        if model and not model.get("seen"):
            turn.put_now("model", {**model, "seen": True})

    def _give_up_model(self, turn: Turn) -> None:
        turn.forget_requests()
        turn.put_now("creating", 0)
        turn.put_now("model", None)
        turn.put_now("new_model", True)

    def _fill_new_model(self, turn: Turn) -> None:
        """What the model that was given up had of epochs; lines and files stay lost with it."""
        if not turn.get("new_model"):
            return
        records = ((n, turn.get(f"epoch/{n}")) for n in range(turn.get("last_epoch", -1) + 1))
        closed = [Closed(n, values) for n, values in records if values]
        if closed:
            self._post_epochs(closed, turn)
        turn.put("new_model", None)

    def _take_rows(self, rows: Sequence[Rows], turn: Turn) -> None:
        rows, own = machine.apart(rows)
        if own:
            self._take_machine(own, turn)
        if not rows:
            return
        opened = OpenEpochs(turn.get("open"), self._name_of)
        taken = opened.take(rows)
        for reason, items in taken.skipped.items():
            turn.sent.skip(reason, items)
        turn.put("open", opened.dump())
        if taken.closed:
            self._send_epochs([taken.closed[epoch] for epoch in sorted(taken.closed)], turn)

    def _send_epochs(self, closed: Sequence[Closed], turn: Turn) -> None:
        """Posting an epoch replaces it, so what another rank or attempt sent goes along."""
        closed[0].values = {**turn.get("model_info", {}), **closed[0].values}
        turn.put("model_info", None)
        for one in closed:
            one.not_finite = sum(not math.isfinite(value) for value in one.values.values())
            key = f"epoch/{one.epoch}"
            one.values = {**turn.get(key, {}), **one.values}
            turn.put(key, one.values)
            turn.put("last_epoch", max(one.epoch, turn.get("last_epoch", -1)))
            turn.put("first_epoch", min(one.epoch, turn.get("first_epoch", one.epoch)))
        self._post_epochs(closed, turn)

    def _take_media(self, media: Media, turn: Turn) -> None:
        if media.what != "checkpoint":
            if media.what == "table" and self._take_table(media, turn):
                return
            turn.sent.skip(NO_PLACE.get(media.what, NO_PLACE["file"]))
            return
        last_ns = turn.get("checkpoint_ns")
        flagged = bool(media.meta.get("best") or media.meta.get("final"))
        interval_ns = int(self.config.checkpoint_interval_seconds * 1e9)
        soon = last_ns is not None and media.wall_ns - last_ns < interval_ns
        if not flagged or media.meta.get("final"):
            self._drop_held(turn)
        if soon and not flagged:
            turn.put("held", _media_to_map(media))
            turn.put(HOLDS, [media.sha256])  # its receipt comes before its delivery
            return
        self._upload_once(media, turn)
        if not flagged:
            turn.put("checkpoint_ns", media.wall_ns)

    def _upload_once(self, media: Media, turn: Turn) -> None:
        if turn.is_confirmed(item_mark(media)):
            turn.sent.delivered += 1
        elif media.path.exists():
            self._upload(media, turn)
        else:
            turn.sent.skip(FILE_GONE)

    def _drop_held(self, turn: Turn) -> None:
        if turn.get("held"):
            turn.sent.skip(NEWER_CHECKPOINT)
            turn.put("held", None)
            turn.put(HOLDS, None)

    def _send_held(self, turn: Turn) -> None:
        held = turn.get("held")
        if not held:
            return
        self._upload_once(_media_from_map(held), turn)
        turn.put("held", None)
        turn.put(HOLDS, None)

    def _take_summary(self, item: Summary, turn: Turn) -> None:
        """Held till the end: a summary has no step, and no epoch it would belong to."""
        held = turn.get("summary", {"values": {}, "items": 0, "mixed": 0})
        values = {hub_key(key, item.rank) or key: value for key, value in item.values.items()}
        self._take_model_info(values, turn)
        turn.put(
            "summary",
            {
                "values": {**held["values"], **values},
                "items": held["items"] + 1,
                "mixed": held["mixed"] + (len(_numbers(values)) < len(values)),
            },
        )

    def _take_model_info(self, values: dict[str, Any], turn: Turn) -> None:
        """What Ultralytics tells of the model itself stands beside the first epoch there is."""
        info = {key: values.pop(key) for key in MODEL_INFO if key in values}
        info = _numbers(info)
        if not info:
            return
        turn.put("model_info", {**turn.get("model_info", {}), **info})
        first = turn.get("first_epoch")
        if first is not None:
            self._send_epochs([Closed(first, {})], turn)

    def _summary_into_last_epoch(self, turn: Turn) -> None:
        """Where a protocol has no final record: beside the last epoch's values, as `final/KEY`.

        Not under KEY itself: that would put the final evaluation in the place of the last epoch.
        """
        held = turn.get("summary")
        if not held:
            return
        turn.put("summary", None)
        last = turn.get("last_epoch")
        if last is None:
            turn.sent.skip(NO_EPOCH, held["items"])
            return
        numbers = _numbers(held["values"])
        if numbers:
            values = {f"{FINAL}{key.removeprefix(FINAL)}": v for key, v in numbers.items()}
            self._send_epochs([Closed(last, values)], turn)
        turn.sent.delivered += held["items"] - held["mixed"]
        turn.sent.skip(NOT_NUMBERS, held["mixed"])


def _numbers(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in values.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }


def _media_to_map(media: Media) -> dict[str, Any]:
    names = [name for name in Media.__slots__ if name != "path"]
    return {**{name: getattr(media, name) for name in names}, "path": str(media.path)}


def _media_from_map(value: dict[str, Any]) -> Media:
    return Media(**{**value, "path": Path(value["path"])})
