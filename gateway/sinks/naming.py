"""How a key is called in each backend: the one place for it, as data in and text out.

Rank -1 and 0 keep the user's names; other ranks are told apart. The table in docs/sinks.md is
held to these functions by a test.
"""

from __future__ import annotations


def neptune_path(key: str, rank: int) -> str:
    """`a/b/c` as it is; of rank 3 `ranks/3/a/b/c`."""
    return key if rank <= 0 else f"ranks/{rank}/{key}"


def clearml_title_series(key: str, rank: int) -> tuple[str, str]:
    """Title `a`, series `b/c`; without a slash both are the key.

    The server joins task, iteration, title and series with `-` into an event's id, so a `-` in a
    title could make two series one: it becomes `_`.
    """
    title, slash, series = key.partition("/")
    if not slash or not series or not title:
        title = series = key
    return title.replace("-", "_"), clearml_series(series, rank)


def clearml_series(series: str, rank: int) -> str:
    return series if rank <= 0 else f"{series} (rank {rank})"


def clearml_section(rank: int) -> str:
    """The hyperparameter section of a rank's params."""
    return "General" if rank <= 0 else f"Rank {rank}"


def rank_prefix(rank: int) -> str:
    """What stands before a text line of a rank that shares one console with others."""
    return "" if rank <= 0 else f"[rank {rank}] "
