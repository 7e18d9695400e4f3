"""The ingest loop: receive in bursts, commit in groups, acknowledge, tell who is alive.

One thread, plain poll. It owns the ROUTER socket, every journal's writing end and live.json.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import socket as sockets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq

from rank_client.wire import frames
from rank_client.wire.disk import OsDisk
from rank_client.wire.records import Kind

from ..journal.writer import Journal, JournalDamaged, SyncFailed
from ..rules.gate import Gate
from .peers import Peers, Reply

COMMIT_SECONDS = 0.01
COMMIT_BYTES = 1 << 20
BURST_FRAMES = 2000
TICK_SECONDS = 1.0
FULL_RETRY_SECONDS = 2.0
BUDGET_BYTES = 128 << 20
RECENT_SECONDS = 86400.0
REST_SECONDS = 60.0

log = logging.getLogger("rankgate.ingest")


class RunStore:
    """The open journals, by run id."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.open: dict[str, Journal] = {}
        self.ends: dict[str, int] = {}  #: last entry of the journals that were closed
        self._needed: dict[str, float] = {}
        self.disk = OsDisk()

    def directory(self, run: str) -> Path:
        return self.root / "runs" / run

    def journal(self, run: str) -> Journal:
        found = self.open.get(run)
        if found is None:
            directory = self.directory(run)
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = Journal(self.disk, str(directory / "journal"), os.urandom(16))
            if found.seq == 0:
                found.append_map(Kind.RULES, time.time_ns(), {"rules": Gate().as_maps()})
            for text in found.damage:
                log.error("journal of run %s is damaged: %s", run, text)
            self.open[run] = found
        return found

    def recent(self) -> list[str]:
        """Runs whose journal was written to in the last day."""
        since = time.time() - RECENT_SECONDS
        runs = self.root / "runs"
        journals = sorted(runs.glob("*/journal")) if runs.is_dir() else []
        return [j.parent.name for j in journals if _newest(j) > since]

    def drop(self, run: str) -> None:
        """Close a journal; it is read from disk again when next asked for."""
        self.open.pop(run).close()

    def rest(self, busy: set[str], now: float) -> None:
        """Close the journals that no stream has needed for a while: a run costs a descriptor."""
        for run, journal in list(self.open.items()):
            if run in busy or journal.pending_bytes:
                self._needed.pop(run, None)
            elif now - self._needed.setdefault(run, now) > REST_SECONDS:
                del self._needed[run]
                self.ends[run] = journal.durable_seq
                _mark(journal)
                self.drop(run)


@dataclass
class Ingest:
    """The loop's state; `stopping` is set by SIGTERM or when the parent is gone."""

    store: RunStore
    peers: Peers
    socket: zmq.Socket[bytes]
    addresses: list[str]
    clock_ns: Callable[[], int] = time.time_ns
    stopping: bool = False
    stop_runs: frozenset[str] = frozenset()
    pending_since: float = 0.0

    def run(self) -> None:
        parent = os.getppid()
        poller = zmq.Poller()
        poller.register(self.socket, zmq.POLLIN)
        tick_at = time.monotonic()
        while not self.stopping:
            now = time.monotonic()
            wait = tick_at - now
            if self.pending_since:
                wait = min(wait, self.pending_since + COMMIT_SECONDS - now)
            if poller.poll(max(0, int(wait * 1000 + 0.999))):
                self._burst()
            now = time.monotonic()
            if self.pending_since and now - self.pending_since >= COMMIT_SECONDS:
                self._commit()
            if now >= tick_at:
                tick_at = now + TICK_SECONDS
                self._tick()
                self.stopping = self.stopping or os.getppid() != parent
        self._leave()

    # --- receiving -----------------------------------------------------------

    def _burst(self) -> None:
        """Take what is there, until a commit is due."""
        receive, out = self.socket.recv_multipart, list[Reply]()
        now_ns = self.clock_ns()
        size = 0
        for _ in range(BURST_FRAMES):
            try:
                parts = receive(zmq.NOBLOCK)
            except zmq.Again:
                break
            if len(parts) != 2:
                self.peers.count("bad frame: parts")
                continue
            self.peers.receive(now_ns, parts[0], parts[1], out)
            size += len(parts[1])
            if size >= COMMIT_BYTES:
                break
        self._send(out)
        if not self.pending_since:
            self.pending_since = time.monotonic()
        if size >= COMMIT_BYTES:
            self._commit()

    def _send(self, out: list[Reply]) -> None:
        for peer, frame in out:
            try:
                self.socket.send_multipart((peer, frame), zmq.NOBLOCK, copy=True)
            except zmq.ZMQError:
                # Gone or slow. Every answer is repeatable state: a later one says the same.
                self.peers.count("answer not sent")

    def _commit(self) -> None:
        self.pending_since = 0.0
        for run, journal in list(self.store.open.items()):
            try:
                journal.commit()
            except (OSError, SyncFailed) as error:
                self._commit_failed(run, error)
        self._send(self.peers.committed())
        if not self.socket.poll(0):
            for journal in self.store.open.values():
                _mark(journal)

    def _commit_failed(self, run: str, error: Exception) -> None:
        """Full: credit 0 until there is room. Anything else: stop, and begin again from disk."""
        if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            log.critical("cannot write the journal of run %s: %s; stopping", run, error)
            raise SystemExit(74)
        log.error("no space for the journal of run %s; ranks keep their logs until there is", run)
        self.peers.full = True
        self.peers.forget(run)
        self.store.drop(run)

    # --- each second ---------------------------------------------------------

    def _tick(self) -> None:
        now_ns = self.clock_ns()
        if self.peers.full:
            self.peers.full = not _room(self.store.root)
        ticks = self.peers.tick(now_ns)
        for run, body in ticks.items():
            self.store.journal(run).append_map(Kind.TICK, now_ns, body)
        self._commit()
        for run in ticks.keys() | self._runs_alive():
            _write_json(self.store.directory(run) / "live.json", self._live(run, now_ns))
        self.store.rest({s.run for s in self.peers.streams.values()}, time.monotonic())
        self._bind_again()
        _write_json(self.store.root / "ingest.json", {"at_ns": now_ns, **self._counts()})
        self.stop_runs = frozenset(
            run
            for run in self.store.open
            if (self.store.directory(run) / "requests" / "stop").exists()
        )

    def _bind_again(self) -> None:
        """Whoever removed our socket's path (a logout does, in /run/user) cut off all new ranks."""
        for address in self.addresses:
            if address.startswith("ipc://") and not Path(address[6:]).exists():
                log.error("%s is gone; listening there again", address)
                try:
                    self.socket.unbind(address)
                    listen(self.socket, address)
                except (zmq.ZMQError, OSError) as error:
                    log.error("cannot: %s", error)

    def _runs_alive(self) -> set[str]:
        return {s.run for s in self.peers.streams.values() if not s.blob}

    def _counts(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "full": self.peers.full,
            "streams": sum(not s.blob and not s.ended for s in self.peers.streams.values()),
            "blobs": sum(s.blob is not None and not s.ended for s in self.peers.streams.values()),
            "counts": self.peers.counts,
            "journals": {
                **self.store.ends,
                **{run: j.durable_seq for run, j in self.store.open.items()},
            },
        }

    def _live(self, run: str, now_ns: int) -> dict[str, Any]:
        streams = [
            {
                "stream": s.id.hex(),
                "kind": s.kind,
                "rank": s.about.get("rank"),
                "node": s.about.get("node"),
                "local_rank": s.about.get("local_rank"),
                "heard_ns": s.heard_ns,
                "silent": s.silent,
                "ended": s.ended,
                "durable": s.durable,
                **{k: s.progress.get(k) for k in ("last", "step", "logged", "refused", "bad")},
                "volatile": s.progress.get("volatile") or "",
            }
            for s in self.peers.streams.values()
            if s.run == run and not s.blob
        ]
        duplicates = self.peers.duplicates.get(run, 0)
        return {"at_ns": now_ns, "pid": os.getpid(), "duplicates": duplicates, "streams": streams}

    def _leave(self) -> None:
        """Tell everyone, bring all to the disk, say that it is."""
        self._commit()
        drain = [
            (s.peer, frames.control(frames.Type.DRAIN, self.peers.session, s.id, {}))
            for s in self.peers.streams.values()
        ]
        self._send(drain)
        for journal in self.store.open.values():
            _mark(journal)
            journal.close()
        self.socket.close(200)
        for address in self.addresses:  # ours until this process lets go of its lock
            if address.startswith("ipc://"):
                Path(address[6:]).unlink(missing_ok=True)


def _mark(journal: Journal) -> None:
    try:
        journal.mark()
    except OSError as error:  # no room: the next commit brings it, or a restart
        log.debug("cannot write a commit mark: %s", error)


def _room(root: Path) -> bool:
    stats = os.statvfs(root)
    return stats.f_bavail * stats.f_frsize > 4 * COMMIT_BYTES


def _newest(journal: Path) -> float:
    return max((e.stat().st_mtime for e in os.scandir(journal)), default=0.0)


def _expect_unfinished(store: RunStore, peers: Peers) -> None:
    for run in store.recent():
        try:
            if not peers.expect(time.time_ns(), run):
                store.drop(run)
        except (JournalDamaged, OSError) as error:
            log.error("run %s: %s", run, error)  # its ranks are told when they come


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """For display only, by rename; a full disk must not stop the loop."""
    try:
        part = path.with_suffix(".part")
        part.write_text(json.dumps(value, skipkeys=True, default=repr))  # peers say what they like
        part.rename(path)
    except OSError as error:
        log.debug("cannot write %s: %s", path, error)


def bind(addresses: list[str]) -> zmq.Socket[bytes]:
    """A ROUTER on every address. Raises zmq.ZMQError when one is taken."""
    context: zmq.Context[Any] = zmq.Context()
    context.linger = 0
    context.set(zmq.MAX_SOCKETS, 65535)
    router: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)
    router.setsockopt(zmq.ROUTER_HANDOVER, 1)
    router.setsockopt(zmq.MAXMSGSIZE, frames.MAX_FRAME_BYTES)
    router.setsockopt(zmq.RCVHWM, 10_000)
    router.setsockopt(zmq.SNDHWM, 10_000)
    router.setsockopt(zmq.HANDSHAKE_IVL, 5000)
    router.setsockopt(zmq.HEARTBEAT_IVL, 5000)
    router.setsockopt(zmq.HEARTBEAT_TIMEOUT, 30_000)
    router.setsockopt(zmq.BACKLOG, 4096)
    for address in addresses:
        listen(router, address)
    return router


def listen(router: zmq.Socket[bytes], address: str) -> None:
    """Raises zmq.ZMQError."""
    if address.startswith("ipc://"):
        # The lock on the data directory says that nobody else serves this path.
        path = Path(address[6:])
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
    before = os.umask(0o177)
    try:
        router.bind(address)
    finally:
        os.umask(before)


def serve(root: Path, addresses: list[str], budget_bytes: int = BUDGET_BYTES) -> None:
    """Run ingest for a data directory until SIGTERM. The caller holds the directory's lock."""
    store = RunStore(root)
    session = int.from_bytes(os.urandom(8), "little") or 1
    ingest: Ingest
    peers = Peers(session, store, budget_bytes, lambda run: run in ingest.stop_runs)
    ingest = Ingest(store, peers, bind(addresses), addresses)
    _expect_unfinished(store, peers)

    def stop(_signal: int, _frame: object) -> None:
        ingest.stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    note = {"pid": os.getpid(), "addresses": addresses, "host": sockets.gethostname()}
    _write_json(root / "gateway.json", note)
    log.info("serving %s for %s", ", ".join(addresses), root)
    ingest.run()
