"""A stand-in for Ultralytics Platform's training webhooks and its storage behind signed URLs."""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from tests.servers.base import Reply, Request, StandIn
from tests.servers.hub_legacy import BadRequestError, RateLimit, strict_json

KEY = "ul_" + "0123456789abcdef0123456789abcdef01234567"
EVENTS = "/api/webhooks/training/metrics"
UPLOADS = "/api/webhooks/models/upload"


@dataclass
class Model:
    id: str
    run_id: int
    project: str
    slug: str
    train_args: dict[str, str]
    start: dict[str, Any]  #: the whole data of the newest training_started
    starts: int = 1
    status: str = "running"
    metrics: dict[int, dict[str, float | None]] = field(default_factory=dict)
    events: dict[int, dict[str, Any]] = field(default_factory=dict)  #: epoch → epoch_end's data
    chunks: list[tuple[int, str]] = field(default_factory=list)
    checkpoints: list[tuple[str, bytes]] = field(default_factory=list)  #: promoted: name, bytes
    results: dict[str, Any] | None = None
    complete: dict[str, Any] = field(default_factory=dict)  #: training_complete's whole data
    completes: int = 0  #: how often it came
    error: str | None = None
    code: str | None = None
    system: list[dict[str, Any]] = field(default_factory=list)  #: of system_metrics
    beats: int = 0  #: signs of life
    cancelled: str | None = None
    ignored: str | None = None


@dataclass
class Upload:
    model: Model
    name: str
    body: bytes | None = None


class PlatformServer(StandIn):
    """`models` holds what was accepted; the readers give it by model id."""

    def __init__(
        self, key: str = KEY, calls: int | None = None, window_seconds: float = 60.0
    ) -> None:
        super().__init__()
        self.key = key
        self.limit = RateLimit(calls, window_seconds)
        self.models: dict[str, Model] = {}
        self.uploads: dict[str, Upload] = {}

    def epochs(self, model_id: str) -> dict[int, dict[str, float | None]]:
        with self.lock:
            return dict(self.models[model_id].metrics)

    def console(self, model_id: str) -> list[str]:
        """All lines, in the order they came."""
        with self.lock:
            return [line for _, text in self.models[model_id].chunks for line in text.split("\n")]

    def checkpoints(self, model_id: str) -> list[tuple[str, bytes]]:
        with self.lock:
            return list(self.models[model_id].checkpoints)

    def finals(self, model_id: str) -> dict[str, Any] | None:
        with self.lock:
            return self.models[model_id].results

    def status(self, model_id: str) -> str:
        with self.lock:
            return self.models[model_id].status

    def only(self) -> str:
        """The id of the one model there is."""
        with self.lock:
            (model_id,) = self.models
        return model_id

    def cancel(self, model_id: str, reason: str) -> None:
        with self.lock:
            self.models[model_id].cancelled = reason

    def handle(self, request: Request) -> Reply:
        try:
            return self._store(request) if request.path[:9] == "/storage/" else self._api(request)
        except BadRequestError as error:
            return Reply.of({"error": str(error)}, error.status)
        except (ValueError, KeyError, TypeError) as error:
            return Reply.of({"error": f"{type(error).__name__}: {error}"}, 400)

    def _api(self, request: Request) -> Reply:
        auth = request.headers.get("authorization", "")
        if not re.fullmatch(r"Bearer ul_[0-9a-f]{40}", auth) or auth[7:] != self.key:
            raise BadRequestError("Invalid or missing API key", 401)
        wait = self.limit.take()
        if wait is not None:
            reset = datetime.fromtimestamp(time.time() + wait, timezone.utc)
            return Reply.of(
                {"error": "Rate limit exceeded"},
                429,
                Retry_After=str(math.ceil(wait)),
                X_RateLimit_Reset=reset.isoformat(timespec="milliseconds")[:-6] + "Z",
            )
        body = strict_json(request.body)
        if request.method == "POST" and request.path == EVENTS:
            return self._event(body)
        if request.method == "POST" and request.path == UPLOADS:
            return self._place(body)
        raise BadRequestError("Not found", 404)

    def _model(self, body: dict[str, Any]) -> Model:
        if body["modelId"] not in self.models:
            raise BadRequestError("Model not found", 404)
        return self.models[body["modelId"]]

    def _event(self, body: dict[str, Any]) -> Reply:
        event, data = body["event"], body["data"]
        take = getattr(self, f"_take_{event}", None)
        if take is None:
            raise BadRequestError(f"unknown event {event}")
        if event == "training_started" and "modelId" not in body:
            model = self._start(body)
        else:
            model = self._model(body)
        answer: dict[str, Any] = {"received": True, "event": event, "modelId": model.id}
        answer |= {"runId": model.run_id, "modelSlug": model.slug, "mode": "remote"}
        if model.cancelled:
            answer |= {"cancelled": True, "action": "training_terminated"}
            answer["reason"] = model.cancelled
        if model.ignored:
            return Reply.of({**answer, "ignored": model.ignored})
        take(model, data)
        return Reply.of(answer)

    def _start(self, body: dict[str, Any]) -> Model:
        project, name = body["project"], body["name"]
        if not re.fullmatch(r"[a-z0-9-]+/[a-z0-9-]+", project):
            raise BadRequestError("project is owner/project-slug")
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
            raise BadRequestError("name is a slug")
        taken = {model.slug for model in self.models.values() if model.project == project}
        slug, number = name, 1
        while slug in taken:
            number += 1
            slug = f"{name}-{number}"
        count = len(self.models) + 1
        model = Model(f"model{count:04d}", 1000 + count, project, slug, {}, {}, starts=0)
        self.models[model.id] = model
        return model

    def _take_training_started(self, model: Model, data: dict[str, Any]) -> None:
        if not all(isinstance(value, str) for value in data["trainArgs"].values()):
            raise BadRequestError("all trainArgs are strings")
        model.train_args, model.start = data["trainArgs"], data
        model.starts += 1
        model.status = "running"

    def _take_epoch_end(self, model: Model, data: dict[str, Any]) -> None:
        epoch = data["epoch"]
        if type(epoch) is not int or epoch < 0:
            raise BadRequestError("epoch is a whole number from 0")
        if not all(v is None or type(v) in (int, float) for v in data["metrics"].values()):
            raise BadRequestError("a metric is a number or null")
        model.metrics[epoch] = data["metrics"]
        model.events[epoch] = data

    def _take_console_output(self, model: Model, data: dict[str, Any]) -> None:
        chunk, content = data["chunkId"], data["content"]
        if type(chunk) is not int or (model.chunks and chunk < model.chunks[-1][0]):
            raise BadRequestError("chunkId rises")
        if data["lineCount"] != content.count("\n") + 1:
            raise BadRequestError("lineCount is not the number of lines")
        model.chunks.append((chunk, content))

    def _take_checkpoint_saved(self, model: Model, data: dict[str, Any]) -> None:
        upload = self.uploads.get(data["modelPath"])
        if data["runId"] != model.run_id or upload is None or upload.model is not model:
            raise BadRequestError("not a checkpoint of this run")
        if upload.body is None:
            raise BadRequestError("nothing was uploaded there")
        model.checkpoints.append((upload.name, upload.body))

    def _take_training_complete(self, model: Model, data: dict[str, Any]) -> None:
        if data["runId"] != model.run_id or not isinstance(data["results"]["metrics"], dict):
            raise BadRequestError("results.metrics and runId, please")
        model.results, model.status = data["results"], "completed"
        model.complete, model.completes = data, model.completes + 1

    def _take_training_failed(self, model: Model, data: dict[str, Any]) -> None:
        if not isinstance(data["error"], str):
            raise BadRequestError("error is a text")
        model.error, model.status = data["error"], "failed"
        model.code = data.get("code")

    def _take_system_metrics(self, model: Model, data: dict[str, Any]) -> None:
        if not isinstance(data["system"], dict):
            raise BadRequestError("system, please")
        model.system.append(data["system"])

    def _take_training_progress(self, model: Model, data: dict[str, Any]) -> None:
        model.beats += 1

    def _place(self, body: dict[str, Any]) -> Reply:
        model = self._model(body)
        if body["runId"] != model.run_id or not re.fullmatch(r"[\w.-]+", body["filename"]):
            raise BadRequestError("runId and a plain filename, please")
        place = f"{model.id}/{len(self.uploads)}-{body['filename']}"
        self.uploads[f"gs://bucket/{place}"] = Upload(model, body["filename"])
        return Reply.of(
            {
                "uploadUrl": f"{self.url}/storage/{place}?signature=s3cret",
                "gcsPath": f"gs://bucket/{place}",
                "uploadPath": place,
                "modelId": model.id,
            }
        )

    def _store(self, request: Request) -> Reply:
        upload = self.uploads.get("gs://bucket/" + request.path.removeprefix("/storage/"))
        if request.method != "PUT" or upload is None or request.query != {"signature": "s3cret"}:
            raise BadRequestError("SignatureDoesNotMatch", 403)
        if "authorization" in request.headers:
            raise BadRequestError("only one auth mechanism allowed")
        if request.headers.get("content-type") != "application/octet-stream":
            raise BadRequestError("the signature is for application/octet-stream", 403)
        if "content-length" not in request.headers:
            raise BadRequestError("MissingContentLength", 411)
        upload.body = request.body
        return Reply(200, b"", "text/plain")
