"""Training is never hurt: the same steps with and without a log, whatever the gateway does.

Blocks of equal steps, each in processes of its own on one core; the gateway and all else are on the
others. A block that logs is paired with one beside it that does not, and all come in random order.
Gated are the client's processor time per step, `log()` in a loop, the time an exit takes and its
code. Wall time is reported only, and `log()` between steps, where what is cold is the interpreter:
beside it stands what a line of JSON takes there that is written to a file by hand.

Run: python -m tests.trials.overhead [--blocks N] [--ddp-blocks N] [--steps N] [--seed S]
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rank_client.run import FINISH_SECONDS
from tests.flow.job import Job, free_port

from . import trial
from .overhead_rank import FAILURE_CODE, WORKS

RANK = Path(__file__).with_name("overhead_rank.py")
CONDITIONS = ("gateway", "absent", "stopped", "black-holed", "disk full", "wrong key")
ENDS = {"finish": 0, "exit": 0, "raise": 1, "code": FAILURE_CODE}
WORLD = {"numpy": 1, "ddp": 2}  #: ranks of a block
TMPFS_BYTES = 8 << 20
HUNG_SECONDS = 120.0

CPU_SHARE = 0.005  #: of a step, for the client
LOG_P50_US, LOG_P999_US = 10.0, 100.0
RESAMPLES = 2000
ENOUGH_PAIRS = 4  #: fewer have no interval worth the name


@dataclass
class Block:
    """What one block of a condition was, its ranks' own figures, and how they ended:
    `exit_seconds` is from the script's last line to where the interpreter takes itself down."""

    condition: str
    end: str
    told: list[dict[str, Any]]
    codes: list[int]
    exit_seconds: float

    def mean(self, name: str) -> float:
        return statistics.fmean(float(t[name]) for t in self.told)


@dataclass
class Pair:
    """A block that logs and the one beside it that does not."""

    with_log: Block
    without: Block

    @property
    def exit_delay_seconds(self) -> float:
        return self.with_log.exit_seconds - self.without.exit_seconds

    def difference(self, name: str) -> float:
        return self.with_log.mean(name) - self.without.mean(name)


@dataclass
class Scene:
    """The machine and the places of one trial."""

    job: Job
    rank_core: int
    full: Path  #: the spool that is full
    mounted: bool  #: it is a small disk; else the ranks' files are limited
    port: int  #: where the gateway listens for keys
    nobody: int
    hole: int
    broken: list[str] = field(default_factory=list)

    def environ(self, condition: str) -> dict[str, str]:
        told = {"RANKGATE_RUN": condition.replace(" ", "-"), "OMP_NUM_THREADS": "1"}
        told |= {"OPENBLAS_NUM_THREADS": "1", "RANKGATE_SPOOL_CAP_MIB": "256"}
        if condition == "absent":
            told["RANKGATE_ADDR"] = f"tcp://127.0.0.1:{self.nobody}"
        elif condition == "black-holed":
            told["RANKGATE_ADDR"] = f"tcp://127.0.0.1:{self.hole}"
        elif condition == "wrong key":
            told["RANKGATE_ADDR"] = f"tcp://127.0.0.1:{self.port}"
            told["RANKGATE_SECRET"] = "ab" * 32
        elif condition == "disk full":
            told["RANKGATE_SPOOL"] = str(self.full)
        return told


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A tmpfs of TMPFS_BYTES; False where we may not mount one."""
    folder.mkdir()
    options = f"size={TMPFS_BYTES},mode=0700"
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    mounted = subprocess.run(words, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def black_hole() -> Iterator[int]:
    """The port of a listener that takes every connection and every byte, and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def swallow(peer: socket.socket) -> None:
            with peer:
                while peer.recv(1 << 16):
                    pass

        def accept() -> None:
            while True:
                try:
                    peer, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=swallow, args=(peer,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


@contextmanager
def scene(folder: Path) -> Iterator[Scene]:
    """One gateway for all, on every core but the ranks'."""
    cores = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        if len(cores) > 1:
            stack.callback(os.sched_setaffinity, 0, cores)
            os.sched_setaffinity(0, cores[:-1])
        mounted = stack.enter_context(small_disk(folder / "full"))
        hole = stack.enter_context(black_hole())
        job = stack.enter_context(Job(folder))
        port = free_port()
        job.serve("--bind", f"tcp://127.0.0.1:{port}")
        yield Scene(job, cores[-1], folder / "full", mounted, port, free_port(), hole)


def carry_out(at: Scene, kind: str, condition: str, end: str, amount: int, steps: int) -> Block:
    """One block: its ranks warm up, the trouble begins, the steps are measured, they end."""
    logs = "nothing" if condition == "no log" else "log"
    ranks = WORLD[kind]
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} if ranks > 1 else {}
    words = [sys.executable, str(RANK), str(at.rank_core), kind, str(amount), str(steps), logs, end]
    started = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        environ = {k: str(v) for k, v in place.items()} | meet | at.environ(condition)
        with (at.job.truth_dir / "ranks.log").open("a") as errors:
            started.append(
                subprocess.Popen(
                    words,
                    env={**at.job.environ, **environ},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
            )
    try:
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()
        with trouble(at, condition):
            return _measured(at, started, condition, end)
    finally:
        for process in started:
            process.kill()
            process.wait()


def _measured(at: Scene, started: list[subprocess.Popen[str]], condition: str, end: str) -> Block:
    go = "limit\n" if condition == "disk full" and not at.mounted else "go\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write(go)
        process.stdin.flush()
    told, exits = [], []
    for process in started:
        out, _ = process.communicate(timeout=HUNG_SECONDS)
        *_, figures, left_at = out.splitlines()
        told.append(json.loads(figures))
        exits.append(float(left_at) - told[-1]["ended_at"])
    return Block(condition, end, told, [p.returncode for p in started], max(exits))


@contextmanager
def trouble(at: Scene, condition: str) -> Iterator[None]:
    """What begins after the ranks' first steps, and is over when they have left."""
    if condition == "stopped":
        pids = at.job.gateway_pids()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
    elif condition == "disk full" and at.mounted:
        filler = at.full / "filler"
        with filler.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(1 << 16)):
                    pass
            except OSError:
                pass  # full
        try:
            yield
        finally:
            filler.unlink()
    else:
        yield


def pairs_of(at: Scene, kind: str, rounds: int, steps: int, rng: random.Random) -> list[Pair]:
    """Every condition once a round, beside a block without a log, in random order."""
    words = [sys.executable, str(RANK), str(at.rank_core), kind]
    environ = {**at.job.environ, **at.environ("no log")}
    out = subprocess.run(words, env=environ, capture_output=True, text=True, check=True).stdout
    amount = int(out.split()[0])
    found = []
    for _ in range(rounds):
        for condition in rng.sample(CONDITIONS, len(CONDITIONS)):
            end = rng.choice(list(ENDS))
            order = rng.sample((condition, "no log"), 2)
            blocks = {name: carry_out(at, kind, name, end, amount, steps) for name in order}
            found.append(Pair(blocks[condition], blocks["no log"]))
            sys.stderr.write(
                f"{kind}: {condition}, {end}: {blocks[condition].exit_seconds:.1f} s\n"
            )
    return found


# --- the figures ---------------------------------------------------------------------------------


def interval(differences: Sequence[float], rng: random.Random) -> list[float]:
    """[mean, low, high]: the mean and its 95 % bootstrap confidence interval."""
    means = sorted(
        statistics.fmean(rng.choices(differences, k=len(differences))) for _ in range(RESAMPLES)
    )
    low, high = means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES)]
    return [round(x, 1) for x in (statistics.fmean(differences), low, high)]


def quantiles_us(ns: Sequence[int]) -> dict[str, float]:
    ordered = sorted(ns)
    at = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}
    found = {name: ordered[int(len(ordered) * share)] for name, share in at.items()}
    return {k: round(v / 1000, 1) for k, v in {**found, "max": ordered[-1]}.items()}


def figures_of(pairs: Sequence[Pair], steps: int, rng: random.Random) -> trial.Figures:
    """Of one condition, per step. `own_us` is the processor time of the client's threads and of
    the calls, by the threads' clocks; `all_us` the paired difference of all of the rank's."""
    told = [t for pair in pairs for t in pair.with_log.told]

    def per_step(name: str, unit_ns: float) -> list[float]:
        return [pair.difference(name) / steps / unit_ns for pair in pairs]

    threads = [pair.with_log.mean("threads_ns") / steps / 1e3 for pair in pairs]
    own = [sum(both) for both in zip(threads, per_step("calls_ns", 1e3), strict=True)]
    return {
        "pairs": len(pairs),
        "step_ms": round(
            statistics.fmean(p.without.mean("wall_ns") for p in pairs) / steps / 1e6, 1
        ),
        "own_us": interval(own, rng),
        "of_which_threads_us": round(statistics.fmean(threads), 1),
        "all_us": interval(per_step("cpu_ns", 1e3), rng),
        "wall_ms": interval(per_step("wall_ns", 1e6), rng),
        "exit_delay_seconds": round(max(pair.exit_delay_seconds for pair in pairs), 2),
        "refused": sum(t["refused"] for t in told),
    }


def log_figures(pairs: Sequence[Pair]) -> trial.Figures:
    """How long the calls took, and what those above 100 µs met: how many of them, the longest."""
    told = [t for pair in pairs for t in pair.with_log.told]

    def all_of(name: str) -> list[Any]:
        return [x for t in told for x in t[name]]

    lines = [ns for pair in pairs for t in pair.without.told for ns in t["line_ns"]]
    return {
        "log_in_a_loop_us": quantiles_us(all_of("loop_ns")),
        "log_beside_a_step_us": quantiles_us(all_of("row_ns")),
        "json_line_beside_a_step_us": quantiles_us(lines),
        "first_call_us": round(max(t["first_ns"] for t in told) / 1000, 1),
        "slow_in_a_loop": _reasons(all_of("loop_slow")),
        "slow_beside_a_step": _reasons(all_of("slow")),
    }


def _reasons(slow: Sequence[tuple[int, str]]) -> dict[str, list[float]]:
    count = Counter(why for _, why in slow)
    longest = {why: max(ns for ns, w in slow if w == why) for why in count}
    return {why: [n, round(longest[why] / 1000, 1)] for why, n in count.most_common()}


# --- the promises --------------------------------------------------------------------------------


def broken_ends(pairs: Sequence[Pair]) -> list[str]:
    """Exits that came late, and codes that are not the script's own."""
    out = []
    for pair in pairs:
        block, want = pair.with_log, [ENDS[pair.with_log.end]] * len(pair.with_log.codes)
        if block.codes != want or pair.without.codes != want:
            codes = f"{block.codes} with a log, {pair.without.codes} without"
            out.append(f"{block.condition}, {block.end}: exit codes {codes}")
        if pair.exit_delay_seconds > FINISH_SECONDS:
            late = f"{pair.exit_delay_seconds:.2f} s longer"
            out.append(f"{block.condition}, {block.end}: the exit took {late}")
    return out


def broken_books(at: Scene, pairs: Sequence[Pair]) -> list[str]:
    """Once all is well again, everything that `log` returned for must be in the series."""
    # Named, as what was meant for another address stays for the gateway there.
    spools = [at.job.spool, *([at.full] if at.mounted else [])]
    commands = [("sweep", "--spool", str(spool)) for spool in spools]
    commands.append(("drain", "--seconds", "60"))
    out = []
    for command in commands:
        code, said, error = at.job.cli(*command)
        if code:
            out.append(f"{command[0]} ended with {code}: {said}{error}")
    for condition in {pair.with_log.condition for pair in pairs}:
        run = condition.replace(" ", "-")
        at.job.assert_accounted(run)
        with at.job.reader(run) as reader:
            streams = {s.index: s.id.hex() for s in reader.streams()}
            rows = Counter(streams[i] for i in reader.points("train/value0").stream.tolist())
            texts = Counter(streams[row[0]] for row in reader.texts() if row[4] == "info")
        for pair in (p for p in pairs if p.with_log.condition == condition):
            for told in pair.with_log.told:
                have = rows[told["stream"]] + texts[told["stream"]]
                if have + told["refused"] != told["rows"] + told["texts"]:
                    logged = told["rows"] + told["texts"]
                    out.append(f"{run}: {logged} calls, {have} there, {told['refused']} refused")
    return out


def broken_times(conditions: trial.Figures, log: trial.Figures | None) -> list[str]:
    """What a quiet machine must keep to: the client's own processor time as a share of a step, by
    the upper end of its interval, and the calls of all conditions together (`log` None: not where
    two ranks share a core, of which one preempts the other in its calls). The paired difference of
    all processor time sees more (the caches), but wanders by more than is allowed: it breaks the
    promise where its whole interval lies above."""
    gates: list[tuple[str, float, float]] = []
    if log:
        gates += [
            ("log() in a loop, p50", log["log_in_a_loop_us"]["p50"], LOG_P50_US),
            ("log() in a loop, p99.9", log["log_in_a_loop_us"]["p99.9"], LOG_P999_US),
        ]
    for name, found in conditions.items():
        allowed_us = CPU_SHARE * found["step_ms"] * 1e3
        gates.append((f"{name}: the client's own time per step", found["own_us"][2], allowed_us))
        if found["pairs"] >= ENOUGH_PAIRS:
            low = found["all_us"][1]
            gates.append((f"{name}: all time per step, at least", low, allowed_us))
    return [f"{what}: {us:g} µs, above {most:g}" for what, us, most in gates if us > most]


def attempt(
    folder: Path, seed: int, blocks: int, ddp_blocks: int, steps: int, gate_times: bool
) -> trial.Figures:
    """The whole trial; its figures by kind of work and condition, with `broken`."""
    rng = random.Random(seed)
    figures: trial.Figures = {"steps": steps, "unit": "[mean, low, high] of 95 %"}
    broken: list[str] = []
    with scene(folder) as at:
        everything = []
        for kind, rounds in zip(WORKS, (blocks, ddp_blocks), strict=True):
            if not rounds:
                continue
            pairs = pairs_of(at, kind, rounds, steps, rng)
            everything += pairs
            by_name = {
                name: figures_of([p for p in pairs if p.with_log.condition == name], steps, rng)
                for name in CONDITIONS
            }
            log = log_figures(pairs)
            broken += broken_ends(pairs)
            if gate_times:
                alone = log if WORLD[kind] == 1 else None
                broken += [f"{kind}: {b}" for b in broken_times(by_name, alone)]
            figures |= {kind: {"blocks": rounds, "all": log, **by_name}}
        broken += broken_books(at, everything)
    return {**figures, "broken": broken}


def main() -> int:
    parser = trial.parser(__doc__.split("\n")[0], 1800.0)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--ddp-blocks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args()

    def body(folder: Path) -> trial.Figures:
        sizes = (given.blocks, given.ddp_blocks, given.steps)
        return attempt(folder, given.seed, *sizes, gate_times=True)

    return trial.run("overhead", given.seed, body)


if __name__ == "__main__":
    sys.exit(main())
