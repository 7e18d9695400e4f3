"""Both protocols under random outages, lost answers and restarts: all arrives, all is counted."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gateway.sinks.base import Item, Media, Params, Rows, RunInfo, Sent, Summary, Text, Unavailable
from gateway.sinks.hub import platform
from gateway.sinks.hub.carry import HubSink
from gateway.sinks.hub.config import HubConfig
from gateway.sinks.hub.legacy import LegacySink
from gateway.sinks.hub.platform import PlatformSink
from tests.servers import hub_legacy
from tests.servers import platform as platform_server
from tests.sinks.fakes import MemoryDict

STREAM = b"s" * 16


class ReceiptDict(MemoryDict):
    """A memory whose `put` is seen only after the receipt, and is gone when a call fails."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: dict[str, Any] = {}

    def put(self, key: str, value: Any) -> None:
        self.waiting[key] = value

    def put_now(self, key: str, value: Any) -> None:
        super().put(key, value)

    def receipt(self) -> None:
        for key, value in self.waiting.items():
            super().put(key, value)
        self.waiting.clear()


class Story:
    """Random items, and what a backend must know after them."""

    def __init__(self, rng: random.Random, folder: Path) -> None:
        self.items: list[Item] = []
        self.epochs: dict[int, dict[str, float]] = {}
        self.lines: list[str] = []
        current: dict[str, float] = {}
        for seq in range(1, rng.randint(5, 60)):
            kind = rng.choices(range(6), (45, 15, 20, 7, 3, 10))[0]
            if kind == 0:
                key = rng.choice("xyz")
                self.items.append(rows(seq, {key: float(seq)}))
                current[key] = float(seq)
            elif kind == 1:
                epoch = len(self.epochs)
                self.items.append(rows(seq, {"epoch": epoch, "v": float(seq)}))
                self.epochs[epoch] = {**current, "v": float(seq)}
                current = {}
            elif kind == 2:
                self.lines.append(f"line {seq}")
                self.items.append(Text(STREAM, 0, seq, seq * 10**6, "info", f"line {seq}"))
            elif kind == 3:
                self.items.append(Params(STREAM, 0, seq, seq, {"epochs": seq}))
            elif kind == 4:
                self.items.append(Summary(STREAM, 0, seq, seq, {"s": seq}))
            else:
                what = rng.choice(("checkpoint", "checkpoint", "image"))
                self.items.append(media(folder, seq, what, best=rng.random() < 0.3))


def rows(seq: int, values: dict[str, float]) -> Rows:
    at = np.array([seq], dtype=np.int64)
    return Rows(STREAM, 0, at, at, at, {key: np.array([value]) for key, value in values.items()})


def media(folder: Path, seq: int, what: str, **meta: Any) -> Media:
    path = folder / f"blob{seq}"
    path.write_bytes(b"%d" % seq)
    return Media(STREAM, 0, seq, seq * 10**9, what, "k", "k.pt", None, path, "", 2, meta)


def trouble(rng: random.Random, server: Any) -> None:
    if rng.random() < 0.5:
        mode = rng.choice(("cut", "apply_then_cut", "status"))
        server.fail(".", mode=mode, times=rng.randint(1, 3), status=rng.choice((429, 500, 503)))


def deliver(
    rng: random.Random, server: Any, make: Callable[[], HubSink], batches: Sequence[list[Item]]
) -> Sent:
    """The send loop of a gateway that has a bad day; the account of all of it."""
    memory, account = ReceiptDict(), Sent()
    sink: HubSink | None = None
    for batch in [*batches, None]:
        trouble(rng, server)
        for attempt in range(50):
            try:
                if sink is None or rng.random() < 0.2:
                    sink = make()
                    sink.open(RunInfo("r", "p", "n", (), 1), memory)
                done = (
                    sink.close("completed", "") if batch is None else sink.send(batch, attempt > 0)
                )
            except Unavailable:
                memory.waiting.clear()
                continue
            memory.receipt()
            account.delivered += done.delivered
            account.maybe_duplicate += done.maybe_duplicate
            for reason, items in done.skipped.items():
                account.skip(reason, items)
            break
        else:
            raise AssertionError("never delivered")
    return account


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("protocol", ["platform", "legacy"])
def test_all_arrives_and_is_counted(
    protocol: Any, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epochs are exact, lines in order, repeats announced, and every item is in the account."""
    rng = random.Random(seed)
    monkeypatch.setattr(platform, "CHUNK_LINES", 3)
    monkeypatch.setenv("ULTRALYTICS_API_KEY", platform_server.KEY)
    monkeypatch.setenv("HUB_API_KEY", hub_legacy.KEY)
    config = HubConfig(protocol=protocol, project="o/p", checkpoint_interval_seconds=20)
    kind = PlatformSink if protocol == "platform" else LegacySink
    story = Story(rng, tmp_path)
    batches, left = [], list(story.items)
    while left:
        size = rng.randint(1, 12)
        batches.append(left[:size])
        left = left[size:]
    stand_in: Any = (
        platform_server.PlatformServer() if protocol == "platform" else hub_legacy.HubLegacyServer()
    )
    with stand_in as server:
        monkeypatch.setenv("ULTRALYTICS_PLATFORM_URL", server.url)
        monkeypatch.setenv("ULTRALYTICS_HUB_API", server.url)
        account = deliver(rng, server, lambda: kind(config), batches)
    assert account.delivered + sum(account.skipped.values()) == sum(i.items for i in story.items)
    assert max(0, len(server.models) - 1) <= account.maybe_duplicate
    if not server.models:
        return
    model = list(server.models)[-1]
    arrived = {
        epoch: {key: value for key, value in values.items() if not key.startswith("final/")}
        for epoch, values in server.epochs(model).items()
    }
    assert arrived == story.epochs
    saved = server.models[model].checkpoints
    files = [one[1] if protocol == "platform" else one.body for one in saved]
    assert sum(files.count(one) > 1 for one in set(files)) <= account.maybe_duplicate
    if protocol == "platform":
        lines = server.console(model) if story.lines else []
        assert list(dict.fromkeys(lines)) == story.lines
        repeated = sum(lines.count(line) > 1 for line in story.lines)
        assert repeated <= account.maybe_duplicate
        assert server.status(model) == "completed"
