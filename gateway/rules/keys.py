"""The keys of a run and the sets of them that its rows have, each by a number."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from rank_client.wire.records import MAX_KEYS, Schema

from .changes import Changes, Layout

Column = tuple[str, str]  #: a key and its type

MAX_RUN_KEYS = MAX_KEYS  #: of all ranks together; each would cost every reader of the run
TOO_MANY_KEYS = f"a key beyond the {MAX_RUN_KEYS:,} of a run"


class Keys:
    """Numbers follow the order of first appearance, so that a projection built anew has the
    same. What is new goes into the changes of its fetch."""

    def __init__(self) -> None:
        self.numbers: dict[Column, int] = {}
        self.sets: dict[tuple[Column, ...], int] = {}
        self._orders: dict[tuple[int, ...], npt.NDArray[np.int64]] = {}

    def too_many(self, columns: Iterable[Column]) -> bool:
        """Would these give the run more keys than it may have?"""
        new = sum(column not in self.numbers for column in columns)
        return new > 0 and len(self.numbers) + new > MAX_RUN_KEYS

    def layout(self, schema: Schema, changes: Changes) -> Layout:
        """How a schema's columns lie in their set."""
        columns = tuple(zip(schema.keys, schema.types, strict=True))
        ordered = tuple(sorted(columns))
        indexes = tuple(columns.index(c) for c in ordered)
        same = indexes == tuple(range(len(indexes)))
        take = None if same else self.order(indexes)
        return Layout(schema.id, self.set_of(ordered, changes), schema.row_bytes, take, columns)

    def order(self, indexes: tuple[int, ...]) -> npt.NDArray[np.int64]:
        """One array object per column order, so that `is` tells whether two streams agree."""
        return self._orders.setdefault(indexes, np.array(indexes, np.int64))

    def set_of(self, columns: tuple[Column, ...], changes: Changes) -> int:
        """The number of a sorted set of columns."""
        found = self.sets.get(columns)
        if found is not None:
            return found
        numbers = []
        for column in columns:
            if column not in self.numbers:
                self.numbers[column] = len(self.numbers) + 1
                changes.keys.append((self.numbers[column], *column))
            numbers.append(self.numbers[column])
        found = self.sets[columns] = len(self.sets) + 1
        changes.keysets.append((found, np.array(numbers, "<u4").tobytes()))
        return found
