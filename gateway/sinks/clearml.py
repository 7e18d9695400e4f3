"""The ClearML sink: one run as one task, through the vendor's low-level API session.

Scalars, plots, images, parameters, artifacts and models are upserts by name, so a batch sent
twice changes nothing; log lines carry their identity and are read back before they are sent again.
The task's iteration offset is never used: a step is what the rank logged.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec

from gateway.sinks import clearml_events as wire
from gateway.sinks import clearml_records as records
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
    Summary,
    Text,
    Unavailable,
    Value,
)
from gateway.sinks.clearml_api import Connection
from gateway.sinks.clearml_task import TaskWriter

RUN_KEY = "rankgate_run"  #: the runtime key that holds the run id, beside the tag
TASK = "task"  #: what the task's id is remembered under
ABORTED = "aborted"  #: what somebody's wish to stop is remembered under, until the run has ended
RUNNING = "running"  #: remembered while the task is meant to be in progress
STATUS = ["id", "status", "status_reason", "status_message"]  #: the fields that tell it
ENDED_HERE = "training "  #: how a status reason begins that this sink gave
LOOK_SECONDS = 10.0  #: between two looks at the task's status
PING_SECONDS = 60.0  #: the server stops a task unheard for 7200 s (tasks.conf, non_responsive)
NON_RESPONSIVE = "non-responsive"  #: stands in the reason when the server did that
DELETED = "ClearML task {} was deleted there: replay the run for a new one"
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
    """See `base.Sink`. Reasons to skip: `not finite` (also: beyond a 32-bit float), and
    `naming.NOT_IN_ORIGINAL`. A task that somebody aborts asks the training to stop."""

    def __init__(
        self,
        config: ClearmlConfig | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stop_asked = ""
        self._config = config or ClearmlConfig()
        self._monotonic = monotonic
        self._connection: Connection | None = None
        self._memory: Memory | None = None
        self._writer: TaskWriter | None = None
        self._place = wire.Place("", "", "", "")
        self._next_look = self._next_ping = 0.0

    @property
    def _api(self) -> Connection:
        if self._connection is None:
            raise Unavailable("ClearML: not open")
        return self._connection

    def open(self, run: RunInfo, memory: Memory) -> None:
        if self._config.mode == "offline":
            raise Off("ClearML is set to offline: nothing is sent, the run can be exported")
        self._connection = self._connection or Connection()
        self._memory = memory
        self.stop_asked = str(memory.get(ABORTED) or "")
        name, project = task_name(self._config, run), project_name(self._config, run)
        try:
            project_id = self._project_id(project)
            task = self._find(run, memory, project_id) or self._create(run, name, project_id)
            task_id = str(task["id"])
            if memory.get(TASK) != task_id:
                memory.put_now(TASK, task_id)
            root = wire.root_path(project, name, task_id)
            self._place = wire.Place(task_id, name, root, run.source)
            self._writer = TaskWriter(self._connection, self._place, project_id)
            if task["status"] == "published":
                raise Off(f"ClearML task {task_id} is published, which makes it read-only")
            if task["status"] != "in_progress" and not self.stop_asked:
                if memory.get(RUNNING):  # somebody did that while no process of this sink was there
                    self._take_stop(task)
                else:
                    self._start()
        except Refused as error:
            raise Off(f"ClearML does not let us make the run's task: {error}") from None
        self._next_look = self._next_ping = self._monotonic() + LOOK_SECONDS

    def _start(self) -> None:
        """Also what was ended: a run that comes back goes on in its task."""
        self._api.call("tasks.started", {"task": self._place.task, "force": True})
        assert self._memory is not None
        self._memory.put_now(RUNNING, True)

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

    def _find(self, run: RunInfo, memory: Memory, project: str) -> dict[str, Any] | None:
        """The task we remember, else the oldest of this project made for this run.

        The second covers a process killed, or an answer lost, between the creation and our note.
        """
        fields = {"only_fields": [*STATUS, "runtime", "tags"], "search_hidden": True}
        known = memory.get(TASK)
        if known:
            tasks = self._tasks({"id": [known], **fields})
            if not tasks:
                raise Off(DELETED.format(known))
            return tasks[0]
        for query in ({f"runtime.{RUN_KEY}": run.run_id}, {"tags": [wire.run_tag(run)]}):
            for task in self._tasks({**query, "project": [project], **fields}):
                # a server that does not know a field of the query leaves it out of account
                in_runtime = (task.get("runtime") or {}).get(RUN_KEY) == run.run_id
                if in_runtime or wire.run_tag(run) in (task.get("tags") or ()):
                    return task
        return None

    def _tasks(self, query: dict[str, Any]) -> list[dict[str, Any]]:
        found = self._api.call("tasks.get_all", {**query, "order_by": ["created"]})
        return list(found["tasks"])

    def _create(self, run: RunInfo, name: str, project: str) -> dict[str, Any]:
        body = {
            "name": name,
            "project": project,
            "type": "training",
            "system_tags": [
                "development"
            ],  # of what no agent runs: an abort is carried out at once
            "tags": task_tags(self._config, run),
            # the run id in the same request: never a task without it
            "runtime": {RUN_KEY: run.run_id, **({"hostname": run.node} if run.node else {})},
            "comment": f"rankgate run {run.run_id}",
        }
        return {"id": self._api.call("tasks.create", body)["id"], "status": "created"}

    def send(self, batch: Sequence[Item], again: bool) -> Sent:
        """Parameters first, as models are labelled by them; then files and the events that show
        them; log lines last, as those cannot be repeated."""
        self._look()
        writer = self._writer
        if writer is None:
            raise Unavailable("ClearML: not open")
        sent = Sent()
        lines: list[str] = []
        properties: dict[str, Value] = {}
        for item in batch:
            if isinstance(item, Rows):
                points, done = wire.scalar_lines(item, self._place)
                sent.add(done)
                lines += points
                continue
            if isinstance(item, Summary):
                values, others = wire.summary_parts(item, self._place)
                lines += values
                properties |= others
            sent.delivered += 1
        writer.params([item for item in batch if isinstance(item, Params)])
        writer.hyperparams(records.hyperparams(properties, records.PROPERTIES))
        for item in batch:
            if isinstance(item, Media):
                lines += writer.media(item)
        writer.events(lines)
        writer.texts([item for item in batch if isinstance(item, Text)], again)
        return sent

    def _look(self) -> None:
        """Now and then: say that the run lives, and see whether somebody has stopped the task."""
        now = self._monotonic()
        if now < self._next_look or self.stop_asked:
            return
        try:
            self._look_now()
            if now >= self._next_ping:
                self._api.call("tasks.ping", {"task": self._place.task})
                self._next_ping = now + PING_SECONDS
        except Refused as error:  # no fault of the batch that comes after this
            raise Unavailable(f"ClearML does not tell of the task: {error}") from None
        self._next_look = now + LOOK_SECONDS

    def _look_now(self) -> None:
        query = {"id": [self._place.task], "only_fields": STATUS, "search_hidden": True}
        found = self._tasks(query)
        if not found:
            raise Off(DELETED.format(self._place.task))
        [task] = found
        if task["status"] != "in_progress":
            self._take_stop(task)

    def _take_stop(self, task: dict[str, Any]) -> None:
        """Somebody changed the status: nothing is killed here, the ranks are asked to stop."""
        why = f"{task.get('status_reason') or ''} {task.get('status_message') or ''}".strip()
        if NON_RESPONSIVE in why or why.startswith(ENDED_HERE):
            self._start()  # the server did, unheard from for so long; or we, and did not note it
            return
        self.stop_asked = f"in ClearML the task was set to {task['status']}" + (
            f": {why}" if why else ""
        )
        assert self._memory is not None
        self._memory.put_now(ABORTED, self.stop_asked)

    def close(self, state: str, reason: str) -> Sent:
        status, message = ENDINGS.get(state, "stopped"), reason
        if self.stop_asked and state != "failed":
            status, message = "stopped", "; ".join(filter(None, (self.stop_asked, reason)))
        body = {
            "task": self._place.task,
            "force": True,
            "status_reason": f"{ENDED_HERE}{state}",
            "status_message": message,
        }
        try:
            self._api.call(f"tasks.{status}", body)
        except Refused as error:
            task = self._place.task
            raise Off(f"ClearML task {task} can no longer be changed: {error}") from None
        if self._memory is not None:
            self._memory.put(RUNNING, None)
            if self.stop_asked:
                self._memory.put(ABORTED, None)
        return Sent()
