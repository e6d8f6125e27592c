"""The user's loss on the units of a pass: sequence log-probs in, a coefficient a row out."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyfast_dpo.logprobs.plan import Chunk, Plan
from pyfast_dpo.logprobs.scores import coefficients_of_rows, sums_of_sequences
from pyfast_dpo.logprobs.statistics import LinearStatistics
from pyfast_dpo.ops.dtypes import statistics_dtype

# Loss of the units in the slice from their log-probs [group, n]: a scalar, or (scalar, tensors [n] to keep).
LossFunction = Callable[[Tensor, slice], Tensor | tuple[Tensor, tuple[Tensor, ...]]]


class LossOptions(NamedTuple):
    plan: Plan
    row_weights: Tensor | None  # [R]
    average: bool
    statistics: bool
    loss_fn: LossFunction


class UnitLosses:
    """The user's loss of the units of one chunk after the other: its sum, and what comes out beside it."""

    def __init__(self, like: Tensor, options: LossOptions, differentiate: bool) -> None:
        plan, wide = options.plan, statistics_dtype(like.dtype)
        self.options, self.differentiate = options, differentiate
        self.value = like.new_zeros((), dtype=torch.float64)
        self.logps = like.new_empty((plan.group, plan.units()), dtype=wide)
        self.outputs: dict[int, tuple[Tensor, ...]] = {}  # by first unit
        self.statistics = empty_statistics(like, plan.rows.targets) if options.statistics else None

    def measure(self, chunk: Chunk, logits: list[LinearStatistics]) -> None:
        """Writes the statistics of the chunk's pieces."""
        if self.statistics is None or not logits:
            return
        for values, parts in zip(self.statistics, zip(*logits, strict=True), strict=True):
            chunk.write(values, torch.cat(parts))

    def coefficients(self, chunk: Chunk, tokens: Tensor) -> Tensor | None:
        """d loss / d log-prob of every row of the chunk, from the log-probs of all of them."""
        plan, average = self.options.plan, self.options.average
        weights = None if self.options.row_weights is None else chunk.of(self.options.row_weights)
        counts = plan.rows.counts.reshape(plan.group, -1)[:, chunk.units].flatten()
        own = self.logps[:, chunk.units]
        own.copy_(sums_of_sequences(tokens, counts, weights, average).view_as(own))
        value, outputs, per_sequence = _call(
            self.options.loss_fn, own, chunk.units, self.differentiate
        )
        self.value += value
        self.outputs[chunk.units.start] = outputs
        if per_sequence is None:
            return None
        return coefficients_of_rows(
            per_sequence.flatten(), counts, weights, average, tokens.shape[0]
        )

    def constants(self) -> tuple[Tensor, ...]:
        """What has no gradient: log-probs, statistics, outputs of the loss."""
        columns = zip(*(self.outputs[unit] for unit in sorted(self.outputs)), strict=True)
        return (
            self.logps.flatten(),
            *(self.statistics or ()),
            *(torch.cat(column) for column in columns),
        )


def _call(
    loss_fn: LossFunction, logps: Tensor, units: slice, differentiate: bool
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """(share of the loss, outputs, its gradient for the log-probs) of the user's function."""
    with torch.enable_grad():
        leaf = logps.detach().clone().requires_grad_(differentiate)
        returned = loss_fn(leaf, units)
        value, outputs = returned if isinstance(returned, tuple) else (returned, ())
        if not isinstance(value, Tensor) or value.dim() != 0:
            raise ValueError(
                f"fused_linear_loss: loss_fn must return a scalar tensor, got {value!r}"
            )
        if not differentiate:
            return value.detach(), tuple(output.detach() for output in outputs), None
        if not value.requires_grad:
            raise ValueError(
                "fused_linear_loss: the value of loss_fn must depend on its log-probs under autograd"
            )
        (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), tuple(output.detach() for output in outputs), gradient


def empty_statistics(like: Tensor, targets: Tensor) -> LinearStatistics:
    entropy, mean, log_sum_sq = (
        torch.empty_like(targets, dtype=statistics_dtype(like.dtype)) for _ in range(3)
    )
    return LinearStatistics(entropy, mean, torch.empty_like(targets, dtype=torch.bool), log_sum_sq)
