"""`rankgate run`: a gateway beside a command. The command's exit code and signals are its own."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Annotated

import typer

from rank_client import sweep
from rank_client.spool import spool_root
from rank_client.tool import tell_exit

from .. import attach
from ..config import Config
from ..errors import RankgateError
from ..supervise import read_json
from ..view.queries import shown
from ..view.summary import summary_lines
from .options import DEFAULT_DIR, ConfigFile, Dir, Sinks, settings_of

#: what follows the command's name is its own, with or without `--` before it
CONTEXT_SETTINGS = {"allow_interspersed_args": False}
PROGRESS_SECONDS = 5.0
SETTLE_SECONDS = 10.0
FROM_TERMINAL = 0x80  #: si_code SI_KERNEL: the terminal sent it to the whole group, us included
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1,
             signal.SIGUSR2)  # fmt: skip


def say(text: str) -> None:
    """To stderr: stdout is the command's."""
    sys.stderr.write(f"rankgate: {text}\n")
    sys.stderr.flush()


def command(
    words: Annotated[
        list[str], typer.Argument(metavar="-- COMMAND…", help="What to run, as you would type it.")
    ],
    directory: Dir = DEFAULT_DIR,
    config: ConfigFile = None,
    sink: Sinks = None,
    run: Annotated[
        str | None, typer.Option(envvar="RANKGATE_RUN", help="Run id; a new one by default.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Only the summary.")] = False,
) -> None:
    """Run a training command with a gateway beside it.

    Starts a gateway for the data directory (or uses the one that is there), runs the command,
    waits until its runs are delivered, prints a summary, and exits with the command's own code.
    When the gateway cannot start, the command runs all the same and its logs wait in the spool.

    \b
    Examples:
      rankgate run -- torchrun --standalone --nproc-per-node 4 train.py
      rankgate run --sink clearml --sink neptune=offline -- python train.py
    """
    root = directory.absolute()
    launch = Launch(root, run or secrets.token_hex(4), secrets.token_hex(8), quiet)
    with attach.hold(root):
        settings = launch.prepare(config, tuple(sink or ()))
        code = launch.go(words)
        if settings is not None and not launch.joined:
            launch.finish(code, settings)
    raise typer.Exit(code)


class Launch:
    """One `rankgate run`: its ids, its gateway, its command."""

    def __init__(self, root: Path, run: str, launch: str, quiet: bool) -> None:
        self.root = root
        self.run = run
        self.launch = launch
        self.quiet = quiet
        self.joined = bool(os.environ.get("RANKGATE_ADDR"))
        self.environ = {
            **os.environ,
            "RANKGATE_DIR": str(root),
            "RANKGATE_RUN": run,
            "RANKGATE_LAUNCH": launch,
        }
        self._told_at = time.monotonic()
        self._warned = False
        self._stored: dict[str, int] = {}

    # --- before --------------------------------------------------------------

    def prepare(self, config: Path | None, sinks: tuple[str, ...]) -> Config | None:
        """Start a gateway; None (said loudly) when there cannot be one. Training goes on."""
        try:
            settings = settings_of(self.root, config, sinks)
            if not self.joined:
                attach.ensure(
                    self.root, self.environ, str(config.absolute()) if config else "", sinks
                )
        except (RankgateError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            say(f"NO GATEWAY: {reason}")
            say("the command runs all the same; its logs wait in the spool for: rankgate drain")
            return None
        if sinks:  # for whoever has to start the gateway again
            self.environ["RANKGATE_SINKS"] = ",".join(sinks)
        if config:
            self.environ["RANKGATE_CONFIG"] = str(config.absolute())
        if not self.quiet:
            say(f"run {self.run}, data in {self.root}")
        return settings

    # --- the command ---------------------------------------------------------

    def go(self, words: list[str]) -> int:
        """Run the command, pass signals on, and give its exit code (128 + n for signal n)."""
        try:
            process = subprocess.Popen(words, env=self.environ)
        except OSError as error:
            say(f"cannot run {words[0]}: {error.strerror}")
            return 127 if isinstance(error, FileNotFoundError) else 126
        # Blocked only now, so that the command starts with the mask it would have without us.
        signal.pthread_sigmask(signal.SIG_BLOCK, {*PASSED_ON, signal.SIGCHLD})
        while process.poll() is None:
            got = signal.sigtimedwait({*PASSED_ON, signal.SIGCHLD}, 0.25)
            if got is not None and _for_the_command(got):
                process.send_signal(got.si_signo)
            self._tell()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*PASSED_ON, signal.SIGCHLD})
        return process.returncode if process.returncode >= 0 else 128 - process.returncode

    def _tell(self) -> None:
        """A line of progress now and then; once, loudly, when the gateway did not come up."""
        now = time.monotonic()
        if now - self._told_at < PROGRESS_SECONDS:
            return
        self._told_at = now
        if self.joined:
            return
        if not attach.served(self.root):
            self._start_again()
            if not self._warned:
                self._warned = True
                say("NO GATEWAY ANSWERS; training goes on, its logs wait in the spool. Last words:")
                say(attach.last_lines(self.root / "gateway.log"))
            return
        if not self.quiet:
            self._tell_progress()

    def _start_again(self) -> None:
        """In a thread: whoever starts a gateway waits until it has the directory's lock."""

        def start() -> None:
            try:
                attach.ensure(self.root, self.environ)
            except OSError:
                pass  # said when the command has ended

        threading.Thread(target=start, daemon=True).start()

    def _tell_progress(self) -> None:
        live = read_json(self.root / "runs" / self.run / "live.json")
        streams = [s for s in live.get("streams", ()) if s["kind"] == "live" and not s["ended"]]
        if streams:
            step = max(s.get("step") or 0 for s in streams)
            self._stored |= {s["stream"]: s["durable"] for s in live["streams"]}
            stored = sum(self._stored.values())  # of those that have ended, too
            silent = sum(s["silent"] for s in streams)
            ranks = len(streams) - silent
            alive = f"{ranks} rank{'s' * (ranks != 1)} live"
            at = f"  step {step:,}" if step >= 0 else ""
            say(f"{alive}{at}  {stored:,} records stored")

    # --- after ---------------------------------------------------------------

    def finish(self, code: int, settings: Config) -> None:
        """Ship what dead ranks left, tell the runs how the command ended, wait for the sinks."""
        try:
            attach.ensure(self.root, self.environ)
            if not attach.wait_served(self.root):
                say("no gateway answers; everything is safe in the spool. Later: rankgate drain")
                return
            runs = self._settle()
            for run in runs:
                tell_exit(
                    run, self.launch, code, attach.address(self.root), self.root, self.environ, 10.0
                )
            if not runs:
                say("the command logged nothing through rankgate")
                return
            for name in settings.sinks.keys() - attach.sinks_of(self.root).keys():
                say(f"the gateway that was here already has no sink {name}; deliver with: "
                    f"rankgate replay {runs[0]} --to {name}")  # fmt: skip
            self._wait(runs, settings)
            for run in runs:
                seen = shown(self.root / "runs" / run, time.time_ns(), spool_root(self.environ))
                sys.stderr.write("\n".join(summary_lines(seen)) + "\n")
        except KeyboardInterrupt:
            say("not waiting any longer; nothing is lost, the gateway goes on by itself")
        except Exception as error:  # the command's exit code is its own, whatever goes wrong here
            say(f"cannot finish: {error}; nothing is lost. Later: rankgate drain")

    def _settle(self) -> list[str]:
        """The runs of this launch, once all that its processes left in the spool is shipped."""
        spool, deadline = spool_root(self.environ), time.monotonic() + SETTLE_SECONDS
        attach.wait_fresh(self.root)
        while True:
            orphans = sweep.find(spool, self.root, lambda run: run in attach.journals(self.root))
            time.sleep(0.05)
            behind = [
                r for r in attach.journals(self.root)
                if not attach.progress(self.root, r).projected
            ]  # fmt: skip
            if (not orphans and not behind) or time.monotonic() > deadline:
                return attach.runs_of_launch(self.root, self.launch)

    def _wait(self, runs: list[str], settings: Config) -> None:
        told = [time.monotonic()]

        def tell(states: list[attach.Progress]) -> None:
            if time.monotonic() - told[0] > PROGRESS_SECONDS and not self.quiet:
                told[0] = time.monotonic()
                for state in states:
                    if state.waiting:
                        say(f"run {state.run}: waiting for {', '.join(state.waiting)}")

        seconds = settings.gateway.drain_seconds
        if not attach.wait_done(self.root, lambda: runs, seconds, tell):
            say("some sinks are not done; the gateway goes on. Look: rankgate status")


def _for_the_command(got: signal.struct_siginfo) -> bool:
    """What a terminal sends (Ctrl-C, say) reaches the command by itself; passing it on would
    make it two."""
    return got.si_signo != signal.SIGCHLD and got.si_code != FROM_TERMINAL
