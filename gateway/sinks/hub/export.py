"""HUB offline: the very requests of a delivery as a folder, and sending that folder later.

A bundle holds `requests.jsonl`, `files/SHA256` and, once it is whole, `bundle.json`. A line holds
method, path, headers without credentials, and `body` or `form` and `file`. What only an answer
can tell stands there as a placeholder; `gives` of an earlier line says where in its answer it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gateway.sinks.base import Item, Memory, Refused, RunInfo, Sent, Unavailable
from gateway.sinks.hub import legacy, platform
from gateway.sinks.hub.carry import HubSink
from gateway.sinks.hub.config import HubConfig
from gateway.sinks.hub.http import NoAnswer, Wire

REQUESTS, MANIFEST, PROGRESS = "requests.jsonl", "bundle.json", "sent.json"
FORMAT = 1
PATIENCE_SECONDS = 600.0  #: the longest that one request of a bundle is waited for

#: The only fields a placeholder is looked for in: anywhere else it would be someone's text.
_FILLED = frozenset({"modelId", "runId", "modelPath", "uploadPath"})
_MODEL, _RUN = "{rankgate:model}", "{rankgate:run}"
_JSON = {"Content-Type": "application/json"}


class HubExport:
    """A sink that writes a bundle into `folder` instead of sending."""

    stop_asked = ""

    def __init__(self, config: HubConfig, folder: Path) -> None:
        self._config = config
        self._recorder = Recorder(folder)
        kind = platform.PlatformSink if config.protocol == "platform" else legacy.LegacySink
        self._sink: HubSink = kind(config, wire=self._recorder)

    def open(self, run: RunInfo, memory: Memory) -> None:
        self._memory = ReceiptMemory(memory)
        self._run = run
        self._sink.open(run, self._memory)

    def send(self, batch: Sequence[Item], again: bool) -> Sent:
        """Write the batch's requests. What an unfinished call wrote is cut off first."""
        self._begin()
        sent = self._sink.send(batch, again=False)
        self._end()
        return sent

    def close(self, state: str, reason: str) -> Sent:
        self._begin()
        sent = self._sink.close(state, reason)
        requests = self._end()
        self._recorder.seal(
            {
                "format": FORMAT,
                "protocol": self._config.protocol,
                "run": self._run.run_id,
                "state": state,
                "requests": requests,
            }
        )
        return sent

    def _begin(self) -> None:
        self._memory.discard()
        size, requests = self._memory.get("bundle") or (0, 0)
        self._recorder.rewind(size, requests)

    def _end(self) -> int:
        size, requests = self._recorder.sync()
        self._memory.put("bundle", [size, requests])
        self._memory.flush()
        return requests


class ReceiptMemory:
    """A memory whose every `put` waits for the receipt, because the file is cut back to it too."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._puts: dict[str, Any] = {}

    def get(self, key: str) -> Any:
        return self._puts[key] if key in self._puts else self._memory.get(key)

    def put(self, key: str, value: Any) -> None:
        self._puts[key] = value

    put_now = put

    def discard(self) -> None:
        self._puts.clear()

    def flush(self) -> None:
        for key, value in self._puts.items():
            self._memory.put(key, value)
        self._puts.clear()


class Recorder:
    """A `Wire` that writes requests down and answers with placeholders."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._requests = 0

    def call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        if path == platform.EVENTS and body["event"] == platform.BEAT:
            return {"received": True}  # about the moment of sending, so not kept
        if path == "/v1/auth" or path.startswith("/v1/agent/"):
            return {"success": True}
        line = {"method": method, "path": path, "headers": _JSON, "body": body}
        gives: dict[str, list[str]] = {}
        answer: dict[str, Any] = {}
        if path == legacy.MODELS:
            gives = {_MODEL: ["data", "id"]}
            answer = {"data": {"id": _MODEL}}
        elif path == platform.UPLOADS:
            names = ("uploadUrl", "gcsPath", "uploadPath")
            answer = {name: f"{{rankgate:{name} {self._requests}}}" for name in names}
            gives = {mark: [name] for name, mark in answer.items()}
        elif path == platform.EVENTS and "modelId" not in body:
            gives = {_MODEL: ["modelId"], _RUN: ["runId"]}
            answer = {"received": True, "modelId": _MODEL, "runId": _RUN}
        elif path == platform.EVENTS:
            answer = {"received": True}
        self._write({**line, "gives": gives} if gives else line)
        return answer

    def post_file(self, path: str, fields: Mapping[str, str], name: str, file: Path) -> None:
        form = dict(fields)
        kept = self._keep(file)
        self._write({"method": "POST", "path": path, "form": form, "name": name, "file": kept})

    def put_file(self, url: str, file: Path) -> None:
        headers = {"Content-Type": "application/octet-stream"}
        self._write({"method": "PUT", "path": url, "headers": headers, "file": self._keep(file)})

    def close(self) -> None:
        pass

    def rewind(self, size: int, requests: int) -> None:
        """Forget what came after the last receipt; the bundle is no longer whole."""
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / MANIFEST).unlink(missing_ok=True)
        with (self._folder / REQUESTS).open("ab") as stream:
            if stream.tell() < size:
                raise Unavailable(f"{stream.name} is shorter than what was written to it")
            stream.truncate(size)
        self._requests = requests

    def sync(self) -> tuple[int, int]:
        """Make it durable; how many bytes and requests there are."""
        with (self._folder / REQUESTS).open("ab") as stream:
            os.fsync(stream.fileno())
            return stream.tell(), self._requests

    def seal(self, manifest: dict[str, Any]) -> None:
        _replace(self._folder / MANIFEST, manifest)

    def _write(self, line: dict[str, Any]) -> None:
        with (self._folder / REQUESTS).open("ab") as stream:
            stream.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._requests += 1

    def _keep(self, file: Path) -> str:
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        name = digest.hexdigest()
        kept = self._folder / "files" / name
        if not kept.exists():
            kept.parent.mkdir(exist_ok=True)
            part = kept.with_suffix(".part")
            shutil.copyfile(file, part)
            with part.open("rb") as stream:
                os.fsync(stream.fileno())
            part.replace(kept)
        return f"files/{name}"


@dataclass(slots=True)
class BundleSent:
    """How far a bundle has been sent, over all calls."""

    requests: int = 0
    refused: list[str] = field(default_factory=list)  #: with the request's number
    values: dict[str, Any] = field(default_factory=dict)  #: of the placeholders


def send_bundle(
    folder: Path,
    sink_config: HubConfig,
    wait: Callable[[float], None] = time.sleep,
) -> BundleSent:
    """Send a bundle in order; called again it goes on after the last confirmed request.

    Waits when asked to by the backend. Raises `Unavailable` when that takes too long or nobody
    answers, `Refused` when the bundle is not one for this configuration. A request that the
    backend refuses is noted and passed over, unless later ones need its answer.
    """
    if not (folder / MANIFEST).exists():
        raise Refused(f"{folder} is not a whole bundle: {MANIFEST} is missing")
    manifest = json.loads((folder / MANIFEST).read_bytes())
    if (manifest["format"], manifest["protocol"]) != (FORMAT, sink_config.protocol):
        raise Refused(f"{folder} is for protocol {manifest['protocol']}, format {FORMAT}")
    is_platform = manifest["protocol"] == "platform"
    wire = platform.connect(sink_config) if is_platform else legacy.connect()
    saved = folder / PROGRESS
    done = BundleSent(**json.loads(saved.read_bytes())) if saved.exists() else BundleSent()
    try:
        with (folder / REQUESTS).open("rb") as stream:
            for number, text in enumerate(stream):
                if number < done.requests:
                    continue
                line = json.loads(text)
                try:
                    _patiently(wire, folder, line, done, wait)
                except Refused as error:
                    if line.get("gives"):
                        raise
                    done.refused.append(f"{number + 1}: {error}")
                done.requests = number + 1
                _replace(
                    saved,
                    {"requests": done.requests, "refused": done.refused, "values": done.values},
                )
    finally:
        wire.close()
    return done


def _patiently(
    wire: Wire,
    folder: Path,
    line: dict[str, Any],
    done: BundleSent,
    wait: Callable[[float], None],
) -> None:
    waited = 0.0
    while True:
        try:
            return _send_line(wire, folder, line, done)
        except Unavailable as error:
            if error.after_seconds is None or waited + error.after_seconds > PATIENCE_SECONDS:
                raise
            seconds = max(error.after_seconds, 1.0)
        wait(seconds)
        waited += seconds


def _send_line(wire: Wire, folder: Path, line: dict[str, Any], done: BundleSent) -> None:
    path = line["path"]
    for mark, value in done.values.items():
        path = path.replace(mark, str(value))
    if line["method"] == "PUT":
        wire.put_file(path, folder / line["file"])
    elif "form" in line:
        wire.post_file(path, line["form"], line["name"], folder / line["file"])
    else:
        answer = wire.call(line["method"], path, _fill(line["body"], done.values))
        for mark, names in line.get("gives", {}).items():
            found: Any = answer
            for name in names:
                found = found.get(name) if isinstance(found, dict) else None
            if found is None and mark != _RUN:  # a run's number may be left out
                raise NoAnswer(f"the answer to {path} lacks {'.'.join(names)}")
            done.values[mark] = found
        if path == platform.EVENTS:
            _check_event(answer)


def _check_event(answer: dict[str, Any]) -> None:
    if answer.get("received") is not True:
        raise NoAnswer("the platform did not confirm the event")
    if answer.get("ignored"):
        raise Refused(f"ignored: {answer['ignored']}")


def _fill(value: Any, values: dict[str, Any], name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _fill(inner, values, key) for key, inner in value.items()}
    return values.get(value, value) if name in _FILLED and isinstance(value, str) else value


def _replace(path: Path, value: Any) -> None:
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8") as stream:
        json.dump(value, stream)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(path)
