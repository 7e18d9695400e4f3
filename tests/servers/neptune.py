"""A stand-in Neptune 2.x server: enough of its REST contract for the real client, as strict as it.

The client downloads swagger documents and calls by operation id, so the one table `OPERATIONS`
both describes the service and routes its requests.
"""

from __future__ import annotations

import base64
import io
import json
import re
import tarfile
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from .base import Reply, Request, StandIn

API_KEY = "stand-in-key"
MAX_CUSTOM_ID = 36
CHUNK_BYTES = 5 * 1024 * 1024
READ_ONLY = {"sys/id", "sys/state", "sys/creation_time", "sys/owner", "sys/size"}

LEADERBOARD = "/api/leaderboard/v1"
ATTRIBUTES = LEADERBOARD + "/attributes"
STORAGE = ATTRIBUTES + "/storage"


def _upload(name: str, folder: str, extra: str) -> list[tuple[str, str, str, str, str]]:
    """The four operations of one kind of upload; `extra` is the parameter that tells it apart."""
    base = f"{STORAGE}/{folder}/upload"
    common = f"experimentIdentifier attribute {extra}"
    later = "experimentIdentifier attribute" + (" subPath" if extra == "subPath" else "")
    multi = name.removesuffix("Upload") + "MultipartUpload"
    return [
        (name, "POST", base, common, "UploadDone"),
        (multi + "Start", "POST", base + "/start", f"{common} totalLength", "UploadStarted"),
        (multi + "Part", "POST", base + "/part", f"{later} uploadId uploadPartIdx", "UploadDone"),
        (multi + "Finish", "POST", base + "/finish", f"{later} uploadId", "UploadDone"),
    ]


def _fetch(name: str, path: str, answer: str) -> tuple[str, str, str, str, str]:
    return (name, "GET", f"{ATTRIBUTES}/{path}", "experimentId attribute", answer)


def _values(name: str, path: str) -> tuple[str, str, str, str, str]:
    parameters = "experimentId attribute limit offset"
    return (name, "GET", f"{ATTRIBUTES}/series/{path}", parameters, "SeriesValues")


#: operationId, method, path, parameters (`@` body, `^` header, `[]` array), answer; by document
OPERATIONS: dict[str, list[tuple[str, str, str, str, str]]] = {
    "backend": [
        (
            "getClientConfig",
            "GET",
            "/api/backend/v1/clients/config",
            "^X-Neptune-Api-Token alpha",
            "ClientConfig",
        ),
        (
            "exchangeApiToken",
            "GET",
            "/api/backend/v1/authorization/oauth-token",
            "^X-Neptune-Api-Token",
            "Tokens",
        ),
        (
            "getProject",
            "GET",
            "/api/backend/v1/projects/get",
            "projectIdentifier",
            "Project",
        ),
        (
            "listProjects",
            "GET",
            "/api/backend/v1/projects",
            "limit organizationIdentifier searchTerm sortBy[] sortDirection[] userRelation",
            "ProjectList",
        ),
        (
            "listOrganizations",
            "GET",
            "/api/backend/v1/myOrganizations",
            "",
            "[Organization]",
        ),
    ],
    "leaderboard": [
        (
            "createExperiment",
            "POST",
            LEADERBOARD + "/experiments",
            "@experimentCreationParams ^X-Neptune-CliVersion",
            "Experiment",
        ),
        ("getExperiment", "GET", LEADERBOARD + "/experiments", "experimentId", "Experiment"),
        ("getExperimentAttributes", "GET", ATTRIBUTES, "experimentId", "Attributes"),
        (
            "executeOperations",
            "POST",
            ATTRIBUTES + "/operations",
            "experimentId organizationName @operations",
            "[OperationError]",
        ),
        ("ping", "POST", ATTRIBUTES + "/ping", "experimentId", "Nothing"),
        *_upload("fileAtomUpload", "file", "ext"),
        *_upload("fileSetFileUpload", "fileset", "subPath"),
        (
            "uploadFileSetAttributeTar",
            "POST",
            ATTRIBUTES + "/uploadFileSetTar",
            "experimentId attribute reset",
            "UploadDone",
        ),
        _values("getFloatSeriesValues", "float"),
        _values("getStringSeriesValues", "string"),
        _values("getImageSeriesValues", "image"),
        _fetch("getFloatSeriesAttribute", "floatSeries", "Last"),
        _fetch("getStringSeriesAttribute", "stringSeries", "Last"),
        _fetch("getFloatAttribute", "floats", "Value"),
        _fetch("getIntAttribute", "integers", "Value"),
        _fetch("getBoolAttribute", "booleans", "Value"),
        _fetch("getStringAttribute", "strings", "Value"),
        _fetch("getStringSetAttribute", "stringSets", "Values"),
    ],
}

#: operations that are answered alike
SAME_AS = {
    "fileSetFileUpload": "fileAtomUpload",
    "fileSetFileMultipartUploadStart": "fileAtomMultipartUploadStart",
    "fileSetFileMultipartUploadPart": "fileAtomMultipartUploadPart",
    "fileSetFileMultipartUploadFinish": "fileAtomMultipartUploadFinish",
    "getStringSeriesAttribute": "getFloatSeriesAttribute",
    "getIntAttribute": "getFloatAttribute",
    "getBoolAttribute": "getFloatAttribute",
    "getStringAttribute": "getFloatAttribute",
}

#: fields of each answer; `Name` refers to another definition, `[Name]` to a list of it
DEFINITIONS: dict[str, dict[str, str]] = {
    "ClientConfig": {
        "apiUrl": "",
        "applicationUrl": "",
        "pyLibVersions": "Versions",
        "multiPartUpload": "Multipart",
        "sysNameSetByBackend": "",
    },
    "Versions": {
        "minRecommendedVersion": "",
        "minCompatibleVersion": "",
        "maxCompatibleVersion": "",
    },
    "Multipart": {
        "enabled": "",
        "minChunkSize": "",
        "maxChunkSize": "",
        "maxChunkCount": "",
        "maxSinglePartSize": "",
    },
    "Tokens": {"accessToken": "", "refreshToken": "", "username": ""},
    "Project": {
        "id": "",
        "name": "",
        "organizationName": "",
        "organizationId": "",
        "projectKey": "",
        "version": "",
    },
    "ProjectList": {"entries": "[Project]"},
    "Organization": {"id": "", "name": ""},
    "Experiment": {
        "id": "",
        "type": "",
        "shortId": "",
        "organizationName": "",
        "projectName": "",
        "trashed": "",
        "organizationId": "",
        "projectId": "",
        "parentId": "",
    },
    "Attributes": {"id": "", "attributes": "[Attribute]"},
    "Attribute": {"name": "", "type": ""},
    "OperationError": {"errorDescription": "", "errorType": ""},
    "UploadStarted": {"uploadId": "", "errors": "[OperationError]"},
    "UploadDone": {"errors": "[OperationError]"},
    "SeriesValues": {"totalItemCount": "", "values": "[Point]"},
    "Point": {"timestampMillis": "", "step": "", "value": ""},
    "Last": {"last": ""},
    "Value": {"value": ""},
    "Values": {"values": ""},
    "Nothing": {},
}

#: bodies that are not plain JSON as they come: the client turns a date into text only when told
BODIES = {
    "@experimentCreationParams": {
        "properties": {
            "gitInfo": {
                "properties": {
                    "commit": {
                        "properties": {"commitDate": {"type": "string", "format": "date-time"}},
                        "type": "object",
                    }
                },
                "type": "object",
            }
        },
        "type": "object",
    }
}

ATOMS = {
    "assignFloat": "float",
    "assignInt": "int",
    "assignBool": "bool",
    "assignString": "string",
    "assignDatetime": "datetime",
}
SERIES = {"logFloats": "floatSeries", "logStrings": "stringSeries", "logImages": "imageSeries"}
CLEARS = {
    "clearFloatSeries": "floatSeries",
    "clearStringSeries": "stringSeries",
    "clearImageSeries": "imageSeries",
}

Point = tuple[float, Any, int]


@dataclass
class Attribute:
    type: str
    value: Any = None  #: of an atom, a string set or a file
    points: list[Point] = field(default_factory=list)
    ext: str = ""


@dataclass
class Run:
    id: str
    short_id: str
    project: str
    custom_id: str | None
    attributes: dict[str, Attribute] = field(default_factory=dict)
    pings: int = 0


@dataclass
class Project:
    id: str
    workspace: str
    name: str


@dataclass
class PartialUpload:
    run: str
    path: str
    sub_path: str
    ext: str
    total: int
    body: bytearray = field(default_factory=bytearray)


class ProblemError(Exception):
    """An answer other than 200, raised anywhere below `handle`."""

    def __init__(self, status: int, title: str, error_type: str = "STAND_IN") -> None:
        super().__init__(title)
        self.reply = Reply.of({"errorType": error_type, "title": title, "code": status}, status)


def token(url: str, api_key: str = API_KEY) -> str:
    """The API token that points a client at `url`."""
    content = {"api_address": url, "api_url": url, "api_key": api_key}
    return base64.b64encode(json.dumps(content).encode()).decode()


class NeptuneServer(StandIn):
    """Records what it accepted in `runs`, and in `refused` what it did not, with the reason."""

    def __init__(
        self,
        projects: tuple[str, ...] = ("team/digits",),
        token_seconds: float = 3600.0,
        max_fields: int = 9000,
    ) -> None:
        super().__init__()
        self.projects = [Project(str(uuid.uuid4()), *name.split("/")) for name in projects]
        self.token_seconds = token_seconds
        self.max_fields = max_fields
        self.runs: dict[str, Run] = {}
        self.refused: list[tuple[str, str]] = []  #: (path, why)
        self.operation_requests = 0
        self.refreshes = 0
        self._access: dict[str, float] = {}
        self._refresh: set[str] = set()
        self._uploads: dict[str, PartialUpload] = {}
        self._routes = {
            (method, path): name
            for operations in OPERATIONS.values()
            for name, method, path, _, _ in operations
        }

    # ------------------------------------------------------------------ what tests read

    def run(self, run_id: str) -> Run:
        """The run by custom id, short id or uuid."""
        with self.lock:
            for run in self.runs.values():
                if run_id in (run.custom_id, run.short_id, run.id):
                    return run
        raise KeyError(run_id)

    def _of_type(self, run_id: str, kind: str) -> dict[str, Attribute]:
        with self.lock:
            attributes = self.run(run_id).attributes
            return {path: a for path, a in attributes.items() if a.type == kind}

    def series(self, run_id: str) -> dict[str, list[Point]]:
        """Each float series as (step, value, timestamp in ms)."""
        return {p: list(a.points) for p, a in self._of_type(run_id, "floatSeries").items()}

    def string_series(self, run_id: str) -> dict[str, list[Point]]:
        return {p: list(a.points) for p, a in self._of_type(run_id, "stringSeries").items()}

    def image_series(self, run_id: str) -> dict[str, list[Point]]:
        """Each image series as (step, bytes, timestamp in ms)."""
        return {p: list(a.points) for p, a in self._of_type(run_id, "imageSeries").items()}

    def atoms(self, run_id: str) -> dict[str, Any]:
        kinds = set(ATOMS.values())
        with self.lock:
            attributes = self.run(run_id).attributes
            return {path: a.value for path, a in attributes.items() if a.type in kinds}

    def tags(self, run_id: str) -> set[str]:
        with self.lock:
            found = self.run(run_id).attributes.get("sys/tags")
            return set(found.value) if found else set()

    def files(self, run_id: str) -> dict[str, bytes]:
        """Files by path; those of a file set by `path/sub path`."""
        found = {p: a.value for p, a in self._of_type(run_id, "file").items()}
        for path, attribute in self._of_type(run_id, "fileSet").items():
            found.update({f"{path}/{name}": body for name, body in attribute.value.items()})
        return found

    def extensions(self, run_id: str) -> dict[str, str]:
        return {p: a.ext for p, a in self._of_type(run_id, "file").items()}

    # ------------------------------------------------------------------ requests

    def handle(self, request: Request) -> Reply:
        try:
            return self._answer(request)
        except ProblemError as problem:
            return problem.reply

    def _answer(self, request: Request) -> Reply:
        document = re.fullmatch(r"/api/(\w+)/swagger\.json", request.path)
        if document:
            return self._swagger(document[1])
        if request.path == "/auth/protocol/openid-connect/token":
            return self._refresh_token(request)
        name = self._routes.get((request.method, request.path))
        if name is None:  # the websocket handshake among them, which the client retries quietly
            raise ProblemError(404, f"no such path: {request.path}")
        if name not in ("getClientConfig", "exchangeApiToken"):
            self._authorise(request)
        elif not self._known_key(request.headers.get("x-neptune-api-token", "")):
            raise ProblemError(401, "unknown API token")
        answer: Reply = getattr(self, "_op_" + SAME_AS.get(name, name))(request)
        return answer

    def _swagger(self, document: str) -> Reply:
        operations = OPERATIONS.get(document)
        if operations is None:
            raise ProblemError(404, f"no such document: {document}")
        paths: dict[str, dict[str, Any]] = {}
        for name, method, path, parameters, answer in operations:
            paths.setdefault(path, {})[method.lower()] = {
                "operationId": name,
                "tags": ["api"],
                "parameters": [_parameter(word) for word in parameters.split()],
                "responses": {"200": {"description": "", "schema": _schema(answer)}},
            }
        definitions = {
            name: {
                "type": "object",
                "properties": {key: _schema(kind) for key, kind in fields.items()},
            }
            for name, fields in DEFINITIONS.items()
        }
        info = {"title": document, "version": "1"}
        body = {"swagger": "2.0", "info": info, "paths": paths, "definitions": definitions}
        return Reply.of(body)

    # ------------------------------------------------------------------ who may

    def _known_key(self, api_token: str) -> bool:
        try:
            found = json.loads(base64.b64decode(api_token))
        except ValueError:
            return False
        return isinstance(found, dict) and found.get("api_key") == API_KEY

    def _grant(self) -> tuple[str, str]:
        expires = time.time() + self.token_seconds
        claims = {"exp": int(expires), "iss": self.url + "/auth", "azp": "neptune-cli"}
        parts = [{"alg": "none"}, {**claims, "jti": uuid.uuid4().hex}]
        text = [base64.urlsafe_b64encode(json.dumps(p).encode()).rstrip(b"=") for p in parts]
        access = b".".join([*text, b"c2lnbmF0dXJl"]).decode()
        refresh = uuid.uuid4().hex
        self._access[access] = expires
        self._refresh.add(refresh)
        return access, refresh

    def _authorise(self, request: Request) -> None:
        kind, _, bearer = request.headers.get("authorization", "").partition(" ")
        expires = self._access.get(bearer)
        if kind != "Bearer" or expires is None:
            raise ProblemError(401, "bearer token wanted")
        if expires < time.time():
            raise ProblemError(401, "token expired", "AUTHORIZATION_TOKEN_EXPIRED")

    def _refresh_token(self, request: Request) -> Reply:
        form = dict(pair.split("=", 1) for pair in request.body.decode().split("&"))
        wanted = {"grant_type": "refresh_token", "client_id": "neptune-cli"}
        if {k: form.get(k) for k in wanted} != wanted:
            return Reply.of({"error": "invalid_request"}, 400)
        if form.get("refresh_token") not in self._refresh:
            return Reply.of({"error": "invalid_grant"}, 400)
        self.refreshes += 1
        access, refresh = self._grant()
        return Reply.of(
            {
                "access_token": access,
                "refresh_token": refresh,
                "token_type": "Bearer",
                "expires_in": int(self.token_seconds),
            }
        )

    def revoke(self) -> None:
        """Forget every token given out: the next request without a new one gets a 401."""
        with self.lock:
            self._access.clear()
            self._refresh.clear()

    # ------------------------------------------------------------------ backend

    def _op_getClientConfig(self, _: Request) -> Reply:
        versions = {
            "minRecommendedVersion": "0.7.0",
            "minCompatibleVersion": "0.7.0",
            "maxCompatibleVersion": None,
        }
        multipart = {
            "enabled": True,
            "minChunkSize": CHUNK_BYTES,
            "maxChunkSize": 1 << 30,
            "maxChunkCount": 1000,
            "maxSinglePartSize": CHUNK_BYTES,
        }
        return Reply.of(
            {
                "apiUrl": self.url,
                "applicationUrl": self.url,
                "pyLibVersions": versions,
                "multiPartUpload": multipart,
                "sysNameSetByBackend": False,
            }
        )

    def _op_exchangeApiToken(self, _: Request) -> Reply:
        access, refresh = self._grant()
        return Reply.of({"accessToken": access, "refreshToken": refresh, "username": "someone"})

    def _project_body(self, project: Project) -> dict[str, Any]:
        return {
            "id": project.id,
            "name": project.name,
            "organizationName": project.workspace,
            "organizationId": "org-" + project.workspace,
            "projectKey": "TEST",
            "version": 2,
        }

    def _op_getProject(self, request: Request) -> Reply:
        wanted = request.query.get("projectIdentifier")
        for project in self.projects:
            if wanted in (project.id, f"{project.workspace}/{project.name}"):
                return Reply.of(self._project_body(project))
        raise ProblemError(404, f"no such project: {wanted}")

    def _op_listProjects(self, _: Request) -> Reply:
        return Reply.of({"entries": [self._project_body(p) for p in self.projects]})

    def _op_listOrganizations(self, _: Request) -> Reply:
        names = sorted({p.workspace for p in self.projects})
        return Reply.of([{"id": "org-" + name, "name": name} for name in names])

    # ------------------------------------------------------------------ runs

    def _experiment(self, run: Run) -> Reply:
        project = next(p for p in self.projects if p.id == run.project)
        return Reply.of(
            {
                "id": run.id,
                "type": "run",
                "shortId": run.short_id,
                "organizationName": project.workspace,
                "projectName": project.name,
                "trashed": False,
                "organizationId": "org-" + project.workspace,
                "projectId": project.id,
                "parentId": project.id,
            }
        )

    def _op_createExperiment(self, request: Request) -> Reply:
        wanted = request.json()
        custom = wanted.get("customId")
        if custom is not None and len(custom) > MAX_CUSTOM_ID:
            raise ProblemError(400, f"customId is longer than {MAX_CUSTOM_ID} characters")
        if wanted.get("projectIdentifier") not in [p.id for p in self.projects]:
            raise ProblemError(404, "no such project")
        for run in self.runs.values():
            if custom and run.custom_id == custom and run.project == wanted["projectIdentifier"]:
                return self._experiment(run)
        short = f"TEST-{len(self.runs) + 1}"
        run = Run(str(uuid.uuid4()), short, wanted["projectIdentifier"], custom)
        run.attributes["sys/id"] = Attribute("string", short)
        run.attributes["sys/state"] = Attribute("experimentState", "running")
        self.runs[run.id] = run
        return self._experiment(run)

    def _find(self, request: Request, name: str = "experimentId") -> Run:
        wanted = request.query.get(name, "")
        for run in self.runs.values():
            if wanted in (run.id, run.short_id) or wanted.endswith("/" + run.short_id):
                return run
        raise ProblemError(404, f"no such run: {wanted}", "EXPERIMENT_NOT_FOUND")

    def _op_getExperiment(self, request: Request) -> Reply:
        return self._experiment(self._find(request))

    def _op_getExperimentAttributes(self, request: Request) -> Reply:
        run = self._find(request)
        attributes = [{"name": p, "type": a.type} for p, a in run.attributes.items()]
        return Reply.of({"id": run.id, "attributes": attributes})

    def _op_ping(self, request: Request) -> Reply:
        self._find(request).pings += 1
        return Reply.of({})

    # ------------------------------------------------------------------ operations

    def _op_executeOperations(self, request: Request) -> Reply:
        run = self._find(request)
        operations = json.loads(request.body, parse_constant=_no_number)
        self.operation_requests += 1
        new = {o["path"] for o in operations} - set(run.attributes)
        if len(run.attributes) + len(new) > self.max_fields:
            kind = "ATTRIBUTES_PER_EXPERIMENT_LIMIT_EXCEEDED"
            raise ProblemError(422, f"more than {self.max_fields} fields", kind)
        errors: list[str] = []
        for operation in operations:
            path = operation["path"]
            ((name, content),) = ((k, v) for k, v in operation.items() if k != "path")
            for why in self._execute(run, path, name, content or {}):
                self.refused.append((path, why))
                errors.append(why)
        return Reply.of(
            [{"errorDescription": e, "errorType": "metadataInconsistency"} for e in errors]
        )

    def _execute(self, run: Run, path: str, name: str, content: dict[str, Any]) -> list[str]:
        if path in READ_ONLY:
            return [f"Attribute {path} is read-only"]
        if name == "deleteAttribute":
            gone = run.attributes.pop(path, None)
            return [] if gone else [f"Attribute {path} does not exist"]
        if name in SERIES:
            return self._log(run, path, SERIES[name], content["entries"])
        if name in ATOMS:
            return self._assign(run, path, ATOMS[name], content)
        if name in ("insertStrings", "removeStrings"):
            attribute, why = self._attribute(run, path, "stringSet")
            if attribute is None:
                return [why]
            old = set(attribute.value or ())
            new = set(content["values"])
            attribute.value = old | new if name == "insertStrings" else old - new
            return []
        if name in CLEARS:
            attribute, why = self._attribute(run, path, CLEARS[name])
            if attribute is None:
                return [why]
            attribute.points.clear()
            return []
        if name == "configFloatSeries":
            attribute, why = self._attribute(run, path, "floatSeries")
            return [] if attribute else [why]
        raise ProblemError(400, f"unknown operation: {name}")

    def _attribute(self, run: Run, path: str, kind: str) -> tuple[Attribute | None, str]:
        """The attribute, made if new; none and the reason if the path is of another type."""
        found = run.attributes.get(path)
        if found is not None and found.type != kind:
            return None, f"Attribute {path} is of type {found.type}, not {kind}"
        if found is None:
            parents = path.split("/")
            above = ["/".join(parents[:n]) for n in range(1, len(parents))]
            if any(a in run.attributes for a in above):
                return None, f"Attribute {path} lies below another attribute"
            if any(p.startswith(path + "/") for p in run.attributes):
                return None, f"Attribute {path} is a namespace"
            found = run.attributes[path] = Attribute(kind)
        return found, ""

    def _assign(self, run: Run, path: str, kind: str, content: dict[str, Any]) -> list[str]:
        value = content["valueMilliseconds" if kind == "datetime" else "value"]
        wanted = {"float": (int, float), "int": int, "bool": bool, "string": str}.get(kind, int)
        if not isinstance(value, wanted) or (kind != "bool" and isinstance(value, bool)):
            return [f"Value of {path} is not a {kind}"]
        if kind == "int" and not -(2**31) <= value < 2**31:
            return [f"Value of {path} does not fit 32 bits"]
        attribute, why = self._attribute(run, path, kind)
        if attribute is None:
            return [why]
        attribute.value = value
        return []

    def _log(self, run: Run, path: str, kind: str, entries: list[dict[str, Any]]) -> list[str]:
        attribute, why = self._attribute(run, path, kind)
        if attribute is None:
            return [why]
        errors = []
        last = attribute.points[-1] if attribute.points else None
        for entry in entries:
            step, stamp, value = entry["step"], entry["timestampMilliseconds"], entry["value"]
            if step is None:
                step = last[0] + 1 if last else 0
            if last and step <= last[0]:
                errors.append(
                    "X-coordinates (step) must be strictly increasing for series attribute: "
                    f"{path}. Invalid point: {step}"
                )
            elif last and stamp < last[2]:
                errors.append(
                    "Timestamp must be non-decreasing for series attribute: "
                    f"{path}. Invalid point: {stamp}"
                )
            elif isinstance(value, (int, float)) != (kind == "floatSeries"):
                errors.append(f"Value of {path} does not fit {kind}")
            else:
                if kind == "imageSeries":
                    value = base64.b64decode(value["data"])
                last = (step, value, stamp)
                attribute.points.append(last)
        return errors

    # ------------------------------------------------------------------ uploads

    def _store(self, run: Run, path: str, sub_path: str, ext: str, body: bytes) -> Reply:
        attribute, why = self._attribute(run, path, "fileSet" if sub_path else "file")
        if attribute is None:
            self.refused.append((path, why))
            return Reply.of({"errors": [{"errorDescription": why, "errorType": "x"}]})
        if sub_path:
            attribute.value = {**(attribute.value or {}), sub_path: body}
        else:
            attribute.value, attribute.ext = body, ext
        return Reply.of({"errors": []})

    def _op_fileAtomUpload(self, request: Request) -> Reply:
        if len(request.body) > CHUNK_BYTES:
            raise ProblemError(413, "send it in parts")
        run = self._find(request, "experimentIdentifier")
        query = request.query
        sub_path = query.get("subPath", "")
        return self._store(run, query["attribute"], sub_path, query.get("ext", ""), request.body)

    def _op_fileAtomMultipartUploadStart(self, request: Request) -> Reply:
        run = self._find(request, "experimentIdentifier")
        query = request.query
        upload = PartialUpload(
            run.id,
            query["attribute"],
            query.get("subPath", ""),
            query.get("ext", ""),
            int(query["totalLength"]),
        )
        name = uuid.uuid4().hex
        self._uploads[name] = upload
        return Reply.of({"uploadId": name, "errors": []})

    def _op_fileAtomMultipartUploadPart(self, request: Request) -> Reply:
        upload = self._uploads[request.query["uploadId"]]
        range_ = re.fullmatch(r"bytes=(\d+)-(\d+)/(\d+)", request.headers.get("x-range", ""))
        if range_ is None or "ext" in request.query:
            raise ProblemError(400, "wrong header or parameters")
        start, end, total = (int(n) for n in range_.groups())
        if end + 1 - start != len(request.body) or total != upload.total:
            raise ProblemError(400, "Length of stream does not match given range")
        if start > len(upload.body):
            raise ProblemError(400, "a part is missing")
        upload.body[start:] = request.body
        return Reply.of({"errors": []})

    def _op_fileAtomMultipartUploadFinish(self, request: Request) -> Reply:
        upload = self._uploads.pop(request.query["uploadId"])
        if len(upload.body) != upload.total:
            raise ProblemError(400, "parts are missing")
        run = self.runs[upload.run]
        return self._store(run, upload.path, upload.sub_path, upload.ext, bytes(upload.body))

    def _op_uploadFileSetAttributeTar(self, request: Request) -> Reply:
        run, path = self._find(request), request.query["attribute"]
        if request.query.get("reset") == "True":
            run.attributes.pop(path, None)
        with tarfile.open(fileobj=io.BytesIO(request.body), mode="r:gz") as archive:
            for member in archive.getmembers():
                body = archive.extractfile(member)
                if body is not None:
                    self._store(run, path, member.name, "", body.read())
        return Reply.of({"errors": []})

    # ------------------------------------------------------------------ reading back

    def _existing(self, request: Request, *kinds: str) -> Attribute:
        path = request.query.get("attribute", "")
        found = self._find(request).attributes.get(path)
        if found is None or found.type not in kinds:
            raise ProblemError(404, f"no such attribute: {path}")
        return found

    def _points(self, request: Request, kind: str) -> Reply:
        points = self._existing(request, kind).points
        offset, limit = int(request.query["offset"]), int(request.query["limit"])
        chosen = points[offset : offset + limit] if kind != "imageSeries" else []
        values = [{"timestampMillis": t, "step": s, "value": v} for s, v, t in chosen]
        return Reply.of({"totalItemCount": len(points), "values": values})

    def _op_getFloatSeriesValues(self, request: Request) -> Reply:
        return self._points(request, "floatSeries")

    def _op_getStringSeriesValues(self, request: Request) -> Reply:
        return self._points(request, "stringSeries")

    def _op_getImageSeriesValues(self, request: Request) -> Reply:
        return self._points(request, "imageSeries")

    def _op_getFloatSeriesAttribute(self, request: Request) -> Reply:
        points = self._existing(request, "floatSeries", "stringSeries").points
        return Reply.of({"last": points[-1][1] if points else None})

    def _op_getFloatAttribute(self, request: Request) -> Reply:
        return Reply.of({"value": self._existing(request, *ATOMS.values()).value})

    def _op_getStringSetAttribute(self, request: Request) -> Reply:
        return Reply.of({"values": sorted(self._existing(request, "stringSet").value)})


def _no_number(text: str) -> Any:
    raise ProblemError(400, f"not valid JSON: {text} is not a number")


def _schema(kind: str) -> dict[str, Any]:
    if kind.startswith("["):
        return {"type": "array", "items": _schema(kind[1:-1])}
    return {"$ref": f"#/definitions/{kind}"} if kind else {}


def _parameter(word: str) -> dict[str, Any]:
    if word.startswith("@"):
        return {"name": word[1:], "in": "body", "required": True, "schema": BODIES.get(word, {})}
    if word.startswith("^"):
        return {"name": word[1:], "in": "header", "type": "string"}
    if word.endswith("[]"):
        items = {"type": "string"}
        return {"name": word[:-2], "in": "query", "type": "array", "items": items}
    kind = "integer" if word in ("limit", "offset", "totalLength", "uploadPartIdx") else "string"
    return {"name": word, "in": "query", "type": kind}
