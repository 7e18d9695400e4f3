"""Points to a backend, by our sink or by the vendor's own calls: `python -m bench.deliver JSON`.

Prints the seconds from the first point until the client says that all is delivered.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gateway.sinks.base import Rows, RunInfo, Sink

from .measure import rss_mb

START_NS = 1_790_000_000_000_000_000
RUN = RunInfo("bench-run", "team/bench", "bench", (), START_NS)
BATCH_ROWS = 500  #: of 20 points each, as the loop hands them over


class Notes(dict[str, Any]):
    """What a sink remembers, in memory."""

    put = put_now = dict.__setitem__


def clearml_sink(_folder: Path) -> Sink:
    from gateway.sinks.clearml import ClearmlSink

    return ClearmlSink()


def neptune_sink(folder: Path) -> Sink:
    from gateway.sinks.neptune import NeptuneConfig, NeptuneSink

    return NeptuneSink(NeptuneConfig(), folder)


def platform_sink(_folder: Path) -> Sink:
    from gateway.sinks.hub.config import HubConfig
    from gateway.sinks.hub.platform import PlatformSink

    return PlatformSink(HubConfig(project="team/bench", requests_per_minute=1_000_000))


def legacy_sink(_folder: Path) -> Sink:
    from gateway.sinks.hub import legacy
    from gateway.sinks.hub.config import HubConfig

    legacy.METRICS_GAP_SECONDS = 0.0
    return legacy.LegacySink(HubConfig(protocol="legacy"))


#: HUB's without the pace that the service asks for: that is not what is measured here
SINKS = {
    "clearml": clearml_sink,
    "neptune": neptune_sink,
    "hub platform": platform_sink,
    "hub legacy": legacy_sink,
}


def by_sink(backend: str, folder: Path, rows: int, keys: int) -> Callable[[], object]:
    """HUB is keyed by epoch: there, each row closes one."""
    importlib.import_module("gateway.sinks.process")  # what its process has loaded besides
    sink = SINKS[backend](folder)
    sink.open(RUN, Notes())
    batches = [_rows(first, min(BATCH_ROWS, rows - first), keys) for first in range(0, rows, 500)]
    if backend.startswith("hub"):
        for batch in batches:
            batch.columns["epoch"] = batch.step

    def send() -> None:
        for batch in batches:
            sink.send([batch], again=False)

    return send


def _rows(first: int, n: int, keys: int) -> Rows:
    step = np.arange(first, first + n, dtype=np.int64)
    columns = {f"bench/m{i:02}": step * 0.37 + i for i in range(keys)}
    return Rows(bytes(16), 0, step + 1, step, START_NS + step * 1_000_000, columns)


def clearml_calls(rows: int, keys: int) -> Callable[[], object]:
    from clearml import Task

    off = {"auto_connect_arg_parser": False, "auto_connect_frameworks": False}
    off |= {"auto_resource_monitoring": False, "auto_connect_streams": False}
    task = Task.init("team/bench", "bench", reuse_last_task_id=False, output_uri=False, **off)
    logger = task.get_logger()

    def send() -> None:
        for step in range(rows):
            for i in range(keys):
                logger.report_scalar("bench", f"m{i:02}", step * 0.37 + i, step)
        task.flush(wait_for_uploads=True)

    return send


def neptune_calls(rows: int, keys: int) -> Callable[[], object]:
    import neptune

    off = {"capture_stdout": False, "capture_stderr": False, "capture_hardware_metrics": False}
    run = neptune.init_run(source_files=[], git_ref=False, **off)

    def send() -> None:
        for step in range(rows):
            for i in range(keys):
                run[f"bench/m{i:02}"].append(step * 0.37 + i, step=step)
        run.wait()

    return send


CALLS = {"clearml": clearml_calls, "neptune": neptune_calls}


def main() -> None:
    config = json.loads(sys.argv[1])
    logging.disable(logging.WARNING)
    backend, rows, keys = config["backend"], config["rows"], config["keys"]
    if config["how"] == "sink":
        send = by_sink(backend, Path(config["folder"]), rows, keys)
    else:
        send = CALLS[backend](rows, keys)
    start, cpu = time.monotonic(), time.process_time()
    send()
    result = {"seconds": time.monotonic() - start, "cpu_s": time.process_time() - cpu}
    print(json.dumps(result | {"memory": rss_mb()}), flush=True)
    os._exit(0)  # the vendors' exit hooks wait for seconds; what counts is over


if __name__ == "__main__":
    main()
