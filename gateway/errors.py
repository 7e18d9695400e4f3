"""What goes wrong for a person at the terminal. Each says in one paragraph what happened and what
to do; the command line prints it on stderr and exits with the code.

    RankgateError        1
    ├── AmbiguousRun    64   a prefix or name that stands for several runs
    ├── Damaged         65   a file that is not what it should be
    ├── UnknownRun      66   no run of that id, name or path
    ├── NotServed       69   needs a gateway, or what one makes, and there is none
    ├── Busy            75   somebody else holds it now; the same command works later
    └── BadConfig       78   a setting, file or argument that cannot be right
"""

from __future__ import annotations


class RankgateError(Exception):
    """The base: `text` is one paragraph for people, `exit_code` the process's."""

    exit_code = 1

    def __init__(self, text: str, exit_code: int | None = None) -> None:
        super().__init__(text)
        self.text = text
        if exit_code is not None:
            self.exit_code = exit_code


class AmbiguousRun(RankgateError):
    """A prefix or name that stands for several runs."""

    exit_code = 64


class Damaged(RankgateError):
    """A file that is not what it should be."""

    exit_code = 65


class UnknownRun(RankgateError):
    """No run of that id, name or path."""

    exit_code = 66


class NotServed(RankgateError):
    """Needs a gateway, or what one makes, and there is none."""

    exit_code = 69


class Busy(RankgateError):
    """Somebody else holds it now; the same command works later."""

    exit_code = 75


class BadConfig(RankgateError):
    """A setting, file or argument that cannot be right."""

    exit_code = 78
