"""The drawing as code: which process runs which part of the flow.

 ranks ──▶ ingest ──▶ journal ──▶ rules ──▶ series + feed ──▶ sinks ──▶ Neptune, ClearML, HUB
          listener    writer     follow    writer, reader     process
                                              └──▶ view (CLI)

`serve` holds the data directory's lock and supervises; the others are the children it starts.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import zmq

from rank_client.rendezvous import LOCK_GATEWAY, LOCK_INGEST, LOCK_RULES, ipc_address

from . import telemetry
from .config import Config, load
from .errors import BadConfig, Busy, RankgateError
from .supervise import BIND_FAILED, Supervisor

LOCK_SECONDS = 2.0
CHILD_LOCK_SECONDS = 20.0

log = logging.getLogger("rankgate")


def take_lock(root: Path, which: int, seconds: float) -> int:
    """Lock one byte of gateway.lock until this process dies. Raises Busy."""
    fd = os.open(root / "gateway.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, which)
        except OSError:
            if time.monotonic() > deadline:
                os.close(fd)
                raise Busy(
                    f"another gateway serves {root}. One directory has one gateway: use it (ranks "
                    "find it by themselves), stop it, or give this one another --dir"
                ) from None
            time.sleep(0.02)
        else:
            return fd


def addresses(root: Path, bind: str, insecure: bool) -> list[str]:
    """Where to listen: always this node's socket, and what was asked for. Raises BadConfig."""
    local = ipc_address(root)
    if bind in ("ipc", local):
        return [local]
    host = bind.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    if not bind.startswith("tcp://") or not host:
        raise BadConfig(f'gateway.bind must be "ipc" or "tcp://ADDRESS:PORT", not {bind!r}')
    if not (host.startswith("127.") or host in ("localhost", "::1")) and not insecure:
        raise BadConfig(
            f"gateway.bind {bind} would be open to everybody on that network, as connections are "
            "not encrypted yet; bind tcp://127.0.0.1:PORT, or say --insecure if that is meant"
        )
    return [local, bind]


def make_data_dir(root: Path) -> None:
    """Raises RankgateError."""
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        probe = root / f".probe-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise RankgateError(
            f"cannot write the data directory {root}: {error.strerror}. Give another with --dir "
            "or RANKGATE_DIR"
        ) from None


def serve(
    root: Path,
    config: Config,
    insecure: bool,
    forever: bool,
    ready: Callable[[list[str]], None],
    elected: Callable[[], None] = lambda: None,
) -> int:
    """Run the gateway of a data directory; the exit code. Raises RankgateError.

    `elected` is called when the directory is ours, `ready` when ingest answers.
    """
    make_data_dir(root)
    where = addresses(root, config.gateway.bind, insecure)
    take_lock(root, LOCK_GATEWAY, LOCK_SECONDS)
    elected()
    supervisor = Supervisor(root, config, where, forever)
    code = supervisor.run(lambda: ready(where))
    if code == BIND_FAILED:
        raise Busy(
            f"cannot listen on {', '.join(where)}: the address is in use or not this machine's. "
            "Choose another port with --bind"
        )
    return code


def detached(arguments: list[str]) -> int:
    """`DIR CONFIG [SINK…]`: started by a rank or by `rankgate run`, leaves when all is done.

    The process that was started waits until its child has the directory's lock (exit code 0) or
    has given up (1): so a training process has no gateway for a child, whose end it would have to
    notice.
    """
    told, tell = os.pipe()
    if os.fork():
        os.close(tell)
        return 0 if os.read(told, 1) else 1
    os.close(told)

    def elected() -> None:
        os.write(tell, b"1")
        os.close(tell)

    return _detached(arguments, elected)


def _detached(arguments: list[str], elected: Callable[[], None]) -> int:
    root, config_path, *sinks = arguments
    telemetry.configure()
    os.nice(10)  # training comes first
    try:
        path = Path(config_path) if config_path else Path(root) / "gateway.toml"
        config = load(path if config_path or path.exists() else None, tuple(sinks))
        return serve(
            Path(root),
            config,
            insecure=False,
            forever=False,
            ready=lambda _: None,
            elected=elected,
        )
    except RankgateError as error:
        log.error("%s", error)
        return error.exit_code


def ingest(arguments: list[str]) -> int:
    """`DIR ADDRESSES BUDGET`."""
    from .ingest import listener

    root, where, budget = Path(arguments[0]), json.loads(arguments[1]), int(arguments[2])
    telemetry.configure()
    take_lock(root, LOCK_INGEST, CHILD_LOCK_SECONDS)
    try:
        listener.serve(root, where, budget)
    except zmq.ZMQError as error:
        log.error("cannot listen on %s: %s", ", ".join(where), error)
        return BIND_FAILED
    return 0


def rules(arguments: list[str]) -> int:
    """`DIR`."""
    from .rules import follow

    telemetry.configure()
    take_lock(Path(arguments[0]), LOCK_RULES, CHILD_LOCK_SECONDS)
    follow.follow(Path(arguments[0]))
    return 0


def sink(arguments: list[str]) -> int:
    """`RUN_DIR NAME CONFIG HOW`."""
    from .sinks import process

    telemetry.configure()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return process.main(arguments)


CHILDREN: dict[str, Callable[[list[str]], int]] = {
    "detached": detached,
    "ingest": ingest,
    "rules": rules,
    "sink": sink,
}


def raise_limits() -> None:
    """As many descriptors as we may have: a rank costs one, and a run."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> None:
    """What `python -c` of a child process calls."""
    raise_limits()
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # whatever mask our starter happened to have
    name, *arguments = sys.argv[1:]
    sys.exit(CHILDREN[name](arguments))
