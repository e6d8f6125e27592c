"""The lm_head on a GPU: logits of a fixed number of rows at a time, and two products of many rows for the gradients.

A product of few rows reads the weight for longer than it multiplies. So logits exist for a piece of some hundred
rows, are scored, and become d log-prob / d logits in the products' dtype; these wait for the loss, `[rows, V]`.
With its coefficients c, d hidden = c (G W) and d weight = G^T (c X) are one product each for all that has waited:
three products whatever the loss couples and whatever the budget of logits is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyfast_dpo.logprobs.head import Head, add_rows
from pyfast_dpo.logprobs.scores import EntropyGradient, Scored, score_logits, write_gradient
from pyfast_dpo.ops.dtypes import statistics_dtype

# Products of logits have a multiple of so many rows, filled up: few numbers of rows, because another may be another
# kernel of cuBLAS with other bits. (On an H100 they were equal, from 1 row to 8192.)
GRAIN = 256
# Of a frozen head nothing waits, but a product of this many rows is faster than several.
FROZEN_ROWS = 2048


# Elements in a vector of 16 bytes. Without a multiple of them cuBLAS has none of its fast kernels: measured on an
# H100, 111 TFLOP/s and not 700 for 50257 columns. So matrices have it between their rows, and what it does not
# divide of a vocabulary is multiplied apart.
LANES = 8


def product(left: Tensor, right: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """left right into `out`, of the matrices' dtype or float32: rounded once from float32 sums, or added to it. On
    the CPU, for tests, the same of matrices in float32."""
    if left.is_cuda:
        options: dict[str, Any] = {} if out.dtype == left.dtype else {"out_dtype": out.dtype}
        if accumulate:
            torch.addmm(out, left, right, out=out, **options)
        else:
            torch.mm(left, right, out=out, **options)
        return
    wide = statistics_dtype(left.dtype)
    result = left.to(wide) @ right.to(wide)
    if accumulate:
        out += result
    else:
        out.copy_(result)


def rows_of(like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A new matrix, its rows LANES or a multiple apart."""
    width = -(-columns // LANES) * LANES
    return like.new_empty((rows, width), dtype=dtype)[:, :columns]


def rows_that_wait(head: Head) -> int:
    """Rows whose gradients of the logits take as much memory as a float32 gradient of the weight."""
    weight = head.weight
    return max(1, 4 * weight.shape[1] // weight.element_size())


def piece_rows(max_rows: int) -> int:
    """Rows of a piece, whose logits exist at a time, where those of `max_rows` fit the budget."""
    grain = min(GRAIN, max_rows)
    return max_rows // grain * grain


class GpuHead:
    """One pass over rows of the hidden states: their logits in pieces, and what is kept of these for the gradients
    of the inputs that ask for them.

    `total` rows in all, of which at most `waiting` are kept between two calls of `add`; `dtype` is that of weight
    and bias as parameters.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        max_rows: int,
        wanted: tuple[bool, bool, bool],
        dtype: torch.dtype,
        total: int,
        waiting: int,
    ) -> None:
        self.states, self.head, self.dtype = hidden, head, dtype
        self.wide = statistics_dtype(hidden.dtype)
        self.grain = min(GRAIN, max_rows)
        self.size = piece_rows(max_rows)
        vocab, whole = head.weight.shape[0], head.weight.shape[0] // LANES * LANES
        parts = slice(0, whole), slice(whole, vocab)
        self.parts = [part for part in parts if part.start < part.stop]
        self.logits = rows_of(hidden, min(self.size, self._filled_up(total)), vocab, self.wide)
        self.frozen = not any(wanted[1:])
        rows = min(total, max(FROZEN_ROWS, self.size) if self.frozen else waiting)
        self.kept = rows_of(hidden, rows if any(wanted) else 0, vocab, hidden.dtype)
        self.count = 0  # rows that are kept now
        self.of_rows: list[Tensor] = []  # products of what was kept, and of them
        # The last product, which is the first where all rows wait together, writes the parameter's dtype.
        self.weight_dtype = dtype if total <= waiting else self.wide
        self.wanted = wanted
        self.hidden: Tensor | None = None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def _filled_up(self, rows: int) -> int:
        return -(-rows // self.grain) * self.grain

    def pieces(self, index: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Parts of the rows that `index` takes, and their logits `[r, V]`, valid until the next part."""
        rows = index.shape[0]
        for first in range(0, rows, self.size):
            piece = slice(first, min(first + self.size, rows))
            present = piece.stop - first
            own = F.pad(index[piece], (0, self._filled_up(present) - present))
            states = self.states.index_select(0, own)
            logits = self.logits[: len(states)]
            for part in self.parts:
                product(states, self.head.weight[part].T, logits[:, part])
            yield piece, self.head.activate(logits[:present])

    def scored(self, index: Tensor, targets: Tensor) -> Iterator[tuple[slice, Scored]]:
        for piece, logits in self.pieces(index):
            yield piece, score_logits(logits, targets[piece])

    def lacks(self, rows: int) -> bool:
        """Whether so many more rows find no place among those that are kept."""
        return self.count + rows > self.kept.shape[0]

    def keep(
        self, scored: Scored, coefficients: Tensor | None, of_entropy: EntropyGradient | None = None
    ) -> None:
        """coefficient of a row times d log-prob / d (x W^T + bias), and the entropy's gradient."""
        place = self._place(scored.logits.shape[0])
        write_gradient(scored, coefficients, self.head, place, of_entropy)

    def keep_gradient(self, gradient: Tensor) -> None:
        """One `[r, V]` that was computed otherwise."""
        self._place(gradient.shape[0]).copy_(gradient)

    def _place(self, rows: int) -> Tensor:
        if self.frozen and self.lacks(rows):
            self._multiply_rows()
        self.count += rows
        return self.kept[self.count - rows : self.count]

    def _multiply_rows(self) -> None:
        if self.count:
            kept, weight = self.kept[: self.count], self.head.weight
            of_rows = kept.new_empty((self.count, weight.shape[1]), dtype=self.wide)
            for part in self.parts:
                product(kept[:, part], weight[part], of_rows, accumulate=part.start > 0)
            self.of_rows.append(of_rows)
        if self.frozen:
            self.count = 0

    def take_rows(self) -> Tensor:
        """`[r, H]`: what was kept times W, for all rows since the last call."""
        self._multiply_rows()
        parts, self.of_rows = self.of_rows, []
        if len(parts) == 1:
            return parts[0]
        empty = self.states.new_empty((0, self.states.shape[1]), dtype=self.wide)
        return torch.cat(parts) if parts else empty

    def add(self, index: Tensor, coefficients: Tensor | None = None) -> None:
        """Adds the gradients of the rows that were kept, which `index` took, times their coefficients."""
        if self.wanted[0]:
            if self.hidden is None:
                self.hidden = torch.zeros_like(self.states)
            of_rows = self.take_rows()
            if coefficients is not None:
                of_rows *= coefficients.unsqueeze(1)
            add_rows(self.hidden, index, of_rows)
        self.add_to_head(index, coefficients)

    def add_to_head(self, index: Tensor, coefficients: Tensor | None = None) -> None:
        """The same for weight and bias alone, after `take_rows`."""
        kept, self.count = self.kept[: self.count], 0
        factors = None if coefficients is None else coefficients.unsqueeze(1)
        if self.wanted[2] and self.head.bias is not None:
            if self.bias is None:
                self.bias = torch.zeros_like(self.head.bias, dtype=self.wide)
            for first in range(0, len(kept), self.size):
                piece = slice(first, first + self.size)
                part = kept[piece].to(self.wide)
                self.bias += (part if factors is None else part * factors[piece]).sum(0)
        if self.wanted[1] and len(kept):
            states = self.states.index_select(0, index)
            if factors is not None:
                # The states take the coefficients, being few; they are rounded once more.
                states = (states * factors).to(states.dtype)
            further = self.weight is not None
            if self.weight is None:
                self.weight = torch.empty_like(self.head.weight, dtype=self.weight_dtype)
            for columns in self.parts:
                product(kept[:, columns].T, states, self.weight[columns], accumulate=further)

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of hidden, weight and bias; of what nothing was added to, zeros."""

        def gradient(
            wanted: bool, total: Tensor | None, like: Tensor | None, dtype: torch.dtype
        ) -> Tensor | None:
            if not wanted or like is None:
                return None
            return torch.zeros_like(like, dtype=dtype) if total is None else total.to(dtype)

        return (
            gradient(self.wanted[0], self.hidden, self.states, self.states.dtype),
            gradient(self.wanted[1], self.weight, self.head.weight, self.dtype),
            gradient(self.wanted[2], self.bias, self.head.bias, self.dtype),
        )
