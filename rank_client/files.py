"""What a call gives as a file, picture or table, turned into a snapshot and the record of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .images import image_maker
from .media import INLINE_COPY_BYTES, MediaSender, copy_unchanged, snapshot
from .redact import Redactor

Make = Callable[[Path], None]  #: writes a snapshot to where it is told


class Files:
    """Hands files to the media sender, under names without secrets."""

    def __init__(self, media: MediaSender, clean: Redactor) -> None:
        self._media = media
        self._clean = clean

    def add_image(self, key: str, image: Any, step: int | None) -> None:
        """A picture, drawn behind the call; a path is a file like any other."""
        if isinstance(image, str | os.PathLike):
            self.add_file("image", Path(image), key=key, step=step)
            return
        self._add(
            self._body("image", key, self._name(key, ".png"), step), image_maker(image), False
        )

    def add_bytes(self, what: str, key: str, ending: str, data: bytes, step: int | None) -> None:
        def make(target: Path) -> None:
            target.write_bytes(data)

        self._add(self._body(what, key, self._name(key, ending), step), make, True)

    def add_file(
        self,
        what: str,
        path: Path,
        key: str | None = None,
        step: int | None = None,
        name: str | None = None,
        meta: dict[str, Any] | None = None,
        wait: bool = False,
    ) -> None:
        """A file as it is now: cloned in this call where the file system can; else copied, in
        this call when it is small or `wait`. Raises OSError, ValueError: nothing is logged."""
        path = path.absolute()
        about = path.stat()
        if not path.is_file():
            raise ValueError(f"{path} is not a regular file")
        name = name or path.name
        body = self._body(what, key or name, name, step, meta)

        def clone(target: Path) -> None:
            if not snapshot(path, target):
                raise NotImplementedError

        def copy(target: Path) -> None:
            copy_unchanged(path, target, about)

        def clone_or_copy(target: Path) -> None:
            if not snapshot(path, target):
                copy_unchanged(path, target)

        if wait or about.st_size <= INLINE_COPY_BYTES:
            self._add(body, clone_or_copy, True)
            return
        try:
            self._add(body, clone, True)
        except NotImplementedError:
            self._add(body, copy, False)

    def _name(self, key: str, ending: str) -> str:
        return self._clean.key(key).replace("/", "_") + ending

    def _body(
        self, what: str, key: str, name: str, step: int | None, meta: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        key, name = self._clean.key(key), self._clean.key(name)
        return {"what": what, "key": key, "name": name, "s": step, "meta": meta or {}}

    def _add(self, body: dict[str, Any], make: Make, now: bool) -> None:
        body["w"] = time.time_ns()
        self._media.add(body, make, now)
