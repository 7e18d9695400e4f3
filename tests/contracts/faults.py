"""What goes wrong between a sink and its backend, as a table: fault × sink.

A fault is arranged once a delivery has begun, at a moment the seed chooses, and is over at some
time. What counts is the backend's own record afterwards: nothing lost, nothing there twice beyond
what was told as `maybe duplicate`.
"""

from __future__ import annotations

import email.utils
import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.servers.base import Reply

from .backends import Backend, Clearml, Jsonl, Legacy, Neptune, Platform, build_run, standing
from .lives import Lives

HOUR_SECONDS = 3600.0
ASKED_SECONDS = 40
MADE: tuple[type[Backend], ...] = (Clearml, Neptune, Platform, Legacy, Jsonl)
FOLDER = "a folder has no server"


@dataclass
class Case:
    """One cell while it is played. `after_steps` steps of the loop come before the fault."""

    backend: Backend
    lives: Lives
    rng: random.Random
    after_steps: int
    steps: int = 0
    notes: dict[str, Any] = field(default_factory=dict)

    def fail(self, pattern: str, **how: Any) -> None:
        self.backend.server.fail(pattern, **how)
        self.notes["server"] = self.backend.server._faults[-1], how["times"]

    @property
    def came_about(self) -> bool:
        """Whether any request met the server's fault."""
        fault, times = self.notes.get("server", (None, 0))
        return fault is None or fault.times < times


@dataclass(frozen=True)
class Fault:
    """`begin` arranges it; `each` is called before every later step, and may end it; `check` says
    what must be so besides. `not_for`: the backends it does not apply to, and why; `not_first`:
    those that it befalls when they have something, as else it says that the settings are wrong."""

    name: str
    begin: Callable[[Case], None]
    each: Callable[[Case], None] = lambda case: None
    check: Callable[[Case], None] = lambda case: None
    not_for: dict[type[Backend], str] = field(default_factory=dict)
    not_first: frozenset[type[Backend]] = frozenset()


@dataclass
class Outcome:
    """What became of one cell."""

    lost: list[str]
    doubled: list[str]
    maybe_duplicate: int
    quarantined: int
    waited_seconds: float

    @property
    def broken(self) -> list[str]:
        over = len(self.doubled) > self.maybe_duplicate
        return [
            *(f"lost {one}" for one in self.lost),
            *(f"twice {d}" for d in self.doubled if over),
        ]


def status(code: int, times: int = 2, **headers: str) -> Fault:
    """The requests that bring items are answered with this status."""

    def begin(case: Case) -> None:
        case.fail(case.backend.writes, status=code, times=case.rng.randint(1, times), **headers)

    not_first = frozenset({Neptune} if code == 401 else ())
    return Fault(f"status {code}", begin, not_for={Jsonl: FOLDER}, not_first=not_first)


def asks_to_wait(name: str, retry_after: Callable[[], str]) -> Fault:
    """429 with `Retry-After`: the loop waits at least so long."""

    def begin(case: Case) -> None:
        case.fail(case.backend.writes, status=429, times=1, Retry_After=retry_after())

    def check(case: Case) -> None:
        asked = ASKED_SECONDS - 5
        assert case.lives.longest_seconds >= asked, case.lives.longest_seconds

    return Fault(f"429, Retry-After as {name}", begin, check=check, not_for={Jsonl: FOLDER})


def reply_lost(case: Case) -> None:
    times = case.rng.randint(1, 3)
    case.fail(case.backend.writes, mode="apply_then_cut", times=times)


def request_lost(case: Case) -> None:
    case.fail(case.backend.writes, mode="cut", times=case.rng.randint(1, 3))


def html(case: Case) -> None:
    page = Reply(200, b"<html><body>Please log in</body></html>", "text/html")
    case.fail(case.backend.writes, status=200, body=page, times=case.rng.randint(1, 2))


def partial(case: Case) -> None:
    """An answer that says that a part of the batch was not taken."""
    if isinstance(case.backend, Clearml):
        data = {"added": 1, "errors": 1, "errors_info": {"told to fail": 1}}
        case.fail(case.backend.writes, status=200, body={"meta": {}, "data": data}, times=1)
    else:
        errors = [{"errorDescription": "told to fail"}]
        case.fail(case.backend.writes, status=200, body=Reply.of(errors), times=1)


def cut_upload(case: Case) -> None:
    case.fail(case.backend.uploads, mode="cut_body", times=2)


def outage(case: Case) -> None:
    case.fail(".", mode=case.rng.choice(["cut", "status"]), times=1 << 30)


def outage_over(case: Case) -> None:
    if case.lives.waited_seconds > HOUR_SECONDS:
        case.backend.server.heal()


def an_hour_passed(case: Case) -> None:
    assert case.lives.waited_seconds > HOUR_SECONDS
    assert case.lives.longest_seconds <= 300.0


def slow(case: Case) -> None:
    case.backend.server.latency_seconds = 0.15


def token_gone(case: Case) -> None:
    case.backend.expire_token()


def token_renewed(case: Case) -> None:
    """After three steps somebody has renewed it."""
    if case.steps > case.after_steps + 3:
        case.backend.renew_token()


def disk_full(case: Case) -> None:
    """The sink's own file cannot grow: SQLite's own limit stands for the disk's."""
    [[pages]] = case.lives.store.db.execute("PRAGMA page_count").fetchall()
    case.lives.store.db.execute(f"PRAGMA max_page_count = {pages}").fetchall()


def disk_freed(case: Case) -> None:
    if case.steps > case.after_steps + 4:
        case.lives.store.db.execute("PRAGMA max_page_count = 1000000").fetchall()


def nowhere_to_stage(case: Case) -> None:
    """The folder the sink works in cannot be made: a file stands in its place."""
    place = case.notes["place"] = _place(case.backend)
    if place.is_dir():
        place.rename(place.with_suffix(".aside"))
    place.write_text("")
    case.lives.again()


def staging_freed(case: Case) -> None:
    place = case.notes["place"]
    if case.steps > case.after_steps + 4 and place.is_file():
        place.unlink()
        if place.with_suffix(".aside").exists():
            place.with_suffix(".aside").rename(place)


def _place(backend: Backend) -> Path:
    return backend.folder / "lines" if isinstance(backend, Jsonl) else backend.scratch


ONE_BY_ONE = "one request is one thing: taken whole or not"
NO_STAGING = "stages nothing on disk"

FAULTS: tuple[Fault, ...] = (
    Fault("reply lost after it was applied", reply_lost, not_for={Jsonl: FOLDER}),
    Fault("request lost", request_lost, not_for={Jsonl: FOLDER}),
    *(status(code) for code in (400, 401, 403, 409, 413, 422, 500, 502, 503)),
    asks_to_wait("seconds", lambda: str(ASKED_SECONDS)),
    asks_to_wait(
        "a date", lambda: email.utils.formatdate(time.time() + ASKED_SECONDS, usegmt=True)
    ),
    Fault("HTML instead of JSON", html, not_for={Jsonl: FOLDER}),
    Fault(
        "partial batch",
        partial,
        not_for={Jsonl: FOLDER, Platform: ONE_BY_ONE, Legacy: ONE_BY_ONE},
    ),
    Fault("connection cut in the middle of an upload", cut_upload, not_for={Jsonl: FOLDER}),
    Fault("an hour's outage", outage, outage_over, an_hour_passed, not_for={Jsonl: FOLDER}),
    Fault("slow server", slow, not_for={Jsonl: FOLDER}),
    Fault("token expired, then renewed", token_gone, token_renewed, not_for={Jsonl: FOLDER}),
    Fault("disk full under the sink's own file", disk_full, disk_freed),
    Fault(
        "no room to stage",
        nowhere_to_stage,
        staging_freed,
        not_for={Clearml: NO_STAGING, Platform: NO_STAGING, Legacy: NO_STAGING},
    ),
)


def play(made: type[Backend], fault: Fault, folder: Path, seed: int) -> Outcome:
    """One cell, whole: a run, its delivery, the fault, and the backend's record at the end."""
    rng = random.Random(seed)
    run_dir = build_run(folder)
    first = made not in fault.not_first
    entries = rng.choice((6, 14, 512) if first else (6, 14))
    with ExitStack() as stack:
        backend = stack.enter_context(standing(made, folder / "backend"))
        stack.enter_context(patch("gateway.sinks.loop.FETCH_ENTRIES", entries))
        lives = stack.enter_context(Lives(backend, run_dir, rng=rng))
        after = rng.randint(0 if first else 1, 2 if entries < 100 else 0)
        case = Case(backend, lives, rng, after_steps=after)

        def each() -> None:
            if case.steps == case.after_steps:
                fault.begin(case)
            elif case.steps > case.after_steps:
                fault.each(case)
            case.steps += 1

        lives.finish(each)
        assert case.came_about, "no request met the fault"
        fault.check(case)
        lives.assert_accounted()
        have, want, view = backend.have(), backend.want(), lives.view()
        return Outcome(
            have.lost(want),
            have.doubled(want),
            view.maybe_duplicate,
            view.quarantined,
            lives.waited_seconds,
        )
