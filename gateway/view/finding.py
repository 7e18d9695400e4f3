"""Finding a run by what people call it, and what to call it in turn."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import apsw

from rank_client.identity import safe_run_id
from rank_client.spool_place import spool_root
from rank_client.wire.disk import OsDisk

from ..errors import AmbiguousRun, Busy, Damaged, NotServed, RankgateError, UnknownRun
from ..journal.reader import JournalReader
from ..series.reader import Reader
from ..series.tables import StreamRow
from .rebuilt import series_of
from .serving import mtime_ns
from .words import clean

SHORT_CHARACTERS = 4
LISTED = 8  #: runs named in an error

_HASH = re.compile(
    r"[0-9a-f]{12,}|(?=[0-9]*[a-f])[0-9a-f]{8,}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
)


@dataclass(frozen=True, slots=True)
class Label:
    """What a run is called: `id` in full, `short` enough to type, `name` to read."""

    id: str
    short: str
    name: str
    project: str


def run_dirs(data_dir: Path) -> list[Path]:
    """The runs of a data directory, by id. Raises RankgateError where they cannot be listed."""
    try:
        return sorted(p for p in (data_dir / "runs").iterdir() if is_run(p))
    except FileNotFoundError:
        return []
    except OSError as error:
        why = "it is a file" if data_dir.is_file() else f"{error.filename}: {error.strerror}"
        raise RankgateError(
            f"cannot read the data directory {data_dir}: {why}. Is it the right one? Set it with "
            "--dir or RANKGATE_DIR."
        ) from None


def newest_first(data_dir: Path) -> list[Path]:
    """The runs of a data directory, that with the newest news first."""

    def news(run: Path) -> int:
        if is_closed(run):
            return 0
        # Not series.db: whoever reads it touches its log.
        return max((mtime_ns(p) for p in (run / "journal").glob("*.log")), default=0)

    return sorted(run_dirs(data_dir), key=news, reverse=True)


def is_run(path: Path) -> bool:
    """A folder that we may not enter counts as one: `reading` says what is the matter."""
    return is_closed(path) or (path / "journal").is_dir() or (path / "series.db").is_file()


def is_closed(run_dir: Path) -> bool:
    """Is it a folder that we may not enter? What is asked of a path inside would raise."""
    return run_dir.is_dir() and not os.access(run_dir, os.X_OK)


def short_id(id_: str, ids: Sequence[str]) -> str:
    """The shortest prefix of a hash that no other run has; other ids as they are."""
    if not _HASH.fullmatch(id_):
        return id_
    for length in range(SHORT_CHARACTERS, len(id_)):
        prefix = id_[:length]
        if not any(other.startswith(prefix) for other in ids if other != id_):
            return prefix
    return id_


def label(run_dir: Path, streams: Sequence[StreamRow]) -> Label:
    """How a run is named, from the hello of its first rank and the ids beside it."""
    id_ = run_dir.name
    beside = _beside(run_dir)
    ranks = [s for s in streams if s.kind != "tool"] or list(streams)
    hello = ranks[0].hello if ranks else {}
    project = clean(str(hello.get("project") or "")) or "default"
    named = next((s.hello["name"] for s in ranks if s.hello.get("name")), "")
    short = short_id(id_, beside)
    if named:
        name = clean(str(named))
    elif short == id_ and id_.startswith(project):
        name = id_
    else:
        name = f"{project}-{short}"
    return Label(id_, short, name, project)


def _beside(run_dir: Path) -> list[str]:
    """The ids of the runs of the same data directory, as far as they can be listed."""
    try:
        return (
            [p.name for p in run_dirs(run_dir.parents[1])] if run_dir.parent.name == "runs" else []
        )
    except RankgateError:
        return []


@contextmanager
def reading(run_dir: Path) -> Iterator[Reader]:
    """A run's reader. Inside the block, SQLite's errors come as Damaged, Busy or NotServed.
    Raises RankgateError for a folder that we may not enter."""
    if is_closed(run_dir):
        raise RankgateError(
            f"{run_dir} is not for this user to enter. Ask its owner, or run this as them."
        )
    try:
        with Reader(run_dir, series_of(run_dir)) as reader:
            try:
                reader.about()
            except (apsw.SQLError, KeyError):  # its tables are being made at this moment
                raise _not_built(run_dir) from None
            yield reader
    except apsw.BusyError as error:
        raise Busy(f"{run_dir}/series.db is locked by another process: try again.") from error
    except apsw.Error as error:
        raise _unreadable(run_dir, error) from error


def _unreadable(run_dir: Path, error: Exception) -> RankgateError:
    series = run_dir / "series.db"
    if not series.exists():
        return _not_built(run_dir)
    if isinstance(error, apsw.CantOpenError | apsw.PermissionsError | apsw.IOError):
        return Damaged(f"{series} cannot be opened ({error}). Check its owner and mode.")
    return Damaged(
        f"{series} is damaged ({error}). Nothing is lost: it is made from the journal beside it. "
        f"Delete it (rm {series}*), and a gateway on this directory builds it again "
        "(rankgate serve)."
    )


def check_whole(run_dir: Path) -> None:
    """Called when a command has shown what can be read. Raises Damaged if that is not all."""
    with reading(run_dir) as reader:
        damage = reader.about().damage
    if damage:
        raise Damaged(
            f"The journal of run {run_dir.name} is damaged: {'; '.join(damage)} (in {run_dir}). "
            "What can be read is kept and was used. If there is a copy of that file, put it back, "
            f"delete the series (rm {run_dir}/series.db*), and a gateway builds it again."
            f"{_in_spool(run_dir.name)}"
        )


def _in_spool(run: str) -> str:
    """How to have what this node's processes logged, which the spool keeps for a while."""
    kept = spool_root(os.environ) / run
    if not kept.is_dir():
        return ""
    return (
        f" What processes of this node logged may still be whole in {kept}. To have it in another "
        f"data directory: mkdir COPY && cp -r {shlex.quote(str(kept))} COPY && "
        f"rm -f COPY/{run}/*/done && rankgate sweep --spool COPY --dir NEW."
    )


def _not_built(run_dir: Path) -> RankgateError:
    """There is a journal and no series: for want of a gateway, or of a readable journal."""
    journal = run_dir / "journal"
    try:
        named = JournalReader(OsDisk(), str(journal)).uuid()
    except (OSError, KeyError, ValueError):
        named = None
    if named is None:
        return Damaged(
            f"{journal} holds no readable journal. If it was copied, copy it again; else move "
            f"{run_dir} away, and the ranks send again what their spools keep."
        )
    return NotServed(
        f"Run {run_dir.name} has a journal but nobody has read it yet. Start a gateway on this "
        "directory (rankgate serve), and it is there in a moment."
    )


def find_run(data_dir: Path, text: str) -> Path:
    """The folder of the run that `text` means: a path, an id, a unique prefix of one, or a name.
    Raises UnknownRun, AmbiguousRun."""
    named = data_dir / "runs" / safe_run_id(text)  # as `--run TEXT` makes it
    if text and is_run(named):
        return named
    path = Path(text).expanduser()
    if ("/" in text or text in (".", "..")) and path.is_dir():
        return _at_path(path)
    runs = run_dirs(data_dir)
    found = [run for run in runs if text and run.name.startswith(text)]
    if not found:
        found = _named(runs, text)
    if len(found) == 1:
        return found[0]
    if found:
        raise AmbiguousRun(
            f"{clean(text)!r} stands for {len(found)} runs: {_listing(found)}. Give more of the id."
        )
    if is_run(path):
        return path.resolve()
    raise _unknown(data_dir, runs, text)


def _at_path(path: Path) -> Path:
    """A run's folder, or a data directory or copy that holds exactly one run."""
    if is_run(path):
        return path.resolve()
    runs = run_dirs(path)
    if len(runs) == 1:
        return runs[0].resolve()
    if runs:
        raise AmbiguousRun(f"{path} holds {len(runs)} runs: {_listing(runs)}. Give one of them.")
    raise UnknownRun(f"{path} is not a run: it has neither a journal folder nor a series.db.")


def quick_label(run: Path) -> Label:
    """A label even where the series cannot be read."""
    try:
        with reading(run) as reader:
            return label(run, reader.streams())
    except RankgateError:
        return label(run, [])


def _named(runs: list[Path], text: str) -> list[Path]:
    """By display name; `digits-7f3a` also while another run made the shown prefix longer."""
    found = []
    for run in runs:
        its = quick_label(run)
        prefix = f"{its.project}-"
        if text == its.name or (
            text.startswith(prefix)
            and len(text) >= len(prefix) + SHORT_CHARACTERS
            and run.name.startswith(text[len(prefix) :])
        ):
            found.append(run)
    return found


def _listing(runs: Sequence[Path]) -> str:
    names = [f"{run.name} ({quick_label(run).name})" for run in runs[:LISTED]]
    more = f" and {len(runs) - LISTED} more" if len(runs) > LISTED else ""
    return ", ".join(names) + more


def _unknown(data_dir: Path, runs: list[Path], text: str) -> UnknownRun:
    shown = repr(clean(text))
    if not runs:
        return UnknownRun(
            f"There is no run {shown}: {data_dir} holds no runs. Is it the right directory? "
            "Set it with --dir or RANKGATE_DIR."
        )
    names = {run.name: run for run in runs} | {quick_label(run).name: run for run in runs}
    near = difflib.get_close_matches(text, names, n=LISTED, cutoff=0.5)
    unique = list(dict.fromkeys(names[n] for n in near))
    if unique:
        return UnknownRun(f"There is no run {shown} in {data_dir}. Nearest: {_listing(unique)}.")
    return UnknownRun(
        f"There is no run {shown} in {data_dir}; it holds {len(runs)}: {_listing(runs)}."
    )
