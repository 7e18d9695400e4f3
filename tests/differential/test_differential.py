"""What Ultralytics' own callbacks bring to a backend, and what the gateway brings there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integrations import environment

from .__main__ import main
from .compare import Declared, Renamed
from .trainings import Case
from .trial import judge, run

#: the newest version, and the original that ends soonest; `make differential` runs all
CASE = Case("platform", "8.4.190")

THERE = {"scalar | val | loss | 0": 1.5, "param | General/lr0": "0.1"}


@pytest.mark.torch
@pytest.mark.timeout(600)
def test_the_gateway_brings_what_the_original_brings(tmp_path: Path) -> None:
    """A real training by the original callbacks and one through the gateway: the server's records
    are equal, up to the declared differences, each of which occurs."""
    verdict = run(CASE, tmp_path)
    assert verdict.ok, verdict.as_map()
    assert verdict.equal >= 150, verdict.as_map()


@pytest.mark.parametrize(
    ("here", "how"),
    [
        ({"param | General/lr0": "0.1"}, "only original"),
        ({**THERE, "scalar | val | loss | 1": 1.5}, "only gateway"),
        ({**THERE, "scalar | val | loss | 0": 1.500001}, "value"),
    ],
)
def test_a_difference_that_nobody_declared_is_found(here: dict[str, object], how: str) -> None:
    """A point lost, one too many, and one changed in its last digit."""
    verdict = judge(THERE, here, ())
    assert not verdict.ok
    assert [one.how for one in verdict.undeclared] == [how]


def test_a_declared_difference_that_does_not_occur_is_found() -> None:
    """What is declared and no longer true fails as well."""
    gone = Declared("only original", "scalar | val | *", "the original sends it twice")
    verdict = judge(THERE, THERE, (gone,))
    assert not verdict.ok
    assert verdict.absent == [gone]


def test_a_declaration_covers_its_own_kind_alone() -> None:
    """A value declared to differ may not be missing."""
    declared = Declared("value", "scalar | val | *", "rounded")
    verdict = judge(THERE, {"param | General/lr0": "0.1"}, (declared,))
    assert [one.how for one in verdict.undeclared] == ["only original"]


def test_another_name_hides_no_other_value() -> None:
    """A fact that is called otherwise is still compared, and must be there to be called so."""
    renamed = Renamed("original", r"scalar \| val \| (.*)", r"scalar | validation | \1", "clearer")
    here = {"scalar | validation | loss | 0": 1.5, "param | General/lr0": "0.1"}
    assert judge(THERE, here, (renamed,)).ok
    assert not judge(THERE, {**here, "scalar | validation | loss | 0": 1.4}, (renamed,)).ok
    assert judge(here, here, (renamed,)).absent == [renamed]


@pytest.mark.parametrize("body", ["sha256:0123456789ab", "P_curve.png"])
def test_bytes_that_are_not_the_files_are_found(body: str) -> None:
    """A picture that was mixed or cut on its way, and one in another's place."""
    verdict = judge({}, {"plot | F1_curve | plot image | 0": [body]}, ())
    assert verdict.altered == ["plot | F1_curve | plot image | 0"]
    assert not judge({}, {"plot | F1_curve | plot image | 0": ["F1_curve.png"]}, ()).altered


def test_without_an_environment_a_case_is_not_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where a package cannot be had, the check fails before any training, with pip's words and
    what to do; nothing passes for want of something to compare."""
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert main(["hub-8.2.50"]) == 1
    out, err = capfd.readouterr()
    assert json.loads(out)["ok"] is False
    assert "No matching distribution found for ultralytics==8.2.50" in err
    assert "the environment for ultralytics 8.2.50 cannot be made: pip ended with 1" in err
    assert "python -m tests.integrations.environment 8.2.50" in err
    assert "hub-8.2.50: NOT GOOD" in err


def test_a_case_that_there_is_not_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    """A name spelt wrong is no case that passed."""
    assert main(["hub-8.2.5"]) == 2
    assert "no case hub-8.2.5; there are: clearml-8.4.190" in capfd.readouterr().err
