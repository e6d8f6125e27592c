"""From hidden states and the lm_head's weight to log-probs and losses, without a logits matrix.

Only scored positions are projected: prompt and padding never reach the lm_head. Logits exist for one chunk
of whole units at a time, in float32 whatever the inputs, within `max_chunk_bytes`. With a trainable head a
loss costs three matrix products of the scored rows, with a frozen head (LoRA) two, the reference one.
Under torch.compile these functions run between two graphs (a graph break).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyfast_dpo.logprobs import oracle
from pyfast_dpo.logprobs.chunks import LinearLogps
from pyfast_dpo.logprobs.head import Head
from pyfast_dpo.logprobs.linear_checks import (
    check_labels_or_rows,
    check_row_weights,
    checked_head,
    completion_rows,
    outside_graphs,
    rows_in_budget,
    under_autocast,
)
from pyfast_dpo.logprobs.linear_loss import linear_loss
from pyfast_dpo.logprobs.plan import Plan
from pyfast_dpo.logprobs.rows import CompletionRows
from pyfast_dpo.logprobs.scores import sums_of_sequences
from pyfast_dpo.logprobs.statistics import LinearStatistics, torch_row_statistics
from pyfast_dpo.logprobs.unit_losses import LossFunction, LossOptions
from pyfast_dpo.ops.checks import check_flags, describe
from pyfast_dpo.ops.dispatch import Impl, use_kernels_for
from pyfast_dpo.ops.dtypes import statistics_dtype


class FusedLinearLoss(NamedTuple):
    """Result of `fused_linear_loss`; only `loss` carries a gradient."""

    loss: Tensor  # scalar, the sum of the shares that loss_fn returned
    logps: Tensor  # [S]
    outputs: tuple[Tensor, ...]  # [U] each, what loss_fn returned beside its share
    statistics: LinearStatistics | None  # [R] each, with statistics=True


@outside_graphs
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None = None,
    *,
    rows: CompletionRows | None = None,
    bias: Tensor | None = None,
    shift: bool = False,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    max_chunk_bytes: int | None = None,
    validate: bool | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Log-probability of every label under logits = softcap * tanh(logit_scale (hidden W^T + bias) / softcap).

    Args:
        hidden: `[..., T, H]`, float64, float32, bfloat16 or float16.
        weight: `[V, H]`, in the dtype and on the device of hidden; bias: `[V]`.
        labels: `[..., T]` int64 in [0, V) or `ignore_index`; shift: as in `token_logps`; or
        rows: which hidden states score which tokens; then nothing waits for the device, and `shift` and
            `ignore_index` have no meaning.
        logit_scale, softcap: what the model does to its logits; softcap None: nothing.
        max_chunk_bytes: bound of the memory for float32 logits; None: 64 MiB, on CUDA 512 MiB. For a loss with
            a trainable head on the CPU it bounds what a float32 weight's gradient, whose memory holds logits
            until it is computed, must have beside it; with a bfloat16 head it bounds the gradients of the
            logits that wait for the loss, and half as much is for logits. On CUDA those wait beside it, in the
            dtype of the weight: as many rows as take the memory of a float32 gradient of the weight, or one
            unit of the loss if that is larger.
        validate, impl: as in `token_logps`.

    Returns:
        `[..., T]`, 0 where the label is ignored; with `rows` `[R]`. float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: wrong types, dtypes, shapes, devices; sharded or quantized weights; a budget
        too small for one row of logits.
    """
    scored, found = _scored_tokens(
        "linear_token_logps", hidden, weight, labels, rows, bias, shift, ignore_index,
        logit_scale, softcap, max_chunk_bytes, validate, impl,
    )  # fmt: skip
    if labels is None:
        return scored
    tokens = scored.new_zeros(labels.numel()).index_put((found.index,), scored)
    return tokens.view(labels.shape)


@outside_graphs
def linear_sequence_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None = None,
    *,
    rows: CompletionRows | None = None,
    bias: Tensor | None = None,
    average: bool = False,
    shift: bool = False,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    max_chunk_bytes: int | None = None,
    validate: bool | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Log-probability of every sequence: the sum, or with `average` the mean, over its scored positions.

    Args: as `linear_token_logps`, for hidden `[B, T, H]` and labels `[B, T]`, or with `rows`.

    Returns:
        `[B]`, or `[S]` with rows, float32 (float64 for float64 inputs); 0 for a sequence without scored
        positions.
    """
    return sequence_logps_of(
        "linear_sequence_logps", hidden, weight, labels, rows, bias, average, shift, ignore_index,
        logit_scale, softcap, max_chunk_bytes, validate, impl,
    )  # fmt: skip


def sequence_logps_of(
    function: str,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    rows: CompletionRows | None,
    bias: Tensor | None,
    average: bool = False,
    shift: bool = False,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    max_chunk_bytes: int | None = None,
    validate: bool | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """`linear_sequence_logps` for the public function of that name, which errors then name."""
    check_flags(function, average=average)
    scored, found = _scored_tokens(
        function, hidden, weight, labels, rows, bias, shift, ignore_index,
        logit_scale, softcap, max_chunk_bytes, validate, impl,
    )  # fmt: skip
    sums = sums_of_sequences(scored, found.counts, None, average)
    return sums if labels is None else sums.view(labels.shape[:-1])


@outside_graphs
def fused_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    loss_fn: LossFunction,
    *,
    group: int | None = 2,
    rows: CompletionRows | None = None,
    row_weights: Tensor | None = None,
    average: bool = False,
    statistics: bool = False,
    bias: Tensor | None = None,
    shift: bool = False,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    max_chunk_bytes: int | None = None,
    validate: bool | None = None,
    impl: Impl = "auto",
) -> FusedLinearLoss:
    """Any torch loss on sequence log-probs, for three matrix products (two with a frozen head).

    A unit is what the loss couples: the sequences u, U + u, 2 U + u, ... of S = group * U stacked ones. The
    loss is the sum of what `loss_fn` returns for its calls on consecutive units.

    Args:
        hidden, weight, labels, rows, bias, shift, ...: as in `linear_token_logps`; labels None with `rows`.
        loss_fn: `loss_fn(logps, units)`: log-probs `[group, n]` of the n units in the slice `units`, under
            autograd. Returns their share of the loss, a scalar (so divide a mean by all U, not by n), or
            (the scalar, a tuple of tensors `[n]` to keep). Gradients reach hidden, weight and bias only,
            not other tensors of loss_fn. For an empty batch it is called once with n = 0.
        group: 2 for pairs, 1 for unpaired sequences; None for a loss that couples the whole batch: one call
            with log-probs `[S, 1]`. A unit beyond `max_chunk_bytes` is computed twice (a fourth product).
        row_weights: `[R]` constants, in the order of the rows: a sequence's log-prob is then the weighted sum.
        average: divide a sequence's sum by its number of scored rows.
        statistics: fill `FusedLinearLoss.statistics`.

    Returns:
        `FusedLinearLoss`. Double backward raises; use impl="torch" for it.

    Raises:
        TypeError, ValueError: as `linear_token_logps`; a number of sequences that `group` does not divide.
    """
    return loss_of(
        "fused_linear_loss", hidden, weight, labels, loss_fn, group, rows, bias, row_weights, average, statistics,
        shift, ignore_index, logit_scale, softcap, max_chunk_bytes, validate, impl,
    )  # fmt: skip


def loss_of(
    name: str,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    loss_fn: LossFunction,
    group: int | None,
    rows: CompletionRows | None,
    bias: Tensor | None,
    row_weights: Tensor | None = None,
    average: bool = False,
    statistics: bool = False,
    shift: bool = False,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    max_chunk_bytes: int | None = None,
    validate: bool | None = None,
    impl: Impl = "auto",
) -> FusedLinearLoss:
    """`fused_linear_loss` for the public function of that name, which errors then name."""
    check_flags(name, average=average, statistics=statistics)
    if not callable(loss_fn):
        raise TypeError(f"{name}: loss_fn must be a function, got {describe(loss_fn)}")
    head = checked_head(name, hidden, weight, bias, logit_scale, softcap)
    check_labels_or_rows(name, hidden, labels, rows)
    max_rows = rows_in_budget(name, max_chunk_bytes, head)
    found = completion_rows(
        name, hidden, head.weight.shape[0], labels, rows, shift, ignore_index, validate
    )
    check_row_weights(name, found, row_weights)
    plan = Plan(found, _checked_group(name, group, len(found.lengths)), max_rows)
    if not use_kernels_for(name, impl, hidden):
        return _torch_loss(hidden, head, plan, loss_fn, row_weights, average, statistics)
    hidden = under_autocast(hidden)
    if row_weights is not None:
        row_weights = row_weights.to(statistics_dtype(hidden.dtype))
    options = LossOptions(plan, row_weights, average, statistics, loss_fn)
    loss, logps, *others = linear_loss(hidden, head, options)
    if not statistics:
        return FusedLinearLoss(loss, logps, tuple(others), None)
    return FusedLinearLoss(loss, logps, tuple(others[4:]), LinearStatistics(*others[:4]))


def _checked_group(function: str, group: int | None, sequences: int) -> int:
    if group is None:
        return max(sequences, 1)
    if type(group) is not int:
        raise TypeError(f"{function}: group must be an int or None, got {describe(group)}")
    if group < 1 or sequences % group:
        raise ValueError(
            f"{function}: group must be a number of sequences that divides all of them, {sequences}, "
            f"got {group}"
        )
    return group


def _scored_tokens(
    function: str,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    rows: CompletionRows | None,
    bias: Tensor | None,
    shift: bool,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    max_chunk_bytes: int | None,
    validate: bool | None,
    impl: Impl,
) -> tuple[Tensor, CompletionRows]:
    head = checked_head(function, hidden, weight, bias, logit_scale, softcap)
    check_labels_or_rows(function, hidden, labels, rows)
    max_rows = rows_in_budget(function, max_chunk_bytes, head)
    found = completion_rows(
        function, hidden, head.weight.shape[0], labels, rows, shift, ignore_index, validate
    )
    if not use_kernels_for(function, impl, hidden):
        return _torch_tokens(torch_logits(hidden, head, found), found), found
    hidden = under_autocast(hidden)
    (tokens,) = LinearLogps.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        head.weight,
        head.bias,
        (head.logit_scale, head.softcap),
        Plan(found, 1, max_rows),
        False,
    )
    return tokens, found


# --- impl="torch": the whole matrix of the scored rows, differentiable to any order -------------------


def _torch_loss(
    hidden: Tensor,
    head: Head,
    plan: Plan,
    loss_fn: LossFunction,
    row_weights: Tensor | None,
    average: bool,
    statistics: bool,
) -> FusedLinearLoss:
    logits = torch_logits(hidden, head, plan.rows)
    weights = None if row_weights is None else row_weights.to(logits.dtype)
    logps = sums_of_sequences(
        _torch_tokens(logits, plan.rows), plan.rows.counts, weights, average
    ).view(plan.group, -1)
    returned = loss_fn(logps, slice(0, plan.units()))
    loss, outputs = returned if isinstance(returned, tuple) else (returned, ())
    return FusedLinearLoss(
        loss.to(logits.dtype),
        logps.detach().flatten(),
        tuple(output.detach() for output in outputs),
        torch_row_statistics(logits, plan.rows.targets) if statistics else None,
    )


def torch_logits(hidden: Tensor, head: Head, rows: CompletionRows) -> Tensor:
    wide = statistics_dtype(hidden.dtype)
    states = hidden.reshape(-1, hidden.shape[-1]).index_select(0, rows.index)
    logits = torch.nn.functional.linear(
        states.to(wide), head.weight.to(wide), None if head.bias is None else head.bias.to(wide)
    )
    logits = logits * head.logit_scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def _torch_tokens(logits: Tensor, rows: CompletionRows) -> Tensor:
    none = torch.iinfo(torch.int64).min  # no label is ignored here
    tokens = oracle.seq_logp(logits.unsqueeze(0), rows.targets.unsqueeze(0), none, False, False)
    return tokens[1][0]
