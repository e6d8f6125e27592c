"""From a model's call to the log-probs of its responses, and where the logits come from.

A model is called as `model(..., project=function)`: its body runs, and `function` gets a *projection*, which
turns hidden states into log-probs and losses; what it returns is what the call returns. So the head's weight is
used inside the model's own call, where DDP and FSDP expect it, and a logits matrix never exists.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pyfast_dpo.layout.attention import takes_shared_prompts
from pyfast_dpo.layout.batches import Batch, completion_rows, model_inputs
from pyfast_dpo.logprobs.fused_policy import (
    FusedPolicyLoss,
    entropy_slope,
    fused_linear_policy_loss,
    inputs_of_rows,
    policy_loss_of_logits,
)
from pyfast_dpo.logprobs.head import Head
from pyfast_dpo.logprobs.linear import FusedLinearLoss, fused_linear_loss, linear_token_logps
from pyfast_dpo.logprobs.logits import token_logps
from pyfast_dpo.logprobs.rows import CompletionRows
from pyfast_dpo.logprobs.scores import sums_of_sequences
from pyfast_dpo.logprobs.statistics import torch_row_statistics
from pyfast_dpo.logprobs.unit_losses import LossFunction
from pyfast_dpo.model.causal_lm import body_of, causal_lm_of, head_of
from pyfast_dpo.ops.checks import check_positive
from pyfast_dpo.ops.dtypes import statistics_dtype

RouterLogits = tuple[Tensor, ...]  # of every layer, [tokens, experts]


class Projection(Protocol):
    """What a model's call hands to `project`."""

    router_logits: RouterLogits | None

    def states(self, rows: CompletionRows) -> Tensor:
        """What the model computed for the scored rows, `[R, ...]`: hidden states or logits."""

    def sequence_logps(self, rows: CompletionRows, *, row_weights: Tensor | None = None) -> Tensor:
        """`[S]` sums of the log-probs of the scored tokens, weighted by `row_weights` `[R]`."""

    def token_logps(self, rows: CompletionRows, temperature: float = 1.0) -> Tensor:
        """`[R]` log-probs of the scored tokens under the logits over the temperature."""

    def loss(
        self,
        rows: CompletionRows,
        loss_fn: LossFunction,
        *,
        group: int | None = 2,
        row_weights: Tensor | None = None,
    ) -> FusedLinearLoss:
        """As `pyfast_dpo.fused_linear_loss`, with statistics."""

    def policy_loss(
        self,
        rows: CompletionRows,
        *,
        advantages: Tensor,
        normalizer: Tensor | float,
        temperature: float = 1.0,
        entropy_coef: float = 0.0,
        entropy_normalizer: Tensor | float | None = None,
        **options: Any,
    ) -> FusedPolicyLoss:
        """As `pyfast_dpo.fused_linear_policy_loss`, with statistics."""


class LinearProjection:
    """From hidden states `[..., H]` and the head, in chunks of the scored rows."""

    def __init__(
        self, hidden: Tensor, head: Head, router_logits: RouterLogits | None = None
    ) -> None:
        self._hidden, self._head = hidden, head
        self.router_logits = router_logits

    def states(self, rows: CompletionRows) -> Tensor:
        return self._hidden.flatten(0, -2)[rows.index]

    def sequence_logps(self, rows: CompletionRows, *, row_weights: Tensor | None = None) -> Tensor:
        return sums_of_sequences(self.token_logps(rows), rows.counts, row_weights, average=False)

    def token_logps(self, rows: CompletionRows, temperature: float = 1.0) -> Tensor:
        check_positive("token_logps", "temperature", temperature)
        head = self._head.at_temperature(temperature)
        return linear_token_logps(self._hidden, rows=rows, **head._asdict())

    def loss(self, rows: CompletionRows, loss_fn: LossFunction, **options: Any) -> FusedLinearLoss:
        return fused_linear_loss(
            self._hidden, labels=None, loss_fn=loss_fn, rows=rows, statistics=True, **self._head._asdict(), **options
        )  # fmt: skip

    def policy_loss(self, rows: CompletionRows, **options: Any) -> FusedPolicyLoss:
        return fused_linear_policy_loss(
            self._hidden, rows=rows, statistics=True, **self._head._asdict(), **options
        )


class LogitsProjection:
    """From the logits `[..., V]` that the model itself has made, whatever its head does."""

    def __init__(self, logits: Tensor, router_logits: RouterLogits | None = None) -> None:
        self._logits = logits.flatten(0, -2)
        self.router_logits = router_logits

    def states(self, rows: CompletionRows) -> Tensor:
        return self._logits[rows.index]

    def sequence_logps(self, rows: CompletionRows, *, row_weights: Tensor | None = None) -> Tensor:
        return sums_of_sequences(self.token_logps(rows), rows.counts, row_weights, average=False)

    def token_logps(self, rows: CompletionRows, temperature: float = 1.0) -> Tensor:
        return token_logps(self._logits_at("token_logps", rows, temperature), rows.targets)

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

    def policy_loss(
        self,
        rows: CompletionRows,
        *,
        temperature: float = 1.0,
        entropy_coef: float = 0.0,
        entropy_normalizer: Tensor | float | None = None,
        **options: Any,
    ) -> FusedPolicyLoss:
        logits = self._logits_at("policy_loss", rows, temperature)
        inputs = inputs_of_rows("policy_loss", logits, rows, **options)
        entropy = entropy_slope("policy_loss", entropy_coef, entropy_normalizer, logits)
        return policy_loss_of_logits(logits, rows, inputs, entropy)

    def _logits_at(self, function: str, rows: CompletionRows, temperature: float) -> Tensor:
        check_positive(function, "temperature", temperature)
        logits = self.states(rows)
        if temperature == 1.0:
            return logits
        return logits.to(statistics_dtype(logits.dtype)) / temperature


# --- the model's call -------------------------------------------------------------------------------


class _Call:
    """A call with `project`, while it runs."""

    def __init__(
        self, model: nn.Module, project: Callable[[Projection], Any], options: dict[str, Any]
    ) -> None:
        self.model, self.project = model, project
        self.body_options = options  # what the model's body gets beside its other keywords
        self.hidden: Tensor | None = None
        self.router_logits: RouterLogits | None = None
        self.autocast: dict[str, Any] = {"device_type": "cpu", "enabled": False}


class _Calls(threading.local):
    def __init__(self) -> None:
        self.running: list[_Call] = []


_calls = _Calls()


def take_projections(model: Any, *, own_logits: bool = False) -> Callable[[], None]:
    """Makes a causal language model of `transformers`, or a PEFT model around one, understand the keyword
    `project` in its call.

    The model's own forward runs, with an lm_head that gets no rows; what the head was to get is kept. All of it
    by hooks, so that `forward` stays the model's own for everybody who reads or calls it.

    Args:
        own_logits: hand out a `LogitsProjection`, for heads that are more than a weight.

    Returns:
        A function that undoes it.
    """
    inner = causal_lm_of(model)
    body = body_of(inner)
    handles = [
        model.register_forward_pre_hook(_begin, with_kwargs=True),
        body.register_forward_pre_hook(_enter_body, with_kwargs=True),
        body.register_forward_hook(_leave_body),
        # before hooks of others, such as FSDP's, which puts weights away
        model.register_forward_hook(partial(_end, own_logits), prepend=True, always_call=True),
    ]
    if not own_logits:
        handles.append(inner.get_output_embeddings().register_forward_pre_hook(_withhold_rows))

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


@torch.compiler.disable
def _begin(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    if kwargs.get("project") is None:
        return None
    kwargs = dict(kwargs)
    names = ("shared_prompt_layout", "output_router_logits")
    project = kwargs.pop("project")
    options = {name: kwargs.pop(name) for name in names if name in kwargs}
    if "shared_prompt_layout" in options and not takes_shared_prompts(causal_lm_of(model)):
        raise ValueError(
            f"{type(model).__name__}: the batch holds shared prompts, and the model does not take them here"
        )
    _calls.running.append(_Call(model, project, options))
    return args, kwargs


@torch.compiler.disable
def _enter_body(body: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    if not _calls.running:
        return None
    call = _calls.running[-1]
    device = next(body.parameters()).device.type
    call.autocast = {
        "device_type": device,
        "enabled": torch.is_autocast_enabled(device),
        "dtype": torch.get_autocast_dtype(device),
    }
    return args, {**kwargs, **call.body_options}


@torch.compiler.disable
def _leave_body(body: nn.Module, args: Any, outputs: Any) -> None:
    if _calls.running:
        _calls.running[-1].router_logits = getattr(outputs, "router_logits", None)


@torch.compiler.disable
def _withhold_rows(layer: nn.Module, args: Any) -> Any:
    if not _calls.running:
        return None
    call, hidden = _calls.running[-1], args[0]
    if call.hidden is None:
        call.hidden = hidden
    elif hidden.shape[-2] > 0:
        raise ValueError(f"{type(call.model).__name__}: the lm_head runs more than once in a call")
    return (hidden[..., :0, :], *args[1:])


@torch.compiler.disable
def _end(own_logits: bool, model: nn.Module, args: Any, outputs: Any) -> Any:
    if not _calls.running or _calls.running[-1].model is not model:
        return outputs
    call = _calls.running.pop()
    if outputs is None:  # the model has raised an error
        return None
    projection: Projection
    if own_logits:
        projection = LogitsProjection(outputs.logits, call.router_logits)
    elif call.hidden is None:
        raise ValueError(f"{type(model).__name__}: the lm_head did not run in the model's call")
    else:
        projection = LinearProjection(call.hidden, head_of(causal_lm_of(model)), call.router_logits)
    with torch.autocast(**call.autocast):  # what is wrapped around forward has ended it
        return call.project(projection)


# --- batches ----------------------------------------------------------------------------------------


def score_responses(model: nn.Module, batch: Batch) -> Tensor:
    """`[S]` log-probs of the responses of a batch, for a model that takes projections."""
    rows = completion_rows(batch)
    logps = model(**model_inputs(batch), project=lambda projection: projection.sequence_logps(rows))
    if not isinstance(logps, Tensor):
        raise ValueError(
            f"score_responses: {type(model).__name__} takes no projections; see pyfast_dpo.model.prepare"
        )
    return logps
