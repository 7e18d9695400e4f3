"""`python -m gateway`: a child process of the gateway by name, else the command line."""

from __future__ import annotations

import sys

INTERRUPTED = 130


def main() -> None:
    """The process's whole life; Ctrl-C is quiet while the modules are still being imported, too."""
    try:
        from . import app

        if len(sys.argv) > 1 and sys.argv[1] in app.CHILDREN:
            app.main()
        else:
            from .cli.main import main as command_line

            command_line()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
