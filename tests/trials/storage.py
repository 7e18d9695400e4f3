"""Storage that knows what a crash may take back, for the trial of crash points.

A file is its bytes and what was done to them since its last sync; a directory is its names and
what became of them since its last sync. `before` is called before every change: there the trial
cuts, and looks at what `crashes` says may be found afterwards.
"""

from __future__ import annotations

import copy
import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random

CUT_BYTES = 8  #: everything is written in multiples of it
CUTS = 6  #: so many such cuts before the end of what was not synced
HOLE_BYTES = 64

Files = dict[str, bytes]


@dataclass(eq=False)
class File:
    """`changes` since the last sync: (offset, bytes) written, or (size, None) for a truncate."""

    data: bytearray = field(default_factory=bytearray)
    synced: bytes = b""
    changes: list[tuple[int, bytes | None]] = field(default_factory=list)

    def change(self, at: int, data: bytes | None) -> None:
        self.changes.append((at, data))
        _apply(self.data, at, data)

    def sync(self) -> None:
        self.synced = bytes(self.data)
        self.changes.clear()

    @property
    def unsynced_bytes(self) -> int:
        return sum(_cost(data) for _, data in self.changes)

    def torn(self, keep: int) -> bytes:
        """With only the first `keep` bytes of the changes."""
        found = bytearray(self.synced)
        for at, data in self.changes:
            if keep <= 0:
                break
            _apply(found, at, data if data is None else data[:keep])
            keep -= _cost(data)
        return bytes(found)

    def with_hole(self, random: Random) -> bytes:
        """All of the changes but a stretch of one, as blocks reach the disk in any order."""
        found = bytearray(self.data)
        writes = [(at, data) for at, data in self.changes if data]
        if writes:
            at, data = random.choice(writes)
            start = at + random.randrange(len(data))
            end = min(start + HOLE_BYTES, at + len(data), len(found))
            old = self.synced[start:end]
            found[start:end] = old + bytes(max(0, end - start - len(old)))
        return bytes(found)


def _cost(data: bytes | None) -> int:
    return CUT_BYTES if data is None else len(data)


def _apply(found: bytearray, at: int, data: bytes | None) -> None:
    if data is None:
        del found[at:]
    else:
        found.extend(bytes(max(0, at - len(found))))
        found[at : at + len(data)] = data


def parent_of(path: str) -> str:
    return path.rpartition("/")[0]


class Storage:
    """Names and files. A directory is a name without a file (None)."""

    def __init__(self, root: str, files: Files | None = None) -> None:
        self.root = root
        self.names: dict[str, File | None] = {root: None}
        for path, data in (files or {}).items():
            self.add_dirs(parent_of(path))
            file = File()
            file.change(0, data)
            file.sync()
            self.names[path] = file
        self.durable = dict(self.names)
        self.renames: list[tuple[str, str]] = []  #: (parent, path): what has changed, in order
        self.before: Callable[[], None] = lambda: None
        self.room = 1 << 40

    def copy(self) -> Storage:
        """The same, synced or not, for another future."""
        made = Storage(self.root)
        made.names, made.durable, made.renames = copy.deepcopy(
            (self.names, self.durable, self.renames)
        )
        return made

    def add_dirs(self, path: str) -> None:
        if path not in self.names:
            self.add_dirs(parent_of(path))
            self.names[path] = None

    # --- changes -------------------------------------------------------------

    def make_dir(self, path: str) -> None:
        if path not in self.names:
            self.make_dir(parent_of(path))
            self.put(path, None)

    def put(self, path: str, file: File | None) -> None:
        self.before()
        self.names[path] = file
        self.renames.append((parent_of(path), path))

    def remove(self, path: str) -> None:
        self.before()
        file = self.names.pop(path)
        assert file is not None
        self.room += len(file.data)
        self.renames.append((parent_of(path), path))

    def rename(self, path: str, to: str) -> None:
        self.before()
        self.names[to] = self.names.pop(path)
        self.renames += [(parent_of(to), to), (parent_of(path), path)]

    def write(self, file: File, at: int, data: bytes) -> int:
        """Raises OSError when there is no room for any of it."""
        self.before()
        grows = max(0, at + len(data) - len(file.data))
        if grows > 0 and self.room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = len(data) - max(0, grows - self.room)
        self.room -= min(grows, self.room)
        file.change(at, bytes(data[:taken]))
        return taken

    def truncate(self, file: File, size: int) -> None:
        self.before()
        self.room += max(0, len(file.data) - size)
        file.change(size, None)

    def sync(self, file: File) -> None:
        self.before()
        file.sync()

    def sync_dir(self, path: str) -> None:
        self.before()
        mine = [changed for parent, changed in self.renames if parent == path]
        self._make_durable(self.durable, mine)
        self.renames = [r for r in self.renames if r[0] != path]

    def _make_durable(self, durable: dict[str, File | None], paths: list[str]) -> None:
        for path in paths:
            if path in self.names:
                durable[path] = self.names[path]
            else:
                durable.pop(path, None)

    # --- what may be found ---------------------------------------------------

    @property
    def dirty(self) -> list[tuple[str, File]]:
        return [(p, f) for p, f in self.names.items() if f is not None and f.changes]

    @property
    def only_grew(self) -> bool:
        """Nothing that was written since a sync was cut off again."""
        return all(data is not None for _, file in self.dirty for _, data in file.changes)

    def killed(self) -> Files:
        """After the death of every process: all that was written."""
        return {p: bytes(f.data) for p, f in self.names.items() if f is not None}

    def crashes(self, random: Random) -> Iterator[tuple[str, Files]]:
        """(what happened, what is found) after a loss of power."""
        if not self.dirty and not self.renames:
            return
        yield "nothing unsynced survived", self._found(self.durable, lambda f: f.synced)
        if self.renames:
            yield "names lost", self._found(self.durable, lambda f: bytes(f.data))
            yield "names kept, bytes lost", self._found(self.names, lambda f: f.synced)
            some = dict(self.durable)
            kept = self.renames[: random.randrange(len(self.renames))]
            self._make_durable(some, [path for _, path in kept])
            yield "some names lost", self._found(some, lambda f: f.torn(f.unsynced_bytes // 2))
        if self.dirty:
            unsynced = max(f.unsynced_bytes for _, f in self.dirty)
            cuts = [c for i in range(1, CUTS) if (c := unsynced - i * CUT_BYTES) > 0]
            for keep in [random.randrange(unsynced + 1), *cuts]:
                yield (
                    f"torn after {keep} bytes",
                    self._found(self.names, lambda f, k=keep: f.torn(k)),
                )
            yield "a hole", self._found(self.names, lambda f: f.with_hole(random))

    def _found(self, names: dict[str, File | None], content: Callable[[File], bytes]) -> Files:
        there: dict[str, bool] = {self.root: True}

        def is_there(path: str) -> bool:
            if path not in there:
                there[path] = path in names and is_there(parent_of(path))
            return there[path]

        return {p: content(f) for p, f in names.items() if f is not None and is_there(p)}


class CrashDisk:
    """`wire.disk.Disk` over a Storage; a new one for every process."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._open: dict[int, File] = {}
        self._next = 2

    def _fd(self, file: File) -> int:
        self._next += 1
        self._open[self._next] = file
        return self._next

    def _find(self, path: str) -> File:
        file = self.storage.names.get(path)
        if file is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return file

    def make_dir(self, path: str) -> None:
        self.storage.make_dir(path)

    def names(self, path: str) -> list[str]:
        if path not in self.storage.names:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return [p.rpartition("/")[2] for p in self.storage.names if parent_of(p) == path]

    def exists(self, path: str) -> bool:
        return path in self.storage.names

    def create(self, path: str) -> int:
        if path in self.storage.names:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        if self.storage.room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        file = File()
        self.storage.put(path, file)
        return self._fd(file)

    def open_append(self, path: str) -> int:
        return self._fd(self._find(path))

    open_read = open_append

    def open_edit(self, path: str) -> int:
        return self._fd(self._find(path)) if self.exists(path) else self.create(path)

    lock = open_edit

    def write(self, fd: int, data: bytes | bytearray | memoryview) -> int:
        file = self._open[fd]
        return self.storage.write(file, len(file.data), bytes(data))

    def write_at(self, fd: int, data: bytes | memoryview, at: int) -> int:
        return self.storage.write(self._open[fd], at, bytes(data))

    def pread(self, fd: int, size: int, at: int) -> bytes:
        return bytes(self._open[fd].data[at : at + size])

    def size(self, fd: int) -> int:
        return len(self._open[fd].data)

    def truncate(self, fd: int, size: int) -> None:
        self.storage.truncate(self._open[fd], size)

    def sync(self, fd: int) -> None:
        self.storage.sync(self._open[fd])

    def sync_dir(self, path: str) -> None:
        self.storage.sync_dir(path)

    def close(self, fd: int) -> None:
        del self._open[fd]

    def rename(self, path: str, to: str) -> None:
        self.storage.rename(path, to)

    def unlink(self, path: str) -> None:
        self.storage.remove(path)
