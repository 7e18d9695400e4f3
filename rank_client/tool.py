"""The launcher wrapper's own stream: how the command of a launch ended."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .identity import agent, boot_id
from .link import Link
from .sender import Carrier, jitter, new_stream_id
from .spool import Spool
from .spool_place import spool_dir
from .wire.records import Kind
from .wire.session import ClientSession

log = logging.getLogger("rankgate")


def tell_exit(
    run: str,
    launch: str,
    code: int,
    address: str,
    data_dir: Path,
    environ: Mapping[str, str],
    seconds: float,
) -> bool:
    """Write the launcher's exit code into a run. False when nobody took it in that time: it then
    lies in the spool, and is shipped like any other orphan."""
    stream = new_stream_id()
    hello: dict[str, Any] = {
        "kind": "tool",
        "run": run,
        "launch": launch,
        "dir": str(data_dir),
        "node": socket.gethostname(),
        "boot": boot_id(),
        "agent": agent(),
        "pid": os.getpid(),
        "rank": -1,
    }
    run_dir = spool_dir(environ, run, lambda _, text: log.warning("rankgate: %s", text))
    spool = Spool(run_dir and f"{run_dir}/{stream.hex()}", {"stream": stream, **hello})
    status = "completed" if code == 0 else "failed"
    spool.append_map(Kind.END, {"status": status, "text": "", "code": code, "w": time.time_ns()})
    session = ClientSession(stream, lambda: hello, spool, jitter)
    session.end({"status": status})
    link = Link(address)
    carrier = Carrier(session, link)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and session.state not in ("closed", "rejected"):
        carrier.step(time.monotonic())
        link.wait(0.01)
    link.close()
    spool.close()
    try:
        if session.state == "closed" and spool.directory and Path(spool.directory).is_dir():
            note = f"{(session.journal or b'').hex()} {session.durable}\n"
            (Path(spool.directory) / "done").write_text(note)
    except OSError:
        pass  # it is shipped once more, and dropped as a duplicate
    return session.state == "closed"
