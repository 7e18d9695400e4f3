"""The view: a run for people. Reads series.db, sinks/*.db and the small files that ingest leaves;
writes nothing, ever, so that any number of viewers may look at a run, live or copied.

`finding.py` finds a run by what it is called, `points.py` selects and reduces points. `queries.py`
says how a run stands, with its books (`accounting.py`), `sinks.py`, `problems.py` and, in
`shown.py`, its keys and files; `serving.py` says how a gateway stands. These frozen values are what
`terminal.py`, `summary.py`, `export.py` and `--json` show. From Python:
`gateway.view.open(run_or_path)`.
"""

from .access import Run, open  # noqa: A004 - read as gateway.view.open

__all__ = ["Run", "open"]
