"""The HTTP shell of the HUB sinks: every call has a time-out, every answer becomes a value or one
of the errors of the sink contract. The one place that knows the key, which is in no message.
"""

from __future__ import annotations

import email.utils
import json
import secrets
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from urllib.parse import urlsplit

import requests
from requests.auth import AuthBase
from urllib3.exceptions import NewConnectionError

from gateway.sinks.base import Refused, Unavailable

CONNECT_TIMEOUT_SECONDS = 10.0
CALL_TIMEOUT_SECONDS = 30.0
UPLOAD_TIMEOUT_SECONDS = 600.0  #: the vendor's own client waits as long for a stored checkpoint
LONGEST_WAIT_SECONDS = 3600.0  #: HUB counts calls by the hour; a longer wish is a wrong clock
MESSAGE_CHARACTERS = 300

#: Not about this batch: a conflict, a plan to be renewed. The items wait.
_PASSING_STATUS = frozenset({402, 404, 408, 409, 425})


class NoAnswer(Unavailable):
    """No usable answer came, so the request may have been carried out all the same."""


class Limited(Unavailable):
    """429: too many requests, of all runs together."""


class Gone(Unavailable):
    """404 in the backend's own words: what we addressed, a model, is not there (any more)."""


class Wire(Protocol):
    """What the sinks speak through: the network here, a folder of requests in `export.py`."""

    def call(self, method: str, path: str, body: Any = None) -> dict[str, Any]: ...
    def post_file(self, path: str, fields: Mapping[str, str], name: str, file: Path) -> None: ...
    def put_file(self, url: str, file: Path) -> None: ...
    def close(self) -> None: ...


class KeyHeader(AuthBase):
    """Sets one header. As `auth`, since requests lets ~/.netrc overrule a plain header."""

    def __init__(self, name: str, value: str) -> None:
        self._name, self._value = name, value

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers[self._name] = self._value
        return request


class NoKey(AuthBase):
    """Sends no credential at all, not even one from ~/.netrc: a signed address refuses a second."""

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        return request


class Http:
    """A `Wire` over one `requests.Session`.

    `key_name` is the variable the key came from; it is named when the key is not accepted.
    """

    def __init__(self, root: str, auth: AuthBase, key: str, key_name: str) -> None:
        self._root = root.rstrip("/")
        self._key, self._key_name = key, key_name
        self._session = requests.Session()
        self._session.auth = auth
        self._session.headers["User-Agent"] = "rankgate"

    def call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """Send JSON, return the JSON object that came back."""
        data = None if body is None else json.dumps(body, allow_nan=False).encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        response = self._send(
            method, self._root + path, CALL_TIMEOUT_SECONDS, data=data, headers=headers
        )
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise NoAnswer(
                f"{_host(response.url)} answered {path} with something that is not a JSON object "
                f"({response.headers.get('Content-Type', 'no content type')}); is the address "
                "right, or is a proxy in between?"
            )
        return answer

    def post_file(self, path: str, fields: Mapping[str, str], name: str, file: Path) -> None:
        """POST multipart/form-data; the answer's body says nothing and is not looked at."""
        with file.open("rb") as stream:
            form = Form(fields, name, stream, file.stat().st_size)
            headers = {"Content-Type": form.content_type}
            response = self._send(
                "POST", self._root + path, UPLOAD_TIMEOUT_SECONDS, data=form, headers=headers
            )
        # A login page of some proxy comes with status 200 and stored nothing.
        if "html" in response.headers.get("Content-Type", ""):
            raise NoAnswer(f"{_host(response.url)} answered the upload with an HTML page")

    def put_file(self, url: str, file: Path) -> None:
        """PUT the bytes to a signed address, which carries its own permission."""
        size = file.stat().st_size
        with file.open("rb") as stream:
            self._send(
                "PUT",
                url,
                UPLOAD_TIMEOUT_SECONDS,
                auth=NoKey(),
                # requests sends an empty file chunked, which storage does not take.
                data=stream if size else b"",
                headers={"Content-Type": "application/octet-stream"},
            )

    def close(self) -> None:
        self._session.close()

    def _send(self, method: str, url: str, timeout: float, **options: Any) -> requests.Response:
        try:
            response = self._session.request(
                method,
                url,
                timeout=(CONNECT_TIMEOUT_SECONDS, timeout),
                allow_redirects=False,  # requests would carry x-api-key along to another host
                **options,
            )
        except requests.RequestException as error:
            # The error's own text may hold a signed address, so only its kind is told.
            text = f"{_host(url)}: {type(error).__name__} on {method}"
            raise (Unavailable(text) if _never_sent(error) else NoAnswer(text)) from None
        self._check(response)
        return response

    def _check(self, response: requests.Response) -> None:
        status = response.status_code
        if 200 <= status < 300:
            return
        host = _host(response.url)
        text = f"{host} answered {status}: {message(response.content).replace(self._key, '***')}"
        wait = wait_seconds(response.headers, time.time())
        if status >= 500:
            raise NoAnswer(text, wait)
        if status in (401, 403):
            raise Unavailable(
                f"{text} - it does not accept the key in {self._key_name}; renew the key and "
                "restart the gateway, nothing is lost until then",
                wait,
            )
        if status == 429:
            raise Limited(text, wait)
        if status == 404 and is_told(response.content):
            raise Gone(text, wait)
        if status in _PASSING_STATUS or 300 <= status < 400:
            raise Unavailable(text, wait)
        raise Refused(text)


class Form:
    """A multipart/form-data body that is read while it is sent; requests' own sits in memory."""

    def __init__(self, fields: Mapping[str, str], name: str, file: BinaryIO, size: int) -> None:
        boundary = secrets.token_hex(16)
        part = f'--{boundary}\r\nContent-Disposition: form-data; name="'
        head = "".join(f'{part}{key}"\r\n\r\n{value}\r\n' for key, value in fields.items())
        head += f'{part}file"; filename="{name}"\r\nContent-Type: application/octet-stream\r\n\r\n'
        tail = f"\r\n--{boundary}--\r\n"
        self.content_type = f"multipart/form-data; boundary={boundary}"
        self._length = len(head.encode()) + size + len(tail)
        self._parts: list[BinaryIO] = [BytesIO(head.encode()), file, BytesIO(tail.encode())]

    def __len__(self) -> int:
        return self._length

    def read(self, size: int = -1) -> bytes:
        while self._parts:
            block = self._parts[0].read(size)
            if block:
                return block
            self._parts.pop(0)
        return b""


def wait_seconds(headers: Mapping[str, str], now: float) -> float | None:
    """How long the backend asks to wait, from `Retry-After`, else from `X-RateLimit-Reset`.

    `X-RateLimit-Reset` is unix seconds on HUB and an ISO time on Platform.
    """
    for name in ("Retry-After", "X-RateLimit-Reset"):
        text = (headers.get(name) or "").strip()
        if not text:
            continue
        try:
            seconds = float(text)
        except ValueError:
            moment = _moment(text)
            if moment is None:
                continue
            seconds = moment - now
        else:
            if name == "X-RateLimit-Reset":
                seconds -= now
        if seconds == seconds:  # not nan
            return min(max(seconds, 0.0), LONGEST_WAIT_SECONDS)
    return None


def message(body: bytes) -> str:
    """What an error's body says: HUB's `message`, Platform's `error`, else its first line."""
    told = _told(body)
    if told is not None:
        return told[:MESSAGE_CHARACTERS]
    text = body.decode("utf-8", "replace").strip().partition("\n")[0]
    return text[:MESSAGE_CHARACTERS] or "(no text)"


def is_told(body: bytes) -> bool:
    """Did the backend itself answer, and not a proxy or another server at that address?"""
    return _told(body) is not None


def _told(body: bytes) -> str | None:
    try:
        value = json.loads(body)
    except ValueError:
        return None
    for name in ("message", "error"):
        if isinstance(value, dict) and isinstance(value.get(name), str):
            return str(value[name])
    return None


def _moment(text: str) -> float | None:
    try:
        moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        try:
            moment = email.utils.parsedate_to_datetime(text)
        except ValueError:
            return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)
    return moment.timestamp()


def _never_sent(error: requests.RequestException) -> bool:
    """Whether no connection came about, so that the backend cannot have done anything."""
    if isinstance(error, (requests.exceptions.ConnectTimeout, requests.exceptions.SSLError)):
        return True
    cause = error.args[0] if error.args else None
    return isinstance(getattr(cause, "reason", None), NewConnectionError)


def _host(url: str) -> str:
    return urlsplit(url).netloc
