"""The protocol of Ultralytics HUB, which ended on 2026-07-31: for self-hosted stand-ins.

One POST carries any number of epochs and replaces them, so sending again does no harm.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gateway.sinks.base import Media, Off, Params, Rows, SinkError, Text, Unavailable
from gateway.sinks.hub.carry import HubSink, log
from gateway.sinks.hub.epochs import Closed
from gateway.sinks.hub.http import Http, KeyHeader, NoAnswer, Wire
from gateway.sinks.hub.pace import Limits, Pace, Paced, shared_file
from gateway.sinks.hub.turn import Turn, item_mark, request_mark

KEY_NAMES = ("HUB_API_KEY", "ULTRALYTICS_API_KEY")
ROOT_NAME = "ULTRALYTICS_HUB_API"
MODELS = "/v1/models"

EPOCHS_PER_POST = 200

METRICS_GAP_SECONDS = 3.0  #: in which short epochs gather: 400 calls an hour were allowed

NO_CONSOLE = "hub legacy has no console"
NO_MACHINE = "hub legacy has no machine metrics"
NO_FIELD = "params without a field in hub legacy"
NOT_FINITE = "not finite"

#: The name of a parameter → its field in `config` of a model, and the field's type.
CONFIG_FIELDS: dict[str, tuple[str, Callable[[Any], int | str]]] = {
    **dict.fromkeys(("batch", "batch_size", "batchSize"), ("batchSize", int)),
    **dict.fromkeys(("imgsz", "image_size", "imageSize"), ("imageSize", int)),
    "epochs": ("epochs", int),
    "patience": ("patience", int),
    "device": ("device", str),
    "cache": ("cache", str),
}


def connect(shared: Path | None = None) -> Wire:
    """The server the environment names, or `Off`; `shared` as in `HubSink`."""
    name = next((name for name in KEY_NAMES if os.environ.get(name, "").strip()), None)
    if name is None:
        raise Off(
            f"hub: neither {KEY_NAMES[0]} nor {KEY_NAMES[1]} is set; the owner of the HUB server "
            f"named by {ROOT_NAME} gives out keys"
        )
    root = os.environ.get(ROOT_NAME)
    if not root:
        raise Off(
            f"hub: {ROOT_NAME} is not set, and Ultralytics' own HUB ended on 2026-07-31. Name a "
            'self-hosted server, or use protocol = "platform" in [sinks.hub]'
        )
    key = os.environ[name].strip()
    file = shared_file(shared, root + key) if shared else None
    pace = Pace(Limits(gap_seconds={"metrics": METRICS_GAP_SECONDS}), file)
    return Paced(Http(root, KeyHeader("x-api-key", key), key, name), pace, _kind)


def _kind(path: str, body: Any) -> str:
    return str(body.get("type", "")) if isinstance(body, dict) else ""


class LegacySink(HubSink):
    """Carries one run to one model."""

    _next_beat = -math.inf
    _name = ""  #: of the model: Ultralytics calls it by the file the training began with

    def _connect(self) -> Wire:
        return connect(self._shared)

    def _greet(self) -> None:
        if self._wire.call("POST", "/v1/auth").get("success") is not True:
            raise Unavailable(f"hub: the key in {' or '.join(KEY_NAMES)} is not accepted")

    def _take_params(self, params: Sequence[Params], turn: Turn) -> None:
        fresh = [item for item in params if not turn.is_confirmed(item_mark(item))]
        body: dict[str, Any] = {}
        for item in params:
            whole = item.rank <= 0 and place_params(item.values, body)
            if self._run.source and item.rank <= 0 and isinstance(item.values.get("model"), str):
                self._name = str(item.values["model"]).rpartition("/")[2]
            turn.sent.delivered += whole
            turn.sent.skip(NO_FIELD, 0 if whole else 1)
        if not fresh:
            return
        if not turn.get("model"):
            self._model(turn, body)
        elif body:
            path = f"{MODELS}/{self._model(turn)}"
            with self._there(turn):
                self._wire.call("PATCH", path, body)
        turn.confirm([item_mark(item) for item in fresh])

    def _model(self, turn: Turn, body: dict[str, Any] | None = None) -> str:
        """The model's id; the model is made at the first need."""
        model = turn.get("model")
        if not model:
            model = self._create(turn, lambda: self._make(body or {}))
        return str(model["id"])

    def _make(self, body: dict[str, Any]) -> dict[str, Any]:
        empty: dict[str, Any] = {"config": {}, "dataset": {}, "lineage": {}}
        meta = {"name": self._name or self._run.name}
        answer = self._wire.call("POST", MODELS, {**empty, **body, "meta": meta})
        data = answer.get("data")
        if not isinstance(data, dict) or not data.get("id"):
            raise NoAnswer("hub: the server made a model without naming it")
        return {"id": data["id"]}

    def _post_epochs(self, closed: Sequence[Closed], turn: Turn) -> None:
        path = f"{MODELS}/{self._model(turn)}"
        for start in range(0, len(closed), EPOCHS_PER_POST):
            part = closed[start : start + EPOCHS_PER_POST]
            # An epoch's values are JSON inside JSON.
            metrics = {str(one.epoch): json.dumps(_finite(one.values)) for one in part}
            body = {"metrics": metrics, "type": "metrics"}
            mark = request_mark(body)
            if not turn.is_confirmed(mark):
                with self._there(turn):
                    self._wire.call("POST", path, body)
                turn.confirm([mark])
            for one in part:
                turn.sent.delivered += one.points - one.not_finite
                turn.sent.skip(NOT_FINITE, one.not_finite)

    def _take_texts(self, texts: Sequence[Text], turn: Turn) -> None:
        turn.sent.skip(NO_CONSOLE, len(texts))

    def _take_machine(self, rows: Sequence[Rows], turn: Turn) -> None:
        turn.sent.skip(NO_MACHINE, sum(part.items for part in rows))

    def _upload(self, media: Media, turn: Turn) -> None:
        meta = media.meta
        epoch = meta.get("epoch")
        fields = {"epoch": str(turn.get("last_epoch", 0) if epoch is None else int(epoch))}
        if meta.get("final"):
            # There is no completion call: this upload is what makes the model `trained`.
            fields |= {"type": "final", "map": str(mean_precision(meta.get("metrics") or {}))}
        else:
            fields |= {"type": "epoch", "isBest": str(bool(meta.get("best")))}
        name = "best.pt" if meta.get("final") else "last.pt"
        path = f"{MODELS}/{self._model(turn)}/upload"
        with turn.once([item_mark(media)], 1), self._there(turn):
            self._wire.post_file(path, fields, name, media.path)
        turn.sent.delivered += 1

    def _finish(self, state: str, reason: str, turn: Turn) -> None:
        """The protocol has no final state but the final upload, so only the summary is sent."""
        self._summary_into_last_epoch(turn)

    def _beat(self) -> None:
        """Beats go along with deliveries: a sink has no thread of its own."""
        model = self._memory.get("model")
        now = self._monotonic()
        if not model or now < self._next_beat:
            return
        self._next_beat = now + self.config.heartbeat_interval_seconds
        agent = f"python-{platform.python_version()}-local"
        body = {"agent": agent, "agentId": self._memory.get("agent_id")}
        try:
            answer = self._wire.call("POST", f"/v1/agent/heartbeat/models/{model['id']}", body)
        except SinkError as error:
            # No item was in it, and the batch before it is confirmed.
            log.info("heartbeat not delivered: %s", error)
            return
        data = answer.get("data")
        if isinstance(data, dict) and data.get("agentId"):
            self._memory.put_now("agent_id", data["agentId"])


def place_params(values: dict[str, Any], body: dict[str, Any]) -> bool:
    """Put what a model has a field for into `body`; True when that was everything."""
    whole = True
    for key, value in values.items():
        if key in CONFIG_FIELDS:
            field, kind = CONFIG_FIELDS[key]
            try:
                body.setdefault("config", {})[field] = kind(value)
            except (TypeError, ValueError, OverflowError):
                whole = False
        elif key in ("data", "dataset") and isinstance(value, str):
            body["dataset"] = {"name": value}
        elif key == "model" and isinstance(value, str):
            name = value.rpartition("/")[2]
            architecture = name.removesuffix(".pt").removesuffix(".yaml")
            parent = {"name": name} if name.endswith(".pt") else {}
            body["lineage"] = {"architecture": {"name": architecture}, "parent": parent}
        else:
            whole = False
    return whole


def mean_precision(metrics: dict[str, Any]) -> float:
    """The mAP a final checkpoint is shown with, 0 where none was given."""
    for key in ("metrics/mAP50-95(B)", "mAP50-95", "map", "fitness"):
        value = metrics.get(key)
        if isinstance(value, (int, float)) and math.isfinite(value):
            return float(value)
    return 0.0


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if math.isfinite(value)}
