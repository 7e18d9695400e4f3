"""One connection to a ClearML server: the vendor's `Session` for address, credentials and token,
our own single attempt with time-outs for every request.

The vendor's loop around a request repeats by itself: without end on a bad certificate, an answer
cut in the middle and status 503 (session.py, `_send_request`), also for log lines, which the
server cannot tell apart. Here a request is sent once and the answer told as `base.py` wants it.
"""

from __future__ import annotations

import mimetypes
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import requests

from gateway.sinks.base import Off, Refused, SinkError, Unavailable
from gateway.sinks.clearml_events import public
from gateway.sinks.retry import asked_seconds

API_VERSION = "2.23"  #: without one the server takes the request for version 1.0
TIMEOUT_SECONDS = (10.0, 60.0)  #: to connect; between two bytes
INSTALL = "pip install 'rankgate[clearml]'"
CREDENTIALS = (
    "no ClearML credentials were found: set CLEARML_API_HOST, CLEARML_API_ACCESS_KEY and "
    "CLEARML_API_SECRET_KEY, or write ~/clearml.conf with `clearml-init`"
)
#: what of the session is used or replaced that the package's documentation does not promise
USED = (
    "_CLIENT_HEADER", "_WORKER_HEADER", "_send_request", "add_auth_headers",
    "get_files_server_host", "refresh_token", "send_request",
)  # fmt: skip
#: set before the package is imported, unless the user has; nothing of it holds a secret
QUIET = {
    "CLEARML_LOG_LEVEL": "ERROR",
    "CLEARML_SUPPRESS_UPDATE_MESSAGE": "1",
    "CLEARML_API_DEFAULT_REQ_METHOD": "POST",  # the default is GET, which proxies repeat
    "CLEARML_DISABLE_VAULT_SUPPORT": "1",  # a vault may set environment variables and write files
}


class Connection:
    """Logged in; `call`, `add_events` and `upload` return only what the server has confirmed."""

    def __init__(self) -> None:
        self._trouble: list[SinkError] = []  # of the login: the vendor wraps what is raised there
        session_class, pool, self._multipart, missing = _import_package()
        try:
            self._session = _once_only(session_class, pool, self._trouble)()
        except missing:
            raise Off(CREDENTIALS) from None
        except Exception as error:
            raise self._explain(error) from None

    def call(self, action: str, body: dict[str, Any]) -> dict[str, Any]:
        """One request; its answer's `data`."""
        return self._request(action, json=body)

    def add_events(self, lines: Sequence[str]) -> None:
        """All of these events, or `Refused` when the server did not take every one."""
        headers = {"Content-Type": "application/json-lines"}
        data = self._request("events.add_batch", data="\n".join(lines), headers=headers)
        added, errors = data.get("added", 0), data.get("errors", 0)
        if errors:
            raise Refused(f"ClearML refused {errors} of {len(lines)}: {data.get('errors_info')}")
        if added != len(lines):
            raise Unavailable(f"ClearML confirmed {added} of {len(lines)} events")

    def upload(self, source: Path, path: str) -> str:
        """Put a file on the file server, replacing what is there; its address, without the user
        and password by which only we get there."""
        host = self._files_host()
        kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
        try:
            with source.open("rb") as file:
                # file server: the field's name is the path (fileserver.py, upload)
                form = self._multipart(fields={path: (path, file, kind)})
                headers = {"Content-Type": form.content_type}
                response = self._session.http.post(
                    f"{host}/",
                    data=form,  # read while it is sent, never whole in memory
                    headers=self._session.add_auth_headers(headers),
                    timeout=TIMEOUT_SECONDS,
                    allow_redirects=False,
                )
        except FileNotFoundError:
            raise Refused(f"{source.name} is gone from the disk") from None
        except Exception as error:
            raise self._explain(error) from None
        if response.status_code != 200:
            raise _problem(response, "file upload")
        return f"{public(host)}/{quote(path)}"

    def _files_host(self) -> str:
        try:
            host = str(self._session.get_files_server_host(self._session.config)).rstrip("/")
        except ValueError:  # the vendor could not guess it from the API server's address
            host = ""
        if not host.startswith(("http://", "https://")):
            raise Refused("no ClearML file server over http is known: set CLEARML_FILES_HOST")
        return host

    def _request(self, action: str, **content: Any) -> dict[str, Any]:
        service, _, name = action.partition(".")
        try:
            response = self._session.send_request(
                service, name, version=API_VERSION, method="post", **content
            )
        except Exception as error:
            raise self._explain(error) from None
        if response.status_code != 200:
            raise _problem(response, action)
        try:
            data = response.json()["data"]
        except (ValueError, KeyError, TypeError):
            raise Unavailable(
                f"{action}: the answer is not ClearML's; check the API host"
            ) from None
        return data if isinstance(data, dict) else {}

    def _explain(self, error: Exception) -> SinkError:
        """A vendor or network error as ours; the trouble of a login goes first."""
        if self._trouble:
            trouble = self._trouble[-1]
            self._trouble.clear()
            return trouble
        if isinstance(error, SinkError):
            return error
        return Unavailable(f"ClearML cannot be reached: {type(error).__name__}: {error}")


def _import_package() -> tuple[Any, Any, Any, Any]:
    """What is used of it. Raises Off when it is not there, or not in this version."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        from clearml.backend_api import Session
        from clearml.backend_api.session.defs import MissingConfigError
        from clearml.backend_api.utils import get_http_session_with_retry
        from clearml.utilities.requests_toolbelt import MultipartEncoder
    except ImportError as error:
        raise Off(f"ClearML's package cannot be imported ({error}): {INSTALL}") from None
    missing = [name for name in USED if not hasattr(Session, name)]
    if missing:
        raise Off(
            f"this version of clearml is not one that rankgate knows (Session has no "
            f"{', '.join(missing)}): {INSTALL}"
        )
    return Session, get_http_session_with_retry, MultipartEncoder, MissingConfigError


def _once_only(session_class: Any, pool: Any, trouble: list[SinkError]) -> Any:
    """The vendor's session with its sending loop replaced by one attempt; `pool` makes its HTTP."""

    class OnceOnly(session_class):  # type: ignore[misc]
        _offline_mode = False  # CLEARML_OFFLINE_MODE is for the vendor's own loggers

        @property
        def http(self) -> Any:
            """Our own pool: the vendor's settings for certificates, none of its retries."""
            if "_http" not in self.__dict__:
                self._http = pool(total=0, config=self.config)
                self._http.write_timeout = TIMEOUT_SECONDS  # it lengthens those of large bodies
            return self._http

        def _send_request(
            self,
            service: str,
            action: str,
            version: str | None = None,
            method: str | None = None,
            headers: dict[str, str] | None = None,
            refresh_token_if_unauthorized: bool = True,
            **content: Any,
        ) -> Any:
            address = f"{self.host}/v{version}" if version else self.host
            about = dict.fromkeys(self._WORKER_HEADER, self.worker)
            about |= dict.fromkeys(self._CLIENT_HEADER, self.client)
            request = {"timeout": TIMEOUT_SECONDS, "allow_redirects": False, **content}
            for last in (False, True):
                url, sent = f"{address}/{service}.{action}", {**about, **(headers or {})}
                try:
                    response = self.http.request(method or "post", url, headers=sent, **request)
                except requests.RequestException as error:
                    trouble.append(_lost(error))
                    raise
                if response.status_code != 401 or not refresh_token_if_unauthorized or last:
                    break
                self.refresh_token()  # the token ran out or was revoked: nothing was done yet
                headers = self.add_auth_headers(dict(headers or {}))
            if action == "login" and response.status_code != 200:
                trouble.append(_problem(response, "login"))
            return response

    return OnceOnly


def _lost(error: requests.RequestException) -> Unavailable:
    return Unavailable(f"ClearML did not answer: {type(error).__name__}: {error}")


def _problem(response: requests.Response, what: str) -> SinkError:
    """A status that is not 200 as what the sink may raise."""
    status = response.status_code
    try:
        text = str(response.json()["meta"]["result_msg"])
    except (ValueError, KeyError, TypeError):
        text = response.reason or ""
    said = f"{what}: {status} {text}"[:500]
    if status in (401, 403):
        return Unavailable(f"ClearML does not accept the credentials ({said})")
    if 300 <= status < 400:
        where = response.headers.get("Location", "elsewhere")
        return Unavailable(f"ClearML has moved to {where}: set CLEARML_API_HOST ({said})")
    if status in (404, 405, 410) and what != "file upload":
        return Unavailable(f"no ClearML API there: check CLEARML_API_HOST ({said})")
    # server: one bad event makes the whole request a 500 (event_bll.py, add_events)
    if status == 500 and what == "events.add_batch":
        return Refused(f"ClearML failed on this ({said})")
    if status == 429 or status >= 500:
        asked = asked_seconds(response.headers.get("Retry-After", ""), time.time())
        return Unavailable(f"ClearML asks to wait ({said})", asked)
    return Refused(f"ClearML refused this ({said})")
