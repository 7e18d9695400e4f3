"""The contract of a sink: what carries one run's passed items to one backend.

The order of calls is `open`, then `send` any number of times, then `close`; `open` again after a
restart. They are called from one thread, by `loop.py`, which owns retries, batching, accounting,
the cursor and the quarantine. A sink holds no queue and starts no thread that outlives a call.

A sink may raise `Unavailable` (nothing is known to be lost: the same call comes again later),
`Refused` (the backend will never take this batch: the loop halves it down to the one bad item),
or `Off` (this sink cannot work here at all). Anything else counts as `Unavailable`. A call that
does not come back at all ends its process, which starts again from its cursor (`process.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Value = float | int | bool | str | None

MAX_SECONDS = 7 * 86_400  #: that a setting may say


class SinkError(Exception):
    """The base of what a sink raises on purpose."""


class Unavailable(SinkError):
    """The backend cannot be reached or asked us to wait; the same call comes again."""

    def __init__(self, reason: str, after_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.after_seconds = after_seconds  #: what the backend asked for (Retry-After), if it did


class Refused(SinkError):
    """The backend answered that it will never take this; the text goes to the quarantine."""


class Off(SinkError):
    """This sink cannot work here (missing package, missing key); the text says what to do."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Scalars of one stream under one set of keys, in the order they were logged.

    `seq`, `step`, `wall_ns` have shape (n,); each column has shape (n,) and dtype float64, int64
    or bool. (stream, seq, key) is a point's identity for ever.
    """

    stream: bytes
    rank: int
    seq: npt.NDArray[np.int64]
    step: npt.NDArray[np.int64]
    wall_ns: npt.NDArray[np.int64]
    columns: dict[str, npt.NDArray[Any]]

    @property
    def items(self) -> int:
        return len(self.seq) * len(self.columns)


@dataclass(frozen=True, slots=True)
class Text:
    """One line a rank logged, or with `console` one that it printed: its level is then `stdout`
    or `stderr`. `step` is None where none was given."""

    stream: bytes
    rank: int
    seq: int
    wall_ns: int
    level: str
    text: str
    step: int | None = None
    console: bool = False
    items: int = 1


@dataclass(frozen=True, slots=True)
class Params:
    """One `log_params` call (or the `config` of init); keys are flat, joined with `/`."""

    stream: bytes
    rank: int
    seq: int
    wall_ns: int
    values: dict[str, Value]
    items: int = 1


@dataclass(frozen=True, slots=True)
class Summary:
    """One `log_summary` call: final values without a step."""

    stream: bytes
    rank: int
    seq: int
    wall_ns: int
    values: dict[str, Value]
    items: int = 1


@dataclass(frozen=True, slots=True)
class Media:
    """A file whose last byte has arrived. `path` is content-addressed: it never changes."""

    stream: bytes
    rank: int
    seq: int
    wall_ns: int
    what: str  #: image | figure | table | file | checkpoint
    key: str  #: the key the user gave, or the file's name
    name: str  #: the file name with its ending
    step: int | None
    path: Path
    sha256: str
    size_bytes: int
    meta: dict[str, Any]  #: checkpoint: best, final, metrics, epoch
    items: int = 1


Item = Rows | Text | Params | Summary | Media


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What a backend's run is made from. `run_id` matches `[A-Za-z0-9._-]{1,64}`."""

    run_id: str
    project: str
    name: str
    tags: tuple[str, ...]
    started_ns: int
    node: str = ""
    source: str = ""  #: which integration made the run: `ultralytics`, or empty


@dataclass(slots=True)
class Sent:
    """What became of items; over all calls, `close` included, delivered + skipped = the items
    given. One call may report fewer than it got (a point held until its epoch closes), a later
    one the rest."""

    delivered: int = 0
    skipped: dict[str, int] = field(default_factory=dict)  #: reason → items, a closed list
    maybe_duplicate: int = 0  #: of the delivered: sent again where the backend cannot tell

    def skip(self, reason: str, items: int = 1) -> None:
        if items:
            self.skipped[reason] = self.skipped.get(reason, 0) + items

    def add(self, part: Sent) -> None:
        self.delivered += part.delivered
        self.maybe_duplicate += part.maybe_duplicate
        for reason, items in part.skipped.items():
            self.skip(reason, items)


RECEIPTS = "receipts"


class Memory(Protocol):
    """What a sink must remember: durable, small, its own (values are msgpack types).

    `put` becomes durable in the same transaction as the receipt of the batch being sent; `put_now`
    at once (a task id, before anything is sent to it). A batch may be sent in pieces before its one
    receipt, so what is kept with `put_now` must not be made from what an earlier piece has `put`.
    `get(RECEIPTS)` tells how many receipts there were.
    """

    def get(self, key: str) -> Any: ...
    def put(self, key: str, value: Any) -> None: ...
    def put_now(self, key: str, value: Any) -> None: ...


class SinkConfig(Protocol):
    """A sink's table of the config: a frozen `msgspec.Struct`, every field with a default, none
    of them a secret (those come from the environment)."""

    @property
    def mode(self) -> str:
        """`online`, or `offline`: an export is written when the run has ended."""


class Sink(Protocol):
    """Three methods; see this module's docstring for their order and what they may raise."""

    @property
    def stop_asked(self) -> str:
        """Why the backend wants the training to stop, or empty; read after each call."""

    def open(self, run: RunInfo, memory: Memory) -> None:
        """Find or create the backend's run. Idempotent: never makes a second one for `run_id`."""

    def send(self, batch: Sequence[Item], again: bool) -> Sent:
        """Deliver in order; return only when the backend has confirmed.

        `again` is True when this very batch may have been delivered before (an answer was lost, or
        the process died): use idempotent keys or read back, else count `maybe_duplicate`.
        An empty batch comes about every 10 s while there is nothing to deliver: the place to
        say that the run lives, to look whether `stop_asked`, and to report what was held.
        """

    def close(self, state: str, reason: str) -> Sent:
        """Tell the run's final state (`completed`, `failed` or `lost`) and report what was still
        held. Idempotent; more may be sent after another `open`."""


@dataclass(frozen=True, slots=True)
class SinkKind:
    """How a sink is made: what an entry point of the group `rankgate.sinks` names."""

    config: Callable[..., SinkConfig]  #: the class of `[sinks.NAME]`, see `SinkConfig`
    online: Callable[[Any, Path], Sink]  #: from the config and a folder of its own to work in
    #: from the config, the folder to write, and what that will be renamed to; None: no export
    export: Callable[[Any, Path, Path], Sink] | None = None
    #: the backend keeps one value of a name and step: points of an older attempt that arrive after
    #: those of a newer one are not given to it (`attempts.py`)
    newest_wins: bool = False
