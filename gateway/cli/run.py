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

from rank_client import orphans, sweep
from rank_client.identity import safe_run_id
from rank_client.integrations.ultralytics_hook import SWITCH, hooked
from rank_client.spool_place import spool_root
from rank_client.tool import tell_exit
from rank_client.wire.keys import key_of

from .. import app, attach
from ..config import Config, with_gateway
from ..errors import RankgateError
from ..nodes import Nodes, nodes_of
from ..supervise import read_json
from ..view.shown import shown
from ..view.summary import summary_lines
from ..view.typed import typed
from .options import DEFAULT_DIR, ConfigFile, Dir, Sinks, replay_lines, settings_of

#: what follows the command's name is its own, with or without `--` before it
CONTEXT_SETTINGS = {"allow_interspersed_args": False}
PROGRESS_SECONDS = 5.0
SETTLE_SECONDS = 10.0
NODES_SETTLE_SECONDS = 60.0  #: other nodes may be cut off for a while when this one has ended
JOIN_SECONDS = 15.0
LEAVE_SECONDS = 60.0
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
    bind: Annotated[
        str | None,
        typer.Option(help='Where other nodes reach the gateway; "tcp://ADDRESS:PORT".'),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Only the summary.")] = False,
    ultralytics: Annotated[
        bool,
        typer.Option(
            "--ultralytics",
            envvar=SWITCH,
            help="Log the command's Ultralytics trainings, in every rank; no change of its code.",
        ),
    ] = False,
) -> None:
    """Run a training command with a gateway beside it.

    Starts a gateway for the data directory (or uses the one that is there), runs the command,
    waits until its runs are delivered, prints a summary, and exits with the command's own code.
    When the gateway cannot start, the command runs all the same and its logs wait in the spool.
    With several nodes (--nnodes, Slurm), the head's gateway also listens on their network, with
    encryption, and prints what to type on the others.

    \b
    Examples:
      rankgate run -- torchrun --standalone --nproc-per-node 4 train.py
      rankgate run --sink clearml --sink neptune=offline -- python train.py
      rankgate run --ultralytics -- yolo train model=yolo11n.yaml device=0,1
    """
    root = directory.absolute()
    launch = Launch(root, nodes_of(words, os.environ), run, quiet)
    if ultralytics:
        launch.environ = hooked(launch.environ)
    with attach.hold(root):
        settings = launch.prepare(config, tuple(sink or ()), bind)
        code = launch.go(words)
        if launch.joined:
            launch.leave()
        elif settings is not None:
            launch.finish(code, settings)
    raise typer.Exit(code)


class Launch:
    """One `rankgate run`: its ids, its gateway, its command."""

    def __init__(self, root: Path, nodes: Nodes, run: str | None, quiet: bool) -> None:
        self.root = root
        self.nodes = nodes
        self.joined = bool(os.environ.get("RANKGATE_ADDR")) or not nodes.head
        given = os.environ.get("RANKGATE_LAUNCH") if self.joined else None
        self.named = bool(run or nodes.run)  #: so that all nodes mean the same run
        self.run = safe_run_id(run or nodes.run or secrets.token_hex(4))
        self.launch = given or nodes.launch or secrets.token_hex(8)
        self.quiet = quiet
        self.environ = {
            **os.environ,
            "RANKGATE_DIR": str(root),
            "RANKGATE_RUN": self.run,
            "RANKGATE_LAUNCH": self.launch,
        }
        if keyfile := os.environ.get("RANKGATE_KEYFILE"):
            self.environ["RANKGATE_KEYFILE"] = str(Path(keyfile).absolute())
        self.bind = ""  #: where the gateway listens for other nodes
        self._told_at = self._answered_at = time.monotonic()
        self._warned = False
        self._drain = typed(root, "drain")  #: what to type when all else is over
        self._stored: dict[str, int] = {}

    # --- before --------------------------------------------------------------

    def prepare(
        self, config: Path | None, sinks: tuple[str, ...], bind: str | None
    ) -> Config | None:
        """Start a gateway; None (said loudly) when there cannot be one. Training goes on."""
        # For whoever has to start the gateway again: not with other settings than we were given.
        given = str(config.absolute()) if config else ""
        self.environ |= {"RANKGATE_CONFIG": given} if given else {}
        self.environ |= {"RANKGATE_SINKS": ",".join(sinks)} if sinks else {}
        self._drain = typed(self.root, "drain", config=given, sinks=sinks)
        try:
            settings = settings_of(self.root, config, sinks)
            if bind:
                settings = with_gateway(settings, bind=bind)
            if self.joined:
                self._join()
            else:
                self._serve(settings, given, sinks)
        except (RankgateError, OSError) as error:
            reason = _reason(self.root, error) if isinstance(error, OSError) else error
            say(f"NO GATEWAY: {reason}")
            say(f"the command runs all the same; its logs wait in the spool for: {self._drain}")
            return None
        if not self.quiet:
            say(f"run {self.run}, data in {self.root}")
        return settings

    def _serve(self, settings: Config, config: str, sinks: tuple[str, ...]) -> None:
        """A gateway for this node, and where there are others for them. Raises RankgateError."""
        bind = settings.gateway.bind
        if self.nodes.several and bind == "ipc":
            bind = "tcp"
        if not attach.runs(self.root):
            app.make_data_dir(self.root)
        if bind == "ipc":
            attach.ensure(self.root, self.environ, config, sinks)
            return
        if not attach.runs(self.root):
            where = app.addresses(self.root, bind, False, self.nodes.rendezvous)
            guard = app.guard_of(self.root, settings, where, False, self.environ)
            self.bind = where[1]
            attach.ensure(self.root, self.environ, config, sinks, self.bind)
            self._tell_others(self.bind, guard)
        elif address := attach.network_address(self.root):
            self._tell_others(address, self._known_guard() or "KEYFILE")
        else:
            say(f"OTHER NODES CANNOT REACH the gateway that serves {self.root} already: it listens "
                "on this node only. Their logs wait in their spools. Stop it "
                f"({typed(self.root, 'status')} names its pid) or give another --dir, and start "
                "again")  # fmt: skip

    def _known_guard(self) -> str:
        """Of a gateway that we did not start: the key is the environment's, or lies beside it."""
        own = self.root / app.KEYFILE
        if keyfile := self.environ.get("RANKGATE_KEYFILE"):
            return keyfile
        if self.environ.get("RANKGATE_SECRET"):
            return app.ENVIRONMENT
        return str(own) if own.exists() else ""

    def _tell_others(self, address: str, guard: str) -> None:
        """The one line for the other nodes, or the variables for a command that goes there."""
        if not self.nodes.several:
            return
        if self.nodes.spreads:
            self._hand_over(address, guard)
            return
        key = "RANKGATE_SECRET=…" if guard == app.ENVIRONMENT else f"RANKGATE_KEYFILE={guard}"
        say(f"on each other node (with a copy of the keyfile, mode 0600):\n"
            f"  RANKGATE_ADDR={address} {key} RANKGATE_RUN={self.run} "
            f"RANKGATE_LAUNCH={self.launch} rankgate run -- …")  # fmt: skip

    def _hand_over(self, address: str, guard: str) -> None:
        """What the command's ranks need for a gateway on another node."""
        self.environ["RANKGATE_ADDR"] = address
        if Path(guard).is_absolute():
            self.environ["RANKGATE_KEYFILE"] = guard

    def _join(self) -> None:
        """The head's gateway is the one: by RANKGATE_ADDR, or by a data directory both see."""
        if self.environ.get("RANKGATE_ADDR"):
            return
        say(f"not the head node; looking for its gateway in {self.root}")
        address = attach.wait_network_address(self.root, JOIN_SECONDS)
        if not address:
            say("NO GATEWAY of the head node is to be seen here; the command runs, its logs wait "
                "in the spool. Set what the head's rankgate run prints: RANKGATE_ADDR, "
                "RANKGATE_KEYFILE, RANKGATE_RUN, RANKGATE_LAUNCH")  # fmt: skip
            return
        self._hand_over(address, self._known_guard())
        if not self.named:
            say(f"this node's ranks are run {self.run} of their own; to have one run for all "
                "nodes, set RANKGATE_RUN and RANKGATE_LAUNCH as the head prints them")  # fmt: skip

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
            if not self._warned and now - self._answered_at > attach.START_SECONDS:
                self._warned = True
                words = attach.last_lines(self.root / "gateway.log")
                last = f" Last words:\n{words}" if words else ""
                say(f"NO GATEWAY ANSWERS; training goes on, its logs wait in the spool.{last}")
            return
        self._answered_at = now
        if not self.quiet:
            self._tell_progress()

    def _start_again(self) -> None:
        """In a thread: whoever starts a gateway waits until it has the directory's lock."""

        def start() -> None:
            try:
                attach.ensure(self.root, self.environ, bind=self.bind)
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
            attach.ensure(self.root, self.environ, bind=self.bind)
            if not attach.wait_served(self.root):
                say(f"no gateway answers; everything is safe in the spool. Later: {self._drain}")
                return
            runs = self._settle()
            for run in runs:
                tell_exit(
                    run, self.launch, code, attach.address(self.root), self.root, self.environ, 10.0
                )
            if not runs:
                say("the command logged nothing through rankgate")
                return
            config = self.environ.get("RANKGATE_CONFIG", "")
            for line in replay_lines(self.root, settings, config, runs):
                say(f"the gateway that was here does not have this sink. To deliver: {line}")
            attach.wait_fresh(self.root)  # else the end we told may not count as to be projected
            self._wait(runs, settings)
            for run in runs:
                seen = shown(self.root / "runs" / run, time.time_ns(), spool_root(self.environ))
                sys.stderr.write("\n".join(summary_lines(seen)) + "\n")
        except KeyboardInterrupt:
            say("not waiting any longer; nothing is lost, the gateway goes on by itself")
        except Exception as error:  # the command's exit code is its own, whatever goes wrong here
            say(f"cannot finish: {error}; nothing is lost. Later: {self._drain}")

    def _settle(self) -> list[str]:
        """The runs of this launch, once all that its processes left in the spool is shipped; those
        that time was too short for, too."""
        spool = spool_root(self.environ)
        patience = NODES_SETTLE_SECONDS if self.nodes.several else SETTLE_SECONDS
        deadline = time.monotonic() + patience
        told = False  #: has ingest told its state since the last of it was shipped?
        while True:
            waiting = orphans.find(spool, self.root, lambda run: run in attach.journals(self.root))
            if waiting:
                told = False
            elif not told:
                told = attach.wait_fresh(self.root, max(0.0, deadline - time.monotonic()))
            time.sleep(0.05)
            behind = [
                r for r in attach.journals(self.root)
                if not attach.progress(self.root, r).projected
            ]  # fmt: skip
            afar = self.nodes.several and read_json(self.root / "ingest.json").get("streams")
            settled = told and not (waiting or behind or afar)
            if settled or time.monotonic() > deadline:
                stored = attach.runs_of_launch(self.root, self.launch)
                return sorted({*stored, *attach.spooled_runs(self.root, self.launch, spool)})

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
            look = typed(self.root, "status")
            say(f"some sinks are not done; the gateway goes on. Look: {look}")

    def leave(self) -> None:
        """On a node that joined: ship what its dead ranks left, as no gateway sees this spool."""
        address = self.environ.get("RANKGATE_ADDR", "")
        if not address.startswith("tcp://"):
            return
        spool, deadline = spool_root(self.environ), time.monotonic() + LEAVE_SECONDS
        try:
            key = key_of(self.environ)
            while left := orphans.find(spool, self.root, lambda run: run == self.run):
                for orphan in left:
                    sweep.ship(orphan, address, max(0.0, deadline - time.monotonic()), key)
                if time.monotonic() > deadline:
                    say(f"{len(left)} streams are still in {spool}: the gateway did not take "
                        "them in time. Nothing is lost; with the same key, on this node: "
                        f"rankgate sweep --address {address}")  # fmt: skip
                    return
        except KeyboardInterrupt:
            say(f"not waiting any longer; nothing is lost, the rest stays in {spool}")
        except Exception as error:  # the command's exit code is its own, whatever goes wrong here
            say(f"cannot ship what is left in {spool}: {error}; nothing is lost")


def _for_the_command(got: signal.struct_siginfo) -> bool:
    """What a terminal sends (Ctrl-C, say) reaches the command by itself; passing it on would
    make it two."""
    return got.si_signo != signal.SIGCHLD and got.si_code != FROM_TERMINAL


def _reason(root: Path, error: OSError) -> str:
    return f"cannot start one for {root}: {error.filename or 'the system'}: {error.strerror}"
