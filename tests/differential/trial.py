"""One case from its trainings to its verdict."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.servers.base import StandIn

from . import record
from .compare import Declared, Difference, Renamed, absent, differences, undeclared
from .declared import DECLARED
from .trainings import Case, original, through_gateway

Training = Callable[[Case, StandIn, Path], Path]


@dataclass
class Verdict:
    """What came of a case; `ok` when nothing stands in the last four lists."""

    facts: int  #: of the original
    equal: int
    found: list[Difference]
    undeclared: list[Difference]
    absent: list[Declared | Renamed]  #: declared and not found
    altered: list[str]  #: facts for which the gateway delivered other bytes than the training's
    unsteady: list[Difference] = field(default_factory=list)  #: between two times the original

    @property
    def ok(self) -> bool:
        return not (self.undeclared or self.absent or self.altered or self.unsteady)

    def as_map(self) -> dict[str, Any]:
        return {
            "facts": self.facts,
            "equal": self.equal,
            "declared": len(self.found) - len(self.undeclared),
            **{
                name: [str(one) for one in getattr(self, name)]
                for name in ("undeclared", "absent", "altered", "unsteady")
            },
        }


def run(case: Case, folder: Path, times: int = 1) -> Verdict:
    """Train with the original `times` times, once through a gateway, two at a time; compare."""
    ways: list[Training] = [through_gateway, *[original] * times]
    # names of one length: a checkpoint holds its path, and is compared by size as well
    folders = [folder / f"training-{number}" for number in range(len(ways))]
    with ThreadPoolExecutor(2) as pool:
        gateway, *originals = pool.map(_record, [case] * len(ways), ways, folders)
    verdict = judge(originals[0], gateway, DECLARED[case])
    for other in originals[1:]:
        verdict.unsteady += differences(originals[0], other)
    return verdict


def _record(case: Case, training: Training, folder: Path) -> record.Record:
    with case.server() as server:
        return record.read(server, training(case, server, folder), folder)


def judge(
    there: record.Record, here: record.Record, meant: tuple[Declared | Renamed, ...]
) -> Verdict:
    """Compare the original's record with the gateway's."""
    gone: list[Declared | Renamed] = []
    for one in meant:
        if not isinstance(one, Renamed):
            continue
        if not one.occurs(there if one.side == "original" else here):
            gone.append(one)
        elif one.side == "original":
            there = one.apply(there)
        else:
            here = one.apply(here)
    declared = tuple(one for one in meant if isinstance(one, Declared))
    found = differences(there, here)
    return Verdict(
        facts=len(there),
        equal=sum(name in here and here[name] == value for name, value in there.items()),
        found=found,
        undeclared=undeclared(found, declared),
        absent=gone + absent(found, declared),
        altered=[name for name, value in here.items() if altered(name, value)],
    )


def altered(name: str, value: Any) -> bool:
    """Are these bytes of no file that the training has, or of another one than they are called?"""
    if "sha256:" in str(value):
        return True
    named = name.startswith(("image | ", "plot | ", "file | "))
    files = [file for file in (value if isinstance(value, list) else [value]) if is_file(file)]
    return named and any(Path(file).stem not in name for file in files)


def is_file(value: Any) -> bool:
    return isinstance(value, str) and value.endswith((".png", ".jpg", ".pt"))
