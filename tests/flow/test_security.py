"""Over a network: who has no key gets nothing through, who has one for a run gets only there."""

from __future__ import annotations

import base64
import os
import random
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from zmq.utils import z85

from gateway.supervise import read_json
from rank_client.link import Link
from rank_client.wire import frames
from rank_client.wire.frames import Type
from rank_client.wire.keys import Key, read_keyfile, write_keyfile

from .job import Job, free_port, wait_until

STRANGER = Key(b"x" * 32)
HELLO = frames.control(
    Type.HELLO, 0, b"h" * 16, {"v": [1, 1], "run": "hostile", "kind": "live", "first": 1}
)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    """A gateway on a tcp port of this machine with a keyfile of its own making."""
    with Job(tmp_path) as job:
        job.environ["ADDRESS"] = f"tcp://127.0.0.1:{free_port()}"
        job.serve("--bind", job.environ["ADDRESS"])
        yield job


def afar(job: Job, keyfile: Path | None = None, **environ: str) -> dict[str, str]:
    """The environment of a rank on another node, with a spool that this gateway does not see."""
    return {
        "RANKGATE_ADDR": job.environ["ADDRESS"],
        "RANKGATE_KEYFILE": str(keyfile or job.data / "gateway.key"),
        "RANKGATE_SPOOL": str(job.spool.with_name("spool-afar")),
        "RANKGATE_DIR": str(job.data.with_name("data-afar")),
        **environ,
    }


def ended(job: Job) -> tuple[str, str]:
    """(stdout, stderr) of the last process, which ended well."""
    process = job.processes[-1]
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out, err


def counts(job: Job) -> dict[str, int]:
    return dict(read_json(job.data / "ingest.json").get("counts", {}))


def runs(job: Job) -> set[str]:
    return {p.name for p in (job.data / "runs").glob("*")}


def spooled(job: Job, run: str) -> int:
    """Bytes of records that wait on the other node."""
    return sum(p.stat().st_size for p in job.spool.with_name("spool-afar").glob(f"{run}/*/*.log"))


# --- the right key -------------------------------------------------------------------------------


def test_a_rank_with_the_key_logs_and_the_secret_is_nowhere(job: Job, tmp_path: Path) -> None:
    """All points arrive; the secret is in no file but its own, in no log and no command line, in
    no spelling."""
    rank = job.rank(0, 1, 200, "finish", 0.01, **afar(job))
    wait_until(lambda: "r1" in runs(job), what="the run is there")
    words = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in (*job.gateway_pids(), rank.pid)]
    said = "".join(ended(job))
    job.drain()
    job.assert_all_there()
    job.stop_gateway(15)
    said += "".join(job.processes[0].communicate())
    secret = read_keyfile(job.data / "gateway.key").secret
    key = Key(secret)
    spellings = [
        spelling
        for raw in (secret, key.server_secret(), key.client_secret())
        for spelling in (
            raw,
            raw.hex().encode(),
            raw.hex().upper().encode(),
            base64.b64encode(raw),
            base64.urlsafe_b64encode(raw),
            z85.encode(raw),
        )
    ]
    files = [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "gateway.key"]
    assert len(files) > 8
    for what, content in [(str(p), p.read_bytes()) for p in files] + [
        ("command lines", b"".join(words)),
        ("output", said.encode()),
    ]:
        assert not any(spelling in content for spelling in spellings), what
    assert (job.data / "gateway.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("spelling", ["hex", "base64"])
def test_the_secret_may_come_by_environment(tmp_path: Path, spelling: str) -> None:
    """RANKGATE_SECRET on both sides does what a keyfile does, and no file is made of it."""
    raw = os.urandom(32)
    text = raw.hex() if spelling == "hex" else base64.b64encode(raw).decode()
    with Job(tmp_path, RANKGATE_SECRET=text) as job:
        job.environ["ADDRESS"] = f"tcp://127.0.0.1:{free_port()}"
        job.serve("--bind", job.environ["ADDRESS"])
        job.rank(0, 1, 50, "finish", **afar(job, RANKGATE_KEYFILE=""))
        ended(job)
        job.drain()
        job.assert_all_there()
        assert not (job.data / "gateway.key").exists()
        held = [p for p in tmp_path.rglob("*") if p.is_file() and text.encode() in p.read_bytes()]
        assert held == []


def test_files_go_over_the_network_too(job: Job) -> None:
    """A checkpoint's bytes arrive over the encrypted connection."""
    job.rank(0, 1, 20, "checkpoint", **afar(job))
    ended(job)
    job.drain()
    job.assert_all_there()
    [blob] = [p for p in (job.data / "runs/r1/media").rglob("*") if p.is_file()]
    assert blob.stat().st_size == 100 << 20


# --- without it ----------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["another secret", "no key", "a file others can read"])
def test_a_rank_without_the_key_trains_on(job: Job, tmp_path: Path, what: str) -> None:
    """It is told once, in one line; its exit code and its records are what they would be; nothing
    of it reaches the gateway."""
    keyfile = tmp_path / "keys" / "k"
    write_keyfile(keyfile, STRANGER)
    place = afar(job, keyfile, RANKGATE_RUN="r2")
    if what == "no key":
        place["RANKGATE_KEYFILE"] = ""
    elif what == "a file others can read":
        keyfile.chmod(0o644)
    job.rank(0, 1, 100, "finish", 0.02, **place)
    _, err = ended(job)
    told = [line for line in err.splitlines() if "keeps everything" in line]
    assert len(told) == 1, err
    assert "Traceback" not in err
    assert "RANKGATE_KEYFILE" in told[0] or f"chmod 600 {keyfile}" in told[0]
    assert runs(job) == set()
    assert not any(name.startswith("bad frame") for name in counts(job))
    truth = job.truth("r2")
    assert sum("step" in line for line in next(iter(truth.values()))) == 100
    assert spooled(job, "r2") > 100 * 40


def test_a_key_that_is_put_right_is_taken_up(job: Job, tmp_path: Path) -> None:
    """A running rank whose keyfile was wrong gets through once the right one is in its place."""
    keyfile = tmp_path / "keys" / "k"
    write_keyfile(keyfile, Key(b"x" * 32, server=gateway_public(job)))  # refused by ZAP: for good
    process = job.rank(0, 1, 10, "stop", **afar(job, keyfile))
    wait_until(lambda: (job.truth_dir / "0.ready").exists(), what="the rank is at work")
    wait_until(lambda: "refused a connection" in output(job), what="it was refused")
    keyfile.unlink()
    write_keyfile(keyfile, read_keyfile(job.data / "gateway.key"))
    wait_until(lambda: "r1" in runs(job), 60, "the rank got through")
    job.ask_stop()
    assert process.wait(60) == 0
    job.drain()
    job.assert_all_there()


def gateway_public(job: Job) -> str:
    return str(read_json(job.data / "gateway.json")["public_key"])


def output(job: Job) -> str:
    """What the gateway in the foreground has said so far."""
    seen = job.__dict__.setdefault("seen", [])
    if not job.__dict__.get("reading"):
        stream = job.processes[0].stderr
        assert stream is not None
        job.__dict__["reading"] = threading.Thread(target=lambda: seen.extend(stream), daemon=True)
        job.__dict__["reading"].start()
    return "".join(seen)


# --- strangers -----------------------------------------------------------------------------------


def raw_blobs(address: str, rng: random.Random, n: int) -> None:
    """Random bytes, and the beginnings of ZMTP 1.0, 2.0 and 3.1, each with a HELLO behind."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    greeting = b"\xff\0\0\0\0\0\0\0\1\x7f\3\1" + b"NULL".ljust(20, b"\0") + bytes(32)
    for index in range(n):
        start = (
            rng.randbytes(rng.randrange(1, 200)),
            b"\1\0" + bytes([len(HELLO) + 1, 0]) + HELLO,
            b"\xff\0\0\0\0\0\0\0\1\x7f\1\5\0\0",
            greeting + b"\4\x19\5READY\x0bSocket-Type\0\0\0\6DEALER" + b"\0" + bytes([len(HELLO)]),
        )[index % 4]
        try:
            with socket.create_connection((host, int(port)), 5) as stranger:
                stranger.sendall(start + HELLO)
        except OSError:
            pass  # thrown out before all was said


def knocking_links(address: str, gateway: str, seconds: float) -> int:
    """zmq clients with no key, another secret, another client key; how many frames they got rid
    of."""
    keys: list[Key | None] = [None, STRANGER, Key(b"x" * 32, server=gateway)]
    links = [Link(address, key) for key in keys]
    sent, deadline = 0, time.monotonic() + seconds
    while time.monotonic() < deadline:
        sent += sum(link.send(HELLO) for link in links)
        time.sleep(0.01)
    for link in links:
        link.close()
    return sent


def test_strangers_get_no_message_through_and_disturb_nobody(job: Job) -> None:
    """Raw bytes, old ZMTP, NULL clients and wrong keys: not one message reaches the gateway, and
    a good rank beside them loses nothing."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")  # noqa: T201 - so that a failure can be repeated
    job.rank(0, 1, 300, "finish", 0.01, **afar(job))
    wait_until(lambda: "r1" in runs(job), what="the good rank is at work")
    address, public = job.environ["ADDRESS"], gateway_public(job)
    thread = threading.Thread(target=raw_blobs, args=(address, random.Random(seed), 200))
    thread.start()
    assert knocking_links(address, public, 2.0) == 0
    thread.join()
    ended(job)
    job.drain()
    job.assert_all_there()
    assert runs(job) == {"r1"}
    assert not any(name.startswith("bad frame") for name in counts(job)), counts(job)


def test_without_encryption_the_same_strangers_do_get_in(tmp_path: Path) -> None:
    """The proof that the test above could fail: on an --insecure gateway their HELLO opens a run,
    and the gateway has said loudly what that means."""
    with Job(tmp_path) as job:
        address = f"tcp://127.0.0.1:{free_port()}"
        job.serve("--bind", address, "--insecure")
        raw_blobs(address, random.Random(1), 40)
        assert knocking_links(address, "", 1.0) > 0
        wait_until(lambda: "hostile" in runs(job), what="the stranger's run")
        wait_until(lambda: "NOT ENCRYPTED" in output(job), what="the loud word")


# --- a key of one run ----------------------------------------------------------------------------


def test_a_key_of_one_run_is_good_for_that_run_alone(job: Job) -> None:
    """`keys new --run` makes a key at once good for its run; another run is refused with a line
    that says why, and leaves nothing at the gateway."""
    code, out, err = job.cli("keys", "new", "--run", "r1")
    assert code == 0, err
    assert f"export RANKGATE_KEYFILE={job.data}/keys/r1.key" in out
    keyfile = job.data / "keys/r1.key"
    assert keyfile.stat().st_mode & 0o777 == 0o600
    job.rank(0, 1, 30, "finish", **afar(job, keyfile, RANKGATE_RUN="r2"))
    _, err = ended(job)
    assert "this key is for run r1 only" in err
    assert runs(job) == set()
    assert spooled(job, "r2") > 0
    job.rank(0, 1, 30, "finish", **afar(job, keyfile))
    ended(job)
    job.drain()
    job.assert_all_there()
    assert runs(job) == {"r1"}
    wait_until(lambda: counts(job).get("refused: the key is for another run"), what="it counts")


# --- where to listen -----------------------------------------------------------------------------


@pytest.mark.parametrize("bind", ["tcp://0.0.0.0:5717", "tcp://*:5717", "tcp", "tcp://:1", "x"])
def test_a_bind_that_is_too_wide_or_unclear_is_refused(tmp_path: Path, bind: str) -> None:
    """Every network at once, or a way to nowhere: the command ends and says what to give."""
    with Job(tmp_path) as job:
        code, _, err = job.cli("serve", "--bind", bind)
        assert code == 78
        assert "tcp://" in re.sub(r"\s+", " ", err)


def test_a_bad_keyfile_is_said_before_anything_is_served(tmp_path: Path) -> None:
    """A keyfile that others can read ends `serve` with the line that mends it."""
    keyfile = tmp_path / "keys" / "k"
    write_keyfile(keyfile, STRANGER)
    keyfile.chmod(0o640)
    with Job(tmp_path) as job:
        bind = f"tcp://127.0.0.1:{free_port()}"
        code, _, err = job.cli("serve", "--bind", bind, "--keyfile", str(keyfile))
        assert code == 78
        assert "chmod 600" in re.sub(r"\s+", " ", err)


def test_this_nodes_ranks_need_no_key(job: Job) -> None:
    """On the gateway's own node ranks come by the socket in the file system, key or not."""
    job.rank(0, 1, 30, "finish")
    ended(job)
    job.drain()
    job.assert_all_there()


def test_a_null_peer_cannot_even_be_queued(job: Job) -> None:
    """A plain DEALER that waits for a connection never gets one it could send on."""
    context: zmq.Context[Any] = zmq.Context()
    plain = context.socket(zmq.DEALER)
    plain.setsockopt(zmq.IMMEDIATE, 1)
    plain.connect(job.environ["ADDRESS"])
    try:
        assert plain.poll(1000, zmq.POLLOUT) == 0
    finally:
        context.destroy(0)
