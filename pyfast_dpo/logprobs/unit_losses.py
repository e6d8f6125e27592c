"""The user's loss on the units of a pass: sequence log-probs in, a coefficient a row out."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyfast_dpo.logprobs.chunk_losses import ChunkLosses
from pyfast_dpo.logprobs.plan import Chunk, Plan
from pyfast_dpo.logprobs.scores import coefficients_of_rows, sums_of_sequences

# Loss of the units in the slice from their log-probs [group, n]: a scalar, or (scalar, tensors [n] to keep).
LossFunction = Callable[[Tensor, slice], Tensor | tuple[Tensor, tuple[Tensor, ...]]]


class LossOptions(NamedTuple):
    plan: Plan
    row_weights: Tensor | None  # [R]
    average: bool
    statistics: bool
    loss_fn: LossFunction

    def losses(self, like: Tensor, differentiate: bool) -> UnitLosses:
        return UnitLosses(like, self, differentiate)


class UnitLosses(ChunkLosses):
    """The user's loss of the units of one chunk after the other: its sum, and what comes out beside it."""

    def __init__(self, like: Tensor, options: LossOptions, differentiate: bool) -> None:
        super().__init__(like, options.plan, options.statistics, differentiate)
        self.options = options
        self.value = like.new_zeros((), dtype=torch.float64)
        self.logps = like.new_empty((self.plan.group, self.plan.units()), dtype=self.wide)
        self.outputs: dict[int, tuple[Tensor, ...]] = {}  # by first unit

    def coefficients(self, chunk: Chunk, tokens: Tensor) -> Tensor | None:
        plan, average = self.plan, self.options.average
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

    def finish(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        columns = zip(*(self.outputs[unit] for unit in sorted(self.outputs)), strict=True)
        outputs = (torch.cat(column) for column in columns)
        return self.value.to(self.wide), (
            self.logps.flatten(), *(self.statistics or ()), *outputs
        )  # fmt: skip


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
