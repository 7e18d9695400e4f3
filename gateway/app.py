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
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import zmq

from rank_client.rendezvous import (
    LOCK_GATEWAY,
    LOCK_INGEST,
    LOCK_RULES,
    check_owner,
    ipc_address,
)
from rank_client.wire.keys import (
    SECRET_BYTES,
    BadKey,
    Key,
    key_of,
    read_keyfile,
    write_keyfile,
)

from . import telemetry
from .config import Config, load, tcp_address, with_gateway
from .errors import BadConfig, Busy, RankgateError
from .nodes import PORT, is_loopback, nodes_of, own_address
from .supervise import BIND_FAILED, Supervisor

KEYFILE = "gateway.key"  #: in the data directory
INSECURE, ENVIRONMENT = "insecure", "environment"  #: guards that are no keyfile
PRIVATE = 0o077  #: of all that a gateway writes, others may read nothing, wherever it lies
LOCK_SECONDS = 2.0
CHILD_LOCK_SECONDS = 20.0

_WILDCARDS = ("*", "0.0.0.0", "::")  # noqa: S104 - to refuse them

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


def addresses(root: Path, bind: str, insecure: bool, rendezvous: str) -> list[str]:
    """Where to listen: always this node's socket, and what was asked for.

    `tcp` alone is the address on the way to the host where the nodes meet. Raises BadConfig.
    """
    local = ipc_address(root)
    if bind in ("ipc", local):
        return [local]
    host, port = tcp_address(bind, "gateway.bind")
    port = port or PORT
    if not host:
        return [local, _tcp(_on_the_way(rendezvous), port)]
    if host not in _WILDCARDS:
        return [local, _tcp(_numeric(host), port)]
    if not insecure:
        raise BadConfig(
            f"gateway.bind {bind} would listen on every network of this machine; give its address "
            f"on the one the nodes share, as in tcp://10.0.0.1:{port}, or tcp alone to have the "
            "one that leads to MASTER_ADDR"
        )
    return [local, _tcp(host, port)]


def _tcp(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _on_the_way(rendezvous: str) -> str:
    if not rendezvous:
        raise BadConfig(
            "bind tcp needs to know where the nodes meet, and neither MASTER_ADDR nor a launcher "
            f"says; give this machine's address on their network: --bind tcp://ADDRESS:{PORT}"
        )
    own = own_address(rendezvous)
    if is_loopback(own):
        raise BadConfig(
            f"the nodes are to meet at {rendezvous}, which here is the loopback address {own} that "
            "no other node reaches; give this machine's address on their network: "
            f"--bind tcp://ADDRESS:{PORT}"
        )
    return own


def _numeric(host: str) -> str:
    """ZeroMQ binds addresses, not names. Raises BadConfig."""
    try:
        return str(socket.getaddrinfo(host, PORT, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise BadConfig(
            f"cannot listen on {host}: {error.strerror}. Give an address of this machine"
        ) from None


def guard_of(
    root: Path, config: Config, where: list[str], insecure: bool, environ: Mapping[str, str]
) -> str:
    """What keeps strangers out: a keyfile's path, INSECURE, ENVIRONMENT for RANKGATE_SECRET, or
    nothing where no network is. Makes a keyfile in the data directory when none is named.

    Raises BadConfig for a key that cannot be used.
    """
    if not any(address.startswith("tcp://") for address in where):
        return ""
    if insecure:
        return INSECURE
    named = config.gateway.keyfile or environ.get("RANKGATE_KEYFILE")
    path = Path(named).absolute() if named else root / KEYFILE
    try:
        if not named and environ.get("RANKGATE_SECRET"):
            key_of(environ)
            return ENVIRONMENT
        if not named and not path.exists():
            write_keyfile(path, Key(os.urandom(SECRET_BYTES)))
        read_keyfile(path)
    except BadKey as error:
        raise BadConfig(f"{error}. (--insecure serves without encryption)") from None
    return str(path)


def _key(guard: str) -> Key | None:
    """Raises BadKey."""
    if guard in ("", INSECURE):
        return None
    return key_of(os.environ) if guard == ENVIRONMENT else read_keyfile(Path(guard))


def make_data_dir(root: Path) -> None:
    """Raises RankgateError."""
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_owner(root)
        probe = root / f".probe-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        why = "it is a file" if root.is_file() else error.strerror
        raise RankgateError(
            f"cannot write the data directory {root}: {why}. Give another with --dir "
            "or RANKGATE_DIR"
        ) from None


def check_room(root: Path, config: Config) -> None:
    """Raises BadConfig where the reserve could never be kept free."""
    stats = os.statvfs(root)
    whole, reserve = stats.f_blocks * stats.f_frsize >> 20, config.gateway.reserve_mib
    if whole <= reserve:
        raise BadConfig(
            f"{config.source}: gateway.reserve_mib is {reserve}, and the disk of "
            f"{root} has {whole} MiB in all, so that nothing would ever be taken. Make it smaller, "
            "or give a larger disk with --dir"
        )


def serve(
    root: Path,
    config: Config,
    insecure: bool,
    forever: bool,
    ready: Callable[[list[str], str], None],
    elected: Callable[[], None] = lambda: None,
) -> int:
    """Run the gateway of a data directory; the exit code. Raises RankgateError.

    `elected` is called when the directory is ours, `ready` when ingest answers, with the
    addresses and their guard.
    """
    os.umask(PRIVATE)
    make_data_dir(root)
    check_room(root, config)
    rendezvous = nodes_of((), os.environ).rendezvous
    where = addresses(root, config.gateway.bind, insecure, rendezvous)
    guard = guard_of(root, config, where, insecure, os.environ)
    if guard == INSECURE:
        log.warning("NOT ENCRYPTED: whoever reaches %s may write to every run", where[1])
    take_lock(root, LOCK_GATEWAY, LOCK_SECONDS)
    elected()
    supervisor = Supervisor(root, config, where, guard, forever)
    code = supervisor.run(lambda: ready(where, guard))
    if code == BIND_FAILED:
        raise Busy(
            f"cannot serve on {', '.join(where)}; the line above says why. An address that is in "
            "use or not this machine's: choose another with --bind"
        )
    return code


def detached(arguments: list[str]) -> int:
    """`DIR CONFIG BIND [SINK…]`: started by a rank or by `rankgate run`, leaves when all is done.

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
    root, config_path, bind, *sinks = arguments
    telemetry.configure()
    os.nice(10)  # training comes first
    try:
        path = Path(config_path) if config_path else Path(root) / "gateway.toml"
        config = load(path if config_path or path.exists() else None, tuple(sinks))
        config = with_gateway(config, bind=bind) if bind else config
        return serve(
            Path(root),
            config,
            insecure=False,
            forever=False,
            ready=lambda _where, _guard: None,
            elected=elected,
        )
    except RankgateError as error:
        log.error("%s", error)
        return error.exit_code


def ingest(arguments: list[str]) -> int:
    """`DIR ADDRESSES BUDGET GUARD RESERVE QUOTA`, sizes in bytes."""
    from .ingest import admission, listener
    from .ingest.limits import Limits

    root, where, budget = Path(arguments[0]), json.loads(arguments[1]), int(arguments[2])
    guard, limits = arguments[3], Limits(int(arguments[4]), int(arguments[5]))
    telemetry.configure()
    take_lock(root, LOCK_INGEST, CHILD_LOCK_SECONDS)
    try:
        key = _key(guard)
        if key is None and guard != INSECURE:
            where = [address for address in where if not address.startswith("tcp://")]
        listener.serve(root, where, budget, key, limits)
    except zmq.ZMQError as error:
        log.error("cannot listen on %s: %s", ", ".join(where), error)
        return BIND_FAILED
    except (BadKey, admission.Unguarded) as error:
        log.error("%s", error)
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
    telemetry.clean_output()
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
    os.umask(PRIVATE)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # whatever mask our starter happened to have
    name, *arguments = sys.argv[1:]
    sys.exit(CHILDREN[name](arguments))
