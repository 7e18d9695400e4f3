"""The offline twin of the ClearML sink: the folder that `Task.import_offline_session` reads.

It needs no ClearML package. Events go to `metrics.jsonl` and `log.jsonl` (each line a list of
events), files under `data/` and `models/`, all else to `task.json`, which is replaced whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gateway.sinks import clearml_events as wire
from gateway.sinks import clearml_records as records
from gateway.sinks.base import (
    Item,
    Media,
    Memory,
    Params,
    Refused,
    Rows,
    RunInfo,
    Sent,
    Summary,
    Text,
)
from gateway.sinks.clearml import ClearmlConfig, project_name, task_name, task_tags

FILES_HOST = "CLEARML_FILES_HOST"


class ClearmlExport:
    """See `base.Sink`. `folder` is written to; `final` is where it will lie when it is imported.

    The importer finds everything by its place in the folder but models, which it takes from the
    absolute path in `task.json`: a folder that is moved elsewhere loses those. It uploads a model
    only to an address in the file, which is CLEARML_FILES_HOST at the time of the export; without
    one the model's file is also kept as an artifact, which any server takes.
    """

    stop_asked = ""

    def __init__(self, config: ClearmlConfig, folder: Path, final: Path | None = None) -> None:
        self._config = config
        self._folder = folder
        self._final = (final or folder).absolute()
        self._files_host = wire.public(os.environ.get(FILES_HOST, "").rstrip("/"))
        self._task: dict[str, Any] = {}
        self._place = wire.Place("", "", "", "")
        self._changed = False

    def open(self, run: RunInfo, memory: Memory) -> None:
        """Start the folder, or go on with the one that is there; `memory` is not needed."""
        task = f"offline-{hashlib.sha256(run.run_id.encode()).hexdigest()[:32]}"
        project, name = project_name(self._config, run), task_name(self._config, run)
        self._place = wire.Place(task, name, wire.root_path(project, name, task), run.source)
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            self._task = json.loads(self._file("task.json").read_bytes())
        except FileNotFoundError:
            self._task = self._new_task(run, project, name)
            self._write_task()
        for log in ("metrics.jsonl", "log.jsonl"):
            _cut_torn_tail(self._file(log))

    def _new_task(self, run: RunInfo, project: str, name: str) -> dict[str, Any]:
        return {
            "id": self._place.task,
            "name": name,
            "project_name": project,
            "type": "training",
            "comment": f"rankgate run {run.run_id}",
            "tags": task_tags(self._config, run),
            "hyperparams": {},
            "execution": {"artifacts": []},
            "offline_folder": self._final.as_posix(),
            "offline_output_models": [],
        }

    def _file(self, name: str) -> Path:
        return self._folder / name

    def _write_task(self) -> None:
        """By rename, so the file is whole at any time."""
        new = self._file("task.json.new")
        with new.open("w") as file:
            json.dump(self._task, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._file("task.json"))
        self._changed = False

    def send(self, batch: Sequence[Item], again: bool) -> Sent:
        """On disk when it returns; lines of a batch written before are told by their identity."""
        sent = Sent()
        lines: list[str] = []
        texts: list[Text] = []
        for item in batch:
            if isinstance(item, Rows):
                points, done = wire.scalar_lines(item, self._place)
                sent.add(done)
                lines += points
                continue
            if isinstance(item, Text):
                texts.append(item)
            elif isinstance(item, Params):
                self._params(item)
            elif isinstance(item, Summary):
                values, others = wire.summary_parts(item, self._place)
                lines += values
                self._hyperparams(records.hyperparams(others, records.PROPERTIES))
            else:
                lines += self._media(item)
            sent.delivered += 1
        there = self._written() if again else set()
        self._append("metrics.jsonl", lines)
        texts = [item for item in texts if wire.text_identity(item) not in there]
        self._append("log.jsonl", [wire.text_line(item, self._place) for item in texts])
        if self._changed:
            self._write_task()
        return sent

    def _params(self, item: Params) -> None:
        self._hyperparams(records.param_items(item))
        own = records.own_values(item)
        if own:
            there = self._task.setdefault("configuration", {})
            new = records.configuration_item(there, item.rank, own)
            there[new["name"]] = new
        source = records.source_values(item)
        self._task.setdefault("script", {}).update(records.script(source))
        self._task.setdefault("runtime", {}).update(records.runtime(source))
        self._changed = True

    def _hyperparams(self, items: list[dict[str, str]]) -> None:
        for item in items:
            self._task["hyperparams"].setdefault(item["section"], {})[item["name"]] = item
            self._changed = True

    def _written(self) -> set[str]:
        """The identities in `log.jsonl`; a batch cut short by a full disk leaves a torn line."""
        for log in ("metrics.jsonl", "log.jsonl"):
            _cut_torn_tail(self._file(log))
        try:
            with self._file("log.jsonl").open() as file:
                return {str(event["worker"]) for line in file for event in json.loads(line)}
        except FileNotFoundError:
            return set()

    def _append(self, name: str, lines: list[str]) -> None:
        if not lines:
            return
        with self._file(name).open("a") as file:
            for batch in wire.batches(lines):
                file.write(f"[{','.join(batch)}]\n")
            file.flush()
            os.fsync(file.fileno())

    def _media(self, item: Media) -> list[str]:
        path = wire.media_path(item, self._place)
        diff = records.uncommitted(item)
        if diff is not None:
            self._task.setdefault("script", {})["diff"] = diff
            self._changed = True
            return []
        if item.what == "checkpoint":
            self._model(item)
            if self._files_host:
                return []
        line = None
        if item.what != "checkpoint":
            # the importer puts the new task's address in place of this one
            line = wire.media_line(item, self._place, path, f"{self._final}/data/{path}")
        if line is None or item.what != "table":
            self._copy(item, self._folder / "data" / path)
        if line is not None:
            return [line]
        artifacts = self._task["execution"]["artifacts"]
        new = records.artifact(item, f"{self._final}/data/{path}")
        artifacts[:] = [old for old in artifacts if old["key"] != new["key"]] + [new]
        self._changed = True
        return []

    def _model(self, item: Media) -> None:
        # the importer calls the task's model by this file name, so it has to tell keys apart
        suffix = wire.ending(item.name)
        name = wire.path_part(wire.artifact_key(item)).removesuffix(suffix) + suffix
        place = f"models/{name}"
        self._copy(item, self._folder / place)
        about = {"name": records.model_names(item, self._place)[0], **records.model_fields(item)}
        weights = {
            "weights_filename": f"{self._final}/{place}",
            "target_filename": name,
            "iteration": item.step or 0,
            "update_comment": False,
        }
        model = {
            "id": f"offline-{hashlib.sha256(place.encode()).hexdigest()[:32]}",
            "init": about,
            "weights": weights,
            "output_uri": self._files_host or None,
        }
        models = self._task["offline_output_models"]
        models[:] = [old for old in models if old["id"] != model["id"]] + [model]
        self._changed = True

    def _copy(self, item: Media, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.part")
        try:
            shutil.copyfile(item.path, part)
        except FileNotFoundError:
            raise Refused(f"{item.name} is gone from the disk") from None
        part.replace(target)

    def close(self, state: str, reason: str) -> Sent:
        """The importer marks every task completed, so the state goes into its comment."""
        first = str(self._task["comment"]).partition("\n")[0]
        self._task["comment"] = f"{first}\ntraining {state}{': ' if reason else ''}{reason}"
        self._write_task()
        return Sent()


def _cut_torn_tail(path: Path) -> None:
    """A process killed while it wrote leaves half a line, on which the importer would stumble."""
    try:
        with path.open("rb+") as file:
            end = file.seek(0, os.SEEK_END)
            while end:
                start = max(0, end - 65536)
                file.seek(start)
                newline = file.read(end - start).rfind(b"\n")
                if newline >= 0:
                    file.truncate(start + newline + 1)
                    return
                end = start
            file.truncate(0)
    except FileNotFoundError:
        pass
