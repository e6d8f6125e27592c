"""From a model's call to the log-probs of its responses, and where the logits come from.

A model is called as `model(..., project=function)`: its body runs, and `function` gets a *projection*, which
turns hidden states into log-probs and losses. So the head's weight is used inside the model's own call, where
DDP and FSDP expect it, and a logits matrix never exists.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any, Protocol

from torch import Tensor, nn

from pyfast_dpo.layout.batches import Batch, completion_rows, model_inputs
from pyfast_dpo.logprobs.head import Head
from pyfast_dpo.logprobs.linear import FusedLinearLoss, fused_linear_loss, linear_token_logps
from pyfast_dpo.logprobs.logits import token_logps
from pyfast_dpo.logprobs.rows import CompletionRows
from pyfast_dpo.logprobs.scores import sums_of_sequences
from pyfast_dpo.logprobs.statistics import torch_row_statistics
from pyfast_dpo.logprobs.unit_losses import LossFunction
from pyfast_dpo.model.causal_lm import head_of

RouterLogits = tuple[Tensor, ...]  # of every layer, [tokens, experts]


class Projection(Protocol):
    """What a model's call hands to `project`."""

    router_logits: RouterLogits | None

    def states(self, rows: CompletionRows) -> Tensor:
        """What the model computed for the scored rows, `[R, ...]`: hidden states or logits."""

    def sequence_logps(self, rows: CompletionRows, *, row_weights: Tensor | None = None) -> Tensor:
        """`[S]` sums of the log-probs of the scored tokens, weighted by `row_weights` `[R]`."""

    def loss(
        self,
        rows: CompletionRows,
        loss_fn: LossFunction,
        *,
        group: int | None = 2,
        row_weights: Tensor | None = None,
    ) -> FusedLinearLoss:
        """As `pyfast_dpo.fused_linear_loss`, with statistics."""


class LinearProjection:
    """From hidden states `[..., H]` and the head, in chunks of the scored rows."""

    def __init__(
        self, hidden: Tensor, head: Head, router_logits: RouterLogits | None = None
    ) -> None:
        self._hidden, self._weight = hidden, head.weight
        self.router_logits = router_logits
        self._options: dict[str, Any] = {
            "bias": head.bias, "logit_scale": head.logit_scale, "softcap": head.softcap,
        }  # fmt: skip

    def states(self, rows: CompletionRows) -> Tensor:
        return self._hidden.flatten(0, -2)[rows.index]

    def sequence_logps(self, rows: CompletionRows, *, row_weights: Tensor | None = None) -> Tensor:
        tokens = linear_token_logps(self._hidden, self._weight, rows=rows, **self._options)
        return sums_of_sequences(tokens, rows.counts, row_weights, average=False)

    def loss(self, rows: CompletionRows, loss_fn: LossFunction, **options: Any) -> FusedLinearLoss:
        return fused_linear_loss(
            self._hidden,
            self._weight,
            None,
            loss_fn,
            rows=rows,
            statistics=True,
            **self._options,
            **options,
        )


class LogitsProjection:
    """From the logits `[..., V]` that the model itself has made, whatever its head does."""

    def __init__(self, logits: Tensor, router_logits: RouterLogits | None = None) -> None:
        self._logits = logits.flatten(0, -2)
        self.router_logits = router_logits

    def states(self, rows: CompletionRows) -> Tensor:
        return self._logits[rows.index]

    def sequence_logps(self, rows: CompletionRows, *, row_weights: Tensor | None = None) -> Tensor:
        tokens = token_logps(self.states(rows), rows.targets)
        return sums_of_sequences(tokens, rows.counts, row_weights, average=False)

    def loss(
        self,
        rows: CompletionRows,
        loss_fn: LossFunction,
        *,
        group: int | None = 2,
        row_weights: Tensor | None = None,
    ) -> FusedLinearLoss:
        logits = self.states(rows)
        logps = sums_of_sequences(
            token_logps(logits, rows.targets), rows.counts, row_weights, average=False
        )
        stacked = logps.view(len(rows.lengths) if group is None else group, -1)
        returned = loss_fn(stacked, slice(0, stacked.shape[1]))
        loss, outputs = returned if isinstance(returned, tuple) else (returned, ())
        statistics = torch_row_statistics(logits.float(), rows.targets)
        return FusedLinearLoss(loss.to(logps.dtype), logps.detach(), outputs, statistics)


# --- the model's call -------------------------------------------------------------------------------


def take_projections(model: Any, *, own_logits: bool = False) -> None:
    """Makes a causal language model of `transformers` understand the keyword `project` in its call.

    Args:
        own_logits: hand out a `LogitsProjection`, for heads that are more than a weight.
    """
    forward = getattr(model, "_forward_without_projection", model.forward)
    model._forward_without_projection = forward
    make = _from_logits if own_logits else _from_hidden
    model.forward = MethodType(partial(_forward, make), model)


def _forward(
    make: Callable[..., Projection], model: Any, *args: Any, project: Any = None, **kwargs: Any
) -> Any:
    if project is None:
        return model._forward_without_projection(*args, **kwargs)
    return project(make(model, *args, **kwargs))


def _from_hidden(model: Any, *args: Any, **kwargs: Any) -> Projection:
    given = {name: value for name, value in kwargs.items() if value is not None}  # no labels=None
    outputs = model.base_model(*args, **given)
    return LinearProjection(outputs[0], head_of(model), getattr(outputs, "router_logits", None))


def _from_logits(model: Any, *args: Any, **kwargs: Any) -> Projection:
    outputs = model._forward_without_projection(*args, **kwargs)
    return LogitsProjection(outputs.logits, getattr(outputs, "router_logits", None))


# --- batches ----------------------------------------------------------------------------------------


def score_responses(model: nn.Module, batch: Batch) -> Tensor:
    """`[S]` log-probs of the responses of a batch, for a model that takes projections."""
    rows = completion_rows(batch)
    return model(**model_inputs(batch), project=lambda projection: projection.sequence_logps(rows))
