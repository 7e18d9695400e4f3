"""A stand-in for Ultralytics HUB's server, which is gone: strict about what the real one took."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import dataclass, field
from typing import Any

from tests.servers.base import Reply, Request, StandIn

KEY = "0123456789abcdef0123456789abcdef01234567"


class BadRequestError(Exception):
    """The request breaks a rule; answered with its status and text."""

    def __init__(self, text: str, status: int = 400) -> None:
        super().__init__(text)
        self.status = status


class RateLimit:
    """So many calls in a sliding window, by key."""

    def __init__(self, calls: int | None, window_seconds: float) -> None:
        self.calls, self.window_seconds = calls, window_seconds
        self._taken: list[float] = []

    def take(self) -> float | None:
        """None, or how many seconds to wait."""
        now = time.monotonic()
        self._taken = [moment for moment in self._taken if moment > now - self.window_seconds]
        if self.calls is not None and len(self._taken) >= self.calls:
            return self._taken[0] + self.window_seconds - now
        self._taken.append(now)
        return None


@dataclass
class Checkpoint:
    epoch: int
    type: str
    is_best: bool
    map: float | None
    name: str
    body: bytes


@dataclass
class Model:
    id: str
    config: dict[str, Any]
    dataset: dict[str, Any]
    lineage: dict[str, Any]
    meta: dict[str, Any]
    status: str = "new"
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    beats: list[dict[str, Any]] = field(default_factory=list)


class HubLegacyServer(StandIn):
    """`models` holds what was accepted; the readers give it by model id."""

    def __init__(
        self, key: str = KEY, calls: int | None = None, window_seconds: float = 3600.0
    ) -> None:
        super().__init__()
        self.key = key
        self.limit = RateLimit(calls, window_seconds)
        self.models: dict[str, Model] = {}
        self._agents = 0

    def epochs(self, model_id: str) -> dict[int, dict[str, float]]:
        with self.lock:
            return dict(self.models[model_id].metrics)

    def checkpoints(self, model_id: str) -> list[Checkpoint]:
        with self.lock:
            return [one for one in self.models[model_id].checkpoints if one.type == "epoch"]

    def finals(self, model_id: str) -> list[Checkpoint]:
        with self.lock:
            return [one for one in self.models[model_id].checkpoints if one.type == "final"]

    def status(self, model_id: str) -> str:
        with self.lock:
            return self.models[model_id].status

    def only(self) -> str:
        """The id of the one model there is."""
        with self.lock:
            (model_id,) = self.models
        return model_id

    def handle(self, request: Request) -> Reply:
        if request.headers.get("x-api-key") != self.key:
            return Reply.of({"message": "Invalid API key"}, 401)
        wait = self.limit.take()
        if wait is not None:
            return Reply.of(
                {"message": "Too many requests"},
                429,
                X_RateLimit_Limit=str(self.limit.calls),
                X_RateLimit_Remaining="0",
                X_RateLimit_Reset=str(int(time.time() + wait) + 1),
                Retry_After=str(math.ceil(wait)),
            )
        try:
            return self._route(request)
        except BadRequestError as error:
            return Reply.of({"message": str(error)}, error.status)
        except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
            return Reply.of({"message": f"{type(error).__name__}: {error}"}, 400)

    def _route(self, request: Request) -> Reply:
        method, path = request.method, request.path
        if (method, path) == ("POST", "/v1/auth"):
            return Reply.of({"success": True})
        if (method, path) == ("POST", "/v1/models"):
            return self._create(strict_json(request.body))
        if match := re.fullmatch(r"/v1/agent/heartbeat/models/([^/]+)", path):
            return self._beat(self._model(match[1]), strict_json(request.body))
        match = re.fullmatch(r"/v1/models/([^/]+)(/metrics|/upload)?", path)
        if not match:
            raise BadRequestError(f"no such path {path}", 404)
        model, rest = self._model(match[1]), match[2]
        if method == "POST" and rest is None:
            return self._metrics(model, strict_json(request.body))
        if method == "POST" and rest == "/upload":
            return self._upload(model, request)
        if method == "GET" and rest == "/metrics":
            return Reply.of({"data": [{"epoch": e, **v} for e, v in model.metrics.items()]})
        if method == "GET" and rest is None:
            return Reply.of({"data": {"id": model.id, "status": model.status, **model.config}})
        if method == "PATCH" and rest is None:
            for name, value in strict_json(request.body).items():
                getattr(model, name).update(value)
            return Reply.of({"data": {"id": model.id}})
        raise BadRequestError("method not allowed", 405)

    def _model(self, model_id: str) -> Model:
        if model_id not in self.models:
            raise BadRequestError("Model not found", 404)
        return self.models[model_id]

    def _create(self, body: dict[str, Any]) -> Reply:
        if not isinstance(body["meta"]["name"], str):
            raise BadRequestError("meta.name must be a string")
        types = {
            "batchSize": int, "epochs": int, "imageSize": int, "patience": int,
            "device": str, "cache": str,
        }  # fmt: skip
        for name, value in body["config"].items():
            if type(value) is not types[name]:
                raise BadRequestError(f"config.{name} is not {types[name].__name__}")
        model_id = f"M{len(self.models) + 1:019d}"  # 20 characters, as on HUB
        self.models[model_id] = Model(model_id, **body)
        return Reply.of({"data": {"id": model_id}})

    def _metrics(self, model: Model, body: dict[str, Any]) -> Reply:
        if body.keys() != {"metrics", "type"} or body["type"] != "metrics" or not body["metrics"]:
            raise BadRequestError("expected metrics and type")
        record: dict[int, dict[str, float]] = {}
        for epoch, text in body["metrics"].items():
            if not re.fullmatch(r"\d+", epoch) or not isinstance(text, str):
                raise BadRequestError("metrics maps an epoch to a JSON string")
            record[int(epoch)] = strict_json(text.encode())
            if not all(type(value) in (int, float) for value in record[int(epoch)].values()):
                raise BadRequestError("a metric is a number")
        model.metrics.update(record)
        model.status = "training" if model.status == "new" else model.status
        return Reply.of({"success": True})

    def _upload(self, model: Model, request: Request) -> Reply:
        fields, name, body = multipart(request)
        kind = fields["type"]
        expected = {"epoch": ("isBest", "last.pt"), "final": ("map", "best.pt")}[kind]
        if fields.keys() != {"epoch", "type", expected[0]} or name != expected[1]:
            raise BadRequestError(f"not the fields of type {kind}: {sorted(fields)}, {name}")
        if fields.get("isBest", "True") not in ("True", "False"):
            raise BadRequestError("isBest is True or False")
        mean = float(fields["map"]) if kind == "final" else None
        best = fields.get("isBest") == "True"
        model.checkpoints.append(Checkpoint(int(fields["epoch"]), kind, best, mean, name, body))
        if kind == "final":
            model.status = "trained"
        return Reply(200, b"ok", "text/plain")

    def _beat(self, model: Model, body: dict[str, Any]) -> Reply:
        if not re.fullmatch(r"python-\d+\.\d+\.\d+\S*-local", body["agent"]):
            raise BadRequestError("agent is python-VERSION-local")
        if body["agentId"] is None:
            self._agents += 1
            body = {**body, "agentId": f"agent-{self._agents}"}
        model.beats.append(body)
        return Reply.of({"data": {"agentId": body["agentId"]}})


def strict_json(body: bytes) -> Any:
    """JSON as the standard has it: no NaN, no Infinity."""

    def refuse(name: str) -> None:
        raise BadRequestError(f"{name} is not JSON")

    return json.loads(body, parse_constant=refuse)


def multipart(request: Request) -> tuple[dict[str, str], str, bytes]:
    """Text fields, and the name and bytes of the one file."""
    match = re.fullmatch(r"multipart/form-data; boundary=(\S+)", request.headers["content-type"])
    if not match:
        raise BadRequestError("not multipart/form-data")
    mark = b"--" + match[1].encode()
    first, *parts, last = (b"\r\n" + request.body).split(b"\r\n" + mark)
    if first or last != b"--\r\n":
        raise BadRequestError("the form does not begin and end with its boundary")
    fields: dict[str, str] = {}
    files: list[tuple[str, bytes]] = []
    for part in parts:
        head, _, body = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        name = re.search(r'[; ]name="([^"]*)"', head.decode())
        file_name = re.search(r'filename="([^"]*)"', head.decode())
        if file_name:
            files.append((file_name[1], body))
        elif name:
            fields[name[1]] = body.decode()
    if len(files) != 1:
        raise BadRequestError("one file, please")
    return fields, *files[0]
