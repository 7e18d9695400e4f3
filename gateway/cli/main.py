"""The command `rankgate`: registers its commands, makes a paragraph and a code of an error."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

from ..errors import RankgateError
from ..view.lines import console, wrapped
from ..view.words import clean

#: in the order of `rankgate --help`; one that is not installed is left out
COMMANDS = (
    "run", "serve", "status", "runs", "show", "tail", "query", "drain", "sweep", "replay", "sinks",
    "keys", "doctor",
)  # fmt: skip

INTERRUPTED = 130
PIPE_CLOSED = 141
OUR_FAULT = 70
OS_TROUBLE = 74

#: typer brings its own click in some versions; this is the base of its errors in each
_CommandError: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="rankgate",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="One loss-free log from every rank of a training job; this looks at it, serves it and "
    "carries it on.",
    epilog="RUN is an id, the start of one, a name such as digits-7f3a, or a run's folder.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        try:
            typer.echo(f"rankgate {version('rankgate')}")
        except PackageNotFoundError:
            typer.echo("rankgate (not installed)")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """What stands before a command."""


def _register() -> None:
    for name in COMMANDS:
        path = f"{__package__}.{name}"
        if importlib.util.find_spec(path) is None:
            continue
        module = importlib.import_module(path)
        if hasattr(module, "group"):
            app.add_typer(module.group, name=name)
            continue
        settings = getattr(module, "CONTEXT_SETTINGS", None)
        app.command(name, context_settings=settings)(module.command)


_register()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line and exit."""
    _open_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a C locale must not stop us
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def _open_streams() -> None:
    """A stream that whoever started us closed (`>&-`) is /dev/null: else the next file that is
    opened would take its number, and what others print into it."""
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            try:
                os.fstat(fd)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # takes the lowest number
            setattr(sys, name, os.fdopen(fd, mode, closefd=False))


def run(arguments: list[str]) -> int:
    """The exit code of a command line; errors are told on stderr."""
    try:
        code = app(arguments or ["--help"], prog_name="rankgate", standalone_mode=False)
        sys.stdout.flush()
    except RankgateError as error:
        _tell(error.text)
        return error.exit_code
    except _CommandError as error:
        return _usage(error)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        return _pipe_closed()
    except SystemExit as error:  # typer's own answer to a closed pipe
        if isinstance(error.__context__, BrokenPipeError):
            return _pipe_closed()
        return error.code if isinstance(error.code, int) else 1
    except OSError as error:
        _tell(f"{error.filename or 'An operation on a file failed'}: {error.strerror or error}.")
        return OS_TROUBLE
    except Exception as error:
        return _our_fault(error)
    return code if isinstance(code, int) else 0


def _usage(error: Any) -> int:
    """A command line that makes no sense: what, and where to read on."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "rankgate"
    text = str(error.format_message())
    _tell(f"{text if text.endswith(('.', '?')) else text + '.'} See: {command} --help")
    return int(error.exit_code)


def _pipe_closed() -> int:
    """Whoever read has seen enough; Python must not complain when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return PIPE_CLOSED


def _our_fault(error: Exception) -> int:
    if os.environ.get("RANKGATE_DEBUG"):
        traceback.print_exc()
    where = traceback.extract_tb(error.__traceback__)[-1]
    _tell(
        f"This should not happen: {type(error).__name__}: {error} ({where.name}, line "
        f"{where.lineno}). Nothing was changed. RANKGATE_DEBUG=1 shows where it comes from."
    )
    return OUR_FAULT


def _tell(text: str) -> None:
    """One paragraph on stderr."""
    out = console(to_stderr=True)
    for line in wrapped(clean(text), "rankgate: ", "  ", min(max(out.width, 40), 100)):
        out.print(line)


if __name__ == "__main__":
    main()
