"""A stand-in for a ClearML API and file server (one address), as strict as the real one is.

Its rules follow the vendor's server source (2.x): event ids, what poisons a request, which status
may follow which. What it accepted is in plain fields and in the readers at the end.
"""

from __future__ import annotations

import base64
import email.parser
import email.policy
import hashlib
import json
import math
import re
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tests.servers.base import Reply, Request, StandIn

ACCESS_KEY = "stand-in-key"
SECRET_KEY = "stand-in-secret"
EVENT_TYPES = {"training_stats_scalar", "training_debug_image", "plot", "log"}
MAX_KEYWORD_BYTES = 32766  #: what Elasticsearch indexes as one keyword
MAX_FLOAT32 = 3.4028234663852886e38
MAX_LAST_METRICS = 2000  #: series of a task that its table of last values holds
#: titles whose points do not count as iterations of the task
NO_ITERATION = {":monitor:machine", ":monitor:gpu"}
NON_RESPONSIVE_SECONDS = 7200  #: after so long without a sign of life a task is stopped
BULK = 500  #: events are indexed in chunks of this size; a bad one ends it after its chunk
#: task fields tasks.create and tasks.edit take
TASK_FIELDS = {
    "name",
    "tags",
    "system_tags",
    "type",
    "comment",
    "parent",
    "project",
    "output_dest",
    "execution",
    "script",
    "hyperparams",
    "configuration",
    "runtime",
    "models",
    "container",
    "error",
}
#: not errors: paging and the fields to answer with
QUERY_WORDS = {
    "only_fields",
    "order_by",
    "page",
    "page_size",
    "search_hidden",
    "shallow_search",
    "_allow_extra_fields_",
    "method",
}
NEXT_STATUS = {
    "created": {"queued", "in_progress"},
    "queued": {"created", "in_progress", "stopped"},
    "in_progress": {"stopped", "failed", "created", "completed"},
    "stopped": {"created", "failed", "queued", "in_progress", "published", "completed"},
    "completed": {"created", "failed", "in_progress", "published"},
    "failed": {"created", "stopped", "published"},
    "published": set(),
}


class ApiError(Exception):
    def __init__(self, code: int, subcode: int, message: str) -> None:
        super().__init__(message)
        self.code, self.subcode = code, subcode


def _b64(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000000+00:00", time.gmtime())


class ClearmlServer(StandIn):
    """`url` is the API server, `files_url` the file server, `env` what a client needs."""

    def __init__(self) -> None:
        super().__init__()
        self.files_url = f"{self.url}/files"
        self.projects: dict[str, dict[str, Any]] = {}
        self.tasks: dict[str, dict[str, Any]] = {}
        self.models: dict[str, dict[str, Any]] = {}
        self.events: dict[str, dict[str, Any]] = {}  #: by the server's id, in order of arrival
        self.files: dict[str, bytes] = {}  #: by path below /files/
        self.tokens: set[str] = set()
        self.calls: list[tuple[str, Any]] = []  #: (service.action, body) that passed auth
        self.batch_sizes: list[tuple[int, int]] = []  #: (events, bytes) of each add_batch
        self.accepted_scalar_sends = 0  #: also counts the same point sent again
        self.seconds = 0.0  #: the clock of `watchdog`; tests move it
        self.heard: dict[str, float] = {}  #: task → when an event, edit or ping came

    @property
    def env(self) -> dict[str, str]:
        return {
            "CLEARML_API_HOST": self.url,
            "CLEARML_WEB_HOST": self.url,
            "CLEARML_FILES_HOST": self.files_url,
            "CLEARML_API_ACCESS_KEY": ACCESS_KEY,
            "CLEARML_API_SECRET_KEY": SECRET_KEY,
        }

    # -- requests -----------------------------------------------------------------------------

    def handle(self, request: Request) -> Reply:
        match = re.fullmatch(r"(?:/v(\d+(?:\.\d+)?))?/([a-z_]+)\.([a-z_]+)", request.path)
        if not match:
            return self._file(request)
        version, service, action = match.groups()
        endpoint = f"{service}.{action}"
        try:
            data = self._call(request, version, endpoint)
        except ApiError as error:
            return self._reply(endpoint, version, {}, error.code, error.subcode, str(error))
        return self._reply(endpoint, version, data, 200, 0, "OK")

    def _call(self, request: Request, version: str | None, endpoint: str) -> dict[str, Any]:
        if endpoint == "auth.login":
            return self._login(request)
        self._check_token(request)
        if not version:
            raise ApiError(400, 1, f"endpoint is not supported: {endpoint} of version 1.0")
        handler: Callable[[Any], dict[str, Any]] | None = getattr(
            self, "_" + endpoint.replace(".", "_"), None
        )
        if handler is None:
            raise ApiError(400, 1, f"endpoint is not supported: {endpoint}")
        body = self._body(request, endpoint)
        self.calls.append((endpoint, body))
        data = handler(body)
        if endpoint.partition(".")[2] not in ("get_all", "get_by_id", "get_task_log"):
            named = body[0] if isinstance(body, list) else body
            self.heard[named.get("task") or data.get("id", "")] = self.seconds
        return data

    def _body(self, request: Request, endpoint: str) -> Any:
        if request.headers.get("content-type", "").startswith("application/json-lines"):
            if endpoint != "events.add_batch":
                raise ApiError(400, 12, "validation error: not a batch endpoint")
            events = [self._json(line) for line in request.body.split(b"\n") if line]
            self.batch_sizes.append((len(events), len(request.body)))
            return events
        body = self._json(request.body or b"{}")
        if not isinstance(body, dict):
            raise ApiError(400, 12, "validation error: body is not an object")
        return body

    def _json(self, text: bytes) -> Any:
        try:
            return json.loads(text)
        except ValueError:
            raise ApiError(400, 12, "validation error: malformed JSON") from None

    def _reply(
        self, endpoint: str, version: str | None, data: Any, code: int, subcode: int, text: str
    ) -> Reply:
        ident = uuid.uuid4().hex
        meta = {
            "id": ident,
            "trx": ident,
            "result_code": code,
            "result_subcode": subcode,
            "result_msg": text,
            "error_stack": "",
            "error_data": {},
            "endpoint": {
                "name": endpoint,
                "requested_version": version or "1.0",
                "actual_version": "2.1",
            },
        }
        return Reply.of({"meta": meta, "data": data}, code)

    def _login(self, request: Request) -> dict[str, Any]:
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        basic = base64.b64encode(f"{ACCESS_KEY}:{SECRET_KEY}".encode()).decode()
        if not (kind == "Basic" and given == basic) and not (
            kind == "Bearer" and given in self.tokens
        ):
            raise ApiError(401, 22, "unauthorized (invalid credentials)")
        now = int(time.time())
        claims = {
            "exp": now + 2592000,
            "iat": now,
            "api_version": "2.34",
            "server_version": "2.3.0",
            "feature_set": "basic",
            "env": "",
            "identity": {"user": "u", "company": "c", "role": "user"},
            "auth_type": "Bearer",
            "jti": uuid.uuid4().hex,
        }
        token = f"{_b64({'alg': 'HS256', 'typ': 'JWT'})}.{_b64(claims)}.{_b64('signature')}"
        self.tokens.add(token)
        return {"token": token}

    def _check_token(self, request: Request) -> None:
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if kind != "Bearer":
            raise ApiError(401, 20, "unauthorized (missing credentials)")
        if token not in self.tokens:
            raise ApiError(401, 30, "invalid token")

    # -- projects -----------------------------------------------------------------------------

    def _projects_get_all(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"projects": self._query(self.projects, body, {"name", "id"})}

    _projects_get_all_ex = _projects_get_all

    def _projects_create(self, body: dict[str, Any]) -> dict[str, Any]:
        name = self._name(body)
        if any(p["name"] == name for p in self.projects.values()):
            raise ApiError(400, 801, "value combination already exists: name")
        ident = uuid.uuid4().hex
        self.projects[ident] = {"id": ident, "name": name, "created": _now()}
        return {"id": ident}

    def _projects_get_by_id(self, body: dict[str, Any]) -> dict[str, Any]:
        if body["project"] not in self.projects:
            raise ApiError(400, 401, "invalid project id")
        return {"project": self.projects[body["project"]]}

    # -- tasks --------------------------------------------------------------------------------

    def _tasks_create(self, body: dict[str, Any]) -> dict[str, Any]:
        name = self._name(body)
        if not body.get("type"):
            raise ApiError(400, 11, "missing required fields: type")
        ident = uuid.uuid4().hex
        task: dict[str, Any] = {
            "id": ident,
            "name": name,
            "status": "created",
            "status_reason": "",
            "status_message": "",
            "created": _now(),
            "tags": [],
            "hyperparams": {},
            "runtime": {},
            "execution": {},
            "output": {},
            "models": {"input": [], "output": []},
            "last_iteration": 0,
            "company": "c",
        }
        self._set_task(task, body)
        self.tasks[ident] = task
        return {"id": ident}

    def _set_task(self, task: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
        allowed = TASK_FIELDS | {"task", "force", "method"}
        if set(body) - allowed:
            raise ApiError(400, 14, f"fields not defined for object: {set(body) - allowed}")
        fields = {key: value for key, value in body.items() if key in TASK_FIELDS}
        if fields.get("project") and fields["project"] not in self.projects:
            raise ApiError(400, 401, f"invalid project id: {fields['project']}")
        if "name" in fields:
            self._name(fields)
        for section, items in (fields.get("hyperparams") or {}).items():
            for name, item in items.items():
                self._check_param({"section": section, "name": name, **item})
        if not all(isinstance(tag, str) for tag in fields.get("tags") or []):
            raise ApiError(400, 12, "validation error: tags")
        if "output_dest" in fields:
            task["output"]["destination"] = fields.pop("output_dest")
        task.update(fields)
        return fields

    def _task(self, body: dict[str, Any], force: bool | None = None) -> dict[str, Any]:
        task = self.tasks.get(body.get("task", ""))
        if task is None:
            raise ApiError(400, 101, f"invalid task id: {body.get('task')}")
        if force is not None and not force and task["status"] != "created":
            raise ApiError(400, 110, "invalid task status: expected created")
        return task

    def _tasks_get_by_id(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"task": self._task(body)}

    def _tasks_get_all(self, body: dict[str, Any]) -> dict[str, Any]:
        known = {"id", "name", "tags", "project", "status", "type", "parent", "user"}
        return {"tasks": self._query(self.tasks, body, known)}

    _tasks_get_all_ex = _tasks_get_all

    def _tasks_edit(self, body: dict[str, Any]) -> dict[str, Any]:
        task = self._task(body, bool(body.get("force")))
        return {"updated": 1, "fields": self._set_task(task, body)}

    def _tasks_edit_configuration(self, body: dict[str, Any]) -> dict[str, Any]:
        task = self._task(body, bool(body.get("force")))
        for item in body["configuration"]:
            if not item.get("name") or not isinstance(item.get("value"), str):
                raise ApiError(400, 12, "validation error: a configuration needs name and text")
        if body.get("replace_configuration"):
            task["configuration"] = {}
        there = task.setdefault("configuration", {})
        there.update({item["name"]: item for item in body["configuration"]})
        return {"updated": 1}

    def _check_param(self, item: dict[str, Any]) -> None:
        if not item.get("section") or not item.get("name"):
            raise ApiError(400, 11, "missing required fields: section, name")
        if not isinstance(item.get("value", ""), str):
            raise ApiError(400, 12, f"validation error: value of {item['name']} is not text")

    def _tasks_edit_hyper_params(self, body: dict[str, Any]) -> dict[str, Any]:
        for item in body["hyperparams"]:
            self._check_param(item)
        properties = all(item["section"] == "properties" for item in body["hyperparams"])
        task = self._task(body, bool(body.get("force")) or properties)
        replace = body.get("replace_hyperparams", "none")
        if replace == "all":
            task["hyperparams"] = {}
        for item in body["hyperparams"]:
            if replace == "section":
                task["hyperparams"].pop(item["section"], None)
        for item in body["hyperparams"]:
            task["hyperparams"].setdefault(item["section"], {})[item["name"]] = item
        return {"updated": 1}

    def _tasks_add_or_update_artifacts(self, body: dict[str, Any]) -> dict[str, Any]:
        task = self._task(body, bool(body.get("force")))
        kept = {(a["key"], a.get("mode", "output")): a for a in self._artifacts(task)}
        for artifact in body["artifacts"]:
            if not artifact.get("key") or not artifact.get("type"):
                raise ApiError(400, 11, "missing required fields: key, type")
            if not isinstance(artifact.get("content_size", 0), int):
                raise ApiError(400, 12, "validation error: content_size")
            if set(artifact.get("type_data", {})) - {"preview", "content_type", "data_hash"}:
                raise ApiError(400, 12, "validation error: type_data")
            kept[artifact["key"], artifact.get("mode", "output")] = artifact
        task["execution"]["artifacts"] = list(kept.values())
        return {"updated": 1}

    def _artifacts(self, task: dict[str, Any]) -> list[dict[str, Any]]:
        artifacts: list[dict[str, Any]] = task["execution"].get("artifacts") or []
        return artifacts

    def _tasks_add_or_update_model(self, body: dict[str, Any]) -> dict[str, Any]:
        task = self._task(body)
        if body["model"] not in self.models:
            raise ApiError(400, 201, f"invalid model id: {body['model']}")
        models = task["models"][body["type"]]
        models[:] = [m for m in models if m["name"] != body["name"]]
        models.append({"name": body["name"], "model": body["model"]})
        return {"updated": 1}

    def _tasks_set_requirements(self, body: dict[str, Any]) -> dict[str, Any]:
        task = self._task(body)
        task["script"] = {**(task.get("script") or {}), "requirements": body["requirements"]}
        return {"updated": 1}

    def _tasks_ping(self, body: dict[str, Any]) -> dict[str, Any]:
        self._task(body)
        return {}

    def _status(self, body: dict[str, Any], status: str) -> dict[str, Any]:
        task = self._task(body)
        same = task["status"] == status
        if not body.get("force") and not same and status not in NEXT_STATUS[task["status"]]:
            raise ApiError(400, 110, f"invalid task status: {task['status']} to {status}")
        fields = {
            "status": status,
            "status_reason": body.get("status_reason", ""),
            "status_message": body.get("status_message", ""),
        }
        task.update(fields)
        return {"updated": 1, "fields": fields}

    def _tasks_started(self, body: dict[str, Any]) -> dict[str, Any]:
        return {**self._status(body, "in_progress"), "started": 1}

    def _tasks_completed(self, body: dict[str, Any]) -> dict[str, Any]:
        return self._status(body, "completed")

    def _tasks_failed(self, body: dict[str, Any]) -> dict[str, Any]:
        return self._status(body, "failed")

    def _tasks_stop(self, body: dict[str, Any]) -> dict[str, Any]:
        """An abort in the web page: carried out at once where no agent runs the task."""
        task = self._task(body)
        if "development" in (task.get("system_tags") or []):
            return self._status({**body, "status_message": "Stopped by u"}, "stopped")
        task["status_message"] = "stopping"
        return {"updated": 1, "fields": {"status_message": "stopping"}}

    def _tasks_stopped(self, body: dict[str, Any]) -> dict[str, Any]:
        return self._status(body, "stopped")

    def abort(self, task: str) -> None:
        """As a person in the web page does."""
        with self.lock:
            self._tasks_stop({"task": task})

    def watchdog(self) -> None:
        """Stop what is in progress and was not heard of for two hours."""
        for ident, task in self.tasks.items():
            silent = self.seconds - self.heard.get(ident, 0.0)
            if task["status"] == "in_progress" and silent > NON_RESPONSIVE_SECONDS:
                why = "Forced stop (non-responsive)"
                task |= {"status": "stopped", "status_reason": why, "status_message": why}

    # -- models -------------------------------------------------------------------------------

    def _models_create(self, body: dict[str, Any]) -> dict[str, Any]:
        name = self._name(body)
        if "uri" not in body:
            raise ApiError(400, 11, "missing required fields: uri")
        ident = uuid.uuid4().hex
        model = {key: value for key, value in body.items() if key != "method"}
        self.models[ident] = {**model, "id": ident, "name": name, "created": _now()}
        return {"id": ident, "created": True}

    def _model(self, body: dict[str, Any]) -> dict[str, Any]:
        if body.get("model") not in self.models:
            raise ApiError(400, 201, f"invalid model id: {body.get('model')}")
        return self.models[body["model"]]

    def _models_edit(self, body: dict[str, Any]) -> dict[str, Any]:
        model = self._model(body)
        fields = {k: v for k, v in body.items() if k not in ("model", "method")}
        if "name" in fields:
            self._name(fields)
        if fields.get("task") and fields["task"] not in self.tasks:
            raise ApiError(400, 101, f"invalid task id: {fields['task']}")
        model.update(fields)
        return {"updated": 1, "fields": fields}

    _models_update = _models_edit

    def _models_add_or_update_metadata(self, body: dict[str, Any]) -> dict[str, Any]:
        model = self._model(body)
        items = {item["key"]: item for item in body["metadata"]}
        if not all(isinstance(item.get("value"), str) for item in items.values()):
            raise ApiError(400, 12, "validation error: metadata values are text")
        kept = {} if body.get("replace_metadata") else model.get("metadata", {})
        model["metadata"] = {**kept, **items}
        return {"updated": 1}

    def _models_get_by_id(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"model": self._model(body)}

    def _models_get_all(self, body: dict[str, Any]) -> dict[str, Any]:
        known = {"id", "name", "tags", "project", "task", "uri", "framework", "ready"}
        return {"models": self._query(self.models, body, known)}

    # -- events -------------------------------------------------------------------------------

    def _events_add_batch(self, events: list[dict[str, Any]]) -> dict[str, Any]:
        if not events:
            raise ApiError(400, 17, "batch request contains no items")
        locks = {(e.get("task"), e.get("allow_locked", False)) for e in events}
        if len(locks) != len({task for task, _ in locks}):
            raise ApiError(400, 12, "validation error: inconsistent allow_locked")
        errors: dict[str, int] = {}
        actions: list[tuple[str, dict[str, Any]]] = []
        for event in events:
            problem = self._event_problem(event)
            if problem:
                errors[problem] = errors.get(problem, 0) + 1
            else:
                actions.append(self._event_action(event))
        added = self._index(actions)
        if any(error.startswith("Iteration number") for error in errors):
            raise ApiError(500, 100, "document(s) failed to index")
        if not added:
            raise ApiError(400, 131, f"events not added: {errors}")
        return {"added": added, "errors": sum(errors.values()), "errors_info": errors}

    def _event_problem(self, event: dict[str, Any]) -> str | None:
        kind = (event.get("type") or "").replace(" ", "_")
        if not kind:
            return "Event must have a 'type' field"
        if kind not in EVENT_TYPES:
            return f"Invalid event type {kind}"
        task = self.tasks.get(event.get("task", ""))
        if task is None or (task["status"] == "published" and not event.get("allow_locked")):
            return f"Invalid task id {event.get('task')}"
        if event.get("iter") is not None:
            try:
                iteration = int(event["iter"])
            except (TypeError, ValueError):
                raise ApiError(500, 100, "general server error: iter") from None
            if not -(2**63) <= iteration < 2**63:
                return "Iteration number should not exceed 9223372036854775807"
        if kind == "training_stats_scalar" and isinstance(event.get("value"), str):
            raise ApiError(500, 100, "general server error: int + str")  # its running total
        return None

    def _event_action(self, event: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        event = {k: v for k, v in event.items() if k not in ("allow_locked", "method")}
        event.setdefault("timestamp", time.time_ns() // 1_000_000)
        event.setdefault("worker", "stand-in")
        event["metric"], event["variant"] = event.get("metric") or "", event.get("variant") or ""
        if event["type"] == "log":
            return uuid.uuid4().hex, event
        parts = [str(event[f]) for f in ("task", "iter", "metric", "variant", "key") if f in event]
        key = hashlib.md5("-".join(parts).encode()).hexdigest()
        return f"{event['type']}:{key}", event  # one index for each type

    def _index(self, actions: list[tuple[str, dict[str, Any]]]) -> int:
        for start in range(0, len(actions), BULK):
            bad = 0
            for ident, event in actions[start : start + BULK]:
                if not self._indexable(event):
                    bad += 1
                    continue
                self.events.pop(ident, None)
                self.events[ident] = event
                if event["type"] == "training_stats_scalar":
                    self.accepted_scalar_sends += 1
                self._tell_task(event)
            if bad:
                raise ApiError(500, 100, f"{bad} document(s) failed to index")
        return len(actions)

    def _tell_task(self, event: dict[str, Any]) -> None:
        """The task's own last iteration and last values, as its row in the table shows them."""
        task = self.tasks[event["task"]]
        if event.get("iter") is not None and event["metric"] not in NO_ITERATION:
            task["last_iteration"] = max(task["last_iteration"], event["iter"])
        if event["type"] == "training_stats_scalar":
            last = task.setdefault("last_metrics", {})
            ids = [hashlib.md5(event[f].encode()).hexdigest() for f in ("metric", "variant")]
            known = ids[1] in last.get(ids[0], {})
            if known or sum(map(len, last.values())) < MAX_LAST_METRICS:
                named = {f: event[f] for f in ("metric", "variant", "value")}
                last.setdefault(ids[0], {})[ids[1]] = named

    def _indexable(self, event: dict[str, Any]) -> bool:
        for field in ("metric", "variant", "worker", "level", "key", "url"):
            if len(str(event.get(field, "")).encode()) > MAX_KEYWORD_BYTES:
                return False
        if not isinstance(event["timestamp"], int):
            return False
        value = event.get("value", 0.0)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return math.isfinite(value) and abs(value) <= MAX_FLOAT32

    def _events_get_task_log(self, body: dict[str, Any]) -> dict[str, Any]:
        self._task(body)
        earlier = body.get("navigate_earlier", True)
        hits = sorted(self._of(body["task"], "log"), key=lambda e: e["timestamp"], reverse=earlier)
        total, start = len(hits), body.get("from_timestamp")
        if start:
            hits = [e for e in hits if (e["timestamp"] < start) == earlier]
            hits = [e for e in hits if e["timestamp"] != start]
        size = body.get("batch_size", 500)
        page = hits[:size]
        page += [e for e in hits[size:] if e["timestamp"] == page[-1]["timestamp"]]
        if body.get("order") in (("asc",) if earlier else ("desc",)):
            page.reverse()
        return {"events": page, "returned": len(page), "total": total}

    # -- files --------------------------------------------------------------------------------

    def _file(self, request: Request) -> Reply:
        try:
            self._check_token(request)
        except ApiError:
            return Reply(401, b"unauthorized", "text/plain")
        path = unquote(request.path).lstrip("/").removeprefix("files").lstrip("/")
        if request.method in ("GET", "HEAD"):
            if not path:
                return Reply(200, b"OK", "text/plain")
            if path not in self.files:
                return Reply(404, b"not found", "text/plain")
            return Reply(200, self.files[path], "application/octet-stream")
        if request.method != "POST" or path:
            return Reply(405, b"method not allowed", "text/plain")
        head = f"Content-Type: {request.headers.get('content-type', '')}\r\n\r\n".encode()
        form = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + request.body)
        names = []
        for part in form.iter_parts():
            name = str(part.get_param("name", header="content-disposition")).lstrip("/")
            name = name.removeprefix("files/")
            if ".." in Path(name).parts or not part.get_filename():
                return Reply(404, b"not found", "text/plain")
            self.files[name] = part.get_payload(decode=True)  # type: ignore[assignment]
            names.append(name)
        return Reply(200, json.dumps(names).encode())

    # -- shared -------------------------------------------------------------------------------

    def _name(self, body: dict[str, Any]) -> str:
        name = str(body.get("name") or "").strip()
        if len(name) < 3:
            raise ApiError(400, 12, "validation error: name is shorter than 3 characters")
        return name

    def _query(
        self, table: dict[str, dict[str, Any]], body: dict[str, Any], known: set[str]
    ) -> list[dict[str, Any]]:
        found = list(table.values())
        for field, wanted in body.items():
            if field in QUERY_WORDS or wanted is None:
                continue
            if field.startswith("runtime."):
                name = field.partition(".")[2]
                found = [row for row in found if row["runtime"].get(name) == wanted]
            elif field not in known:
                raise ApiError(400, 12, f"the stand-in knows no query field {field}")
            elif field == "name":
                found = [row for row in found if re.search(wanted, row["name"])]
            elif field == "tags":
                need = all if wanted[0] == "__$all" else any
                tags = [tag for tag in wanted if tag != "__$all"]
                found = [row for row in found if need(t in row.get("tags", []) for t in tags)]
            else:
                values = wanted if isinstance(wanted, list) else [wanted]
                found = [row for row in found if row.get(field) in values]
        fields = body.get("only_fields")
        if not fields:
            return found
        return [{f: row[f] for f in [*fields, "id"] if f in row} for row in found]

    # -- readers for tests --------------------------------------------------------------------

    def _of(self, task: str, kind: str) -> list[dict[str, Any]]:
        return [e for e in self.events.values() if e["task"] == task and e["type"] == kind]

    def scalars(self, task: str) -> dict[tuple[str, str, int], float]:
        return {
            (e["metric"], e["variant"], e["iter"]): e["value"]
            for e in self._of(task, "training_stats_scalar")
        }

    def log_lines(self, task: str) -> list[str]:
        lines = sorted(self._of(task, "log"), key=lambda e: e["timestamp"])
        return [e["msg"] for e in lines]

    def images(self, task: str) -> list[dict[str, Any]]:
        return self._of(task, "training_debug_image")

    def plots(self, task: str) -> dict[tuple[str, str, int], Any]:
        return {
            (e["metric"], e["variant"], e["iter"]): json.loads(e["plot_str"])
            for e in self._of(task, "plot")
        }

    def params(self, task: str) -> dict[str, dict[str, str]]:
        sections = self.tasks[task]["hyperparams"]
        return {s: {n: i["value"] for n, i in items.items()} for s, items in sections.items()}

    def configuration(self, task: str) -> dict[str, Any]:
        there = self.tasks[task].get("configuration") or {}
        return {name: json.loads(item["value"]) for name, item in there.items()}

    def artifacts(self, task: str) -> dict[str, dict[str, Any]]:
        return {a["key"]: a for a in self._artifacts(self.tasks[task])}

    def output_models(self, task: str) -> dict[str, dict[str, Any]]:
        output = self.tasks[task]["models"]["output"]
        return {m["name"]: self.models[m["model"]] for m in output}

    def file_at(self, url: str) -> bytes:
        assert url.startswith(self.files_url + "/"), url
        return self.files[unquote(url.removeprefix(self.files_url + "/"))]
