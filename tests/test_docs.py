"""The documents say what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from gateway.cli.main import COMMANDS
from gateway.sinks import naming
from gateway.sinks.registry import BUILT_IN
from rank_client.wire.frames import FIELDS, Code, Type
from rank_client.wire.records import FIRST_JOURNAL_KIND, Kind

from .simulator import mutants
from .trials import faults

ROOT = Path(__file__).parents[1]


def table(text: str, columns: int) -> list[list[str]]:
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]
    return [row[:columns] for row in rows if row and row[0].isdigit()]


def test_the_protocol_names_every_message_and_kind() -> None:
    """docs/protocol.md lists exactly the types and kinds that the wire has."""
    messages, kinds = (ROOT / "docs/protocol.md").read_text().split("## Records")
    assert table(messages, 2) == [[str(int(t)), t.name] for t in Type]
    rank_kinds = [k for k in Kind if k < FIRST_JOURNAL_KIND]
    assert table(kinds, 2) == [[str(int(k)), k.name] for k in rank_kinds]


def test_the_protocol_names_every_field() -> None:
    """docs/protocol.md lists of each message's map exactly the fields that the wire declares."""
    messages, _ = (ROOT / "docs/protocol.md").read_text().split("## Records")
    documented = {row[1]: tuple(re.findall(r"`(\w+)`", row[3])) for row in table(messages, 4)}
    assert documented == {t.name: FIELDS[t] for t in Type}


def test_the_protocol_names_every_reason_to_reject() -> None:
    """docs/protocol.md lists exactly the codes of REJECT."""
    messages, _ = (ROOT / "docs/protocol.md").read_text().split("## Records")
    _, codes = messages.split("| REJECT code |")
    assert re.findall(r"^\| `(\w+)`", codes, re.MULTILINE) == [c.value for c in Code]


def test_the_names_in_backends_are_those_of_the_table() -> None:
    """docs/sinks.md shows what gateway/sinks/naming.py does."""
    text = (ROOT / "docs/sinks.md").read_text()
    assert naming.clearml_title_series("a/b/c", 0) == ("a", "b/c")
    assert naming.clearml_title_series("loss", 0) == ("loss", "loss")
    for name in (
        f"series `{naming.clearml_title_series('a/b/c', 3)[1]}`",
        f"`{naming.neptune_path('a/b/c', 3)}`",
        f"`{naming.clearml_section(0)}`",
        f"`{naming.clearml_section(3)}`",
        naming.rank_prefix(3).strip(),
    ):
        assert name in text, name


def test_the_counts_of_the_trials_are_those_of_the_code() -> None:
    """docs/guarantee.md says how many bugs are planted and how many faults are played."""
    text = (ROOT / "docs/guarantee.md").read_text()
    assert f"| {len(mutants.names())} bugs, each found" in text
    assert f"| {len(faults.cells(1))} cells, three seeds each" in text


def test_every_sink_and_command_is_documented() -> None:
    """Each sink has its row, each command of the README exists, each command is in the README."""
    sinks = (ROOT / "docs/sinks.md").read_text()
    for name in BUILT_IN:
        assert f"`{name}`" in sinks
    readme = (ROOT / "README.md").read_text()
    named = set(re.findall(r"`?rankgate (\w+)", readme))
    assert named <= set(COMMANDS) | {"rankgate"} | {"is"}, named - set(COMMANDS)
    for command in set(COMMANDS) - {"runs", "serve"}:
        assert command in named, command


def test_every_environment_variable_is_documented() -> None:
    """Each RANKGATE_ variable that the code reads is in the README, except the internal ones."""
    readme = (ROOT / "README.md").read_text()
    read = set()
    for folder in ("rank_client", "gateway"):
        for path in (ROOT / folder).rglob("*.py"):
            read |= set(re.findall(r"RANKGATE_[A-Z]+", path.read_text()))
    assert read - set(re.findall(r"RANKGATE_[A-Z]+", readme)) == {
        "RANKGATE_SINKS",
        "RANKGATE_PARENT",
    }
