"""A stand-in HTTP server: threads, keep-alive, a record of what it accepted, faults on order."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, urlsplit


@dataclass
class Request:
    method: str
    path: str  #: without the query
    query: dict[str, str]
    headers: dict[str, str]  #: names in lower case
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Reply:
    status: int = 200
    body: bytes = b"{}"
    content_type: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of(value: Any, status: int = 200, **headers: str) -> Reply:
        return Reply(status, json.dumps(value).encode(), headers=headers)


@dataclass
class Fault:
    """What to do instead of, or after, handling a request whose path matches.

    mode: `status` (answer `reply`, do nothing) · `cut` (close the connection, do nothing) ·
    `cut_body` (close in the middle of its body) · `apply_then_cut` (do it, then close without an
    answer) · `delay` (wait, then do it).
    """

    pattern: re.Pattern[str]
    mode: str
    reply: Reply
    seconds: float
    times: int
    until: float


class StandIn:
    """Use as a context manager; `url` is its address. Subclasses implement `handle`.

    `handle` runs under one lock, so a subclass keeps its state in plain fields.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.requests: list[tuple[str, str, int]] = []  #: (method, path, status), status 0 = cut
        self.answering: set[int] = set()  #: clients' ports whose request is not answered yet
        self.latency_seconds = 0.0  #: of each answer: half before it is carried out, half after
        self.keep_alive = True  #: False: a connection carries one request
        self._faults: list[Fault] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *_: Any) -> None:
                pass

            def _serve(self) -> None:
                outer._serve(self)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_: Any) -> None:
                pass  # a client that was killed mid-request is what many tests do

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )

    def __enter__(self) -> Any:
        self._thread.start()
        return self

    def __exit__(
        self, _t: type[BaseException] | None, _e: BaseException | None, _b: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def handle(self, request: Request) -> Reply:
        raise NotImplementedError

    def fail(
        self,
        pattern: str,
        *,
        mode: str = "status",
        status: int = 503,
        body: Any = None,
        seconds: float = 0.0,
        times: int = 1,
        for_seconds: float | None = None,
        **headers: str,
    ) -> None:
        """The next `times` requests (or all for `for_seconds`) on a matching path go wrong."""
        reply = body if isinstance(body, Reply) else Reply.of(body or {"error": "told to fail"})
        reply.status, reply.headers = status, headers
        until = time.monotonic() + for_seconds if for_seconds is not None else float("inf")
        count = times if for_seconds is None else 1 << 30
        with self.lock:
            self._faults.append(Fault(re.compile(pattern), mode, reply, seconds, count, until))

    def heal(self) -> None:
        with self.lock:
            self._faults.clear()

    def wait_until(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while True:
            with self.lock:
                if condition():
                    return
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {seconds} s; last: {self.requests[-10:]}")
            time.sleep(0.01)

    def _take_fault(self, path: str, mode: str = "") -> Fault | None:
        """The next one for this path: of that mode, or of any that does not cut a body."""
        now = time.monotonic()
        self._faults = [f for f in self._faults if f.times > 0 and f.until > now]
        for fault in self._faults:
            wanted = fault.mode == mode if mode else fault.mode != "cut_body"
            if wanted and fault.pattern.search(path):
                fault.times -= 1
                return fault
        return None

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(handler.path)
        length = int(handler.headers.get("Content-Length") or 0)
        with self.lock:
            cut = self._take_fault(parts.path, "cut_body")
        if cut:
            handler.rfile.read(length // 2)
            self._cut(handler, Request(handler.command, parts.path, {}, {}, b""))
            return
        body = handler.rfile.read(length)
        if len(body) < length:
            return
        query = {k: v[-1] for k, v in parse_qs(parts.query, keep_blank_values=True).items()}
        headers = {k.lower(): v for k, v in handler.headers.items()}
        request = Request(handler.command, parts.path, query, headers, body)
        port = handler.client_address[1]
        with self.lock:
            self.answering.add(port)
        try:
            self._answer_to(handler, request)
        finally:
            with self.lock:
                self.answering.discard(port)

    def _answer_to(self, handler: BaseHTTPRequestHandler, request: Request) -> None:
        with self.lock:
            fault = self._take_fault(request.path)
        if fault and fault.mode == "delay":
            time.sleep(fault.seconds)
            fault = None
        if fault and fault.mode == "status":
            reply = fault.reply
        elif fault and fault.mode == "cut":
            self._cut(handler, request)
            return
        else:
            time.sleep(self.latency_seconds / 2)
            with self.lock:
                reply = self.handle(request)
            time.sleep(self.latency_seconds / 2)
            if fault:
                self._cut(handler, request)
                return
        with self.lock:
            self.requests.append((request.method, request.path, reply.status))
        handler.send_response(reply.status)
        handler.send_header("Content-Type", reply.content_type)
        handler.send_header("Content-Length", str(len(reply.body)))
        if not self.keep_alive:
            handler.send_header("Connection", "close")  # and the handler closes it
        for name, value in reply.headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        if request.method != "HEAD":
            handler.wfile.write(reply.body)

    def _cut(self, handler: BaseHTTPRequestHandler, request: Request) -> None:
        with self.lock:
            self.requests.append((request.method, request.path, 0))
        handler.close_connection = True
        handler.connection.shutdown(socket.SHUT_RDWR)
