"""Machine metrics: what is told, by whom, and that nothing of it reaches the training."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from rank_client.capture import machine
from rank_client.capture.machine import Gpus, Machine, Node
from rank_client.identity import Place
from tests.flow.job import wait_until

PLACE = Place(0, 0, 1, 1, "none")
HOLD = """
import fcntl, os, sys, time
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""
FORKS = """
import os, pathlib, signal, sys, time
from rank_client.capture import machine
from rank_client.identity import Place
machine.SAMPLE_SECONDS = 0.01
machine.Machine(None, Place(0, 0, 1, 1, "none"), print)
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.01)
for limit in sys.argv[2].split(","):
    machine.IMPORT_SECONDS = float(limit)
    child = os.fork()
    if child == 0:
        __import__(sys.argv[3])
        os._exit(7)
    deadline = time.monotonic() + 20
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            raise SystemExit("the child hangs")
        time.sleep(0.01)
os._exit(os.waitstatus_to_exitcode(ended[1]))
"""


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SAMPLE_SECONDS", 0.05)


@pytest.fixture
def made() -> Iterator[list[Machine]]:
    machines: list[Machine] = []
    yield machines
    for one in machines:
        one.stop(5)


def begin(
    made: list[Machine], run_dir: Path | None, place: Place = PLACE
) -> list[dict[str, float]]:
    """A machine's samples, as they come."""
    samples: list[dict[str, float]] = []
    made.append(Machine(str(run_dir) if run_dir else None, place, samples.append))
    return samples


def test_what_a_sample_tells() -> None:
    """Load, memory, the job's own memory, disk and network as rates since the last sample."""
    node = Node(psutil, PLACE)
    sample = node.sample(time.monotonic() + 1)
    assert {"system/cpu_percent", "system/memory_percent", "system/process_memory_gib",
            "system/network_received_mbs", "system/network_sent_mbs"} <= set(sample)  # fmt: skip
    assert 0 <= sample["system/cpu_percent"] <= 100
    assert 0 < sample["system/memory_percent"] <= 100
    own = psutil.Process().memory_info().rss / (1 << 30)
    assert own * 0.9 < sample["system/process_memory_gib"] < own + 8
    assert all(value >= 0 for value in sample.values())


def test_the_jobs_memory_is_that_of_its_launchers_children() -> None:
    """Under a launcher all its processes on this node count, not ours alone."""
    launched = Node(psutil, Place(0, 0, 2, 2, "torch")).sample(time.monotonic())
    alone = Node(psutil, PLACE).sample(time.monotonic())
    key = "system/process_memory_gib"
    assert launched[key] > alone[key]


def test_what_a_machine_does_not_tell_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container without disk counters: everything else is there."""
    monkeypatch.setattr(psutil, "disk_io_counters", lambda: None)
    node = Node(psutil, PLACE)
    sample = node.sample(time.monotonic() + 1)
    assert "system/cpu_percent" in sample
    assert not any("disk" in key for key in sample)


def test_one_process_of_a_node_samples(tmp_path: Path, made: list[Machine]) -> None:
    """The second waits as long as the first one samples, and goes on when it has stopped."""
    first = begin(made, tmp_path)
    wait_until(lambda: len(first) > 2, what="samples of the first")
    second = begin(made, tmp_path, Place(1, 1, 2, 2, "none"))
    wait_until(lambda: len(first) > 6, what="more of the first")
    assert second == []
    made[0].stop(5)
    wait_until(lambda: second, what="a sample of the second")


def test_another_goes_on_when_the_one_that_samples_is_killed(
    tmp_path: Path, made: list[Machine]
) -> None:
    """The lock of a process that is killed is free."""
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        samples = begin(made, tmp_path)
        time.sleep(5 * machine.SAMPLE_SECONDS)
        assert samples == []
        other.kill()
    wait_until(lambda: samples, what="a sample")


def test_without_a_spool_the_first_local_rank_samples(made: list[Machine]) -> None:
    """Where there is no directory for a lock, local rank 0 does it."""
    second = begin(made, None, Place(1, 1, 2, 2, "none"))
    first = begin(made, None)
    wait_until(lambda: len(first) > 3, what="samples")
    assert second == []


def test_without_psutil_it_is_said_once(
    tmp_path: Path,
    made: list[Machine],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """No exception, one line that says what to install."""
    monkeypatch.setitem(sys.modules, "psutil", None)
    samples = begin(made, tmp_path)
    wait_until(lambda: "pip install psutil" in caplog.text, what="the line")
    made[0].stop(5)
    assert samples == []
    assert len(caplog.records) == 1


def nvml(**broken: Any) -> Any:
    """A stand-in for the module of `nvidia-ml-py`, with two GPUs."""
    module = SimpleNamespace(
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetUtilizationRates=lambda device: SimpleNamespace(gpu=90 + device),
        nvmlDeviceGetMemoryInfo=lambda device: SimpleNamespace(used=20 + device, total=80),
        nvmlDeviceGetTemperature=lambda device, kind: 60 + device + kind,
        nvmlDeviceGetPowerUsage=lambda device: 300_000 + device,
    )
    for name, value in broken.items():
        setattr(module, name, value)
    return module


def test_what_each_gpu_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load, memory, temperature and power, under the GPU's number."""
    monkeypatch.setitem(sys.modules, "pynvml", nvml())
    assert Gpus().sample() == {
        "system/gpu/0/percent": 90.0,
        "system/gpu/0/memory_percent": 25.0,
        "system/gpu/0/temperature_celsius": 60.0,
        "system/gpu/0/power_watts": 300.0,
        "system/gpu/1/percent": 91.0,
        "system/gpu/1/memory_percent": 26.25,
        "system/gpu/1/temperature_celsius": 61.0,
        "system/gpu/1/power_watts": 300.001,
    }


def raises(*_: object) -> None:
    raise RuntimeError("NVML: Not Supported")


@pytest.mark.parametrize("broken", ["nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetPowerUsage"])
def test_a_gpu_that_does_not_tell(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """No driver, no permission, no power sensor: what is told is there, and nothing is raised."""
    monkeypatch.setitem(sys.modules, "pynvml", nvml(**{broken: raises}))
    sample = Gpus().sample()
    assert ("system/gpu/1/percent" in sample) == (broken == "nvmlDeviceGetPowerUsage")
    assert "system/gpu/0/power_watts" not in sample


def test_nothing_is_imported_with_the_package() -> None:
    """psutil, NVML and ctypes are loaded by the thread that needs them, never by the import."""
    code = (
        "import sys, rank_client; "
        "assert not {'psutil', 'pynvml', 'ctypes', 'termios'} & set(sys.modules), sys.modules"
    )
    environ = {**os.environ, "PYTHONPATH": str(Path(machine.__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], env=environ, check=True)


def fork_while_it_imports(
    folder: Path, import_seconds: float, limits_seconds: tuple[float, ...], child: str
) -> None:
    """One fork per limit. Raises where a child cannot import the module `child`, or there is none
    in time."""
    begun = folder / "begun"
    (folder / "psutil.py").write_text(
        f"import pathlib, time\npathlib.Path({str(begun)!r}).touch()\n"
        f"time.sleep({import_seconds})\n"
    )
    path = f"{folder}:{Path(machine.__file__).parents[2]}"
    words = [sys.executable, "-c", FORKS, str(begun), ",".join(map(str, limits_seconds)), child]
    environ = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(words, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 7, done.stderr


def test_a_fork_while_it_imports(tmp_path: Path) -> None:
    """The child can import the same module; else it would wait for a thread that it has not."""
    fork_while_it_imports(tmp_path, 1, limits_seconds=(30,), child="psutil")


def test_a_fork_does_not_wait_for_ever_for_an_import(tmp_path: Path) -> None:
    """An import that hangs, on a file system that is away say, holds the training a while only,
    and one fork only: not each of a DataLoader's workers."""
    fork_while_it_imports(tmp_path, 600, limits_seconds=(0.2, 600, 600), child="csv")
