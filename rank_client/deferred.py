"""Values on a device: copied without waiting, logged when they have arrived.

The copy is queued on the device's own stream behind the work that makes the value; an event tells
when it is done. The training thread never waits, and later plain calls do not wait for it either.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

from .values import scalar

MAX_PENDING = 64

#: begins copies of the tensors and gives (ready, values): `ready()` never blocks, and once it is
#: true `values()` gives the host tensors.
BeginCopy = Callable[[list[Any]], tuple[Callable[[], bool], Callable[[], list[Any]]]]


def begin_copy(tensors: list[Any]) -> tuple[Callable[[], bool], Callable[[], list[Any]]]:
    """Copy to pinned host memory behind an event, through the torch the user has imported."""
    torch = sys.modules["torch"]
    if any(t.device.type != "cuda" for t in tensors):
        # No event to ask: a clone is queued at once, and the sender's thread does the waiting.
        clones = [t.detach().clone() for t in tensors]
        return (lambda: True), (lambda: clones)
    hosts, events = [], []
    for device in {t.device for t in tensors}:
        with torch.cuda.device(device):
            for tensor in tensors:
                if tensor.device == device:
                    host = torch.empty((), dtype=tensor.dtype, pin_memory=True)
                    host.copy_(tensor.detach().reshape(()), non_blocking=True)
                    hosts.append((id(tensor), host))
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            events.append(event)
    by_id = dict(hosts)
    order = [by_id[id(t)] for t in tensors]
    # The tensors are kept alive until the copy has run.
    return (lambda: all(e.query() for e in events) or not tensors), (lambda: order)


class Deferral:
    """The calls that wait for a device, oldest first, at most `MAX_PENDING`.

    Without a lock, as a signal handler may log while its own thread is in here: each step is one
    call of a dict, and of two threads that find a call ready, one gets it.
    """

    def __init__(self, begin: BeginCopy = begin_copy) -> None:
        self._begin = begin
        self._numbers = count()
        self._calls: dict[int, tuple[int, int, dict[str, Any], list[str], Any, Any]] = {}

    @property
    def pending(self) -> int:
        return len(self._calls)

    def add(self, step: int, wall_ns: int, good: dict[str, Any], waiting: dict[str, Any]) -> bool:
        """Queue the copies. False when too many wait already."""
        if len(self._calls) >= MAX_PENDING:
            return False
        ready, values = self._begin(list(waiting.values()))
        self._calls[next(self._numbers)] = (step, wall_ns, good, list(waiting), ready, values)
        return True

    def ready(self) -> Iterator[tuple[int, int, dict[str, Any], dict[str, str]]]:
        """(step, wall_ns, values, bad) of each call whose values are here; `bad` says why not."""
        for number, (step, wall_ns, good, keys, ready, values) in list(self._calls.items()):
            failure, hosts = "", []
            try:
                if not ready():
                    continue
                hosts = values()
            except Exception as error:  # the device has failed: its values will never come
                failure = str(error) or type(error).__name__
            if self._calls.pop(number, None) is None:
                continue
            result, bad = dict(good), dict.fromkeys(keys, failure) if failure else {}
            for key, host in () if failure else zip(keys, hosts, strict=True):
                try:
                    result[key] = scalar(host)
                except Exception as error:  # a device error surfaces here, in our thread
                    bad[key] = str(error) or type(error).__name__
            yield step, wall_ns, result, bad

    def drop(self) -> int:
        dropped = 0
        for number in list(self._calls):
            dropped += self._calls.pop(number, None) is not None
        return dropped
