"""Other people's text in a terminal and in a table; secrets in anything at all.

Not here: pages in a browser, as there are none.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from gateway.view import export
from gateway.view.finding import label, reading
from gateway.view.points import Answer
from gateway.view.queries import run_view
from gateway.view.shown import shown
from gateway.view.terminal import run_status_lines, runs_lines, show_lines
from rank_client import redact
from rank_client.redact import MARK, Redactor
from tests.build import RunBuilder

from .row import Row, without

#: an escape sequence, a window's title, a bell, an 8-bit CSI, an override of direction, a new line
UNSAFE = "\x1b[31m \x1b]0;owned\x07 \x07 \x9b2J \u202egpj.exe \u2066x \r\nfake line \x00"
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
FORMULAS = ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", '=HYPERLINK("http://x","y"),z')


def terminals_obey_nothing(root: Path) -> None:
    """With such text for every name a rank gives, each line people see is plain."""
    run = RunBuilder(root, "r1", project=f"p{UNSAFE}", name=f"n{UNSAFE}")
    rank = run.rank(0, node=f"host{UNSAFE}")
    rank.log({f"k{UNSAFE}": 1.0}, 0).text(f"t{UNSAFE}").log({f"k{UNSAFE}": float("nan")}, 1)
    path = run.close()
    now = time.time_ns()
    view = run_view(path, now)
    lines = show_lines(shown(path, now)) + run_status_lines(view) + runs_lines([view], now)
    out = io.StringIO()
    export.write_table([answer(f"k{UNSAFE}")], out.write)
    texts = [line.plain for line in lines] + out.getvalue().splitlines()
    assert len(texts) > 8
    assert [text for text in texts if CONTROLS.search(text)] == []


def as_it_comes(patch: Any) -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith("gateway.view.") and hasattr(module, "clean"):
            patch.setattr(module, "clean", lambda text: text)


def json_is_ascii(root: Path) -> None:
    """What `--json` prints has no byte that a terminal would obey, and reads back the same."""
    with reading(RunBuilder(root, "r1", project=f"p{UNSAFE}").close()) as reader:
        told = label(reader.run_dir, reader.streams())
    text = export.json_text({"x": UNSAFE, "run": told})
    assert text.isascii()
    assert not CONTROLS.search(text.replace("\n", ""))
    assert json.loads(text)["x"] == UNSAFE


def answer(key: str) -> Answer:
    values = np.array([-0.1, 1e-300, float("-inf")])
    n = np.arange(len(values))
    return Answer(key, "", n * 0, n * 0 + 1, n - 1, n + 10**18, values)


def spreadsheets_run_nothing(_: Path) -> None:
    """A key that is a formula comes as text; numbers stay what they are, with their sign."""
    out = io.StringIO()
    export.write_csv([answer(key) for key in FORMULAS], out.write)
    rows = list(csv.DictReader(io.StringIO(out.getvalue(), newline="")))
    assert len(rows) == 3 * len(FORMULAS)
    assert {row["key"] for row in rows} == {f"'{key}" for key in FORMULAS}
    assert [row["value"] for row in rows[:3]] == ["-0.1", "1e-300", "-inf"]
    assert rows[0]["step"] == "-1"


# --- secrets -------------------------------------------------------------------------------------

HEX = "5f" * 32
SHAPES = (
    "AKIAIOSFODNN7EXAMPLE", "ghp_" + "a1B2" * 9, "hf_" + "Ab3" * 10, "eyJ" + "hbGciOiJI" * 4,
    "sk-" + "a1" * 20, "xoxb-" + "1234567890-ab",
)  # fmt: skip


def shapes_are_seen(_: Path) -> None:
    redactor = Redactor({})
    for secret in SHAPES:
        assert redactor.text(f"using {secret} now") == f"using {MARK} now"
    assert redactor.text("s3://me:pass-word@host/x") == f"s3://{MARK}@host/x"


def names_are_seen(_: Path) -> None:
    redactor = Redactor({})
    for name in ("password", "db/api_key", "clientSecret", "aws_secret_access_key"):
        assert redactor.value(name, "plain words") == MARK
    assert redactor.value("max_tokens", 512) == 512


def the_environment_is_seen(_: Path) -> None:
    """The job's own secret too, which looks like any other hash."""
    redactor = Redactor({"RANKGATE_SECRET": HEX, "MY_PASSWORD": "correct-horse"})
    assert redactor.text(f"key={HEX}; {HEX[:20]}; pw correct-horse") == (
        f"key={MARK}; {HEX[:20]}; pw {MARK}"
    )


def the_files_of_vendors_are_seen(root: Path) -> None:
    """A key that stands in ClearML's or Ultralytics' file alone."""
    (root / "clearml.conf").write_text('api.credentials { secret_key: "plain-words-1" }')
    (root / ".config/Ultralytics").mkdir(parents=True)
    (root / ".config/Ultralytics/settings.json").write_text('{"api_key": "plain-words-2"}')
    redactor = Redactor({"HOME": str(root)})
    assert redactor.text("plain-words-1 and plain-words-2") == f"{MARK} and {MARK}"


def passwords_of_urls_are_seen(_: Path) -> None:
    """Without the URL around them too."""
    redactor = Redactor({"CLEARML_FILES_HOST": "https://me:plain-words@files.host"})
    assert redactor.text("login me, plain-words") == f"login me, {MARK}"


def other_notations_are_seen(_: Path) -> None:
    secret = "plain 'words' of\\all"
    redactor = Redactor({"X_SECRET": secret})
    shown = f"{[secret]} {json.dumps(secret)} /x?y={quote(secret)}"
    assert redactor.text(shown).count(MARK) == 3


TEXT, SECRET = "text in terminals and tables", "secrets in logs"

ROWS = [
    Row(TEXT, "terminal", terminals_obey_nothing, as_it_comes),
    Row(
        TEXT,
        "JSON",
        json_is_ascii,
        without(export, "json_text", lambda v: json.dumps(export.as_json(v), ensure_ascii=False)),
    ),
    Row(TEXT, "CSV", spreadsheets_run_nothing, without(export, "csv_text", lambda text: text)),
    Row(SECRET, "by shape", shapes_are_seen, without(redact, "_SECRET", re.compile("(?!)"))),
    Row(SECRET, "by name", names_are_seen, without(redact, "is_secret_name", lambda _: False)),
    Row(
        SECRET,
        "by the environment",
        the_environment_is_seen,
        without(redact, "_secret_values", lambda _: []),
    ),
    Row(
        SECRET,
        "by the files of vendors",
        the_files_of_vendors_are_seen,
        without(redact.key_files, "keys", lambda _: []),
    ),
    Row(
        SECRET,
        "a URL's password on its own",
        passwords_of_urls_are_seen,
        without(redact, "_passwords", lambda _: []),
    ),
    Row(
        SECRET,
        "in other notations",
        other_notations_are_seen,
        without(redact, "_forms", lambda value: {value}),
    ),
]
