"""A training process that has hardly a descriptor left: it lives on, and its log arrives."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from .job import Job

#: begins to log with so many descriptors left, goes on once they are there again
FEW = """
import json, os, resource, sys, time
import rank_client

def wait(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)

left = int(sys.argv[1])
truth = open(f"{left}.jsonl", "w")
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
taken = []
try:
    while True:
        taken.append(os.open(os.devnull, os.O_RDONLY))
except OSError:
    pass
for _ in range(left):
    os.close(taken.pop())
run = rank_client.init()
run.log({"a": 1.0}, step=0)
wait(lambda: run._sender.session.welcomed or "connect" in run._warned)
for fd in taken:
    os.close(fd)
run.log({"a": 2.0}, step=1)
truth.write(json.dumps({"run": run.id, "stream": run.stream}) + "\\n")
truth.write('{"step": 0, "a": 1.0}\\n{"step": 1, "a": 2.0}\\n')
truth.close()
wait(lambda: run._sender.session.welcomed)
print("connected at once" if "connect" not in run._warned else "connected later")
sys.exit(0 if run.finish(seconds=30) else 3)
"""
MOST = 20
AT_ONCE = 7  #: processes at a time


@pytest.mark.timeout(180)
def test_few_descriptors_end_no_training(tmp_path: Path) -> None:
    """With 0 to 20 of them left at `init` the process goes on, and once there are more all that
    it logged arrives, what was logged before too."""
    place = {"RANKGATE_RUN": "r1", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    said = {}
    with Job(tmp_path) as job:
        job.serve()
        for first in range(0, MOST + 1, AT_ONCE):
            started = {
                left: job.start(sys.executable, "-c", FEW, str(left), **place, RANK=str(left))
                for left in range(first, min(first + AT_ONCE, MOST + 1))
            }
            for left, process in started.items():
                out, err = process.communicate(timeout=100)
                assert process.returncode == 0, (left, process.returncode, out, err)
                assert "Traceback" not in err
                said[left] = out.strip()
        job.drain()
        job.assert_all_there()
    assert said[0] == "connected later"
