"""What both protocols of HUB share: sorting a batch, holding what has to wait, accounting for it.

A point waits until its epoch closes, a summary until the end, a checkpoint until its interval has
passed. So `send` may report fewer items than it got; a later `send` or `close` reports the rest,
and after `close` delivered + skipped is the sum of all items of all batches.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
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
)
from gateway.sinks.hub.config import HubConfig
from gateway.sinks.hub.epochs import NO_EPOCH, Closed, OpenEpochs, rank_key
from gateway.sinks.hub.http import NoAnswer, Wire
from gateway.sinks.hub.turn import Turn, item_mark

NEWER_CHECKPOINT = "a newer checkpoint within the interval"
FILE_GONE = "file is gone"
NOT_NUMBERS = "summary holds more than finite numbers"

NO_PLACE = {what: f"hub has no place for a {what}" for what in ("image", "figure", "table", "file")}

log = logging.getLogger(__name__)


class HubSink:
    """A sink (see `gateway.sinks.base`) without a protocol; a subclass fills in the hooks.

    `wire` replaces the network, `monotonic` the clock of heartbeats.
    """

    stop_asked = ""

    def __init__(
        self,
        config: HubConfig,
        wire: Wire | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
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
        turn = Turn(self._memory, again)
        if batch and turn.get("closed"):
            self._reopen(turn)
            turn.put("closed", None)
        self._take_params([item for item in batch if isinstance(item, Params)], turn)
        self._take_rows([item for item in batch if isinstance(item, Rows)], turn)
        self._take_texts([item for item in batch if isinstance(item, Text)], turn)
        for item in batch:
            if isinstance(item, Media):
                self._take_media(item, turn)
            elif isinstance(item, Summary):
                self._take_summary(item, turn)
        turn.commit(batch)
        self._beat()
        return turn.sent

    def close(self, state: str, reason: str) -> Sent:
        turn = Turn(self._memory, again=bool(self._memory.get("closing")))
        if turn.get("closed") != state:
            turn.put_now("closing", True)  # should we die now, a held checkpoint may be there
            self._send_held(turn)
            self._finish(state, reason, turn)
            opened = OpenEpochs(turn.get("open"))
            turn.sent.skip(NO_EPOCH, opened.points)
            turn.put("open", None)
            turn.put("closed", state)
            turn.put("closing", None)
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

    def _upload(self, media: Media, turn: Turn) -> None:
        raise NotImplementedError

    def _finish(self, state: str, reason: str, turn: Turn) -> None:
        """Tell the state and settle the summary."""
        raise NotImplementedError

    def _beat(self) -> None:
        """Say that the run lives, where the protocol has a way to."""

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

    def _take_rows(self, rows: Sequence[Rows], turn: Turn) -> None:
        if not rows:
            return
        opened = OpenEpochs(turn.get("open"))
        taken = opened.take(rows)
        for reason, items in taken.skipped.items():
            turn.sent.skip(reason, items)
        turn.put("open", opened.dump())
        if taken.closed:
            self._send_epochs([taken.closed[epoch] for epoch in sorted(taken.closed)], turn)

    def _send_epochs(self, closed: Sequence[Closed], turn: Turn) -> None:
        """Posting an epoch replaces it, so what another rank or attempt sent goes along."""
        for one in closed:
            one.not_finite = sum(not math.isfinite(value) for value in one.values.values())
            key = f"epoch/{one.epoch}"
            one.values = {**turn.get(key, {}), **one.values}
            turn.put(key, one.values)
            turn.put("last_epoch", max(one.epoch, turn.get("last_epoch", -1)))
        self._post_epochs(closed, turn)

    def _take_media(self, media: Media, turn: Turn) -> None:
        if media.what != "checkpoint":
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

    def _send_held(self, turn: Turn) -> None:
        held = turn.get("held")
        if not held:
            return
        self._upload_once(_media_from_map(held), turn)
        turn.put("held", None)

    def _take_summary(self, item: Summary, turn: Turn) -> None:
        """Held till the end: a summary has no step, and no epoch it would belong to."""
        held = turn.get("summary", {"values": {}, "items": 0, "mixed": 0})
        values = {rank_key(item.rank, key): value for key, value in item.values.items()}
        turn.put(
            "summary",
            {
                "values": {**held["values"], **values},
                "items": held["items"] + 1,
                "mixed": held["mixed"] + (len(_numbers(values)) < len(values)),
            },
        )

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
            values = {f"final/{key}": value for key, value in numbers.items()}
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
