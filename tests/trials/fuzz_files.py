"""Journals and spools with bytes changed, cut, swapped, doubled and taken from others.

What reads them may say that they are damaged, in the words that are documented, and nothing else.
What is still whole is kept, what is kept is true, and everything is accounted for.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random
from typing import NamedTuple

from gateway.journal.reader import Entry, JournalReader
from gateway.journal.salvage import BROKEN_BATCH
from gateway.journal.writer import Journal, JournalDamaged
from gateway.rules.project import Projection
from gateway.series.reader import Reader
from gateway.series.writer import Series
from rank_client.orphan_source import OrphanSource
from rank_client.orphans import read_hello
from rank_client.wire.records import UNNUMBERED, Kind, pack_map, walk
from tests.gateway.journal.made import UUID
from tests.gateway.rules.made import Life, Run
from tests.rank_client.wire.disks import MemoryDisk

SERIES_EVERY = 10  #: of the journals, so many are projected into a real series.db
SEGMENT_BYTES = 4000
DAMAGES = ("flip", "flip", "zero", "noise", "cut", "swap", "double", "other", "drop")
IN_PLACE = frozenset({"flip", "zero", "noise"})  #: everything else stays where it was
Rows = dict[tuple[bytes, int], tuple[int, float]]  #: (stream, number) → (step, "a")


class Base(NamedTuple):
    """A run whose journal is to be damaged, and what its ranks logged."""

    files: dict[str, bytes]
    rows: Rows


def make_base(random: Random, number: int) -> Base:
    """Two ranks with rows of several schemas, maps, texts, files, gaps and ends; some segments."""
    run = Run()
    run.journal.close()
    run.disk = MemoryDisk()
    run.journal = Journal(run.disk, "j", UUID, SEGMENT_BYTES)
    lives = []
    for rank in range(2):  # other runs have other streams
        hello = {"kind": "live", "run": "r", "rank": rank, "world_size": 2, "launch": str(number)}
        lives.append(Life(run, 2 * number + rank, hello))
    run.lives = lives
    for step in range(60):
        life = random.choice(lives)
        life.row({"a": step / 7, "b": step}, step)
        dice = random.random()
        if dice < 0.2:
            life.row({"a": step / 7, "c": True}, step)
        elif dice < 0.3:
            life.kv({"a": step / 7}, step)
        elif dice < 0.4:
            life.text("some text " * random.randrange(30))
        elif dice < 0.45:
            life.arrived(life.file())
        elif dice < 0.5:
            life.gap(3)
        if random.random() < 0.4:
            life.flush()
        if random.random() < 0.2:
            life.tell_again()
            run.tick()
        if random.random() < 0.3:
            run.journal.commit()
            run.journal.mark()
    for life in lives:
        life.end().bye()
    run.entries()
    run.journal.close()
    rows = {
        (life.id, number): (step, values["a"])
        for life in lives
        for number, (step, values) in life.rows.items()
    }
    return Base({path: bytes(data) for path, data in run.disk.files.items()}, rows)


def damaged(random: Random, files: dict[str, bytes], other: dict[str, bytes]) -> set[str]:
    """Change `files`; what was done to them."""
    done = set()
    for _ in range(random.randint(1, 4)):
        how, path = random.choice(DAMAGES), random.choice(sorted(files))
        data = bytearray(files[path])
        if not data:
            continue
        done.add(how)
        at = random.randrange(len(data))
        size = min(random.choice((1, 8, 64, 512)), len(data) - at)
        if how == "flip":
            data[at] ^= 1 << random.randrange(8)
        elif how == "zero":
            data[at : at + size] = bytes(size)
        elif how == "noise":
            data[at : at + size] = random.randbytes(size)
        elif how == "cut":
            del data[at:]
        elif how == "swap":
            there = random.randrange(len(data) - size + 1)
            data[at : at + size], data[there : there + size] = (
                data[there : there + size], data[at : at + size],
            )  # fmt: skip
        elif how == "double":
            data[at:at] = data[at : at + size]
        elif how == "other":
            data = bytearray(random.choice(sorted(other.items()))[1])
        elif how == "drop" and len(files) > 1:
            del files[path]
            continue
        files[path] = bytes(data)
    return done


# --- journals --------------------------------------------------------------------------------


def fuzz_journal(
    random: Random, base: Base, other: Base, folder: Path | None, counts: Counter[str]
) -> None:
    """One damaged journal: read as it is, then recovered, appended to and read again."""
    files = dict(base.files)
    done = damaged(random, files, other.files)
    disk = MemoryDisk()
    disk.files = {path: bytearray(data) for path, data in files.items()}
    entries = read(disk)
    if done <= IN_PLACE:
        _whole_entries_are_kept(base, files, entries)
    project(base, entries, folder, counts)
    try:
        journal = Journal(disk, "j", UUID, SEGMENT_BYTES)
    except JournalDamaged:
        counts["refused"] += 1
        return
    seq = journal.append_map(Kind.TICK, 0, {"quiet": [], "back": [], "dup": 0})
    journal.commit()
    journal.mark()
    journal.close()
    again = read(disk)
    assert again[-1].seq >= seq, f"an entry appended as {seq} cannot be read"
    project(base, again, None, counts)


def read(disk: MemoryDisk) -> list[Entry]:
    """What a reader finds; numbers ascend, whatever stands there."""
    reader = JournalReader(disk, "j")
    reader.uuid()
    entries: list[Entry] = []
    nothing = 0
    while nothing < 3:
        found = reader.read(3000)
        entries += found
        nothing = 0 if found else nothing + 1
    reader.close()
    numbers = [e.seq for e in entries]
    assert numbers == sorted(set(numbers)), "entries that do not ascend"
    return entries


def _whole_entries_are_kept(base: Base, files: dict[str, bytes], entries: list[Entry]) -> None:
    """An entry none of whose bytes changed is read, unless no mark says that it is committed."""
    read_numbers = {e.seq for e in entries if e.kind != BROKEN_BATCH}
    last = sorted(files)[-1]
    for path, before in base.files.items():
        now = files[path]
        heads = list(walk(before))
        marks = [
            h.at for h in heads
            if h.kind == Kind.MARK and now[h.at : h.at + h.size] == before[h.at : h.at + h.size]
        ]  # fmt: skip
        end = len(before) if path != last else max(marks, default=0)
        for head in heads:
            if head.kind in (Kind.MARK, Kind.TABLE) or head.at >= end:
                continue
            here = slice(head.at, head.at + head.size)
            if now[here] == before[here]:
                assert head.seq in read_numbers, f"entry {head.seq} is whole and was not read"


def project(base: Base, entries: list[Entry], folder: Path | None, counts: Counter[str]) -> None:
    """Everything adds up; rows are those that were logged."""
    projection = Projection()
    changes = projection.take(entries)
    for stream in projection.streams.values():
        assert stream.last_seq == stream.stored + stream.gaps, vars_of(stream)
        done = stream.projected + stream.quarantined + stream.control
        assert stream.stored == done, vars_of(stream)
        counts["kept"] += stream.projected
        counts["quarantined"] += stream.quarantined
        counts["gaps"] += stream.gaps
    assert all(n >= 0 for _, _, _, n, _ in changes.losses), "a negative loss"
    counts["salvaged entries"] += sum(e.kind == BROKEN_BATCH for e in entries)
    if folder is None:
        return
    for path in folder.glob("series.db*"):
        path.unlink()
    series = Series(folder / "series.db", UUID)
    series.apply(series.projection.take(entries))
    series.close()
    with Reader(folder) as reader:
        ids = {s.index: s.id for s in reader.streams()}
        if "a" in {name for _, name, _ in reader.keys()}:
            points = reader.points("a")
            for index, seq, step, value in zip(
                points.stream.tolist(), points.seq.tolist(), points.step.tolist(),
                points.value.tolist(), strict=True,
            ):  # fmt: skip
                want = base.rows.get((ids[index], seq))
                assert want is None or want == (step, value), f"row {seq} is another"
                counts["rows"] += want is not None


def vars_of(stream: object) -> str:
    return str({name: getattr(stream, name) for name in (
        "last_seq", "stored", "gaps", "projected", "quarantined", "control")})  # fmt: skip


# --- spools ----------------------------------------------------------------------------------


def make_spool(random: Random) -> dict[str, bytes]:
    """Segments as a rank writes them: head, schemas, records."""
    files, number = {}, 0
    for index in range(1, 4):
        records = [
            pack_map(Kind.HEAD, number + 1, {"run": "r", "stream": b"s" * 16, "kind": "live"})
        ]
        for _ in range(20):
            number += 1
            records.append(pack_map(Kind.TEXT, number, {"t": "x" * random.randrange(80)}))
        files[f"{index:08d}.log"] = b"".join(records)
    return files


def fuzz_spool(
    random: Random, base: dict[str, bytes], other: dict[str, bytes], folder: Path,
    counts: Counter[str],
) -> None:  # fmt: skip
    """One damaged spool, as sweep sees it: what it would send is what was logged, in order."""
    files = dict(base)
    damaged(random, files, other)
    for path in folder.glob("*.log"):
        path.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    read_hello(folder)
    source = OrphanSource(folder)
    written = {
        (h.seq, data[h.at : h.at + h.size])
        for data in (*base.values(), *other.values())
        for h in walk(data)
    }
    first = source.first_kept
    while first <= source.last:
        n, records = source.read(first, 1000)
        assert n > 0, f"record {first} was announced and cannot be read"
        heads = [h for h in walk(records) if h.kind not in UNNUMBERED]
        assert [h.seq for h in heads] == list(range(first, first + n)), "a hole"
        for head in heads:
            assert (head.seq, records[head.at : head.at + head.size]) in written, "another record"
        first += n
        counts["records swept"] += n


def fuzz(seed: int, n: int, folder: Path) -> tuple[Counter[str], list[int], list[str]]:
    """One worker's files; like fuzz_frames.fuzz."""
    random = Random(f"files {seed}")
    counts: Counter[str] = Counter()
    folder.mkdir(exist_ok=True)
    bases = [make_base(random, number) for number in range(3)]
    spools = [make_spool(random) for _ in range(3)]
    for i in range(n):
        file_seed = random.getrandbits(32)
        mine = Random(file_seed)
        try:
            if i % 3 == 2:
                fuzz_spool(mine, *mine.sample(spools, 2), folder, counts)
            else:
                where = folder if i % SERIES_EVERY == 0 else None
                fuzz_journal(mine, *mine.sample(bases, 2), where, counts)
        except Exception as error:  # whatever it is, it is what is looked for
            text = f"file {i} ({file_seed}) of seed {seed}: {type(error).__name__}: {error}"
            return counts, [], [text[:800]]
        counts["files"] += 1
    return counts, [], []
