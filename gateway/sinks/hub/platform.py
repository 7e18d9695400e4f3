"""Ultralytics Platform: training webhooks, an event per epoch, checkpoints in three steps.

Written from the vendor's public contract; the answers' unknown fields are ignored.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gateway.sinks.base import Media, Off, Params, Rows, SinkError, Text
from gateway.sinks.hub import environment, machine
from gateway.sinks.hub.carry import FINAL, MODEL_INFO, HubSink, log
from gateway.sinks.hub.config import HubConfig
from gateway.sinks.hub.epochs import Closed
from gateway.sinks.hub.http import Http, KeyHeader, NoAnswer, Wire
from gateway.sinks.hub.pace import Limits, Pace, Paced, shared_file
from gateway.sinks.hub.results import CLASS_NAMES, Results, class_names, has_place
from gateway.sinks.hub.turn import Turn, item_mark, request_mark, row_mark
from gateway.sinks.naming import hub_key, rank_prefix

EVENTS = "/api/webhooks/training/metrics"
UPLOADS = "/api/webhooks/models/upload"
KEY_NAME = "ULTRALYTICS_API_KEY"
ROOT_NAME = "ULTRALYTICS_PLATFORM_URL"
ROOT = "https://platform.ultralytics.com"

UPLOADS_PER_MINUTE = 10
CONSOLE_GAP_SECONDS = 1.5  #: in which lines gather to one request
BEAT = "training_progress"
BEAT_SECONDS = 45.0  #: without a request, before one says that the run lives

CHUNK_LINES = 1000
CHUNK_CHARACTERS = 64 * 1024

FITNESS = "fitness"
IGNORED = "ignored by the platform"
NEWER_PLOT = "a newer plot of that name"
NO_RESULTS = "a plot of a run without results"
NO_CURVE = "a plot that is no curve of numbers"


def connect(config: HubConfig, shared: Path | None = None) -> Wire:
    """The platform the environment names, or `Off`; `shared` as in `HubSink`."""
    key = os.environ.get(KEY_NAME, "").strip()
    if not key:
        raise Off(
            f"hub: {KEY_NAME} is not set. Make a key at {ROOT} under Settings, API keys, and set "
            "it where the gateway starts"
        )
    root = os.environ.get(ROOT_NAME) or ROOT
    wire = Http(root, KeyHeader("Authorization", f"Bearer {key}"), key, KEY_NAME)
    calls = {"": config.requests_per_minute, UPLOADS: UPLOADS_PER_MINUTE}
    limits = Limits(calls, 60.0, {"console_output": CONSOLE_GAP_SECONDS})
    return Paced(wire, Pace(limits, shared_file(shared, root + key) if shared else None), _kind)


def _kind(path: str, body: Any) -> str:
    return str(body["event"]) if path == EVENTS else path


class PlatformSink(HubSink):
    """Carries one run to one model. `stop_asked` is set when someone stopped it over there."""

    _spoke_at = -math.inf

    def _connect(self) -> Wire:
        return connect(self.config, self._shared)

    def _greet(self) -> None:
        if not re.fullmatch(r"[^/\s]+/[^/\s]+", self.config.project or ""):
            raise Off('hub: set project = "owner/project-slug" in [sinks.hub]')

    def _take_params(self, params: Sequence[Params], turn: Turn) -> None:
        fresh = [item for item in params if not turn.is_confirmed(item_mark(item))]
        args = dict(turn.get("args", {}))
        for item in params:
            named = {hub_key(key, item.rank): str(v) for key, v in item.values.items()}
            args.update({name: text for name, text in named.items() if name is not None})
        turn.put("args", args)
        if fresh:
            if turn.get("model"):
                self._start_again(turn)
            else:
                self._model(turn)
            turn.confirm([item_mark(item) for item in fresh])
        turn.sent.delivered += len(params)

    def _reopen(self, turn: Turn) -> None:
        """A run that ended goes on. A model that was cancelled would stop it at once, so this one
        gets another."""
        if self._start_again(turn).get("cancelled"):
            self.stop_asked = ""
            self._give_up_model(turn)

    def _start_again(self, turn: Turn) -> dict[str, Any]:
        """As a resumed run does it: a second start, by modelId."""
        data = self._start_data(turn.get("args", {}), turn)
        return self._event("training_started", data, turn)

    def _model(self, turn: Turn) -> dict[str, Any]:
        """The model's id and run id, made at the first need.

        They are kept and never derived: the platform adds -2 to a name that is taken.
        """
        model = turn.get("model")
        return model if model else self._create(turn, lambda: self._start(turn))

    def _start(self, turn: Turn) -> dict[str, Any]:
        body = {
            "event": "training_started",
            "data": self._start_data(turn.get("args", {}), turn),
            "project": self.config.project,
            "name": slug(self._run.name) or slug(self._run.run_id) or "run",
        }
        answer = self._post(body, turn)
        if not answer.get("modelId"):
            raise NoAnswer("hub: the platform confirmed the start without naming a model")
        return {"id": answer["modelId"], "run_id": answer.get("runId")}

    def _start_data(self, args: dict[str, str], turn: Turn) -> dict[str, Any]:
        about, train_args = environment.apart(args)
        data: dict[str, Any] = {
            "trainArgs": train_args,
            "environment": {"hostname": self._run.node, **about},
        }
        if args.get("epochs", "").isdecimal():
            data["epochs"] = int(args["epochs"])
        if "device" in args:
            data["device"] = args["device"]
        return data | self._machine(turn)

    def _event(self, event: str, data: dict[str, Any], turn: Turn) -> dict[str, Any]:
        """Send an event of the model; `ignored` in the answer: the platform did not take it."""
        model = self._model(turn)
        with self._there(turn):
            answer = self._post({"event": event, "data": data, "modelId": model["id"]}, turn)
        if answer.get("runId") not in (None, model["run_id"]):
            turn.put_now("model", {**turn.get("model"), "run_id": answer["runId"]})
        return answer

    def _post(self, body: dict[str, Any], turn: Turn) -> dict[str, Any]:
        answer = self._wire.call("POST", EVENTS, body)
        if answer.get("received") is not True:
            raise NoAnswer(f"hub: the platform did not confirm {body['event']}")
        self._spoke_at = self._monotonic()
        if answer.get("cancelled") or answer.get("action") == "training_terminated":
            self.stop_asked = str(answer.get("reason") or "cancelled on Ultralytics Platform")
        for name in ("warning", "ignored"):
            self._say(name, answer.get(name), turn)
        return answer

    def _say(self, name: str, text: Any, turn: Turn) -> None:
        """What the platform remarks, once."""
        if text and text != turn.get(f"said {name}"):
            turn.put_now(f"said {name}", str(text))
            log.warning("Ultralytics Platform says %s: %s", name, text)

    def _beat(self) -> None:
        """Nothing else tells the platform that a quiet run lives, or us that it is to stop."""
        if self._monotonic() - self._spoke_at < BEAT_SECONDS:
            return
        turn = Turn(self._memory)
        if not turn.get("model") or turn.get("closed"):
            return
        last = turn.get("last_epoch")
        data = {} if last is None else {"epoch": last}
        self._spoke_at = self._monotonic()
        try:
            self._event(BEAT, data, turn)
        except SinkError as error:
            log.info("sign of life not delivered: %s", error)  # there was no item in it

    def _machine(self, turn: Turn) -> dict[str, Any]:
        values = turn.get("machine")
        return {"system": machine.as_shown(values)} if values else {}

    def _take_machine(self, rows: Sequence[Rows], turn: Turn) -> None:
        """The newest sample of the first node that logged one."""
        node = turn.get("machine_rank", rows[0].rank)
        turn.put("machine_rank", node)
        own = [part for part in rows if part.rank == node and len(part.seq)]
        others = sum(part.items for part in rows if part.rank != node)
        turn.sent.skip(machine.OTHER_NODE, others)
        older = sum(part.items for part in rows) - others
        if own:
            newest = max(own, key=lambda part: int(part.wall_ns[-1]))
            turn.put("machine", machine.sample(newest))
            older -= len(newest.columns)
            self._send_machine(newest, turn)
        turn.sent.skip(machine.NOT_NEWEST, older)

    def _send_machine(self, newest: Rows, turn: Turn) -> None:
        items, mark = len(newest.columns), row_mark(newest)
        if not turn.is_confirmed(mark):
            self._model(turn)
            with turn.once([mark], items):
                answer = self._event("system_metrics", self._machine(turn), turn)
            if answer.get("ignored"):
                turn.sent.skip(IGNORED, items)
                return
        turn.sent.delivered += items

    def _post_epochs(self, closed: Sequence[Closed], turn: Turn) -> None:
        for one in closed:
            data = self._epoch_data(one, turn)
            mark = request_mark(data)
            if not turn.is_confirmed(mark):
                if self._event("epoch_end", data, turn).get("ignored"):
                    turn.sent.skip(IGNORED, one.points)
                    continue
                turn.confirm([mark])
            turn.sent.delivered += one.points

    def _epoch_data(self, one: Closed, turn: Turn) -> dict[str, Any]:
        metrics = {k: v for k, v in one.values.items() if self._in_metrics(k)}
        data: dict[str, Any] = {"epoch": one.epoch, "metrics": without_nan(metrics)}
        fitness = one.values.get(FITNESS)
        if fitness is not None and math.isfinite(fitness):
            best = turn.get("best")
            if best is None or fitness >= best[1]:
                best = [one.epoch, fitness]
                turn.put("best", best)
            data["fitness"], data["best_fitness"] = fitness, best[1]
        data |= self._machine(turn)
        info = {field: one.values[key] for key, field in MODEL_INFO.items() if key in one.values}
        if info:
            data["modelInfo"] = without_nan(info)
        return data

    def _take_texts(self, texts: Sequence[Text], turn: Turn) -> None:
        fresh = [item for item in texts if not turn.is_confirmed(item_mark(item))]
        turn.sent.delivered += len(texts) - len(fresh)
        for chunk in chunks(fresh):
            self._send_chunk(chunk, turn)

    def _name_of(self, key: str, rank: int) -> str | None:
        if key == FITNESS and rank <= 0:
            return key  # has a place of its own, whatever the run's source
        return super()._name_of(key, rank)

    def _in_metrics(self, key: str) -> bool:
        """Ultralytics tells fitness and the model's figures beside the metrics, not in them."""
        return not self._run.source or key not in (FITNESS, *MODEL_INFO)

    def _send_chunk(self, chunk: Sequence[Text], turn: Turn) -> None:
        content = "\n".join(marked(item) for item in chunk)
        # The contract wants a rising clock; the line's own makes a repeat carry the same id.
        chunk_id = max(chunk[0].wall_ns // 1_000_000, turn.get("chunk_id", 0) + 1)
        self._model(turn)
        data = {"chunkId": chunk_id, "content": content, "lineCount": content.count("\n") + 1}
        with turn.once([item_mark(item) for item in chunk], len(chunk)):
            answer = self._event("console_output", data, turn)
        turn.put_now("chunk_id", chunk_id)
        if answer.get("ignored"):
            turn.sent.skip(IGNORED, len(chunk))
        else:
            turn.sent.delivered += len(chunk)

    def _take_table(self, media: Media, turn: Turn) -> bool:
        """Curves and their like wait for the end, as their place is in the results."""
        if not has_place(media.key) or media.rank > 0:
            return False
        before = turn.get("plots", [])
        others = [plot for plot in before if plot[1] != media.key]
        turn.put("plots", [*others, [str(media.path), media.key, False]])
        turn.sent.skip(NEWER_PLOT, sum(plot[1] == media.key and not plot[2] for plot in before))
        return True

    def _upload(self, media: Media, turn: Turn) -> None:
        model = self._model(turn)
        name = re.sub(r"[^\w.-]", "_", media.name)
        place = {"filename": name, "modelId": model["id"], "runId": model["run_id"]}
        with self._there(turn):
            answer = self._wire.call("POST", UPLOADS, place)
        if not answer.get("uploadUrl") or not answer.get("gcsPath"):
            raise NoAnswer("hub: the platform named no place for the checkpoint")
        self._wire.put_file(answer["uploadUrl"], media.path)
        saved = {
            "runId": model["run_id"],
            "modelPath": answer["gcsPath"],
            "uploadPath": answer.get("uploadPath"),
        }
        with turn.once([item_mark(media)], 1):
            told = self._event("checkpoint_saved", saved, turn)  # only this promotes the file
        if told.get("ignored"):
            turn.sent.skip(IGNORED)
            return
        turn.sent.delivered += 1
        if media.meta.get("best") or media.meta.get("final") or not turn.get("weights"):
            turn.put_now("weights", [answer["gcsPath"], media.size_bytes])

    def _finish(self, state: str, reason: str, turn: Turn) -> None:
        if state != "completed":
            turn.sent.skip(NO_RESULTS, sum(not told for _, _, told in turn.get("plots", [])))
            turn.put("plots", None)
            self._summary_into_last_epoch(turn)
            error = f"{state}: {reason}" if reason else state
            failure = {"error": error, "code": failure_code(state, reason)}
            self._event("training_failed", failure, turn)
            return
        held = turn.get("summary", {"values": {}, "items": 0})
        # What comes after an end may end it again, and the platform keeps the last word alone.
        values = {**turn.get("told", {}), **held["values"]}
        names = class_names(values.get(CLASS_NAMES))
        results: dict[str, Any] = {"metrics": without_nan(self._final_metrics(values, turn))}
        if turn.get("best"):
            results["bestEpoch"], results["bestFitness"] = turn.get("best")
        if turn.get("weights"):
            results["modelPath"], results["modelSize"] = turn.get("weights")
        tables = Results(names)
        shown = self._read_tables(tables, turn)
        results |= {"validation": tables.validation} if tables.validation else {}
        data: dict[str, Any] = {"results": results, "runId": self._model(turn)["run_id"]}
        data |= {"classNames": names} if names else {}
        data |= {"plots": tables.plots} if tables.plots else {}
        if self._event("training_complete", data, turn).get("ignored"):
            turn.sent.skip(IGNORED, held["items"] + shown)
        else:
            turn.sent.delivered += held["items"] + shown
        turn.put("summary", None)
        turn.put("told", values)

    def _final_metrics(self, values: dict[str, Any], turn: Turn) -> dict[str, Any]:
        """The summary beside the last epoch's values; of Ultralytics its final evaluation, as its
        own callback tells it, with the last epoch's fitness."""
        last = turn.get("last_epoch")
        record = {} if last is None else turn.get(f"epoch/{last}", {})
        evaluated = {k: v for k, v in values.items() if k.startswith(FINAL)}
        if self._run.source and evaluated:
            values = evaluated
            record = {key: value for key, value in record.items() if key == FITNESS}
            if record:
                values.pop(FINAL + FITNESS, None)
        final = {k.removeprefix(FINAL): v for k, v in values.items() if k != CLASS_NAMES}
        return {k: v for k, v in record.items() if k not in MODEL_INFO} | final

    def _read_tables(self, tables: Results, turn: Turn) -> int:
        """How many have a place and were not told before; what has none is skipped."""
        kept: list[list[Any]] = []
        shown = 0
        for path, key, told in sorted(turn.get("plots", []), key=lambda one: one[1]):
            try:
                good = tables.take(key, Path(path))
            except (OSError, ValueError, KeyError, IndexError, TypeError):
                good = False
            if not good:
                turn.sent.skip(NO_CURVE, 0 if told else 1)
                continue
            kept.append([path, key, True])
            shown += not told
        turn.put("plots", kept)
        return shown


def marked(item: Text) -> str:
    """An item's lines, each with its rank where ranks share the console."""
    prefix = rank_prefix(item.rank)
    return "\n".join(prefix + line for line in item.text.rstrip("\n").split("\n"))


def failure_code(state: str, reason: str) -> str:
    """One word for what a run ended with: `exit 137`, an exception's name, else the state."""
    if match := re.search(r"exited with (-?\d+)", reason):
        return f"exit {match[1]}"
    match = re.match(r"(?:rank -?\d+: )?([A-Za-z_][\w.]*(?:Error|Exception|Interrupt))\b", reason)
    return match[1] if match else state


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
