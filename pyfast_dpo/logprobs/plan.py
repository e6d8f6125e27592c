"""How a pass over scored rows is cut into chunks and pieces."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from pyfast_dpo.logprobs.head import LogitsBuffer
from pyfast_dpo.logprobs.rows import CompletionRows
from pyfast_dpo.logprobs.scores import TILE
from pyfast_dpo.ops import operators


class Chunk(NamedTuple):
    """Consecutive units and their rows: one range of rows for each position in a unit."""

    units: slice
    ranges: list[tuple[int, int]]
    lent: bool  # its logits take the memory of the weight's gradient

    def size(self) -> int:
        return sum(last - first for first, last in self.ranges)

    def of(self, values: Tensor) -> Tensor:
        """The chunk's part of values `[R, ...]`, in the order of the chunk."""
        parts = [values[first:last] for first, last in self.ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def write(self, values: Tensor, part: Tensor) -> None:
        for (first, last), own in zip(
            self.ranges, part.split([last - first for first, last in self.ranges]), strict=True
        ):
            values[first:last] = own


class Plan(NamedTuple):
    """How a pass over rows is cut: unit u consists of the sequences u, U + u, 2 U + u, ... or of row u."""

    rows: CompletionRows
    group: int  # sequences in a unit; 0: every row is one
    max_rows: int  # rows whose logits fit the budget
    # The budget is for kept gradients (`keeps_gradients`), and half as much beside it for logits.
    kept: bool = False
    # Rows whose logits fit the memory of the weight's gradient (`WeightGradient.lend`), for one chunk.
    lent_rows: int = 0
    # Rows of a chunk of which no logits wait for the loss.
    ready_rows: int = 0

    @property
    def chunk_rows(self) -> int:
        return max(self.ready_rows, 2 * self.max_rows if self.kept else self.max_rows)

    @property
    def piece_rows(self) -> int:
        """Rows whose logits exist at a time."""
        if not self.kept:
            return self.max_rows
        panel = operators.HEAD_PANEL_ROWS
        return min(-(-self.max_rows // (2 * panel)) * panel, self.max_rows)

    def units(self) -> int:
        return len(self.rows.lengths) // self.group if self.group else int(self.rows.index.shape[0])

    def _borders(self) -> tuple[Sequence[int], Sequence[int]]:
        """Rows before every sequence, or row; and in the units before every unit."""
        units, lengths = self.units(), self.rows.lengths
        if not self.group:
            return range(units + 1), range(units + 1)
        return [0, *accumulate(lengths)], [
            0, *accumulate(sum(lengths[u::units]) for u in range(units))
        ]  # fmt: skip

    def chunks(self) -> list[Chunk]:
        """Consecutive units that fit the budget together, in the order of their computation; a single empty
        chunk when there are no units."""
        units, (starts, ends) = self.units(), self._borders()

        def rows_of(first: int, last: int) -> int:
            return ends[last] - ends[first]

        spans: list[tuple[int, int]] = []
        first = 0
        while first == 0 or first < units:
            last = bisect_right(ends, ends[first] + self.chunk_rows) - 1
            last = min(max(last, first + 1), units)
            spans.append((first, last))
            first = max(last, 1)
        lent = max(
            (s for s in spans if 0 < rows_of(*s) <= self.lent_rows),
            key=lambda s: rows_of(*s),
            default=None,
        )
        if lent is not None:  # the longest, which takes its neighbours in
            at = spans.index(lent)
            while at + 1 < len(spans) and rows_of(lent[0], spans[at + 1][1]) <= self.lent_rows:
                lent = lent[0], spans.pop(at + 1)[1]
            while at > 0 and rows_of(spans[at - 1][0], lent[1]) <= self.lent_rows:
                at -= 1
                lent = spans.pop(at)[0], lent[1]
            spans = [lent, *spans[:at], *spans[at + 1 :]]
        return [
            Chunk(
                slice(first, last),
                [
                    (starts[k * units + first], starts[k * units + last])
                    for k in range(max(self.group, 1))
                ],
                (first, last) == lent,
            )
            for first, last in spans
        ]

    def pieces(self, rows: int) -> list[slice]:
        """Parts of so many rows whose logits fit the budget."""
        size = self.piece_rows
        return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]

    def parts(self, rows: int, vocab: int) -> list[slice]:
        """Parts of so many rows of which a tile of the vocabulary fits the budget."""
        size = self.piece_rows * vocab // min(TILE, vocab)
        return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]

    def buffer(self, vocab: int) -> LogitsBuffer:
        return LogitsBuffer(min(self.piece_rows, self.rows.index.shape[0]) * vocab)
