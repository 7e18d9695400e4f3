"""Data out: exact, stable, and harmless in a spreadsheet."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gateway.errors import BadConfig
from gateway.view.export import (
    COLUMNS,
    as_json,
    csv_text,
    json_text,
    write_csv,
    write_json,
    write_parquet,
    write_table,
)
from gateway.view.points import Answer


def answer(value: Any, key: str = "loss", reduction: str = "", first_step: int = 0) -> Answer:
    values = np.array(value) if not isinstance(value, np.ndarray) else value
    n = len(values)
    step = np.arange(first_step, first_step + n)
    rank = None if reduction else np.zeros(n, np.int64)
    return Answer(key, reduction, rank, np.ones(n, np.int64), step, step + 10**18, values)


def text_of(write: Any, *answers: Answer) -> str:
    out = io.StringIO()
    write(answers, out.write)
    return out.getvalue()


class TestCsv:
    """key,rank,reduction,attempt,step,time_ns,value"""

    def test_columns(self) -> None:
        """The header is fixed; a raw value has a rank and no reduction."""
        assert text_of(write_csv, answer([0.5])) == (
            "key,rank,reduction,attempt,step,time_ns,value\nloss,0,,1,0,1000000000000000000,0.5\n"
        )

    def test_reduced(self) -> None:
        """A reduced value has a reduction and no rank."""
        lines = text_of(write_csv, answer([0.5], reduction="mean")).splitlines()
        assert lines[1] == "loss,,mean,1,0,1000000000000000000,0.5"

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (0.1 + 0.2, "0.30000000000000004"), (math.nan, "nan"), (-math.inf, "-inf"),
            (5e-324, "5e-324"), (-1.5, "-1.5"),
        ],
    )  # fmt: skip
    def test_floats_read_back(self, value: float, text: str) -> None:
        """Floats are written so that they read back the same; numbers are never escaped."""
        line = text_of(write_csv, answer([value])).splitlines()[1]
        assert line.rpartition(",")[2] == text

    def test_integers_and_bools(self) -> None:
        """All 64 bits of an integer are there; objects keep the type each value has."""
        assert text_of(write_csv, answer([2**63 - 1])).endswith(",9223372036854775807\n")
        assert text_of(write_csv, answer([True])).endswith(",true\n")
        mixed = np.array([2**60 + 1, 0.5], dtype=object)
        ends = [x.rpartition(",")[2] for x in text_of(write_csv, answer(mixed)).splitlines()[1:]]
        assert ends == ["1152921504606846977", "0.5"]

    @pytest.mark.parametrize("key", ["=1+1", "+x", "-x", "@SUM(A1)", "\tx", "\rx"])
    def test_formulas_are_defused(self, key: str) -> None:
        """A key that a spreadsheet would run starts with an apostrophe."""
        [_, row] = csv.reader(io.StringIO(text_of(write_csv, answer([1.0], key)), newline=""))
        assert row[0] == f"'{key}"

    @pytest.mark.parametrize("key", ["a,b", 'a"b', "a\nb", "ünï"])
    def test_quoting(self, key: str) -> None:
        """A key with a comma, quote or line break reads back the same."""
        [_, row] = csv.reader(io.StringIO(text_of(write_csv, answer([1.0], key)), newline=""))
        assert row[0] == key

    def test_plain_text_is_plain(self) -> None:
        """An ordinary key is written as it is."""
        assert csv_text("train/loss") == "train/loss"

    def test_no_values(self) -> None:
        """Without values there is still a header."""
        assert text_of(write_csv) == ",".join(COLUMNS) + "\n"

    def test_many_rows(self) -> None:
        """Rows past one batch follow without a seam."""
        lines = text_of(write_csv, answer(np.arange(120_000))).splitlines()
        assert [x.rpartition(",")[2] for x in lines[1:]] == [str(i) for i in range(120_000)]


class TestJson:
    """A list of objects with the same names."""

    def test_names_and_nulls(self) -> None:
        """Rank and reduction are null where they do not apply."""
        raw, reduced = json.loads(text_of(write_json, answer([1]), answer([2.5], "k", "max")))
        assert tuple(raw) == COLUMNS
        assert (raw["rank"], raw["reduction"], raw["value"]) == (0, None, 1)
        assert (reduced["key"], reduced["rank"], reduced["reduction"]) == ("k", None, "max")

    def test_not_finite_is_text(self) -> None:
        """What JSON has no number for is text that `float` understands."""
        found = json.loads(text_of(write_json, answer([math.nan, math.inf, -math.inf])))
        assert [r["value"] for r in found] == ["nan", "inf", "-inf"]

    def test_exact(self) -> None:
        """Integers and floats read back the same."""
        assert json.loads(text_of(write_json, answer([2**63 - 1])))[0]["value"] == 2**63 - 1
        assert json.loads(text_of(write_json, answer([0.1 + 0.2])))[0]["value"] == 0.1 + 0.2
        assert json.loads(text_of(write_json, answer([True])))[0]["value"] is True

    def test_empty(self) -> None:
        """Without values it is an empty list."""
        assert json.loads(text_of(write_json)) == []

    def test_any_value(self) -> None:
        """Bytes are hex, floats that JSON lacks are text, controls are escaped."""
        assert as_json({"a": b"\x01", "b": (math.nan, 1.5, None)}) == {
            "a": "01", "b": ["nan", 1.5, None],
        }  # fmt: skip
        assert "\x1b" not in json_text({"text": "\x1b[2J"})


class TestTable:
    """For reading."""

    def test_rows(self) -> None:
        """A key, a header, and a row per value with thousands separated."""
        lines = text_of(write_table, answer([0.25, math.nan], first_step=1500)).splitlines()
        assert lines[0] == "loss"
        assert lines[1].split() == ["RANK", "ATTEMPT", "STEP", "TIME", "VALUE"]
        assert (lines[2].split()[2], lines[2].split()[-1]) == ("1,500", "0.25")
        assert lines[3].split()[-1] == "NaN"

    def test_long_keys_say_what_is_left_out(self) -> None:
        """Only the newest rows of a long key are shown, and that is said."""
        lines = text_of(write_table, answer(np.arange(5000))).splitlines()
        assert lines[0] == "loss (the last 1,000 of 5,000; --format csv has all)"
        assert (len(lines), lines[-1].split()[-1]) == (1002, "4,999")

    def test_no_values(self) -> None:
        """Nothing to show is said."""
        assert text_of(write_table, answer(np.empty(0))) == "No values\n"


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pyarrow the error is one line with the command that installs it."""
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(BadConfig, match=r"pip install 'rankgate\[parquet\]'"):
        write_parquet([answer([1.0])], tmp_path / "x.parquet")


def test_parquet(tmp_path: Path) -> None:
    """With pyarrow the columns are those of the CSV."""
    pq = pytest.importorskip("pyarrow.parquet")
    write_parquet([answer([1.0, 2.0]), answer([3.0], "k", "max")], tmp_path / "x.parquet")
    table = pq.read_table(tmp_path / "x.parquet")
    assert tuple(table.column_names) == COLUMNS
    assert table.column("value").to_pylist() == [1.0, 2.0, 3.0]
