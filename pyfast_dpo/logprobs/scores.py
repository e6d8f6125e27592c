"""Scores of rows by the lm_head and their gradients: what the passes of `chunks.py` are made of."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfast_dpo.logprobs.head import Head, LogitsBuffer, WeightGradient, add_rows
from pyfast_dpo.logprobs.statistics import LinearStatistics, row_statistics
from pyfast_dpo.ops import operators
from pyfast_dpo.ops.dtypes import statistics_dtype

# No label is ignored among the rows: the lowest number is none that a label has.
NONE_IGNORED = torch.iinfo(torch.int64).min
# Vocabulary entries at a time where gradients are computed from known statistics. A constant, so that the
# gradient of a row depends on nothing but the row.
TILE = 8192


class Statistics(NamedTuple):
    """Of the rows' distributions, `[r]` each: all that their gradients need beside the logits."""

    tokens: Tensor  # log-probs of the targets
    row_max: Tensor
    row_sum: Tensor  # sum of exp(z - row_max)


class Scored(NamedTuple):
    logits: Tensor  # [r, V]
    targets: Tensor  # [r]
    statistics: Statistics


def score(states: Tensor, targets: Tensor, head: Head, buffer: LogitsBuffer) -> Scored:
    """The logits are valid until the next call with this buffer."""
    return score_logits(head.logits(states, buffer), targets)


def score_logits(logits: Tensor, targets: Tensor) -> Scored:
    _, tokens, row_max, row_sum, _ = operators.seq_logp(
        logits.unsqueeze(0), targets.unsqueeze(0), NONE_IGNORED, False, False, False
    )
    return Scored(logits, targets, Statistics(tokens[0], row_max[0], row_sum[0]))


def statistics_of(scored: Scored) -> LinearStatistics:
    return row_statistics(scored.logits, scored.targets, scored.statistics.row_max)


def keeps_gradients(head: Head, wanted: tuple[bool, bool, bool]) -> bool:
    """Whether the gradients of the logits wait for the loss in bfloat16, at half the logits' memory: the CPU's
    products of a bfloat16 head round them so anyway. With a frozen head nothing waits but a factor a row."""
    return (
        head.weight.dtype == torch.bfloat16 and head.softcap is None and wanted[1] and not wanted[2]
    )


def gradient_of_logits(scored: Scored, coefficients: Tensor, head: Head) -> Tensor:
    """`[r, V]`: coefficient of a row times d log-prob / d (x W^T + bias), in the dtype of the logits, which it
    overwrites if it can."""
    arguments = _backward_arguments(scored, coefficients)
    if head.softcap is None:
        operators.seq_logp_backward_(*arguments)
        return head.backward_through_activation(scored.logits, scored.logits)
    return head.backward_through_activation(
        operators.seq_logp_backward(*arguments)[0], scored.logits
    )


def write_gradient(scored: Scored, coefficients: Tensor, head: Head, out: Tensor) -> None:
    """The same, rounded once to the dtype of out `[r, V]`: without a soft-cap in one pass, which reads the logits and
    writes it."""
    if head.softcap is None:
        if head.logit_scale != 1.0:
            coefficients = coefficients * head.logit_scale
        arguments = _backward_arguments(scored, coefficients)
        operators.seq_logp_backward_out(*arguments, out.unsqueeze(0))
    else:
        out.copy_(gradient_of_logits(scored, coefficients, head))


def _backward_arguments(scored: Scored, coefficients: Tensor) -> tuple[Any, ...]:
    logits = scored.logits.unsqueeze(0)
    return (
        None, coefficients.unsqueeze(0), logits, scored.targets.unsqueeze(0),
        *(values.unsqueeze(0) for values in scored.statistics), logits.new_ones(1), NONE_IGNORED, False,
    )  # fmt: skip


def gradient_of_entropy(scored: Scored, coefficients: Tensor, head: Head) -> Tensor:
    """`[r, V]`: coefficient of a row times d entropy / d (x W^T + bias), in a new matrix."""
    logps = scored.logits.log_softmax(-1)
    weights = logps.exp()
    logps = logps.masked_fill_(weights == 0, 0.0)  # 0 log 0 = 0
    entropy = -(weights * logps).sum(-1, keepdim=True)
    gradient = logps.add_(entropy).mul_(weights).mul_(-coefficients.unsqueeze(1))
    return head.backward_through_activation(gradient, scored.logits)


def gradient_of_tile(
    logits: Tensor,
    first: int,
    targets: Tensor,
    statistics: Statistics,
    coefficients: Tensor,
    head: Head,
) -> Tensor:
    """The same for vocabulary entries from `first` on, logits `[r, v]`, from the statistics of whole rows."""
    z = logits if head.softcap is None else logits.clone()
    gradient = z.sub_(statistics.row_max.unsqueeze(1)).exp_()
    gradient *= (-coefficients / statistics.row_sum).unsqueeze(1)
    column = targets - first
    inside = (column >= 0) & (column < logits.shape[1])
    column = column.clamp(0, logits.shape[1] - 1).unsqueeze(1)
    # 1 - p without cancellation.
    of_target = (coefficients * -torch.expm1(statistics.tokens)).unsqueeze(1)
    of_target = torch.where(inside.unsqueeze(1), of_target, gradient.gather(1, column))
    gradient.scatter_(1, column, of_target)
    return head.backward_through_activation(gradient, logits)


class Gradients:
    """Where the three gradients of a pass are gathered, for the inputs that ask for them; `dtype` is that of
    weight and bias as parameters."""

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        wanted: tuple[bool, bool, bool],
        rows: int,
        dtype: torch.dtype,
    ) -> None:
        wide = statistics_dtype(hidden.dtype)
        self.head, self.dtype = head, dtype
        self.hidden = torch.zeros_like(hidden) if wanted[0] else None
        self.weight = WeightGradient(head.weight, rows, dtype) if wanted[1] else None
        self.bias = (
            torch.zeros_like(head.bias, dtype=wide) if wanted[2] and head.bias is not None else None
        )

    def add(self, gradient: Tensor, states: Tensor, index: Tensor) -> None:
        """From the gradient of the logits of the rows that `index` took from the hidden states."""
        if self.weight is not None:
            self.weight.start(states.shape[0])
        if self.hidden is not None:
            add_rows(self.hidden, index, self.head.gradient_of_rows(gradient))
        self._add_to_head(gradient, states, slice(0, gradient.shape[1]))  # last: may overwrite it

    def add_kept(self, kept: Tensor, coefficients: Tensor, states: Tensor, index: Tensor) -> None:
        """From d log-prob / d logits `[r, V]` of rows whose coefficients are known now. For the weight the
        coefficients are multiplied into the states, which are few, and rounded once more."""
        factors = coefficients.unsqueeze(1)
        if self.weight is not None:
            self.weight.start(states.shape[0])
            whole = slice(0, kept.shape[1])
            self.weight.add(kept, (states * factors).to(states.dtype), whole)
        if self.hidden is not None:
            add_rows(self.hidden, index, self.head.gradient_of_rows(kept).mul_(factors))

    def add_by_tiles(
        self,
        states: Tensor,
        targets: Tensor,
        statistics: Statistics,
        coefficients: Tensor,
        buffer: LogitsBuffer,
    ) -> Tensor | None:
        """From rows whose statistics and coefficients are known: their logits are computed again, a part of
        the vocabulary at a time, so that the weight's gradient is passed over once for all of them. Returns
        the rows' own gradient `[r, H]`."""
        vocab = self.head.weight.shape[0]
        of_rows: Tensor | None = None
        if self.weight is not None:
            self.weight.start(states.shape[0])
        for first in range(0, vocab, TILE):
            tile = slice(first, min(first + TILE, vocab))
            head = self.head.tile(tile)
            gradient = gradient_of_tile(
                head.logits(states, buffer), first, targets, statistics, coefficients, head
            )
            self._add_to_head(gradient, states, tile)
            if self.hidden is not None:
                part = head.gradient_of_rows(gradient)
                of_rows = part if of_rows is None else of_rows.add_(part)
        return of_rows

    def _add_to_head(self, gradient: Tensor, states: Tensor, tile: slice) -> None:
        if self.bias is not None:
            self.bias[tile] += gradient.sum(0, dtype=self.bias.dtype)
        if self.weight is not None:
            self.weight.add(gradient, states, tile)

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        weight = None if self.weight is None else self.weight.finish()
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return self.hidden, weight, bias


# --- from tokens to sequences and back ----------------------------------------------------------------


class _SegmentSums(torch.autograd.Function):
    """float64 sums of consecutive values, `counts` at a time; torch's own has no second derivative."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(counts)
        ctx.size, ctx.dtype = values.shape[0], values.dtype
        # unsafe: its check of the counts would wait for the device.
        return torch.segment_reduce(values.double(), "sum", lengths=counts, axis=0, unsafe=True)

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor, None]:
        (counts,) = ctx.saved_tensors
        return grad_sums.to(ctx.dtype).repeat_interleave(counts, output_size=ctx.size), None


def sums_of_sequences(
    tokens: Tensor, counts: Tensor, weights: Tensor | None, average: bool
) -> Tensor:
    """`[s]`: sums, or means over the rows, of consecutive tokens times their weights."""
    sums = _SegmentSums.apply(tokens if weights is None else tokens * weights, counts)
    return (sums / counts.clamp(min=1) if average else sums).to(tokens.dtype)


def coefficients_of_rows(
    per_sequence: Tensor, counts: Tensor, weights: Tensor | None, average: bool, size: int
) -> Tensor:
    """`[size]`: the gradient of `sums_of_sequences` for the tokens."""
    if average:
        per_sequence = (per_sequence / counts.clamp(min=1).double()).to(per_sequence.dtype)
    per_row = per_sequence.repeat_interleave(counts, output_size=size)
    return per_row if weights is None else per_row * weights
