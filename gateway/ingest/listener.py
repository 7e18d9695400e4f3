"""The ingest loop: receive in bursts, commit in groups, acknowledge, tell who is alive.

One thread, plain poll. It owns the ROUTER socket, every journal's writing end and live.json; files
are worked on by a second one (`Worker`).
"""

from __future__ import annotations

import logging
import os
import signal
import socket as sockets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import zmq

from rank_client.wire import frames
from rank_client.wire.disk import Disk, OsDisk, is_at
from rank_client.wire.keys import Key
from rank_client.wire.records import Kind

from .. import parent
from ..journal.writer import Journal, JournalDamaged, SyncFailed
from ..rules.gate import Gate
from . import drop
from .admission import KEYS_DIR, PEER_PREFIX, Guarded, self_test, server_public
from .limits import Limits, Watch
from .media import Blob, Job, blob_path, is_sha256
from .peers import FULL_ERRNOS, Peers, Reply
from .streams import Stream
from .worker import Worker

COMMIT_SECONDS = 0.01
COMMIT_BYTES = 1 << 20
BURST_FRAMES = 2000
TICK_SECONDS = 1.0
FULL_RETRY_SECONDS = 2.0
RECEIVE_FRAMES = 32  #: of each peer, unread: what one that ignores its credit can make us hold
SEND_FRAMES = 64  #: to each peer; one that does not read gets the same state told later
BUDGET_BYTES = 128 << 20
RECENT_SECONDS = 86400.0
REST_SECONDS = 60.0

log = logging.getLogger("rankgate.ingest")


class RunStore:
    """The open journals, by run id."""

    def __init__(self, root: Path, disk: Disk | None = None) -> None:
        self.root = root
        self.open: dict[str, Journal] = {}
        self.ends: dict[str, int] = {}  #: last entry of the journals that were closed
        self._needed: dict[str, float] = {}
        self._failed: dict[str, tuple[float, OSError]] = {}
        self.disk: Disk = disk or OsDisk()

    def directory(self, run: str) -> Path:
        return self.root / "runs" / run

    def journal(self, run: str) -> Journal:
        """Raises JournalDamaged, OSError."""
        found = self.open.get(run)
        if found is None:
            failed = self._failed.get(run)
            if failed and time.monotonic() < failed[0]:
                raise failed[1]  # every rank asks, and finding out reads a whole segment
            try:
                found = self.open[run] = self._journal(run)
            except OSError as error:
                self._failed = {run: (time.monotonic() + FULL_RETRY_SECONDS, error)}
                raise
        return found

    def _journal(self, run: str) -> Journal:
        directory = self.directory(run)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = Journal(self.disk, str(directory / "journal"), os.urandom(16))
        if found.seq == 0:
            found.append_map(Kind.RULES, time.time_ns(), {"rules": Gate().as_maps()})
        for text in found.damage:
            log.error("journal of run %s is damaged: %s", run, text)
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
    watch: Watch
    worker: Worker
    clock_ns: Callable[[], int] = time.time_ns
    stopping: bool = False
    stop_runs: frozenset[str] = frozenset()
    guarded: Guarded | None = None  #: what comes over the network, when anything may
    pending_since: float = 0.0
    dropping: set[tuple[str, str]] = field(default_factory=set)  #: files on their way out
    no_room: frozenset[str] = frozenset()  #: runs whose last commit found no room

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
                self.dropping.discard((job.blob.run, job.blob.sha256))
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
                _mark(journal)

    def _stored(self, run: str, journal: Journal) -> bool:
        """Commit one run; False when there was no room: what is buffered waits until there is,
        and credit is 0. On anything else stop, and begin again from disk."""
        if self.peers.full and run in self.no_room:
            return False
        try:
            journal.commit()
        except (OSError, SyncFailed) as error:
            if not isinstance(error, OSError) or error.errno not in FULL_ERRNOS:
                log.critical("cannot write the journal of run %s: %s; stopping", run, error)
                raise SystemExit(74) from error
            self.peers.full = True
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
        self._tell_live(now_ns, set(ticks))
        self.store.rest({s.run for s in self.peers.streams.values()}, time.monotonic())
        self._bind_again()
        _write_json(self.store.root / "ingest.json", {"at_ns": now_ns, **self._counts()})
        self.stop_runs = frozenset(
            run
            for run in self.store.open
            if (self.store.directory(run) / "requests" / "stop").exists()
        )

    def _drop_files(self, now_ns: int) -> None:
        """Enter in the journal what policy drops, then have it removed."""
        for request in self.store.root.glob(f"runs/*/requests/{drop.REQUEST}"):
            run_dir = request.parent.parent
            cursor, reasons = drop.take(request)
            try:
                journal = self.store.journal(run_dir.name)
            except (JournalDamaged, OSError):
                continue  # said when a rank asks for it
            if cursor < self.peers.newest_blob.setdefault(run_dir.name, journal.seq):
                continue  # who asked did not know of all files
            for sha256, reason in reasons.items():
                if is_sha256(sha256) and blob_path(run_dir, sha256).exists():
                    self._drop_file(now_ns, run_dir, sha256, reason)

    def _drop_file(self, now_ns: int, run_dir: Path, sha256: str, reason: str) -> None:
        run = run_dir.name
        file = run, sha256
        if file in self.dropping or run in self.no_room or not self.peers.let_go(run, sha256):
            return
        body = {"sha256": sha256, "reason": reason}
        self.store.journal(run).append_map(Kind.DROP, now_ns, body)
        self._commit()
        if run not in self.no_room:  # else it is said, and asked for again
            self.dropping.add(file)
            blob = Blob.announced(self.store.disk, run, run_dir, sha256, 0)
            self.worker.put(Job(b"", blob, "drop"))

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
        self.peers.full = self.watch.full(self.peers.full)
        self.watch.look(self.peers.full, self.store.open)
        self.peers.over_quota = self.watch.over_quota
        self.peers.crowded = self.watch.crowded

    def _look_at_links(self, now_ns: int) -> None:
        """A process that is stopped or keeps the GIL says nothing and stays connected."""
        for stream, frame in self.peers.unheard(now_ns):
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

    def _tell_live(self, now_ns: int, runs: set[str]) -> None:
        """live.json of each run that has a stream, or had one until now."""
        streams: dict[str, list[Stream]] = {run: [] for run in runs}
        for stream in self.peers.streams.values():
            if not stream.file:
                streams.setdefault(stream.run, []).append(stream)
        for run, own in streams.items():
            path = self.store.directory(run) / "live.json"
            _write_json(path, self._live(run, own, now_ns))

    def _counts(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "full": self.peers.full,
            "alarms": self.watch.alarms,
            "streams": sum(not s.file and not s.ended for s in self.peers.streams.values()),
            "blobs": sum(s.file is not None and not s.ended for s in self.peers.streams.values()),
            "counts": self.peers.counts,
            "journals": {
                **self.store.ends,
                **{run: j.durable_seq for run, j in self.store.open.items()},
            },
        }

    def _live(self, run: str, streams: list[Stream], now_ns: int) -> dict[str, Any]:
        newer = self.peers.superseded(run)
        told = [{**_about(s), **_superseded(s, newer.get(s.id))} for s in streams]
        duplicates = self.peers.duplicates.get(run, 0)
        return {"at_ns": now_ns, "pid": os.getpid(), "duplicates": duplicates, "streams": told}

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
        self.worker.close()
        self.socket.close(200)
        if self.guarded:
            self.guarded.close()
        for address in self.addresses:  # ours until this process lets go of its lock
            if address.startswith("ipc://"):
                Path(address[6:]).unlink(missing_ok=True)


def _about(s: Stream) -> dict[str, Any]:
    """A stream in live.json; with what its HELLO (`ABOUT`) and PING (`PROGRESS`) told."""
    return {
        "stream": s.id.hex(),
        "kind": s.kind,
        "heard_ns": s.heard_ns,
        "silent": s.silent,
        "link": s.link,
        "ended": s.ended,
        "durable": s.durable,
        **s.about,
        **s.progress,
    }


def _superseded(s: Stream, newer: Stream | None) -> dict[str, Any]:
    """By whom, and for how many seconds both have been heard."""
    if newer is None:
        return {}
    seconds = (min(s.heard_ns, newer.heard_ns) - newer.opened_ns) / 1e9
    return {"superseded": newer.id.hex(), "both_seconds": max(0.0, seconds)}


def _mark(journal: Journal) -> None:
    try:
        journal.mark()
    except OSError as error:  # no room: the next commit brings it, or a restart
        log.debug("cannot write a commit mark: %s", error)


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
    text = msgspec.json.encode(value)  # ten times as fast as json, for thousands of streams
    part = path.with_suffix(".part")
    try:
        part.write_bytes(text)
        part.rename(path)
    except OSError as error:
        log.debug("cannot write %s: %s", path, error)
        part.unlink(missing_ok=True)
        _write_over(path, text)


def _write_over(path: Path, text: bytes) -> None:
    """On a full disk: into the blocks that the file has. Whoever reads it at this very moment may
    find it torn, and looks again; without it they would be told that the gateway is gone."""
    try:
        with path.open("r+b") as file:
            file.write(text.ljust(path.stat().st_size))
    except OSError as error:
        log.debug("cannot write over %s: %s", path, error)


def bind(addresses: list[str]) -> zmq.Socket[bytes]:
    """A ROUTER on every address. Raises zmq.ZMQError when one is taken."""
    context: zmq.Context[Any] = zmq.Context()
    context.linger = 0
    context.set(zmq.MAX_SOCKETS, 65535)
    router: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)
    router.setsockopt(zmq.ROUTER_HANDOVER, 1)
    router.setsockopt(zmq.MAXMSGSIZE, frames.MAX_FRAME_BYTES)
    router.setsockopt(zmq.RCVHWM, RECEIVE_FRAMES)
    router.setsockopt(zmq.SNDHWM, SEND_FRAMES)
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
    if "[" in address:
        router.setsockopt(zmq.IPV6, 1)
    before = os.umask(0o177)
    try:
        router.bind(address)
    finally:
        os.umask(before)


def guard(root: Path, addresses: list[str], key: Key) -> Guarded | None:
    """A ROUTER on the tcp addresses for those with a key, tried out; None without such an
    address. Raises zmq.ZMQError, BadKey, Unguarded."""
    network = [a for a in addresses if a.startswith("tcp://")]
    if not network:
        return None
    router = bind([])
    try:
        guarded = Guarded(router, key, root / KEYS_DIR)
        for address in network:
            listen(router, address)
            self_test(guarded, address)
    except BaseException:
        router.context.destroy(0)
        raise
    return guarded


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
    peers.is_near = lambda peer: not peer.startswith(PEER_PREFIX)
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
        "host": sockets.gethostname(),
        "public_key": server_public(key) if key else "",
    }
    _write_json(root / "gateway.json", note)
    log.info("serving %s for %s", ", ".join(addresses), root)
    ingest.run()
