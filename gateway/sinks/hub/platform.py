"""Ultralytics Platform: training webhooks, an event per epoch, checkpoints in three steps.

Written from the vendor's public contract; the answers' unknown fields are ignored.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from gateway.sinks.base import Media, Off, Params, Text
from gateway.sinks.hub.carry import HubSink
from gateway.sinks.hub.epochs import Closed, rank_key
from gateway.sinks.hub.http import Http, KeyHeader, NoAnswer, Wire
from gateway.sinks.hub.turn import Turn, item_mark, request_mark
from gateway.sinks.naming import rank_prefix

EVENTS = "/api/webhooks/training/metrics"
UPLOADS = "/api/webhooks/models/upload"
KEY_NAME = "ULTRALYTICS_API_KEY"
ROOT_NAME = "ULTRALYTICS_PLATFORM_URL"
ROOT = "https://platform.ultralytics.com"

#: One request holds many lines: the limit is 100 requests a minute for everything.
CHUNK_LINES = 1000
CHUNK_CHARACTERS = 64 * 1024

IGNORED = "ignored by the platform"

#: Ultralytics' names for what the platform shows beside the first epoch.
MODEL_INFO = {
    "model/parameters": "parameters",
    "model/GFLOPs": "gflops",
    "model/speed_PyTorch(ms)": "speedMs",
}


def connect() -> Wire:
    """The platform the environment names, or `Off`."""
    key = os.environ.get(KEY_NAME, "").strip()
    if not key:
        raise Off(
            f"hub: {KEY_NAME} is not set. Make a key at {ROOT} under Settings, API keys, and set "
            "it where the gateway starts"
        )
    root = os.environ.get(ROOT_NAME) or ROOT
    return Http(root, KeyHeader("Authorization", f"Bearer {key}"), key, KEY_NAME)


class PlatformSink(HubSink):
    """Carries one run to one model. `stop_asked` is set when someone stopped it over there."""

    def _connect(self) -> Wire:
        return connect()

    def _greet(self) -> None:
        if not re.fullmatch(r"[^/\s]+/[^/\s]+", self.config.project or ""):
            raise Off('hub: set project = "owner/project-slug" in [sinks.hub]')

    def _take_params(self, params: Sequence[Params], turn: Turn) -> None:
        fresh = [item for item in params if not turn.is_confirmed(item_mark(item))]
        args = dict(turn.get("args", {}))
        for item in params:
            args.update({rank_key(item.rank, key): str(v) for key, v in item.values.items()})
        turn.put("args", args)
        if fresh:
            if turn.get("model"):
                self._reopen(turn)
            else:
                self._model(turn)
            turn.confirm([item_mark(item) for item in fresh])
        turn.sent.delivered += len(params)

    def _reopen(self, turn: Turn) -> None:
        """As a resumed run does it: a second start, by modelId."""
        self._event("training_started", self._start_data(turn.get("args", {})), turn)

    def _model(self, turn: Turn) -> dict[str, Any]:
        """The model's id and run id, made at the first need.

        They are kept and never derived: the platform adds -2 to a name that is taken.
        """
        model = turn.get("model")
        return model if model else self._create(turn, lambda: self._start(turn))

    def _start(self, turn: Turn) -> dict[str, Any]:
        body = {
            "event": "training_started",
            "data": self._start_data(turn.get("args", {})),
            "project": self.config.project,
            "name": slug(self._run.name) or slug(self._run.run_id) or "run",
        }
        answer = self._post(body, turn)
        if not answer.get("modelId"):
            raise NoAnswer("hub: the platform confirmed the start without naming a model")
        return {"id": answer["modelId"], "run_id": answer.get("runId")}

    def _start_data(self, args: dict[str, str]) -> dict[str, Any]:
        data: dict[str, Any] = {"trainArgs": args, "environment": {"hostname": self._run.node}}
        if args.get("epochs", "").isdecimal():
            data["epochs"] = int(args["epochs"])
        if "device" in args:
            data["device"] = args["device"]
        return data

    def _event(self, event: str, data: dict[str, Any], turn: Turn) -> bool:
        """Send an event of the model; False when the platform says that it did not take it."""
        model = self._model(turn)
        answer = self._post({"event": event, "data": data, "modelId": model["id"]}, turn)
        if answer.get("runId") not in (None, model["run_id"]):
            turn.put_now("model", {**model, "run_id": answer["runId"]})
        return not answer.get("ignored")

    def _post(self, body: dict[str, Any], turn: Turn) -> dict[str, Any]:
        answer = self._wire.call("POST", EVENTS, body)
        if answer.get("received") is not True:
            raise NoAnswer(f"hub: the platform did not confirm {body['event']}")
        turn.doubtful = False
        if answer.get("cancelled"):
            self.stop_asked = str(answer.get("reason") or "cancelled on Ultralytics Platform")
        return answer

    def _post_epochs(self, closed: Sequence[Closed], turn: Turn) -> None:
        for one in closed:
            data = self._epoch_data(one, turn)
            mark = request_mark(data)
            if not turn.is_confirmed(mark):
                if not self._event("epoch_end", data, turn):
                    turn.sent.skip(IGNORED, one.points)
                    continue
                turn.confirm([mark])
            turn.sent.delivered += one.points

    def _epoch_data(self, one: Closed, turn: Turn) -> dict[str, Any]:
        data: dict[str, Any] = {"epoch": one.epoch, "metrics": without_nan(one.values)}
        fitness = one.values.get("fitness")
        if fitness is not None and math.isfinite(fitness):
            best = turn.get("best")
            if best is None or fitness >= best[1]:
                best = [one.epoch, fitness]
                turn.put("best", best)
            data["fitness"], data["best_fitness"] = fitness, best[1]
        info = {field: one.values[key] for key, field in MODEL_INFO.items() if key in one.values}
        if info:
            data["modelInfo"] = without_nan(info)
        return data

    def _take_texts(self, texts: Sequence[Text], turn: Turn) -> None:
        fresh = [item for item in texts if not turn.is_confirmed(item_mark(item))]
        turn.sent.delivered += len(texts) - len(fresh)
        for chunk in chunks(fresh):
            lines = [rank_prefix(item.rank) + item.text.rstrip("\n") for item in chunk]
            content = "\n".join(lines)
            # The contract wants a rising clock; the line's own makes a repeat carry the same id.
            chunk_id = max(chunk[0].wall_ns // 1_000_000, turn.get("chunk_id", 0) + 1)
            self._model(turn)
            doubtful = turn.doubtful
            data = {"chunkId": chunk_id, "content": content, "lineCount": content.count("\n") + 1}
            if not self._event("console_output", data, turn):
                turn.sent.skip(IGNORED, len(chunk))
                continue
            turn.put_now("chunk_id", chunk_id)
            turn.doubt(len(chunk) if doubtful else 0)
            turn.confirm([item_mark(item) for item in chunk])
            turn.sent.delivered += len(chunk)

    def _upload(self, media: Media, turn: Turn) -> None:
        model = self._model(turn)
        doubtful = turn.doubtful
        name = re.sub(r"[^\w.-]", "_", media.name)
        place = {"filename": name, "modelId": model["id"], "runId": model["run_id"]}
        answer = self._wire.call("POST", UPLOADS, place)
        if not answer.get("uploadUrl") or not answer.get("gcsPath"):
            raise NoAnswer("hub: the platform named no place for the checkpoint")
        self._wire.put_file(answer["uploadUrl"], media.path)
        saved = {
            "runId": model["run_id"],
            "modelPath": answer["gcsPath"],
            "uploadPath": answer.get("uploadPath"),
        }
        # Only this event promotes the file.
        if not self._event("checkpoint_saved", saved, turn):
            turn.sent.skip(IGNORED)
            return
        turn.doubt(int(doubtful))
        turn.confirm([item_mark(media)])
        turn.sent.delivered += 1
        if media.meta.get("best") or media.meta.get("final") or not turn.get("weights"):
            turn.put_now("weights", [answer["gcsPath"], media.size_bytes])

    def _finish(self, state: str, reason: str, turn: Turn) -> None:
        if state != "completed":
            self._summary_into_last_epoch(turn)
            error = f"{state}: {reason}" if reason else state
            self._event("training_failed", {"error": error}, turn)
            return
        held = turn.get("summary", {"values": {}, "items": 0})
        last = turn.get("last_epoch")
        record = {} if last is None else turn.get(f"epoch/{last}", {})
        results: dict[str, Any] = {"metrics": without_nan({**record, **held["values"]})}
        if turn.get("best"):
            results["bestEpoch"], results["bestFitness"] = turn.get("best")
        if turn.get("weights"):
            results["modelPath"], results["modelSize"] = turn.get("weights")
        data = {"results": results, "runId": self._model(turn)["run_id"]}
        if self._event("training_complete", data, turn):
            turn.sent.delivered += held["items"]
        else:
            turn.sent.skip(IGNORED, held["items"])
        turn.put("summary", None)


def chunks(texts: Sequence[Text]) -> Iterator[list[Text]]:
    """Lines in order, as many together as one request may hold."""
    chunk: list[Text] = []
    size = 0
    for item in texts:
        if chunk and (len(chunk) == CHUNK_LINES or size + len(item.text) > CHUNK_CHARACTERS):
            yield chunk
            chunk, size = [], 0
        chunk.append(item)
        size += len(item.text) + 1
    if chunk:
        yield chunk


def without_nan(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN or infinity and the platform takes null for them."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
