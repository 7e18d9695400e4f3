"""`rankgate doctor` where something is really wrong: what it says, and with which exit code."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.view import disks, reach
from rank_client.spool import Spool
from rank_client.wire.keys import Key, write_keyfile

from ..flow.job import ROOT, Job, free_port, wait_until
from .test_reading_commands import Say, rankgate

#: `rankgate doctor --json` of another user; a first look imports all that it needs
_AS_NOBODY = """
import contextlib, io, os, sys
from gateway.cli import main
with contextlib.redirect_stdout(io.StringIO()):
    main.run(["doctor", "--dir", "/var/tmp/rankgate-none"])
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sys.exit(main.run(["doctor", "--json", *sys.argv[1:]]))
"""

Found = dict[str, dict[str, Any]]
Look = Callable[..., Found]


@pytest.fixture
def look(capsys: Say) -> Look:
    """Runs `rankgate doctor --json`: name → check, and compares the exit code with the states."""

    def run(*words: str) -> Found:
        code, out, err = rankgate(capsys, "doctor", "--json", *words)
        assert err == ""
        checks = json.loads(out)
        assert code == int(any(c["state"] == "bad" for c in checks))
        for check in checks:
            assert set(check) == {"name", "state", "text", "advice"}
            assert check["state"] in ("ok", "warn", "bad")
            assert check["advice"] or check["state"] != "bad", check
        return {c["name"]: c for c in checks}

    return run


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A real disk in memory of 4 MiB; only root may mount one."""
    place = tmp_path / "small"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=4m,mode=0700", "tmpfs", str(place)]
    if subprocess.run(words, capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


class TestText:
    """What a person reads."""

    def test_words_and_width(self, capsys: Say, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each line begins with ok, warn, bad or the sign of what hangs below; none is wider than
        the terminal, and the last one counts."""
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setenv("RANKGATE_ADDR", f"tcp://127.0.0.1:{free_port()}")
        monkeypatch.setenv("RANKGATE_SPOOL", "/var/tmp")
        code, out, _ = rankgate(capsys, "doctor", "--dir", "/var/tmp/rankgate-none")
        *lines, last = out.splitlines()
        assert code == 1
        assert {line[:5] for line in lines} == {"ok   ", "warn ", "bad  ", "     "}
        assert all(len(line) <= 80 for line in lines), max(lines, key=len)
        assert " need a look" in last
        assert any(line.startswith("     → start it there") for line in lines)


class TestDisks:
    """Directories that are not fit."""

    def test_a_disk_in_memory(
        self, tmpfs: Path, look: Look, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Data and spool on tmpfs: a warning each, with what it means for it."""
        monkeypatch.setenv("RANKGATE_SPOOL", str(tmpfs))
        found = look("--dir", str(tmpfs))
        for name, word in (("data directory", "reboot"), ("spool", "memory from the training")):
            check = found[f"{name}: file system"]
            assert (check["state"], check["text"]) == ("warn", "tmpfs, in memory")
            assert word in check["advice"]

    def test_less_room_than_the_reserve(self, tmpfs: Path, look: Look) -> None:
        """Below what the config keeps free, a gateway takes nothing: bad; the config counts."""
        found = look("--dir", str(tmpfs))["data directory: room"]
        assert found["state"] == "bad"
        assert "of which 268 MB stay free" in found["text"]
        (tmpfs / "gateway.toml").write_text("[gateway]\nreserve_mib = 1\n")
        assert look("--dir", str(tmpfs))["data directory: room"]["state"] == "warn"

    def test_a_full_disk(self, tmpfs: Path, look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing can be written: room and fsync of the spool are bad, and nothing stays behind."""
        monkeypatch.setenv("RANKGATE_SPOOL", str(tmpfs))
        with pytest.raises(OSError), (tmpfs / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        found = look()
        assert found["spool: room"]["state"] == found["spool: fsync"]["state"] == "bad"
        assert "No space left" in found["spool: fsync"]["text"]
        assert os.listdir(tmpfs) == ["filler"]

    @pytest.mark.parametrize("kind", ["nfs4", "lustre", "ceph", "fuse.sshfs", "fuse.glusterfs"])
    def test_a_network_disk(self, kind: str) -> None:
        """What may stay there and what not is said, for data and spool apart."""
        data, spool = disks.judged(disks.DATA, kind), disks.judged(disks.SPOOL, kind)
        assert (data.state, spool.state) == ("warn", "warn")
        assert "journal/ and media/ are safe there, series.db and sinks/" in data.advice
        assert "RANKGATE_SPOOL" in spool.advice

    @pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "fuseblk"])
    def test_a_disk_of_the_node(self, kind: str) -> None:
        """Is fine."""
        assert disks.judged(disks.DATA, kind).state == "ok"

    def test_the_longest_mount_point_counts(self, tmp_path: Path) -> None:
        """A folder is on the file system mounted nearest above it, spaces in names included."""
        place = tmp_path / "my disk"
        place.mkdir()
        point = str(place).replace(" ", "\\040")
        mounts = f"/dev/vda / ext4 rw 0 0\nserver:/x {point} nfs4 rw 0 0\n"
        assert disks.file_system(place / "deeper", mounts) == "nfs4"
        assert disks.file_system(tmp_path, mounts) == "ext4"

    def test_somebody_elses_spool(
        self, tmp_path: Path, look: Look, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A spool of another user: ranks would keep their logs in memory only."""
        if os.getuid():
            pytest.skip("only root may give a directory away")
        spool = tmp_path / "theirs"
        spool.mkdir()
        os.chown(spool, 12345, -1)
        monkeypatch.setenv("RANKGATE_SPOOL", str(spool))
        found = look()["spool"]
        assert found["state"] == "bad"
        assert "belongs to uid 12345" in found["text"]

    @pytest.mark.parametrize("below", ["", "deeper/still"])
    def test_a_file_in_the_way(
        self, tmp_path: Path, look: Look, monkeypatch: pytest.MonkeyPatch, below: str
    ) -> None:
        """No run can make a directory there, so it is bad."""
        (tmp_path / "file").touch()
        monkeypatch.setenv("RANKGATE_SPOOL", str(tmp_path / "file" / below))
        monkeypatch.setenv("RANKGATE_DIR", str(tmp_path / "file" / below))
        found = look()
        for name in ("data directory", "spool"):
            assert found[name]["state"] == "bad"
            assert found[name]["text"] == f"{tmp_path}/file is a file"

    @pytest.mark.parametrize("below", ["", "data"])
    def test_what_we_may_not_see(self, tmp_path: Path, below: str) -> None:
        """Directories of somebody else, or below such: each part that cannot be looked at is bad
        and says so, and nothing there is called empty."""
        if os.getuid():
            pytest.skip("only root may become somebody else")
        theirs = tmp_path / "theirs"
        (theirs / "data").mkdir(parents=True)
        theirs.chmod(0o700)
        (theirs / "data").chmod(0o700)
        words = [sys.executable, "-c", _AS_NOBODY, "--dir", str(theirs / below)]
        environ = {**os.environ, "RANKGATE_SPOOL": str(theirs / below), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(words, capture_output=True, text=True, env=environ, cwd="/")
        assert done.returncode == 1, done.stderr
        found = {c["name"]: c for c in json.loads(done.stdout)}
        for name in ("config", "data directory", "gateway", "key", "spool", "spool: leftovers"):
            assert found[name]["state"] == "bad", found[name]
        assert found["gateway"]["text"].endswith(": Permission denied")
        assert {"open files", "clock", "python"} <= found.keys()

    def test_a_data_directory_open_to_others(self, tmp_path: Path, look: Look) -> None:
        """A warning with the command that closes it."""
        tmp_path.chmod(0o755)
        found = look("--dir", str(tmp_path))["data directory"]
        assert (found["state"], found["advice"].split(":")[0]) == ("warn", f"chmod 700 {tmp_path}")


class TestKeys:
    """RANKGATE_KEYFILE and the gateway's own."""

    def test_a_keyfile_others_may_read(
        self, tmp_path: Path, look: Look, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Bad, with the command that mends it; mended, it is fine, and the secret is never said."""
        path = tmp_path / "job.key"
        write_keyfile(path, Key(bytes(range(32))))
        path.chmod(0o644)
        monkeypatch.setenv("RANKGATE_KEYFILE", str(path))
        found = look()
        assert found["key"]["state"] == "bad"
        assert f"chmod 600 {path}" in found["key"]["text"]
        path.chmod(0o600)
        found = look()
        assert (found["key"]["state"], found["key"]["text"]) == ("ok", f"RANKGATE_KEYFILE {path}")
        assert bytes(range(32)).hex() not in str(found)

    def test_the_key_of_another_run(
        self, tmp_path: Path, look: Look, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A key that is bound to a run is good for no other."""
        path = tmp_path / "job.key"
        write_keyfile(path, Key(bytes(32), "digits-7"))
        monkeypatch.setenv("RANKGATE_KEYFILE", str(path))
        assert look()["key"]["text"].endswith("for run digits-7 alone")
        monkeypatch.setenv("RANKGATE_RUN", "digits-8")
        assert look()["key"]["state"] == "bad"

    def test_the_gateways_own_key(self, tmp_path: Path, look: Look) -> None:
        """Is looked at where it lies in the data directory."""
        path = tmp_path / reach.OWN_KEYFILE
        path.write_text("nonsense")
        path.chmod(0o600)
        found = look("--dir", str(tmp_path))["gateway: key"]
        assert found["state"] == "bad"
        assert "rankgate keys new" in found["text"]


class TestAddress:
    """RANKGATE_ADDR, and the socket of the data directory's own gateway."""

    @pytest.fixture(autouse=True)
    def short_wait(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(reach, "ANSWER_SECONDS", 1.5)

    def _said(self, look: Look, patch: pytest.MonkeyPatch, address: str) -> str:
        patch.setenv("RANKGATE_ADDR", address)
        found = look()["RANKGATE_ADDR"]
        assert found["state"] == "bad"
        return str(found["text"])

    def test_nobody_listens(self, look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
        """Said as it is, at once."""
        began = time.monotonic()
        said = self._said(look, monkeypatch, f"tcp://127.0.0.1:{free_port()}")
        assert said.endswith("nobody listens there")
        assert time.monotonic() - began < 10

    @pytest.mark.parametrize("address", ["tcp://127.0.0.1", "tcp://x:99999", "udp:/x", "nonsense"])
    def test_no_address(self, address: str, look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
        """What cannot be an address is told so."""
        said = self._said(look, monkeypatch, address)
        assert "not an address" in said or "none that can be connected to" in said

    def test_a_black_hole(self, look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
        """A listener that takes the connection and never speaks is no gateway, by a deadline."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            said = self._said(look, monkeypatch, f"tcp://127.0.0.1:{port}")
        assert "lets nobody in for 1.5 s" in said

    def test_a_gateway(self, tmp_path: Path, look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
        """One that runs answers on both ways, and leaves no trace of it; with another key or none
        the handshake is named; stopped, it does not answer."""
        port = free_port()
        with Job(tmp_path) as job:
            job.serve("--bind", f"tcp://127.0.0.1:{port}")
            monkeypatch.setenv("RANKGATE_DIR", str(job.data))
            monkeypatch.setenv("RANKGATE_ADDR", f"tcp://127.0.0.1:{port}")

            def handshake_fails() -> bool:
                return "handshake fails" in look()["RANKGATE_ADDR"]["text"]

            wait_until(handshake_fails, what="no key is refused")  # a busy gateway says so late
            monkeypatch.setenv("RANKGATE_SECRET", "ab" * 32)
            wait_until(handshake_fails, what="a wrong key is refused")
            monkeypatch.delenv("RANKGATE_SECRET")
            monkeypatch.setenv("RANKGATE_KEYFILE", str(job.data / "gateway.key"))
            wait_until(lambda: look()["RANKGATE_ADDR"]["state"] == "ok", what="it answers")
            found = look()
            assert found["gateway: key"]["state"] == "ok"
            for name in ("RANKGATE_ADDR", "gateway: socket"):
                assert found[name]["state"] == "ok", found[name]
                assert "answers after" in found[name]["text"]
            assert not list(job.data.glob("runs/*"))
            os.kill(job.child("ingest"), signal.SIGSTOP)
            try:
                assert look()["RANKGATE_ADDR"]["state"] == "bad"
            finally:
                os.kill(job.child("ingest"), signal.SIGCONT)


class TestLeftovers:
    """What dead processes left in the spool."""

    def _leave(self, run: str, stream: int, **hello: str) -> Path:
        folder = Path(os.environ["RANKGATE_SPOOL"]) / run / bytes([stream] * 16).hex()
        Spool(str(folder), {"stream": bytes([stream] * 16), "run": run, **hello}).close()
        return folder

    def test_by_run_and_command(self, look: Look, capsys: Say) -> None:
        """Each run's streams with the command that ships them: where they belong decides."""
        self._leave("a", 1, dir="/data/one")
        self._leave("a", 2, dir="/data/one")
        self._leave("b", 3, dir="/data/one", addr="tcp://head:5717")
        hole = self._leave("c", 4, dir="/data/two")
        (hole / "hole").write_text("00 1 2 3\n")
        look()
        code, out, _ = rankgate(capsys, "doctor")
        assert code == 0
        text = " ".join(out.split())
        assert "run a: 2 streams not shipped" in text
        assert "rankgate drain --dir /data/one" in text
        assert "rankgate sweep --address tcp://head:5717" in text
        assert "rankgate sweep --accept-gap --dir /data/two" in text

    def test_a_process_that_lives(self, look: Look) -> None:
        """Is no leftover."""
        folder = Path(os.environ["RANKGATE_SPOOL"]) / "a" / bytes(16).hex()
        code = (
            "import sys; from rank_client.spool import Spool; "
            "s = Spool(sys.argv[1], {'stream': bytes(16), 'run': 'a'}); print(flush=True); input()"
        )
        words = [sys.executable, "-c", code, str(folder)]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            assert look()["spool: leftovers"]["text"] == "none"
            process.communicate(b"\n")
        assert look()["spool: leftovers"]["state"] == "warn"


class TestMachine:
    """Config, clock, descriptors."""

    def test_a_config_that_cannot_be_read(self, tmp_path: Path, look: Look) -> None:
        """Bad, with the key's full path."""
        (tmp_path / "gateway.toml").write_text("[gateway]\nreserve = 1\n")
        assert "gateway.reserve" in look("--dir", str(tmp_path))["config"]["text"]

    def test_a_clock_that_was_set_back(self, tmp_path: Path, look: Look) -> None:
        """A gateway's last word from our future is told."""
        later = time.time_ns() + 300 * 10**9
        (tmp_path / "ingest.json").write_text(f'{{"at_ns": {later}}}')
        found = look("--dir", str(tmp_path))["clock"]
        assert found["state"] == "warn"
        assert "in our future" in found["text"]

    def test_few_descriptors(self, tmp_path: Path) -> None:
        """A low limit is a warning that says for how many ranks, and what to type."""
        words = ["sh", "-c", 'ulimit -Sn 256; exec "$0" -m gateway doctor', sys.executable]
        done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        text = " ".join(done.stdout.split())
        assert "256 allowed" in text
        assert "more than 64 ranks: ulimit -n" in text
