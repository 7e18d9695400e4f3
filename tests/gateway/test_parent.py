"""A child of the gateway whose supervisor is gone leaves, however early that happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.parent import PARENT
from rank_client.rendezvous import gateway_command, ipc_address


@pytest.mark.parametrize("name", ["ingest", "rules"])
def test_a_child_whose_parent_was_gone_before_it_looked(tmp_path: Path, name: str) -> None:
    """It leaves by itself: a child that stayed would hold the lock of the next gateway's."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    rest = [json.dumps([ipc_address(tmp_path)]), str(1 << 20), "", "0", "0"]
    environ = {**os.environ, PARENT: str(gone.pid)}
    child = subprocess.Popen(gateway_command(name, str(tmp_path), *rest), env=environ)
    try:
        assert child.wait(15) == 0
    finally:
        child.kill()
        child.wait()
