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


class EntropyGradient(NamedTuple):
    """What the entropies of the rows bring to a gradient, `[r]` each."""

    entropy: Tensor
    coefficients: Tensor

    def of(self, rows: slice) -> EntropyGradient:
        return EntropyGradient(self.entropy[rows], self.coefficients[rows])


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


def gradient_of_logits(
    scored: Scored, coefficients: Tensor | None, head: Head, of_entropy: EntropyGradient | None = None
) -> Tensor:  # fmt: skip
    """`[r, V]`: coefficient of a row times d log-prob / d (x W^T + bias), and the entropy's beside it, in the dtype
    of the logits, which it overwrites if it can."""
    logits = scored.logits
    out = logits if head.softcap is None else torch.empty_like(logits)
    _write(scored, coefficients, of_entropy, out)
    return head.backward_through_activation(out, logits)


def write_gradient(
    scored: Scored, coefficients: Tensor | None, head: Head, out: Tensor, of_entropy: EntropyGradient | None = None
) -> None:  # fmt: skip
    """The same, rounded once to the dtype of out `[r, V]`: without a soft-cap in one pass, which reads the logits and
    writes it."""
    if head.softcap is not None:
        out.copy_(gradient_of_logits(scored, coefficients, head, of_entropy))
        return
    if head.logit_scale != 1.0:
        if coefficients is not None:
            coefficients = coefficients * head.logit_scale
        if of_entropy is not None:
            scaled = of_entropy.coefficients * head.logit_scale
            of_entropy = of_entropy._replace(coefficients=scaled)
    _write(scored, coefficients, of_entropy, out)


def _write(
    scored: Scored, coefficients: Tensor | None, of_entropy: EntropyGradient | None, out: Tensor
) -> None:
    """Before the head's activation."""
    logits = scored.logits.unsqueeze(0)
    operators.seq_logp_backward_out(
        None, None if coefficients is None else coefficients.unsqueeze(0), logits, scored.targets.unsqueeze(0),
        *(values.unsqueeze(0) for values in scored.statistics), logits.new_ones(1), NONE_IGNORED, False,
        out.unsqueeze(0), *(values.unsqueeze(0) for values in of_entropy or ()),
    )  # fmt: skip


def gradient_of_tile(
    logits: Tensor,
    first: int,
    targets: Tensor,
    statistics: Statistics,
    coefficients: Tensor,
    head: Head,
) -> Tensor:
    """`gradient_of_logits` for vocabulary entries from `first` on, logits `[r, v]`, from the statistics of whole
    rows."""
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


def rows_with_gradient(coefficients: Tensor, tokens: Tensor) -> Tensor | None:
    """On the CPU: which rows have a coefficient (or are NaN, which 0 does not hide), where products without the
    others have fewer panels; else None."""
    present = ((coefficients != 0) | tokens.isnan()).nonzero().squeeze(1)
    panel = operators.HEAD_PANEL_ROWS
    if -(-present.shape[0] // panel) == -(-tokens.shape[0] // panel):
        return None
    return present


def at_the_end(matrix: Tensor, rows: Tensor) -> Tensor:
    """The last rows of the matrix, to which these, in ascending order, were moved: where `WeightGradient.lend` expects
    them, and in no fresh memory."""
    place = matrix.shape[0]
    for row in reversed(rows.tolist()):
        place -= 1
        if row != place:
            matrix[place].copy_(matrix[row])
    return matrix[place:]


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

    def add(
        self,
        scored: Scored,
        coefficients: Tensor | None,
        states: Tensor,
        index: Tensor,
        of_entropy: EntropyGradient | None = None,
    ) -> None:
        """Of the rows that `index` took from the hidden states. Their logits are overwritten."""
        rows = states.shape[0]
        if coefficients is not None and of_entropy is None:
            present = rows_with_gradient(coefficients, scored.statistics.tokens)
            if present is not None:
                scored = Scored(
                    at_the_end(scored.logits, present),
                    scored.targets[present],
                    Statistics(*(values[present] for values in scored.statistics)),
                )
                coefficients, states, index = coefficients[present], states[present], index[present]
        if not self._start(rows, states.shape[0]):
            return
        gradient = gradient_of_logits(scored, coefficients, self.head, of_entropy)
        if self.hidden is not None:
            add_rows(self.hidden, index, self.head.gradient_of_rows(gradient))
        self._add_to_head(gradient, states, slice(0, gradient.shape[1]))  # last: may overwrite it

    def add_kept(
        self, kept: Tensor, coefficients: Tensor, tokens: Tensor, states: Tensor, index: Tensor
    ) -> None:
        """From d log-prob / d logits `[r, V]` of rows whose coefficients are known now. For the weight the
        coefficients are multiplied into the states, which are few, and rounded once more."""
        rows, present = states.shape[0], rows_with_gradient(coefficients, tokens)
        if present is not None:
            kept = at_the_end(kept, present)
            coefficients, states, index = coefficients[present], states[present], index[present]
        if not self._start(rows, states.shape[0]):
            return
        factors = coefficients.unsqueeze(1)
        if self.weight is not None:
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

    def _start(self, rows: int, present: int) -> bool:
        """Before a part of so many rows, of which some have a gradient; whether any has."""
        if self.weight is not None:
            if present or not rows:
                self.weight.start(rows)
            else:
                self.weight.skip(rows)
        return bool(present or not rows)

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
