"""Writing into one ClearML task: what each kind of item becomes there, confirmed by the server.

Everything but log lines is an upsert by name. Configuration, script and runtime are replaced whole
by the server, so they are read first and written with what is new in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway.sinks import clearml_events as wire
from gateway.sinks import clearml_records as records
from gateway.sinks.base import Media, Params, Refused, SinkError, Text, Unavailable, Value
from gateway.sinks.clearml_api import Connection

LOG_PAGE = 500  #: log lines asked for at once when reading back


class TaskWriter:
    """Its methods return when the server has confirmed; see `base.py` for what they raise."""

    def __init__(self, api: Connection, place: wire.Place, project: str) -> None:
        self._api = api
        self._place = place
        self._task = place.task
        self._project = project  # its id
        self._known_good: list[str] = []  # an event this server took, to tell a sick one by
        self._doubtful: set[str] = set()  # log lines of a request whose outcome is not known

    def read(self, field: str) -> Any:
        """A field of the task as it is now, None if it has none."""
        query = {"id": [self._task], "only_fields": [field], "search_hidden": True}
        found = self._api.call("tasks.get_all", query)["tasks"]
        return found[0].get(field) if found else None

    def _edit(self, **fields: Any) -> None:
        self._api.call("tasks.edit", {"task": self._task, "force": True, **fields})

    # --- events --------------------------------------------------------------

    def events(self, lines: list[str]) -> None:
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

    def texts(self, texts: list[Text], again: bool) -> None:
        """The one kind that the server cannot tell apart: read back when it may be there."""
        names = {wire.text_identity(item) for item in texts}
        if again or not self._doubtful.isdisjoint(names):
            there = self._read_back(texts)
            texts = [item for item in texts if wire.text_identity(item) not in there]
        if texts:
            self._doubtful |= names  # until the last answer is here; a raise leaves them so
            for batch in wire.batches([wire.text_line(item, self._place) for item in texts]):
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

    # --- parameters, configuration, script -----------------------------------

    def params(self, items: list[Params]) -> None:
        """Hyperparameters and the configuration of each rank, then what is known of the code."""
        if not items:
            return
        merged = {(p["section"], p["name"]): p for i in items for p in records.param_items(i)}
        self.hyperparams(list(merged.values()))
        self._configuration(items)
        source = {k: v for item in items for k, v in records.source_values(item).items()}
        if source:
            self._source(source)

    def hyperparams(self, params: list[dict[str, str]]) -> None:
        if params:
            body = {"task": self._task, "hyperparams": params, "replace_hyperparams": "none"}
            self._api.call("tasks.edit_hyper_params", {**body, "force": True})

    def _configuration(self, items: list[Params]) -> None:
        ranks: dict[int, dict[str, Value]] = {}
        for item in items:
            ranks.setdefault(item.rank, {}).update(records.own_values(item))
        if not any(ranks.values()):
            return
        there = self.read("configuration") or {}
        new = [
            records.configuration_item(there, rank, values)
            for rank, values in ranks.items()
            if values
        ]
        body = {"task": self._task, "configuration": new, "replace_configuration": False}
        self._api.call("tasks.edit_configuration", {**body, "force": True})

    def _source(self, values: Mapping[str, Value]) -> None:
        self._script(records.script(values))
        runtime = records.runtime(values)
        if runtime:
            self._edit(runtime={**(self.read("runtime") or {}), **runtime})

    def _script(self, fields: Mapping[str, Any]) -> None:
        if fields:
            self._edit(script={**(self.read("script") or {}), **fields})

    # --- files ---------------------------------------------------------------

    def media(self, item: Media) -> list[str]:
        """Upload the file and make its record; the event that shows it, if there is one."""
        path = wire.media_path(item, self._place)
        if item.what == "table":
            line = wire.media_line(item, self._place, path, "")
            if line is not None:
                return [line]
        diff = records.uncommitted(item)
        if diff is not None:
            self._script({"diff": diff})
            return []
        url = self._api.upload(item.path, path)
        if item.what == "checkpoint":
            self._model(item, url)
            return []
        line = wire.media_line(item, self._place, path, url)
        if line is not None:
            return [line]
        body = {"task": self._task, "artifacts": [records.artifact(item, url)], "force": True}
        self._api.call("tasks.add_or_update_artifacts", body)
        return []

    def _model(self, item: Media, url: str) -> None:
        """One model document per key: models.create is no upsert, so look for it by task."""
        document, entry = records.model_names(item, self._place)
        about = {k: v for k, v in records.model_fields(item).items() if v is not None}
        fields = {**about, "name": document, "uri": url, "task": self._task}
        fields["labels"] = records.labels(self.read("hyperparams") or {})
        query = {"task": [self._task], "only_fields": ["id", "name"]}
        found = self._api.call("models.get_all", query)["models"]
        model = next((m["id"] for m in found if m.get("name") == document), None)
        if model is None:
            model = self._api.call("models.create", {**fields, "project": self._project})["id"]
        self._api.call("models.edit", {"model": model, **fields, "iteration": item.step or 0})
        metadata = {"metadata": records.model_metadata(item), "replace_metadata": True}
        self._api.call("models.add_or_update_metadata", {"model": model, **metadata})
        link = {"task": self._task, "model": model, "type": "output"}
        self._api.call("tasks.add_or_update_model", {**link, "name": entry})
