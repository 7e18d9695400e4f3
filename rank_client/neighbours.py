"""Shipping what earlier processes left on this node, from one of its ranks."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path

from .meant import same_directory
from .orphans import Orphan, find, kept
from .sender import Warn
from .sweep import ship
from .tidy import tidy
from .wire.keys import key_of
from .wire.session import ClientSession

NEIGHBOURS_SECONDS = 2.0  #: between two looks at what they left
NEIGHBOUR_SHIP_SECONDS = 30.0


class Neighbours(threading.Thread):
    """Ships what earlier lives of a run left on this node, where only its ranks can see that: the
    gateway is on another. In one rank of a node, beside its own data, and never before it."""

    def __init__(
        self,
        run_dir: Path,
        data_dir: Path,
        session: ClientSession,
        address: str,
        environ: Mapping[str, str],
        warn: Warn,
    ) -> None:
        super().__init__(name="rankgate-neighbours", daemon=True)
        self._run_dir = run_dir
        self._data_dir = data_dir
        self._session = session
        self._address = address
        self._environ = environ
        self._warn = warn
        self._leave = threading.Event()
        self._asked: set[tuple[Path, bytes]] = set()  # kept spools, and the journal that has them

    def run(self) -> None:
        while not self._leave.wait(NEIGHBOURS_SECONDS):
            try:
                if self._session.idle:
                    self._look()
                    tidy(self._run_dir.parent, time.time())
            except Exception as error:  # nothing may escape into the training process
                self._warn("neighbours", f"shipping what earlier processes left failed: {error}")

    def stop(self, seconds: float) -> None:
        self._leave.set()
        self.join(max(0.0, seconds))

    def _look(self) -> None:
        root, run = self._run_dir.parent, self._run_dir.name
        for orphan in (*find(root, None, lambda r: r == run), *kept(root, self._doubted)):
            if self._leave.is_set() or not self._session.idle:
                return
            if not self._meant_for_ours(orphan):
                continue
            shipped = ship(
                orphan,
                self._address,
                NEIGHBOUR_SHIP_SECONDS,
                key_of(self._environ),
                stop=self._leave.is_set,
            )
            for text in shipped.damage:
                self._warn(f"damage {orphan.directory}", f"{text}; see: rankgate sweep --help")
            if shipped.over and self._session.journal:
                self._asked.add((orphan.directory, self._session.journal))

    def _meant_for_ours(self, orphan: Orphan) -> bool:
        """Another project of this node may use the run's name too."""
        hello = orphan.hello
        return hello.get("addr") == self._address or same_directory(hello, self._data_dir)

    def _doubted(self, directory: Path, _journal: bytes) -> bool:
        """Each is asked for once: this process cannot know what became of the journal before."""
        asked = (directory, self._session.journal or b"")
        return directory.parent == self._run_dir and asked not in self._asked
