"""The thread that works on files, so that the thread that acknowledges records never waits."""

from __future__ import annotations

import queue
import socket
import threading

from .media import Job

LEAVE_SECONDS = 5.0  #: for what is under way; what is not written then is sent again


class Worker(threading.Thread):
    """Runs jobs in the order they are given. `wake` becomes readable when some are done."""

    def __init__(self) -> None:
        super().__init__(name="rankgate-files", daemon=True)
        self.wake, self._tell = socket.socketpair()
        self.wake.setblocking(False)
        self._tell.setblocking(False)
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Job] = queue.SimpleQueue()

    def put(self, job: Job) -> None:
        self._jobs.put(job)

    def run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.run()
            self._done.put(job)
            try:
                self._tell.send(b"1")
            except BlockingIOError:
                pass  # it has many bytes to wake up for already

    def done(self) -> list[Job]:
        """What was carried out since this was last asked."""
        try:
            while self.wake.recv(4096):
                pass
        except BlockingIOError:
            pass
        out: list[Job] = []
        while not self._done.empty():
            out.append(self._done.get())
        return out

    def close(self) -> None:
        """Let the thread end after what it was given."""
        self._jobs.put(None)
        self.join(LEAVE_SECONDS)
        if not self.is_alive():
            self.wake.close()
            self._tell.close()
