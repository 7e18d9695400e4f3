"""The bad network's door closes whatever is on its way in."""

from __future__ import annotations

import subprocess
import sys

from tests.flow.job import ROOT

#: Ten closings at each of the event loop's first turns after a connection. In a process of its own:
#: asyncio leaves a connection unclosed that it accepts for a server just closed.
CLOSINGS = """
import asyncio, socket
from tests.trials.door import Door

async def main(gateway):
    door = Door(gateway)
    for number in range(60):
        await door.open()
        with socket.socket() as rank:
            rank.connect(("127.0.0.1", door.port))
            for _ in range(number % 6):
                await asyncio.sleep(0)
            await asyncio.wait_for(door.close(), 20)

with socket.create_server(("127.0.0.1", 0), backlog=200) as gateway:
    asyncio.run(main(gateway.getsockname()[1]))
"""


def test_a_door_closes_on_a_connection_just_accepted() -> None:
    """`close` returns, wherever a connection stands then: else a schedule would never end."""
    words = [sys.executable, "-c", CLOSINGS]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
