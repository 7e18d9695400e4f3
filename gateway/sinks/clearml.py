"""The ClearML sink: one run as one task, through the vendor's low-level API session.

Scalars, plots, images, parameters, artifacts and models are upserts by name, so a batch sent
twice changes nothing; log lines carry their identity and are read back before they are sent again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from gateway.sinks import clearml_events as wire
from gateway.sinks.base import (
    Item,
    Media,
    Memory,
    Off,
    Params,
    Refused,
    Rows,
    RunInfo,
    Sent,
    SinkError,
    Summary,
    Text,
    Unavailable,
)
from gateway.sinks.clearml_api import Connection

RUN_KEY = "rankgate_run"  #: the runtime key that holds the run id, beside the tag
TASK = "task"  #: what the task's id is remembered under
LOG_PAGE = 500  #: log lines asked for at once when reading back
ENDINGS = {"completed": "completed", "failed": "failed"}  #: any other state: stopped


class ClearmlConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`[sinks.clearml]`; addresses and keys come from the vendor's variables or ~/clearml.conf."""

    mode: Literal["online", "offline"] = "online"  #: offline: an export for import_offline_session
    project: str | None = None  #: left out = the run's project
    task: str | None = None  #: the task's name; left out = the run's name, else its id
    tags: tuple[str, ...] = ()  #: besides the run's own


def project_name(config: ClearmlConfig, run: RunInfo) -> str:
    return wire.long_enough(config.project or run.project or "rankgate")


def task_name(config: ClearmlConfig, run: RunInfo) -> str:
    return wire.long_enough(config.task or run.name or run.run_id)


def task_tags(config: ClearmlConfig, run: RunInfo) -> list[str]:
    return list(dict.fromkeys((*run.tags, *config.tags, wire.run_tag(run))))


class ClearmlSink:
    """See `base.Sink`. Reasons to skip: `not finite` (also: beyond a 32-bit float)."""

    stop_asked = ""

    def __init__(self, config: ClearmlConfig | None = None) -> None:
        self._config = config or ClearmlConfig()
        self._connection: Connection | None = None
        self._name = self._task = self._project = ""  # the last two are ids
        self._root = ""  # where the task's files go on the file server
        self._known_good: list[str] = []  # an event this server took, to tell a sick one by
        self._doubtful: set[str] = set()  # log lines of a request whose outcome is not known

    @property
    def _api(self) -> Connection:
        if self._connection is None:
            raise Unavailable("ClearML: not open")
        return self._connection

    def open(self, run: RunInfo, memory: Memory) -> None:
        if self._config.mode == "offline":
            raise Off("ClearML is set to offline: nothing is sent, the run can be exported")
        self._connection = self._connection or Connection()
        self._name = task_name(self._config, run)
        project = project_name(self._config, run)
        try:
            self._project = self._project_id(project)
            task = self._find(run, memory) or self._create(run)
            self._task = str(task["id"])
            if memory.get(TASK) != self._task:
                memory.put_now(TASK, self._task)
            self._root = wire.root_path(project, self._name, self._task)
            if task["status"] == "published":
                raise Off(f"ClearML task {self._task} is published, which makes it read-only")
            if task["status"] != "in_progress":
                self._api.call("tasks.started", {"task": self._task, "force": True})
        except Refused as error:
            raise Off(f"ClearML does not let us make the run's task: {error}") from None

    def _project_id(self, name: str) -> str:
        query = {
            "name": f"^{re.escape(name)}$",
            "only_fields": ["id", "name"],
            "search_hidden": True,
        }

        def look() -> str | None:
            found = self._api.call("projects.get_all", query)["projects"]
            return next((str(p["id"]) for p in found if p.get("name") == name), None)

        there = look()
        if there:
            return there
        try:
            made = self._api.call("projects.create", {"name": name, "description": ""})
            return str(made["id"])
        except Refused:  # somebody else made it just now, or the name is not allowed
            there = look()
            if there is None:
                raise
            return there

    def _find(self, run: RunInfo, memory: Memory) -> dict[str, Any] | None:
        """The task we remember, else the oldest of this project made for this run.

        The second covers a process killed, or an answer lost, between the creation and our note.
        """
        fields = {"only_fields": ["id", "status", "runtime", "tags"], "search_hidden": True}
        known = memory.get(TASK)
        if known:
            tasks = self._tasks({"id": [known], **fields})
            if not tasks:
                raise Off(f"ClearML task {known} was deleted there: replay the run for a new one")
            return tasks[0]
        for query in ({f"runtime.{RUN_KEY}": run.run_id}, {"tags": [wire.run_tag(run)]}):
            for task in self._tasks({**query, "project": [self._project], **fields}):
                # a server that does not know a field of the query leaves it out of account
                in_runtime = (task.get("runtime") or {}).get(RUN_KEY) == run.run_id
                if in_runtime or wire.run_tag(run) in (task.get("tags") or ()):
                    return task
        return None

    def _tasks(self, query: dict[str, Any]) -> list[dict[str, Any]]:
        found = self._api.call("tasks.get_all", {**query, "order_by": ["created"]})
        return list(found["tasks"])

    def _create(self, run: RunInfo) -> dict[str, Any]:
        body = {
            "name": self._name,
            "project": self._project,
            "type": "training",
            "tags": task_tags(self._config, run),
            "runtime": {RUN_KEY: run.run_id},  # in the same request: never a task without it
            "comment": f"rankgate run {run.run_id}",
        }
        return {"id": self._api.call("tasks.create", body)["id"], "status": "created"}

    def send(self, batch: Sequence[Item], again: bool) -> Sent:
        """Files first, then events and parameters, log lines last: those cannot be repeated."""
        sent = Sent()
        lines: list[str] = []
        params: dict[tuple[str, str], dict[str, str]] = {}
        texts: list[Text] = []
        for item in batch:
            new: list[dict[str, str]] = []
            if isinstance(item, Rows):
                points = wire.scalar_lines(item, self._task)
                sent.delivered += len(points)
                sent.skip("not finite", item.items - len(points))
                lines += points
                continue
            if isinstance(item, Text):
                texts.append(item)
            elif isinstance(item, Params):
                new = wire.param_items(item)
            elif isinstance(item, Summary):
                values, new = wire.summary_parts(item, self._task)
                lines += values
            else:
                lines += self._media(item)
            params.update({(p["section"], p["name"]): p for p in new})
            sent.delivered += 1
        self._send_events(lines)
        self._send_params(list(params.values()))
        self._send_texts(texts, again)
        return sent

    def _send_events(self, lines: list[str]) -> None:
        for batch in wire.batches(lines):
            self._add(batch)
            self._known_good = batch[-1:]

    def _add(self, batch: list[str]) -> None:
        try:
            self._api.add_events(batch)
        except Refused as refused:
            self._check_health(refused)
            raise

    def _check_health(self, refused: Refused) -> None:
        """Is it this batch, or would the server refuse anything now? Then nothing is its fault."""
        try:
            if self._known_good:
                self._api.add_events(self._known_good)  # an upsert: changes nothing
            else:
                self._api.call("events.get_task_log", {"task": self._task, "batch_size": 1})
        except SinkError as sick:
            raise Unavailable(f"ClearML takes no events at all: {refused}; {sick}") from None

    def _send_params(self, params: list[dict[str, str]]) -> None:
        if params:
            body = {"task": self._task, "hyperparams": params, "replace_hyperparams": "none"}
            self._api.call("tasks.edit_hyper_params", {**body, "force": True})

    def _send_texts(self, texts: list[Text], again: bool) -> None:
        names = {wire.text_identity(item) for item in texts}
        if again or not self._doubtful.isdisjoint(names):
            there = self._read_back(texts)
            texts = [item for item in texts if wire.text_identity(item) not in there]
        if texts:
            self._doubtful |= names  # until the last answer is here; a raise leaves them so
            for batch in wire.batches([wire.text_line(item, self._task) for item in texts]):
                self._add(batch)
        self._doubtful -= names

    def _read_back(self, texts: list[Text]) -> set[str]:
        """Which of these lines are in the task's log: the pages that cover their times."""
        if not texts:
            return set()
        wanted = {wire.text_identity(item) for item in texts}
        times = [item.wall_ns // 1_000_000 for item in texts]
        at, last, there = min(times) - 1, max(times), set()
        while at < last:
            page = self._api.call(
                "events.get_task_log",
                {
                    "task": self._task,
                    "navigate_earlier": False,
                    "from_timestamp": at,  # the server gives what is later than this
                    "batch_size": LOG_PAGE,
                },
            )["events"]
            there |= wanted.intersection(str(event.get("worker")) for event in page)
            if len(page) < LOG_PAGE:
                break
            # a page holds all lines of its last millisecond (events_iterator.py, _get_events)
            at = max(int(event["timestamp"]) for event in page)
        return there

    def _media(self, item: Media) -> list[str]:
        """Upload the file and make its record; the event that shows it, if there is one."""
        path = wire.media_path(self._root, item)
        if item.what == "table":
            line = wire.media_line(item, self._task, path, "")
            if line is not None:
                return [line]
        url = self._api.upload(item.path, path)
        if item.what == "checkpoint":
            self._model(item, url)
            return []
        line = wire.media_line(item, self._task, path, url)
        if line is not None:
            return [line]
        artifacts = [wire.artifact(item, url)]
        body = {"task": self._task, "artifacts": artifacts, "force": True}
        self._api.call("tasks.add_or_update_artifacts", body)
        return []

    def _model(self, item: Media, url: str) -> None:
        """One model document per key: models.create is no upsert, so look for it by task."""
        about = wire.model_fields(item, self._name)
        fields = {key: value for key, value in about.items() if value is not None}
        fields |= {"uri": url, "task": self._task}
        query = {"task": [self._task], "only_fields": ["id", "name"]}
        found = self._api.call("models.get_all", query)["models"]
        model = next((m["id"] for m in found if m.get("name") == fields["name"]), None)
        if model is None:
            model = self._api.call("models.create", {**fields, "project": self._project})["id"]
        self._api.call("models.edit", {"model": model, **fields, "iteration": item.step or 0})
        link = {"task": self._task, "model": model, "type": "output"}
        self._api.call("tasks.add_or_update_model", {**link, "name": wire.artifact_key(item)})

    def close(self, state: str, reason: str) -> Sent:
        status = ENDINGS.get(state, "stopped")
        body = {
            "task": self._task,
            "force": True,
            "status_reason": f"training {state}",
            "status_message": reason,
        }
        try:
            self._api.call(f"tasks.{status}", body)
        except Refused as error:
            raise Off(f"ClearML task {self._task} can no longer be changed: {error}") from None
        return Sent()
