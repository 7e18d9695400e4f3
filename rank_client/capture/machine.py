"""How the machine is doing, once per node: processor, memory, disk, network, GPUs.

One of a run's processes on a node samples, the one that has locked the run's spool directory; when
it dies another goes on. psutil and NVML are imported by the thread that samples.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ..identity import Place

SAMPLE_SECONDS = 15.0
FIRST_SECONDS = 1.0  #: what the rates of the first sample are over
STAGGER_SECONDS = 1.0  #: per local rank, so that the lowest is the first to ask for the lock
MEGABYTE, GIB = 1e6, float(1 << 30)
LAUNCHED = ("torch", "slurm", "mpi")  #: our parent started the node's ranks, and nothing else

log = logging.getLogger("rankgate")

IMPORT_SECONDS = 5.0  #: a fork waits no longer for an import in the thread here
#: held while it imports: a child forked just then would wait for that module for ever
_importing = threading.RLock()
_hangs = False  #: a fork has waited for this import in vain; no other waits, until it is over


def _before_fork() -> None:
    global _hangs  # noqa: PLW0603 - forks follow each other
    _hangs = not _importing.acquire(timeout=0 if _hangs else IMPORT_SECONDS)


def _after_in_parent() -> None:
    with suppress(RuntimeError):  # not ours: the import takes longer than a training should wait
        _importing.release()


def _after_in_child() -> None:
    global _importing  # noqa: PLW0603 - whoever may hold the old one is not in this process
    _importing = threading.RLock()


os.register_at_fork(
    before=_before_fork, after_in_parent=_after_in_parent, after_in_child=_after_in_child
)


class Machine:
    """Samples in a daemon thread; each sample goes to `put`, which must not raise."""

    def __init__(
        self,
        run_dir: str | None,
        where: Place,
        put: Callable[[dict[str, float]], None],
    ) -> None:
        self._run_dir = run_dir
        self._where = where
        self._put = put
        self._lock_fd = -1
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rankgate-machine", daemon=True)
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """Sample no more; waits so long at most for one that is being taken."""
        self._stop.set()
        self._thread.join(max(0.0, seconds))

    def become_child(self) -> None:
        """In a forked child, which would keep the lock when the parent dies."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)

    def _run(self) -> None:
        try:
            self._stop.wait(min(self._where.local_rank * STAGGER_SECONDS, SAMPLE_SECONDS))
            while not self._stop.is_set() and not self._elected():
                self._stop.wait(SAMPLE_SECONDS)
            if not self._stop.is_set():
                self._sample_on()
        except Exception as error:  # nothing may escape into the training process
            log.warning("rankgate: machine metrics are not recorded: %r", error)
        finally:
            self._leave()

    def _elected(self) -> bool:
        """Is this the process of its node that samples?"""
        if self._run_dir is None:
            return self._where.local_rank == 0
        fd = os.open(self._run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # Not a POSIX lock, which has to be of a file: and nothing is left behind here.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            return False
        self._lock_fd = fd
        return True

    def _leave(self) -> None:
        fd, self._lock_fd = self._lock_fd, -1
        if fd >= 0:
            os.close(fd)

    def _sample_on(self) -> None:
        # Not before it is needed: an import evaluates code, and a Ctrl-C that ends the main thread
        # in that moment gives the process another exit code.
        if self._stop.wait(SAMPLE_SECONDS):
            return
        try:
            with _importing:
                import psutil
        except ImportError:
            log.warning("rankgate: no machine metrics, as psutil is missing: pip install psutil")
            return
        node = Node(psutil, self._where)
        gpus = Gpus()
        pause = min(FIRST_SECONDS, SAMPLE_SECONDS)
        while not self._stop.wait(pause):
            self._put({**node.sample(time.monotonic()), **gpus.sample()})
            pause = SAMPLE_SECONDS
        gpus.close()


class Node:
    """What psutil tells; what a machine does not tell is left out."""

    def __init__(self, psutil: Any, where: Place) -> None:
        self._psutil = psutil
        pid = os.getppid() if where.launcher in LAUNCHED else os.getpid()
        self._job = psutil.Process(pid)
        self._before: dict[str, float] = {}
        self._at = 0.0
        self.sample(time.monotonic())  # rates are since the sample before

    def sample(self, now: float) -> dict[str, float]:
        """Percent, GiB, and MB/s since the last sample at `now` seconds."""
        psutil = self._psutil
        out: dict[str, float] = {}
        _tell(out, "system/cpu_percent", lambda: psutil.cpu_percent(None))
        _tell(out, "system/memory_percent", lambda: psutil.virtual_memory().percent)
        _tell(out, "system/process_memory_gib", self._job_gib)
        sums: dict[str, float] = {}
        _tell(sums, "system/disk_read_mbs", lambda: psutil.disk_io_counters().read_bytes)
        _tell(sums, "system/disk_written_mbs", lambda: psutil.disk_io_counters().write_bytes)
        _tell(sums, "system/network_received_mbs", lambda: psutil.net_io_counters().bytes_recv)
        _tell(sums, "system/network_sent_mbs", lambda: psutil.net_io_counters().bytes_sent)
        passed = now - self._at
        for key, value in sums.items():
            if key in self._before and passed > 0:
                out[key] = max(0.0, value - self._before[key]) / MEGABYTE / passed
        self._before, self._at = sums, now
        return out

    def _job_gib(self) -> float:
        """Resident memory of the job's processes on this node; pages they share count for each."""
        total = 0
        for process in (self._job, *self._job.children(recursive=True)):
            try:
                total += process.memory_info().rss
            except self._psutil.Error:
                pass  # it has just ended
        return total / GIB


class Gpus:
    """What NVML tells of each GPU of the node; nothing where there is no NVML."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self._devices: list[Any] = []
        try:
            with _importing:
                import pynvml
        except ImportError:
            return
        try:
            pynvml.nvmlInit()
            count = pynvml.nvmlDeviceGetCount()
            self._devices = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]
            self._nvml = pynvml
        except Exception as error:  # its errors are its own; no driver is the common one
            log.info("rankgate: no GPU metrics: %s", error)

    def sample(self) -> dict[str, float]:
        out: dict[str, float] = {}
        for i, device in enumerate(self._devices):
            self._one(out, f"system/gpu/{i}", device)
        return out

    def _one(self, out: dict[str, float], name: str, device: Any) -> None:
        nvml = self._nvml

        def memory() -> float:
            info = nvml.nvmlDeviceGetMemoryInfo(device)
            return float(100.0 * info.used / info.total)

        _tell(out, f"{name}/percent", lambda: nvml.nvmlDeviceGetUtilizationRates(device).gpu)
        _tell(out, f"{name}/memory_percent", memory)
        _tell(
            out,
            f"{name}/temperature_celsius",
            lambda: nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU),
        )
        _tell(out, f"{name}/power_watts", lambda: nvml.nvmlDeviceGetPowerUsage(device) / 1000.0)

    def close(self) -> None:
        if self._nvml is not None:
            self._nvml.nvmlShutdown()


def _tell(out: dict[str, float], key: str, ask: Callable[[], Any]) -> None:
    """One value, unless this machine, container or device does not tell it."""
    try:
        out[key] = float(ask())
    except Exception:  # noqa: S110 - psutil and NVML have dozens of reasons; the others still tell
        pass
