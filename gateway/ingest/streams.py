"""What the gateway knows of one sender, and of a file on its way, while it lives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..journal.writer import Journal
from .media import Blob

#: What is kept of HELLO and PING, for live.json; a peer may say anything, at any length.
ABOUT = ("rank", "node", "local_rank", "pid")
PROGRESS = ("last", "step", "logged", "refused", "bad", "volatile", "offset")
TOLD_CHARACTERS = 256


@dataclass(slots=True, eq=False)
class Arriving:
    """A file on its way. `taken` chunks were handed to the disk's thread, `written` of them are
    there; `refs` are the records that wait for it."""

    blob: Blob
    state: str = "opening"  #: opening | open | finishing | whole
    taken: int = 0
    written: int = 0
    refs: list[tuple[bytes, int]] = field(default_factory=list)

    def want(self, body: dict[str, Any]) -> None:
        """Note the record a HELLO or BYE names, if it names one."""
        of, media = body.get("of"), body.get("media")
        if isinstance(of, bytes) and isinstance(media, int) and (of, media) not in self.refs:
            self.refs.append((of, media))


@dataclass(slots=True, eq=False)
class Stream:
    """What is known of one sender while this gateway lives."""

    id: bytes
    run: str
    kind: str
    journal: Journal
    peer: bytes
    heard_ns: int
    opened_ns: int = 0  #: its first HELLO in this life of the gateway
    durable: int = 0
    silent: bool = False
    link: str = ""  #: its connection: up | gone, or not known; for display only
    ended: bool = False
    dropped: bool = False  #: data came that we had no room for
    changed: bool = False  #: another journal had acknowledged it
    nonce: Any = None  #: of its last HELLO
    welcome_ns: int = 0  #: when it said HELLO, while the answer waits for a commit
    file: Arriving | None = None
    bye_peer: bytes | None = None
    about: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(ABOUT))
    progress: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(PROGRESS))

    @property
    def high_water(self) -> int:
        """The last number that was taken."""
        return self.file.taken if self.file else self.journal.streams[self.id].high_water

    @property
    def stored(self) -> int:
        """The last number that is on disk once the journal is committed."""
        return self.file.written if self.file else self.journal.streams[self.id].high_water


def told(body: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Numbers and short texts only."""
    out: dict[str, Any] = dict.fromkeys(names)
    for name in names:
        value = body.get(name)
        if isinstance(value, str):
            out[name] = value[:TOLD_CHARACTERS]
        elif isinstance(value, int | float):
            out[name] = value
    return out
