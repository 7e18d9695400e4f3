"""Answers of a query as table, CSV, JSON or Parquet, and any frozen value as JSON.

The columns are fixed: key, rank, reduction, attempt, step, time_ns, value. Rank is empty for a
reduced value, reduction for a raw one; nan, inf and whole numbers are exact.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from ..errors import BadConfig
from .points import Answer
from .words import clean, clock, count, number

COLUMNS = ("key", "rank", "reduction", "attempt", "step", "time_ns", "value")
FORMATS = ("table", "csv", "json", "parquet")
BATCH_ROWS = 50_000
GAP = "  "
TABLE_ROWS = 1000  #: the newest of a key in a table

Write = Callable[[str], object]


# --- CSV ---------------------------------------------------------------------


def write_csv(answers: Iterable[Answer], write: Write) -> None:
    write(",".join(COLUMNS) + "\n")
    for answer in answers:
        key, reduction = csv_text(answer.key), csv_text(answer.reduction)
        for rank, attempt, step, time_ns, value in _batches(answer, _exact):
            write(
                "".join(
                    f"{key},{r},{reduction},{a},{s},{t},{v}\n"
                    for r, a, s, t, v in zip(rank, attempt, step, time_ns, value, strict=True)
                )
            )


def csv_text(text: str) -> str:
    """A cell of text, quoted where it must be. One that a spreadsheet would take for a formula
    starts with an apostrophe."""
    if text[:1] in ("=", "+", "-", "@", "\t", "\r"):
        text = f"'{text}"
    if any(c in text for c in ',"\n\r'):
        return '"' + text.replace('"', '""') + '"'
    return text


def _exact(value: Any) -> str:
    """A number as text that reads back the same: repr of floats, nan and inf, true and false."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value)


def _batches(answer: Answer, show: Callable[[Any], Any]) -> Iterator[tuple[Sequence[Any], ...]]:
    """Columns as lists of Python values, so many rows at once."""
    for start in range(0, len(answer), BATCH_ROWS):
        part = slice(start, start + BATCH_ROWS)
        attempt = answer.attempt[part].tolist()
        rank = [""] * len(attempt) if answer.rank is None else answer.rank[part].tolist()
        value = [show(v) for v in answer.value[part].tolist()]
        yield rank, attempt, answer.step[part].tolist(), answer.time_ns[part].tolist(), value


# --- JSON --------------------------------------------------------------------


def write_json(answers: Iterable[Answer], write: Write) -> None:
    """A list of objects with the columns' names; rank and reduction are null where empty, and
    what JSON has no number for is "nan", "inf" or "-inf"."""
    write("[")
    before = "\n"
    for answer in answers:
        key, reduction = json.dumps(answer.key), json.dumps(answer.reduction or None)
        for rank, attempt, step, time_ns, value in _batches(answer, _json_number):
            ranks = ["null"] * len(attempt) if answer.rank is None else rank
            objects = [
                f'{{"key": {key}, "rank": {r}, "reduction": {reduction}, "attempt": {a}, '
                f'"step": {s}, "time_ns": {t}, "value": {v}}}'
                for r, a, s, t, v in zip(ranks, attempt, step, time_ns, value, strict=True)
            ]
            write(before + ",\n".join(objects))
            before = ",\n"
    write("\n]\n" if before == ",\n" else "]\n")


def _json_number(value: Any) -> str:
    text = _exact(value)
    return text if not isinstance(value, float) or isfinite(value) else f'"{text}"'


def as_json(value: Any) -> Any:
    """A frozen value as plain JSON: names as they are, bytes in hex, floats that JSON lacks as
    text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [as_json(v) for v in value]
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, float) and not isfinite(value):
        return repr(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def json_text(value: Any) -> str:
    """Plain ASCII, so that no text of anybody's can reach the terminal's controls."""
    return json.dumps(as_json(value), indent=2)


# --- table -------------------------------------------------------------------


def write_table(answers: Iterable[Answer], write: Write) -> None:
    """For reading: values shortened, times local, the newest rows of a key that has many."""
    any_row = False
    for answer in answers:
        any_row = any_row or len(answer) > 0
        if len(answer):
            _write_key(answer, write)
    if not any_row:
        write("No values\n")


def _write_key(answer: Answer, write: Write) -> None:
    last = slice(max(0, len(answer) - TABLE_ROWS), None)
    who = "RANK" if answer.rank is not None else "REDUCTION"
    names = answer.rank[last].tolist() if answer.rank is not None else answer.reduction
    rows = [
        (
            str(names if isinstance(names, str) else names[i]),
            str(attempt), count(step), clock(time_ns), number(value),
        )
        for i, (attempt, step, time_ns, value) in enumerate(
            zip(
                answer.attempt[last].tolist(), answer.step[last].tolist(),
                answer.time_ns[last].tolist(), answer.value[last].tolist(), strict=True,
            )
        )
    ]  # fmt: skip
    header = (who, "ATTEMPT", "STEP", "TIME", "VALUE")
    widths = [max(len(header[i]), *(len(r[i]) for r in rows)) for i in range(len(header))]
    skipped = len(answer) - len(rows)
    note = f" (the last {count(len(rows))} of {count(len(answer))}; --format csv has all)"
    write(f"{clean(answer.key)}{note if skipped else ''}\n")
    for row in (header, *rows):
        write(GAP.join(c.rjust(w) for c, w in zip(row, widths, strict=True)).rstrip() + "\n")


# --- Parquet -----------------------------------------------------------------


def write_parquet(answers: Iterable[Answer], path: Path) -> None:
    """One row group per key. Needs pyarrow. Values are float64 (int64 where all keys are)."""
    try:
        pa = importlib.import_module("pyarrow")  # an extra
        pq = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise BadConfig("Parquet needs pyarrow: pip install 'rankgate[parquet]'") from None
    tables = [_arrow_table(answer, pa) for answer in answers]
    if not tables:
        raise BadConfig("There is nothing to write: no key matches.")
    pq.write_table(pa.concat_tables(tables, promote_options="permissive"), path)


def _arrow_table(answer: Answer, pa: Any) -> Any:
    n = len(answer)
    value = answer.value
    if value.dtype == object:
        value = value.astype(float)
    return pa.table(
        {
            "key": pa.array([answer.key] * n, pa.string()),
            "rank": pa.nulls(n, pa.int64()) if answer.rank is None else pa.array(answer.rank),
            "reduction": pa.array([answer.reduction or None] * n, pa.string()),
            "attempt": pa.array(answer.attempt),
            "step": pa.array(answer.step),
            "time_ns": pa.array(answer.time_ns),
            "value": pa.array(value),
        }
    )
