"""Two network namespaces as two nodes of a cluster, with one cable between them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

DEVICE = "rgveth0"


def ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout


class TwoNodes:
    """Nodes 0 and 1 with the addresses in `hosts`; use as a context manager, which leaves neither
    namespace nor process behind."""

    hosts = ("10.77.31.1", "10.77.31.2")

    def __init__(self) -> None:
        self.names = [f"rg{os.getpid()}n{number}" for number in (0, 1)]

    @staticmethod
    def skip_unless_possible() -> None:
        if os.geteuid() != 0:
            pytest.skip("network namespaces need root")
        if not shutil.which("ip") or not shutil.which("unshare"):
            pytest.skip("network namespaces need the commands ip and unshare")
        tried = subprocess.run(["unshare", "--net", "--uts", "true"], check=False)
        if tried.returncode:
            pytest.skip("this machine lets nobody make a network namespace")

    def __enter__(self) -> TwoNodes:
        try:
            for name in self.names:
                ip("netns", "add", name)
            a, b = self.names
            ip("link", "add", DEVICE, "netns", a, "type", "veth", "peer", DEVICE, "netns", b)
            for name, host in zip(self.names, self.hosts, strict=True):
                ip("-n", name, "address", "add", f"{host}/24", "dev", DEVICE)
                for device in ("lo", DEVICE):
                    ip("-n", name, "link", "set", device, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        there = ip("netns", "list").split()
        for name in self.names:
            if name in there:
                for pid in ip("netns", "pids", name).split():
                    try:
                        os.kill(int(pid), signal.SIGKILL)
                    except ProcessLookupError:
                        pass
                ip("netns", "delete", name)

    def on(self, node: int, *words: str) -> tuple[str, ...]:
        """The words that run a command on a node, under a host name of its own."""
        named = 'hostname "$0" && exec "$@"'
        inside = ("unshare", "--uts", "sh", "-c", named, f"node{node}", *words)
        return ("ip", "netns", "exec", self.names[node], *inside)

    def cable(self, state: str) -> None:
        """`down` or `up`."""
        ip("-n", self.names[1], "link", "set", DEVICE, state)


def lines_of(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0
