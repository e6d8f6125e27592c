"""Prepared examples as users of `datasets` read them: lists of ids, columns, selections."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from torch.utils.data import Dataset

from pyfast_dpo.data.report import DataReport
from pyfast_dpo.layout.padded_collators import MASK_SUFFIX

Example = dict[str, Any]


@dataclass(frozen=True)
class Lists:
    """A column of lists of ints in two arrays: a tenth of the memory of Python lists, and nothing that
    worker processes would have to copy to read it."""

    values: np.ndarray  # int32, of all lists one after the other
    ends: np.ndarray  # int64 [N + 1]

    def __getitem__(self, index: Any) -> list[int]:
        return self.values[self.ends[index] : self.ends[index + 1]].tolist()


class PreparedDataset(Dataset[Example]):
    """Tokenized examples with the report of how they came about; reads as a `datasets.Dataset` does.

    `dataset[3]` is an example (a dict whose ids are Python lists), `dataset[2:5]` and `dataset[[2, 4]]` dicts of
    columns, `dataset["prompt"]` a column; `select`, `add_column`, `column_names`, `num_rows`. The columns of
    the rows that the examples were made of are there too. `examples` is a sequence of the examples without them.

    Args:
        examples: dicts of the same columns. Those named `..._ids` hold ints; `..._assistant_mask` a 1 or 0
            for each of the ids of that name, and may be left out of examples, which then have ones.
        report: of the rows.
        rows: that the examples were made of.
        numbers: for each example the number of its row, from 1.
    """

    def __init__(
        self,
        examples: Iterable[Mapping[str, Any]],
        report: DataReport,
        rows: Any = None,
        numbers: Sequence[int] | None = None,
    ) -> None:
        self.report = report
        self._columns, count = _packed(examples)
        self._order = np.arange(count)
        self._rows = rows
        self._numbers = None if rows is None else np.asarray(numbers, dtype=np.int64)
        if self._numbers is not None and len(self._numbers) != count:
            raise ValueError(
                f"PreparedDataset: numbers must have one entry for each of the {count} examples, "
                f"got {len(self._numbers)}"
            )

    def __len__(self) -> int:
        return len(self._order)

    @property
    def num_rows(self) -> int:
        return len(self)

    @property
    def column_names(self) -> list[str]:
        return [*(name for name in self._raw_names() if name not in self._columns), *self._columns]

    @property
    def examples(self) -> Examples:
        return Examples(self._columns, self._order)

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    @overload
    def __getitem__(self, key: int) -> Example: ...
    @overload
    def __getitem__(self, key: str) -> list[Any]: ...
    @overload
    def __getitem__(self, key: slice | Iterable[int]) -> dict[str, list[Any]]: ...
    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self._column(key)
        if isinstance(key, slice):
            key = range(len(self))[key]
        if isinstance(key, Iterable):
            examples = [self[int(i)] for i in key]
            return {name: [each.get(name) for each in examples] for name in self.column_names}
        example = self.examples[key]
        return (
            example if self._rows is None else {**self._rows[self.row_number(key) - 1], **example}
        )

    def select(self, indices: Iterable[int]) -> PreparedDataset:
        """The examples at these indices, in this order, with the same report."""
        chosen = np.fromiter(indices, dtype=np.int64)
        if len(chosen) and not (-len(self) <= chosen.min() and chosen.max() < len(self)):
            raise IndexError(
                f"PreparedDataset.select: an index is out of range for {len(self)} rows"
            )
        return self._with(self._columns, self._order[chosen])

    def add_column(self, name: str, values: Sequence[Any]) -> PreparedDataset:
        """The same examples with one more column, or with a new one in the place of that name."""
        other = self._with(self._columns, self._order)
        other.set_column(name, values)
        return other

    def set_column(self, name: str, values: Sequence[Any]) -> None:
        """As `add_column`, of this dataset itself."""
        if len(values) != len(self):
            raise ValueError(
                f"PreparedDataset: column {name!r} must have {len(self)} values, got {len(values)}"
            )
        column: list[Any] = [None] * (int(self._order.max()) + 1 if len(self) else 0)
        for place, value in zip(self._order, values, strict=True):
            column[place] = value
        self._columns = {**self._columns, name: column}

    def tokens(self) -> list[int]:
        """Tokens that every example brings to a batch of shared prompts."""
        return sum(self.lengths(name) for name in self._columns if name.endswith("_ids")).tolist()  # type: ignore[union-attr]

    def lengths(self, name: str) -> np.ndarray:
        """`[N]` int64, of the lists of a column of ids."""
        return np.diff(self._columns[name].ends)[self._order]

    def row_number(self, index: int) -> int:
        """From 1, of the row that an example was made of; of the example itself where there is no row."""
        place = self._order[index]
        return int(place + 1 if self._numbers is None else self._numbers[place])

    def largest_id(self) -> int:
        """Of all examples, also of those that are not selected; -1 of none."""
        columns = [c.values for name, c in self._columns.items() if name.endswith("_ids")]
        return max((int(values.max()) for values in columns if len(values)), default=-1)

    def _with(self, columns: dict[str, Any], order: np.ndarray) -> PreparedDataset:
        other = PreparedDataset((), self.report)
        other._rows, other._numbers = self._rows, self._numbers
        other._columns, other._order = columns, order
        return other

    def _raw_names(self) -> list[str]:
        if self._rows is None or not len(self):
            return []
        return list(self._rows[int(self._numbers[self._order[0]]) - 1])  # type: ignore[index]

    def _column(self, name: str) -> list[Any]:
        column = self._columns.get(name)
        if column is not None:
            return [column[place] for place in self._order]
        if name not in self._raw_names():
            raise KeyError(f"PreparedDataset: no column {name!r} among {self.column_names}")
        assert self._numbers is not None
        return [self._rows[int(number) - 1].get(name) for number in self._numbers[self._order]]


class Examples(Sequence[Example]):
    """The examples of a prepared dataset one by one, a slice as a list of them."""

    def __init__(self, columns: Mapping[str, Any], order: np.ndarray) -> None:
        self._columns, self._order = columns, order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return [self[i] for i in range(len(self))[key]]
        if not -len(self) <= key < len(self):
            raise IndexError(f"PreparedDataset: index {key} is out of range for {len(self)} rows")
        place = self._order[key]
        return {name: column[place] for name, column in self._columns.items()}


def _packed(examples: Iterable[Mapping[str, Any]]) -> tuple[dict[str, Any], int]:
    """(columns, number of examples)"""
    lists: dict[str, tuple[array[int], array[int]]] = {}
    plain: dict[str, list[Any]] = {}
    masks: dict[str, dict[int, Any]] = {}  # of the examples that have one
    count = 0
    for example in examples:
        for name, value in example.items():
            if name.endswith(MASK_SUFFIX):
                masks.setdefault(name, {})[count] = value
            elif name.endswith("_ids"):
                values, ends = lists.setdefault(name, (array("i"), array("q", [0])))
                values.frombytes(np.asarray(value, dtype=np.int32).tobytes())
                ends.append(len(values))
            else:
                plain.setdefault(name, []).append(value)
        count += 1
    columns: dict[str, Any] = {
        name: Lists(np.array(values, dtype=np.int32), np.array(ends, dtype=np.int64))
        for name, (values, ends) in lists.items()
    }
    for name, given in masks.items():
        ends = columns[name.removesuffix(MASK_SUFFIX) + "_ids"].ends
        ones = np.ones(ends[-1], dtype=np.int32)
        for place, mask in given.items():
            ones[ends[place] : ends[place + 1]] = mask
        columns[name] = Lists(ones, ends)
    columns.update(plain)
    for name, column in columns.items():
        rows = len(column.ends) - 1 if isinstance(column, Lists) else len(column)
        if rows != count:
            raise ValueError(
                f"PreparedDataset: {count - rows} of {count} examples have no {name!r}"
            )
    return columns, count
