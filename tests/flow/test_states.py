"""A hang, a held GIL, a stopped process, a dead one and a slow one, in one real run: what the view
says of each from second to second, while rank 0 goes on."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from gateway.attach import served
from gateway.view.queries import RankView, RunView, run_view

from .job import Job, wait_until

GOES_ON, HANGS, KEEPS_GIL, STOPPED, KILLED, SLOW = range(6)
RANKS = 6
QUICK_STEPS = 40  #: after these the two that hang do
SLOW_SECONDS = 4.0
SLOW_STEPS = 5
SHOWN_SECONDS = 15.0  #: so soon a hang is to be seen
SLACK_SECONDS = 3.0  #: two cores, six ranks, other tests


class Story:
    """What happened to six ranks, and every look at them. The gateway has another spool, so that
    it does not adopt the killed one by itself."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.looks: list[tuple[float, RunView]] = []
        elsewhere = f"{job.spool}-of-gateway"
        job.start(sys.executable, "-m", "gateway", "serve", RANKGATE_SPOOL=elsewhere)
        wait_until(lambda: served(job.data), what="the gateway answers")
        many = 10_000
        self.processes = [
            job.rank(GOES_ON, RANKS, many, "finish", 0.05),
            job.rank(HANGS, RANKS, QUICK_STEPS, "hang", 0.05),
            job.rank(KEEPS_GIL, RANKS, QUICK_STEPS, "gil", 0.05),
            job.rank(STOPPED, RANKS, many, "finish", 0.05),
            job.rank(KILLED, RANKS, many, "finish", 0.05),
            job.rank(SLOW, RANKS, many, "finish", SLOW_SECONDS),
        ]
        for rank in (HANGS, KEEPS_GIL):
            wait_until((job.truth_dir / f"{rank}.ready").exists, what=f"rank {rank} hangs")
        self.since = time.monotonic()  #: the faults: at most some ms after the hangs
        self.processes[STOPPED].send_signal(signal.SIGSTOP)
        self.processes[KILLED].kill()
        self.watch(self._all_shown, 45, "every fault is shown")
        _, self.status, _ = job.cli("status")
        _, self.swept, _ = job.cli("sweep")
        self.watch(lambda ranks: ranks[KILLED].state == "dead", 20, "the killed rank is dead")
        self.processes[STOPPED].send_signal(signal.SIGCONT)
        self.watch(lambda ranks: ranks[STOPPED].state == "live", 20, "the stopped rank is live")
        for process in self.processes:
            process.kill()
            process.wait(20)
        job.cli("sweep")
        job.drain()

    def watch(
        self, condition: Callable[[tuple[RankView, ...]], bool], seconds: float, what: str
    ) -> None:
        """Look twice a second until it is so."""

        def look() -> bool:
            time.sleep(0.5)
            view = run_view(self.job.data / "runs" / "r1", time.time_ns(), self.job.spool)
            self.looks.append((time.monotonic() - self.since, view))
            return condition(view.ranks)

        try:
            wait_until(look, seconds, what)
        except AssertionError as error:
            raise AssertionError(f"{error}; now {self.looks[-1][1].ranks}") from None

    def _all_shown(self, ranks: tuple[RankView, ...]) -> bool:
        states = [r.state for r in ranks]
        shown = ["live", "stuck", "silent", "silent", "gone", "live"]
        return states == shown and ranks[SLOW].step >= SLOW_STEPS

    def first(self, rank: int, state: str) -> tuple[float, RankView, str]:
        """When it was first shown so: (seconds since the faults, the rank, its problem)."""
        for seconds, view in self.looks:
            if view.ranks[rank].state == state:
                told = [p.text for p in view.problems if p.rank == rank and p.kind == state]
                return seconds, view.ranks[rank], " ".join(told)
        raise AssertionError(f"rank {rank} was never {state}")

    def states(self, rank: int) -> list[str]:
        """One after the other, each once."""
        seen = (view.ranks[rank].state for _, view in self.looks)
        # `unknown` claims nothing: a busy machine's gateway has not told anything for 3 s.
        return list(dict.fromkeys(state for state in seen if state != "unknown"))


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    with Job(tmp_path_factory.mktemp("states")) as job:
        yield Story(job)


def test_a_hang_is_shown_with_rank_and_step(story: Story) -> None:
    """A rank that hangs, and whose pings go on, is stuck at its step within 15 s, not silent."""
    seconds, rank, text = story.first(HANGS, "stuck")
    assert seconds < SHOWN_SECONDS + SLACK_SECONDS
    assert rank.step == QUICK_STEPS - 1
    assert text.startswith(f"rank {HANGS} ") and text.endswith("others go on")
    assert f"stuck at step {QUICK_STEPS - 1} for " in text
    assert story.states(HANGS) == ["live", "stuck"]
    assert f"stuck at step {QUICK_STEPS - 1} for " in " ".join(story.status.split())


@pytest.mark.parametrize("number", [KEEPS_GIL, STOPPED])
def test_a_rank_that_cannot_speak_is_silent_and_connected(story: Story, number: int) -> None:
    """A C call that keeps the GIL, or SIGSTOP: no pings, but a connection, so it is not gone."""
    _, rank, text = story.first(number, "silent")
    assert rank.connected
    assert text.startswith(f"rank {number} ") and ", still connected: " in text
    assert story.states(number)[:2] == ["live", "silent"]
    assert "gone" not in story.states(number)


def test_a_killed_rank_is_gone(story: Story) -> None:
    """Its connection tells before three pings are missed; it was never silent or stuck."""
    seconds, _, text = story.first(KILLED, "gone")
    assert seconds < SHOWN_SECONDS
    assert text.startswith(f"rank {KILLED} ") and "not connected any more" in text
    assert story.states(KILLED)[:2] == ["live", "gone"]


def test_slow_but_regular_is_never_stuck(story: Story) -> None:
    """A rank that logs every 4 s was live at every look, for five of its steps."""
    assert story.states(SLOW) == ["live"]
    assert story.looks[-1][1].ranks[SLOW].step >= SLOW_STEPS


def test_the_one_that_goes_on_is_live(story: Story) -> None:
    """What became of the others is no problem of its own."""
    assert story.states(GOES_ON) == ["live"]
    assert all(p.rank != GOES_ON for _, view in story.looks for p in view.problems)


def test_what_the_killed_rank_left_is_adopted(story: Story) -> None:
    """Once its spool is shipped the rank is dead, and nothing of it is missing."""
    _, rank, _ = story.first(KILLED, "dead")
    assert story.swept.startswith(f"run r1, rank {KILLED}: ")
    assert rank.accounting.on_the_way == rank.accounting.lost == 0


def test_the_stopped_rank_is_live_again(story: Story) -> None:
    """When it goes on, so does what is said of it; it may answer before it logs again, and is
    stuck until then."""
    assert [s for s in story.states(STOPPED) if s != "stuck"] == ["live", "silent"]
    assert story.looks[-1][1].ranks[STOPPED].state == "live"


def test_all_that_was_logged_is_there_once(story: Story) -> None:
    """Probing connections moved no record: all ranks were killed in the end, and the sums hold."""
    points_of_a_call = 4
    story.job.assert_all_there(extra_allowed=points_of_a_call * RANKS)
