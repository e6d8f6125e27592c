"""DPO, IPO and KTO from hidden states and the lm_head's weight: `fused_linear_loss` with their losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyfast_dpo.logprobs.fused import FusedPreferenceLoss, FusedUnpairedLoss
from pyfast_dpo.logprobs.linear import loss_of, sequence_logps_of
from pyfast_dpo.logprobs.linear_checks import check_labels_or_rows, outside_graphs
from pyfast_dpo.logprobs.rows import CompletionRows
from pyfast_dpo.losses.stacked import StackedLoss
from pyfast_dpo.losses.table import (
    LOSS_OPTIONS,
    LossType,
)
from pyfast_dpo.losses.unpaired import kto_loss
from pyfast_dpo.ops.checks import (
    check_constants,
    check_label_options,
    check_per_sequence,
    check_tensor,
    check_unpaired_options,
    describe,
)
from pyfast_dpo.ops.labels import scored_lengths


@outside_graphs
def fused_linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None = None,
    *,
    rows: CompletionRows | None = None,
    reference_logps: Tensor | None = None,
    reference_hidden: Tensor | None = None,
    reference_weight: Tensor | None = None,
    reference_bias: Tensor | None = None,
    bias: Tensor | None = None,
    beta: float = 0.1,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    average: bool | None = None,
    **options: Any,
) -> FusedPreferenceLoss:
    """`fused_dpo_loss` from hidden states: P pairs stacked as rows 0..P-1 chosen, P..2P-1 rejected.

    Args:
        hidden: `[2P, T, H]` with labels `[2P, T]`, or any shape with `rows`; weight: `[V, H]`; bias: `[V]`.
        reference_logps: `[2P]` log-probs of the reference model, summed or averaged as those of the policy;
            or
        reference_hidden: its hidden states, of the same shape but for H, with `reference_weight` `[V, H']`
            and `reference_bias` (by default the policy's own weight and bias, detached).
        beta, loss_type, label_smoothing, average: as in `fused_dpo_loss`.
        options: the other options of `preference_loss`, such as loss_weights or rpo_alpha; and shift,
            ignore_index, logit_scale, softcap, max_chunk_bytes, validate, impl, as in `linear_token_logps`.

    Returns:
        `FusedPreferenceLoss`. Double backward raises; use impl="torch" for it.
    """
    return _pair_loss(
        "fused_linear_dpo_loss", hidden, weight, labels, rows,
        (reference_logps, reference_hidden, reference_weight, reference_bias),
        bias, loss_type, beta, label_smoothing, average, options,
    )  # fmt: skip


@outside_graphs
def fused_linear_ipo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None = None,
    *,
    rows: CompletionRows | None = None,
    reference_logps: Tensor | None = None,
    reference_hidden: Tensor | None = None,
    reference_weight: Tensor | None = None,
    reference_bias: Tensor | None = None,
    bias: Tensor | None = None,
    beta: float = 0.1,
    average: bool = True,
    **head_options: Any,
) -> FusedPreferenceLoss:
    """`fused_linear_dpo_loss` with `loss_type="ipo"`, on length-averaged log-probs; the same options."""
    return _pair_loss(
        "fused_linear_ipo_loss", hidden, weight, labels, rows,
        (reference_logps, reference_hidden, reference_weight, reference_bias),
        bias, "ipo", beta, 0.0, average, head_options,
    )  # fmt: skip


@outside_graphs
def fused_linear_kto_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    is_desirable: Tensor,
    *,
    kl: Tensor | float,
    rows: CompletionRows | None = None,
    reference_logps: Tensor | None = None,
    reference_hidden: Tensor | None = None,
    reference_weight: Tensor | None = None,
    reference_bias: Tensor | None = None,
    bias: Tensor | None = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    **head_options: Any,
) -> FusedUnpairedLoss:
    """`fused_kto_loss` from hidden states `[N, T, H]`; the other arguments as in `fused_linear_dpo_loss`."""
    name = "fused_linear_kto_loss"
    _check_head_options(name, head_options)
    count = _sequences(name, hidden, labels, rows)
    if rows is None and hidden.dim() != 3:
        raise ValueError(f"{name}: hidden must have shape [N, T, H], got {describe(hidden)}")
    check_unpaired_options(
        name, count, hidden, is_desirable, kl, beta, desirable_weight, undesirable_weight
    )
    shared: dict[str, Any] = {"rows": rows, "average": False, **head_options}
    reference = _reference_logps(
        name, hidden, weight, labels, count, bias,
        (reference_logps, reference_hidden, reference_weight, reference_bias), shared,
    )  # fmt: skip

    def loss_fn(logps: Tensor, units: slice) -> tuple[Tensor, tuple[Tensor, ...]]:
        result = kto_loss(
            logps[0],
            is_desirable[units],
            None if reference is None else reference[units],
            kl=kl,
            beta=beta,
            desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight,
            impl=head_options.get("impl", "auto"),
        )
        return _share(result.losses, count), (result.rewards, result.losses)

    result = loss_of(name, hidden, weight, labels, loss_fn, 1, bias=bias, **shared)
    return FusedUnpairedLoss(result.loss, result.logps, *result.outputs)


def _pair_loss(
    name: str,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    rows: CompletionRows | None,
    reference_forms: tuple[Tensor | None, ...],
    bias: Tensor | None,
    loss_type: LossType,
    beta: float,
    label_smoothing: float,
    average: bool | None,
    options: dict[str, Any],
) -> FusedPreferenceLoss:
    loss_options = {key: options[key] for key in options.keys() & LOSS_OPTIONS}
    head_options = {key: options[key] for key in options.keys() - LOSS_OPTIONS}
    _check_head_options(name, head_options)
    count = _sequences(name, hidden, labels, rows)
    if count % 2 or (rows is None and hidden.dim() != 3):
        raise ValueError(
            f"{name}: hidden must have shape [2P, T, H], or rows 2P sequences, chosen first, then as many "
            f"rejected, got {describe(hidden)} and {count} sequences"
        )
    pairs = count // 2
    impl = head_options.get("impl", "auto")
    loss = StackedLoss.checked(
        name, pairs, hidden, loss_type, beta, label_smoothing, loss_options, impl
    )
    shared: dict[str, Any] = {
        "rows": rows, "average": loss.takes_averages(average), **head_options,
    }  # fmt: skip
    reference = _reference_logps(name, hidden, weight, labels, count, bias, reference_forms, shared)
    lengths = None
    if loss.takes_lengths(average):
        check_labels_or_rows(name, hidden, labels, rows)
        lengths = rows.counts if rows is not None else _counts(labels, **head_options)

    def loss_fn(logps: Tensor, units: slice) -> tuple[Tensor, tuple[Tensor, ...]]:
        own = slice(None) if loss.couples_batch else units
        result = loss.of(logps, reference, lengths, own)
        kept = (result.chosen_rewards, result.rejected_rewards, result.losses)
        return _share(result.losses, pairs), kept

    group = None if loss.couples_batch else 2
    result = loss_of(name, hidden, weight, labels, loss_fn, group, bias=bias, **shared)
    return FusedPreferenceLoss(result.loss, *result.logps.reshape(2, -1), *result.outputs)


# What the functions of this file hand on as it is.
HEAD_OPTIONS = {
    "shift", "ignore_index", "logit_scale", "softcap", "max_chunk_bytes", "validate", "impl",
}  # fmt: skip


def _check_head_options(function: str, options: dict[str, Any]) -> None:
    unknown = sorted(options.keys() - HEAD_OPTIONS)
    if unknown:
        raise TypeError(f"{function}: unexpected keyword argument {unknown[0]!r}")
    check_label_options(function, options.get("shift", False), options.get("ignore_index", -100))


def _counts(
    labels: Tensor | None, shift: bool = False, ignore_index: int = -100, **_: Any
) -> Tensor:
    assert labels is not None
    return scored_lengths(labels, shift, ignore_index)


def _share(losses: Tensor, count: int) -> Tensor:
    """These units' share of the mean over all, in float64: so equal losses have their own value as the mean."""
    return losses.sum(dtype=torch.float64) / max(count, 1)


def _sequences(
    function: str, hidden: Tensor, labels: Tensor | None, rows: CompletionRows | None
) -> int:
    check_tensor(function, "hidden", hidden)
    if hidden.dim() < 2:
        raise ValueError(f"{function}: hidden must have shape [..., T, H], got {describe(hidden)}")
    return hidden.shape[0] if rows is None else len(rows.lengths)


def _reference_logps(
    function: str,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    count: int,
    bias: Tensor | None,
    forms: tuple[Tensor | None, ...],
    options: dict[str, Any],
) -> Tensor | None:
    """The reference's log-probs `[count]` from whichever of the two forms was given."""
    logps, reference_hidden, reference_weight, reference_bias = forms
    if logps is not None and reference_hidden is not None:
        raise ValueError(f"{function}: pass reference_logps or reference_hidden, not both")
    if reference_hidden is not None:
        check_tensor(function, "reference_hidden", reference_hidden)
    check_per_sequence(function, count, hidden, reference_logps=logps)
    check_constants(function, reference_logps=logps, reference_hidden=reference_hidden)
    if reference_hidden is None:
        return logps
    if reference_weight is None:
        reference_weight, reference_bias = weight, bias
    with torch.no_grad():
        return sequence_logps_of(
            function, reference_hidden, reference_weight, labels, bias=reference_bias, **options
        )
