"""What carries frames: it may drop, double, delay, reorder and cut them, and part the ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

Deliver = Callable[[bytes], None]


@dataclass
class Weather:
    """Chances per frame; `slow_seconds` is the most that a delayed one is late."""

    drop: float = 0.0
    double: float = 0.0
    cut: float = 0.0
    slow: float = 0.0
    slow_seconds: float = 3.0


CLEAR = Weather()


class Network:
    """`at(seconds, call, *arguments)` is the world's agenda."""

    def __init__(self, random: Random, at: Callable[..., None]) -> None:
        self.weather = CLEAR
        self.cut_off: set[object] = set()  #: ends that nothing reaches
        self.deaf: set[object] = set()  #: ends whose frames go out, but which hear nothing
        self._random = random
        self._at = at

    def send(self, frame: bytes, end: object, towards_gateway: bool, deliver: Deliver) -> None:
        """One frame between the gateway and the rank's end `end`."""
        random, weather = self._random.random, self.weather
        if end in self.cut_off or (end in self.deaf and not towards_gateway):
            return
        if weather is CLEAR:
            self._at(0.001 + 0.002 * random(), deliver, frame)
            return
        if random() < weather.drop:
            return
        if random() < weather.cut:
            frame = frame[: self._random.randint(0, len(frame))]
        for _ in range(2 if random() < weather.double else 1):
            late = weather.slow_seconds * random() if random() < weather.slow else 0.0
            self._at(0.001 + 0.01 * random() + late, deliver, frame)


class SimLink:
    """Implements `rank_client.link.Link` for a simulated process."""

    def __init__(
        self, network: Network, gateway: Callable[[bytes, SimLink, bytes], None], name: bytes
    ) -> None:
        self.name = name
        self.closed = False
        self._network = network
        self._gateway = gateway
        self._inbox: list[bytes] = []

    def send(self, frame: bytes) -> bool:
        if self in self._network.cut_off:
            return False  # nobody is connected: the caller keeps the frame
        arrive = lambda arrived: self._gateway(self.name, self, arrived)  # noqa: E731
        self._network.send(frame, self, True, arrive)
        return True

    def arrive(self, frame: bytes) -> None:
        if not self.closed:
            self._inbox.append(frame)

    def receive(self) -> list[bytes]:
        got, self._inbox = self._inbox, []
        return got

    def close(self) -> None:
        self.closed = True
