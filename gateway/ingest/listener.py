"""The ingest loop: receive in bursts, commit in groups, acknowledge, tell who is alive.

One thread, plain poll. It owns the ROUTER socket, every journal's writing end and live.json; files
are worked on by a second one (`Worker`).
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from socket import gethostname
from typing import Any

import zmq

from rank_client.wire import frames
from rank_client.wire.disk import Disk, is_at
from rank_client.wire.keys import Key
from rank_client.wire.records import Kind

from .. import parent
from ..journal.writer import Journal, JournalDamaged, SyncFailed
from . import drop
from .admission import PEER_PREFIX, Guarded, server_public
from .answers import Reply
from .journals import RunStore, mark
from .limits import Limits, Watch
from .peers import FULL_ERRNOS, Peers
from .presence import unheard
from .sockets import bind, guard, listen
from .telling import tell_ingest, tell_live, write_json
from .worker import Worker

COMMIT_SECONDS = 0.01
COMMIT_BYTES = 1 << 20
BURST_FRAMES = 2000
TICK_SECONDS = 1.0
BUDGET_BYTES = 128 << 20

log = logging.getLogger("rankgate.ingest")


@dataclass
class Ingest:
    """The loop's state; `stopping` is set by SIGTERM or when the parent is gone."""

    store: RunStore
    peers: Peers
    socket: zmq.Socket[bytes]
    addresses: list[str]
    watch: Watch
    worker: Worker
    clock_ns: Callable[[], int] = time.time_ns
    stopping: bool = False
    stop_runs: frozenset[str] = frozenset()
    guarded: Guarded | None = None  #: what comes over the network, when anything may
    pending_since: float = 0.0
    no_room: frozenset[str] = frozenset()  #: runs whose last commit found no room

    def __post_init__(self) -> None:
        self._drops = drop.Drops(self.peers, self.store, self._commit, self.worker.put)

    def run(self) -> None:
        poller = zmq.Poller()
        poller.register(self.socket, zmq.POLLIN)
        poller.register(self.worker.wake, zmq.POLLIN)
        if self.guarded:
            poller.register(self.guarded.router, zmq.POLLIN)
            poller.register(self.guarded.gatekeeper.socket, zmq.POLLIN)
        tick_at = time.monotonic()
        while not self.stopping:
            now = time.monotonic()
            wait = tick_at - now
            if self.pending_since:
                wait = min(wait, self.pending_since + COMMIT_SECONDS - now)
            if ready := poller.poll(max(0, int(wait * 1000 + 0.999))):
                self._take({socket for socket, _ in ready})
            now = time.monotonic()
            if self.pending_since and now - self.pending_since >= COMMIT_SECONDS:
                self._commit()
            if now >= tick_at:
                tick_at = now + TICK_SECONDS
                self._tick()
                self.stopping = self.stopping or parent.gone()
        self._leave()

    # --- receiving -----------------------------------------------------------

    def _take(self, ready: set[Any]) -> None:
        if self.socket in ready:
            self._burst(self.socket.recv_multipart)
        if self.worker.wake.fileno() in ready:
            self._files()
        if self.guarded is None:
            return
        if self.guarded.gatekeeper.socket in ready:
            self.guarded.gatekeeper.answer()
        if self.guarded.router in ready:
            self._burst(self._from_network)

    def _from_network(self, _flags: int) -> list[bytes]:
        assert self.guarded is not None
        return self.guarded.receive(self.peers)

    def _burst(self, receive: Callable[[int], list[bytes]]) -> None:
        """Take what is there, until a commit is due."""
        out: list[Reply] = []
        now_ns = self.clock_ns()
        size = 0
        for _ in range(BURST_FRAMES):
            try:
                parts = receive(zmq.NOBLOCK)
            except zmq.Again:
                break
            if len(parts) != 2:
                if parts:  # else it was refused, and counted as that
                    self.peers.bad(now_ns, parts[0], "parts", out)
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

    def _files(self) -> None:
        """What the files' thread has done since."""
        out: list[Reply] = []
        for job in self.worker.done():
            if job.verb == "drop":
                self._drops.done(job)
            self.peers.done(self.clock_ns(), job, out)
        self._send(out)
        if not self.pending_since:
            self.pending_since = time.monotonic()

    def _send(self, out: list[Reply]) -> None:
        for peer, frame in out:
            try:
                self._send_one(peer, frame)
            except zmq.ZMQError:
                # Gone or slow. Every answer is repeatable state: a later one says the same.
                self.peers.count("answer not sent")

    def _send_one(self, peer: bytes, frame: bytes) -> None:
        """Raises zmq.Again for a peer that is slow, zmq.ZMQError for one that is gone."""
        if self.guarded and peer.startswith(PEER_PREFIX):
            self.guarded.send(peer, frame)
        else:
            self.socket.send_multipart((peer, frame), zmq.NOBLOCK, copy=True)

    def _commit(self) -> None:
        self.pending_since = 0.0
        self.no_room = frozenset(
            run for run, journal in list(self.store.open.items()) if not self._stored(run, journal)
        )
        self._send(self.peers.committed(self.no_room))
        if not self.socket.poll(0):
            for journal in self.store.open.values():
                mark(journal)

    def _stored(self, run: str, journal: Journal) -> bool:
        """Commit one run; False when there was no room: what is buffered waits until there is,
        and credit is 0. On anything else stop, and begin again from disk."""
        if self.peers.room.full and run in self.no_room:
            return False
        try:
            journal.commit()
        except (OSError, SyncFailed) as error:
            if not isinstance(error, OSError) or error.errno not in FULL_ERRNOS:
                log.critical("cannot write the journal of run %s: %s; stopping", run, error)
                raise SystemExit(74) from error
            self.peers.room.full = True
            return False
        return True

    # --- each second ---------------------------------------------------------

    def _tick(self) -> None:
        now_ns = self.clock_ns()
        self._look_for_replaced()
        self._look_at_limits()
        ticks = self.peers.tick(now_ns)
        for run, body in ticks.items():
            if run not in self.no_room:
                self.store.journal(run).append_map(Kind.TICK, now_ns, body)
        self._commit()
        self._drop_files(now_ns)
        self._look_at_links(now_ns)
        tell_live(self.store, self.peers, now_ns, set(ticks))
        self.store.rest({s.run for s in self.peers.streams.values()}, time.monotonic())
        self._bind_again()
        tell_ingest(self.store, self.peers, self.watch.alarms, now_ns)
        self.stop_runs = frozenset(
            run
            for run in self.store.open
            if (self.store.directory(run) / "requests" / "stop").exists()
        )

    def _drop_files(self, now_ns: int) -> None:
        """What policy asked for since the last look."""
        for path in self.store.root.glob(f"runs/*/requests/{drop.REQUEST}"):
            request = drop.take(path)
            try:
                self._drops.carry_out(now_ns, path.parent.parent.name, request)
            except (JournalDamaged, OSError):
                continue  # said when a rank asks for it

    def _look_for_replaced(self) -> None:
        """What is written to a deleted journal is seen by nobody: its ranks say HELLO to the one
        that is there now, and send it what they keep."""
        for run, journal in list(self.store.open.items()):
            if not is_at(*journal.file):
                log.error("somebody deleted or replaced the journal of run %s; going on", run)
                self.peers.forget(run)
                self.peers.newest_blob.pop(run, None)
                self.store.drop(run)

    def _look_at_limits(self) -> None:
        self.peers.room.full = self.watch.full(self.peers.room.full)
        self.watch.look(self.peers.room.full, self.store.open)
        self.peers.room.over_quota = self.watch.over_quota
        self.peers.room.crowded = self.watch.crowded

    def _look_at_links(self, now_ns: int) -> None:
        """A process that is stopped or keeps the GIL says nothing and stays connected."""
        for stream, frame in unheard(self.peers.streams.values(), now_ns):
            try:
                self._send_one(stream.peer, frame)
                stream.link = "up"
            except zmq.Again:
                stream.link = "up"
            except zmq.ZMQError:
                stream.link = "gone"

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

    def _leave(self) -> None:
        """Tell everyone, bring all to the disk, say that it is."""
        self._commit()
        drain = [
            (s.peer, frames.control(frames.Type.DRAIN, self.peers.session, s.id, {}))
            for s in self.peers.streams.values()
        ]
        self._send(drain)
        for journal in self.store.open.values():
            mark(journal)
            journal.close()
        self.worker.close()
        self.socket.close(200)
        if self.guarded:
            self.guarded.close()
        for address in self.addresses:  # ours until this process lets go of its lock
            if address.startswith("ipc://"):
                Path(address[6:]).unlink(missing_ok=True)


def _expect_unfinished(store: RunStore, peers: Peers) -> None:
    for run in store.recent():
        try:
            if not peers.expect(time.time_ns(), run):
                store.drop(run)
        except (JournalDamaged, OSError) as error:
            log.error("run %s: %s", run, error)  # its ranks are told when they come


def serve(
    root: Path,
    addresses: list[str],
    budget_bytes: int = BUDGET_BYTES,
    key: Key | None = None,
    limits: Limits | None = None,
    disk: Disk | None = None,
) -> None:
    """Run ingest for a data directory until SIGTERM. The caller holds the directory's lock.

    With a key, tcp addresses are encrypted and only for those who have it; without one they are
    open to everybody. Raises zmq.ZMQError, BadKey, Unguarded.
    """
    store = RunStore(root, disk)
    session = int.from_bytes(os.urandom(8), "little") or 1
    ingest: Ingest
    worker = Worker()
    worker.start()
    stop_asked = lambda run: run in ingest.stop_runs  # noqa: E731
    peers = Peers(session, store, budget_bytes, stop_asked, worker.put)
    peers.opening.is_near = lambda peer: not peer.startswith(PEER_PREFIX)
    guarded = guard(root, addresses, key) if key else None
    plain = [a for a in addresses if not (guarded and a.startswith("tcp://"))]
    watch = Watch(root, limits or Limits())
    ingest = Ingest(store, peers, bind(plain), addresses, watch, worker, guarded=guarded)
    _expect_unfinished(store, peers)

    def stop(_signal: int, _frame: object) -> None:
        ingest.stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    note = {
        "pid": os.getpid(),
        "addresses": addresses,
        "host": gethostname(),
        "public_key": server_public(key) if key else "",
    }
    write_json(root / "gateway.json", note)
    log.info("serving %s for %s", ", ".join(addresses), root)
    ingest.run()
