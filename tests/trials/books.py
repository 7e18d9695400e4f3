"""The books of a run after a trial: what was logged against what is in the journal, the series and
the feed. Every check adds a sentence to `broken` instead of stopping at the first.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from gateway.ingest.media import blob_path
from gateway.journal.reader import JournalReader
from gateway.rules.follow import rebuild
from gateway.rules.project import ITEM_KINDS
from gateway.series.db import open_reader
from gateway.series.reader import Reader
from gateway.series.tables import StreamRow
from gateway.sinks.store import read_views
from rank_client.wire.disk import OsDisk
from rank_client.wire.frames import DATA_HEAD, DATA_HEAD_BYTES
from rank_client.wire.records import UNNUMBERED, Kind, walk

PRINTED = ("stdout", "stderr")  #: levels of what a rank printed: these pass from each
PASSING_RANKS = (-1, 0)  #: whose items the built-in rules let through
SHOWN = 3  #: examples in a sentence

Truth = dict[str, list[tuple[str, int, str]]]  #: stream → (kind, number, note) of each call


def read_truth(truth_dir: Path, run: str) -> Truth:
    """What returned, by stream; a line cut by a kill is of a call whose return nobody noted."""
    found: Truth = {}
    for path in truth_dir.glob("*.truth"):
        about, *lines = path.read_bytes().decode().split("\n")[:-1] or [""]
        if about and json.loads(about)["run"] == run:
            parts = [line.split(" ") for line in lines]
            found[json.loads(about)["stream"]] = [(k, int(n), note) for k, n, note in parts]
    return found


class Books:
    """Checks of one run, on disk and at rest. `figures` counts, `broken` says what is wrong."""

    def __init__(self, run_dir: Path, truth: Truth) -> None:
        self.run_dir = run_dir
        self.truth = truth
        self.broken: list[str] = []
        self.figures = {"streams": 0, "calls": 0, "records": 0, "lost": 0, "doubled": 0}

    def check(self) -> Books:
        """Everything; the gateway must have left."""
        rebuild(self.run_dir)  # whoever wrote it may have been stopped before the last entries
        self.figures["calls"] = sum(map(len, self.truth.values()))
        self.journal()
        with Reader(self.run_dir) as reader:
            self._series(reader)
            self._feed(reader)
            self.accounts(reader)
        self._files()
        self.rebuilt()
        return self

    def fault(self, count: str, what: str, examples: Iterable[Any]) -> None:
        found = list(examples)
        if found:
            self.figures[count] = self.figures.get(count, 0) + len(found)
            shown = ", ".join(map(str, found[:SHOWN]))
            self.broken.append(f"{self.run_dir.name}: {len(found)} {what}: {shown}")

    # --- the journal ---------------------------------------------------------

    def journal(self) -> None:
        """Entries 1, 2, …; of each stream the numbers 1, 2, …, each once."""
        reader = JournalReader(OsDisk(), str(self.run_dir / "journal"))
        high: Counter[bytes] = Counter()
        calls: Counter[bytes] = Counter()
        expected = 1
        while entries := reader.read():
            for entry in entries:
                if entry.seq != expected:
                    self.fault("lost", "journal entries out of order", [(expected, entry.seq)])
                expected = entry.seq + 1
                if entry.kind == Kind.BATCH:
                    self._batch(entry.body, high, calls)
        reader.close()
        self.fault("damaged", "stretches of the journal unreadable", reader.damage)
        self.figures["streams"] = len(high)
        self.figures["records"] = sum(high.values())
        kept = {stream.hex(): n for stream, n in calls.items()}
        missing = {
            stream: len(lines) - kept.get(stream, 0)
            for stream, lines in self.truth.items()
            if kept.get(stream, 0) < len(lines)
        }
        self.fault("lost", "streams with fewer calls than returned", missing.items())

    def _batch(self, body: memoryview, high: Counter[bytes], calls: Counter[bytes]) -> None:
        stream, first, n = DATA_HEAD.unpack_from(body, 8)[5:8]
        numbered = [h for h in walk(body[8 + DATA_HEAD_BYTES :]) if h.kind not in UNNUMBERED]
        if [h.seq for h in numbered] != list(range(first, first + n)):
            self.fault("lost", "batches that are not what they say", [(stream.hex(), first, n)])
        if first != high[stream] + 1:
            what = "doubled" if first <= high[stream] else "lost"
            self.fault(what, f"batches {what} in the journal", [(stream.hex(), first, n)])
        high[stream] = max(high[stream], first + n - 1)
        calls[stream] += sum(h.kind == Kind.ROW or h.kind in ITEM_KINDS for h in numbered)

    # --- the series ----------------------------------------------------------

    def _series(self, reader: Reader) -> None:
        """Every call that returned once, with its values; at most one more of a killed life."""
        streams = {s.index: s.id.hex() for s in reader.streams()}
        have: Counter[tuple[str, str, int]] = Counter()
        for kind, key, factor in (("row", "x", 1 / 7), ("odd", "odd/x", -1 / 7)):
            points = reader.points(key)
            for index, step, value in zip(
                points.stream.tolist(), points.step.tolist(), points.value.tolist(), strict=True
            ):
                have[streams[index], kind, step] += 1
                if abs(value - step * factor) > 1e-9 * max(1, step):
                    self.fault("lost", "values changed", [(streams[index], key, step, value)])
        for stream, _, _, _, level, text in reader.texts():
            if level not in PRINTED:
                have[streams[stream], "text", int(text.split(" ")[1])] += 1
        for kind in ("params", "summary"):
            for stream, _, _, values in reader.maps(kind):
                if "seed" not in values:
                    [number] = values.values()
                    have[streams[stream], kind, number] += 1
        for row in reader.media():
            have[streams[row.stream], "file", int(row.name.split("-")[1])] += 1
        want = {(s, kind, n) for s, lines in self.truth.items() for kind, n, _ in lines}
        self.fault("lost", "calls not in the series", sorted(want - have.keys()))
        self.fault("doubled", "calls twice in the series", [k for k, n in have.items() if n > 1])
        more = Counter(stream for stream, _, _ in have.keys() - want)
        self.fault("doubled", "streams with calls nobody made", [s for s in more if more[s] > 1])

    # --- the feed ------------------------------------------------------------

    def _feed(self, reader: Reader) -> None:
        """Each item that passes, once: rows by (key set, stream, number), others by number."""
        passing = {s.index for s in reader.streams() if s.rank in PASSING_RANKS}
        want: set[tuple[Any, ...]] = set()
        for keyset in reader.keysets():
            stream, seq, _ = reader.heads(keyset)
            system = all(name.startswith("system/") for name, _ in reader.keyset(keyset))
            mine = np.isin(stream, list(passing)) | system
            pairs = zip(stream[mine].tolist(), seq[mine].tolist(), strict=True)
            want |= {("rows", keyset, *pair) for pair in pairs}
        others = [("text", t[0], t[1]) for t in reader.texts() if t[4] not in PRINTED]
        others += [(k, m[0], m[1]) for k in ("params", "summary") for m in reader.maps(k)]
        others += [("media", m.stream, m.seq) for m in reader.media() if m.sha256]
        want |= {(kind, 0, s, q) for kind, s, q in others if s in passing}
        want |= {("console", 0, t[0], t[1]) for t in reader.texts() if t[4] in PRINTED}
        have = Counter(
            (e.kind, e.keyset, e.stream, seq)
            for e in reader.feed(0, 1 << 40)
            for seq in range(e.first, e.last + 1)
        )
        self.figures["fed"] = len(want)
        self.fault("lost", "items not in the feed", sorted(want - have.keys()))
        self.fault("doubled", "items twice in the feed", [k for k, n in have.items() if n > 1])
        self.fault("doubled", "items in the feed that are none", sorted(have.keys() - want))

    # --- sums ----------------------------------------------------------------

    def accounts(self, reader: Reader) -> None:
        streams = reader.streams()
        self.fault("unaccounted", "streams that do not add up", filter(_does_not_add_up, streams))
        self.fault("lost", "losses told", reader.losses())
        self.fault("lost", "records quarantined", reader.quarantine())
        about = reader.about()
        passed = sum(n for name, n in about.counters.items() if name.startswith("passed "))
        for view in read_views(self.run_dir):
            done = view.delivered + sum(view.skipped.values()) + view.quarantined
            if view.state in ("drained", "exported") and done != passed:
                self.fault("unaccounted", f"items of {view.name} beside {passed} passed", [done])
        state = f"{about.state}: {about.reason}" if about.reason else about.state
        self.state = state

    def _files(self) -> None:
        """Files that `log_file` returned for: whole, under their own checksum."""
        with Reader(self.run_dir) as reader:
            ids = {s.index: s.id.hex() for s in reader.streams()}
            have = {(ids[m.stream], int(m.name.split("-")[1])): m for m in reader.media()}
        missing = []
        for stream, lines in self.truth.items():
            for kind, n, sha256 in lines:
                if kind == "file":
                    row = have.get((stream, n))
                    if row is None or row.sha256 != sha256 or not self._whole(row.sha256):
                        missing.append((stream, n, row and (row.sha256, row.lost)))
        self.fault("lost", "files that are not here whole", missing)

    def _whole(self, sha256: str) -> bool:
        return blob_path(self.run_dir, sha256).is_file()

    def rebuilt(self) -> None:
        """series.db is sound, and what the journal alone gives is the same."""
        db = open_reader(self.run_dir / "series.db")
        if (found := db.execute("PRAGMA integrity_check").fetchall()) != [("ok",)]:
            self.fault("damaged", "faults of series.db", found)
        db.close()
        copy = self.run_dir.with_name(f"{self.run_dir.name}.rebuilt")
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        (copy / "journal").symlink_to(self.run_dir / "journal")
        rebuild(copy)
        with Reader(self.run_dir) as here, Reader(copy) as there:
            pairs = zip(here.dump(), there.dump(), strict=False)
            self.fault("damaged", "rows differ in a rebuild", (a[0] for a, b in pairs if a != b))
            if len(here.dump()) != len(there.dump()):
                self.fault("damaged", "rows more or less in a rebuild", [1])
        shutil.rmtree(copy)


def _does_not_add_up(stream: StreamRow) -> bool:
    return (
        stream.last_seq != stream.stored + stream.gaps
        or stream.stored != stream.projected + stream.quarantined + stream.control
        or bool(stream.gaps or stream.refused)
    )
