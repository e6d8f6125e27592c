"""From logits to the loss in one call: the drop-in for a training loop that has its logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfast_dpo.logprobs.logits import checked_logps
from pyfast_dpo.losses.mean import mean_of_losses
from pyfast_dpo.losses.stacked import StackedLoss
from pyfast_dpo.losses.table import (
    LOSS_OPTIONS,
    LossType,
)
from pyfast_dpo.losses.unpaired import kto_loss
from pyfast_dpo.ops.checks import (
    check_constants,
    check_per_sequence,
    check_tensor,
    check_unpaired_options,
    describe,
)
from pyfast_dpo.ops.dispatch import Impl
from pyfast_dpo.ops.labels import scored_lengths


class FusedPreferenceLoss(NamedTuple):
    """Result of `fused_dpo_loss` and `fused_ipo_loss`; only `loss` carries a gradient."""

    loss: Tensor  # scalar, mean over the pairs; 0 for P = 0
    chosen_logps: Tensor  # [P]
    rejected_logps: Tensor  # [P]
    chosen_rewards: Tensor  # [P] beta * (policy - reference)
    rejected_rewards: Tensor  # [P]
    losses: Tensor  # [P]


class FusedUnpairedLoss(NamedTuple):
    """Result of `fused_kto_loss`; only `loss` carries a gradient."""

    loss: Tensor  # scalar, mean over the rows; 0 for N = 0
    logps: Tensor  # [N]
    rewards: Tensor  # [N] beta * (policy - reference)
    losses: Tensor  # [N]


def fused_dpo_loss(
    policy_logits: Tensor,
    labels: Tensor,
    *,
    reference_logps: Tensor | None = None,
    reference_logits: Tensor | None = None,
    beta: float = 0.1,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    average: bool | None = None,
    shift: bool = False,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    validate: bool | None = None,
    impl: Impl = "auto",
    **loss_options: Any,
) -> FusedPreferenceLoss:
    """Mean preference loss of P pairs stacked as rows 0..P-1 chosen, P..2P-1 rejected.

    Args:
        policy_logits: `[2P, T, V]`, float64, float32, bfloat16 or float16.
        labels: `[2P, T]` int64; `ignore_index` for prompt and padding.
        reference_logps: `[2P]` log-probs of the reference model, stacked and averaged (or summed) as
            those of the policy; or
        reference_logits: `[2P, T, V]` logits of the reference model. With neither, the reference is
            uniform (log-prob 0).
        beta, loss_type, label_smoothing: as in `preference_loss`.
        average: average the log-probs over the tokens (True) or sum them (False), for every loss. By default
            the losses that are defined on averages see averages and the others sums; the log-probs and
            rewards in the result are averages when all losses take them, else sums. "ipo" takes averages
            (the authors' reading); pass False for the sums of the paper's formula.
        shift: the Hugging Face layout, where position t scores label t + 1.
        inplace_backward: the gradient overwrites `policy_logits`, see `token_logps`.
        loss_options: the other options of `preference_loss`, such as loss_weights, margins or rpo_alpha.

    Returns:
        `FusedPreferenceLoss`. policy == reference gives a "sigmoid" loss of exactly ln 2.

    Raises:
        TypeError, ValueError: wrong types, dtypes, shapes, devices, options; an odd number of rows.
    """
    return _fused_pair_loss(
        "fused_dpo_loss",
        policy_logits,
        labels,
        reference_logps=reference_logps,
        reference_logits=reference_logits,
        beta=beta,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        average=average,
        shift=shift,
        ignore_index=ignore_index,
        inplace_backward=inplace_backward,
        validate=validate,
        impl=impl,
        **loss_options,
    )


def fused_ipo_loss(
    policy_logits: Tensor,
    labels: Tensor,
    *,
    reference_logps: Tensor | None = None,
    reference_logits: Tensor | None = None,
    beta: float = 0.1,
    average: bool = True,
    shift: bool = False,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    validate: bool | None = None,
    impl: Impl = "auto",
) -> FusedPreferenceLoss:
    """`fused_dpo_loss` with `loss_type="ipo"` (Azar et al. 2023, eq. 17), on length-averaged log-probs."""
    return _fused_pair_loss(
        "fused_ipo_loss",
        policy_logits,
        labels,
        reference_logps=reference_logps,
        reference_logits=reference_logits,
        beta=beta,
        loss_type="ipo",
        label_smoothing=0.0,
        average=average,
        shift=shift,
        ignore_index=ignore_index,
        inplace_backward=inplace_backward,
        validate=validate,
        impl=impl,
    )


def _fused_pair_loss(
    name: str,
    policy_logits: Tensor,
    labels: Tensor,
    *,
    reference_logps: Tensor | None,
    reference_logits: Tensor | None,
    beta: float,
    loss_type: LossType,
    label_smoothing: float,
    average: bool | None,
    shift: bool,
    ignore_index: int,
    inplace_backward: bool,
    validate: bool | None,
    impl: Impl,
    **loss_options: Any,
) -> FusedPreferenceLoss:
    """All checks come before the work on the logits, and name the public function."""
    check_tensor(name, "policy_logits", policy_logits)
    unknown = sorted(set(loss_options) - LOSS_OPTIONS)
    if unknown:
        raise TypeError(f"{name}: unexpected keyword argument {unknown[0]!r}")
    if policy_logits.dim() != 3 or policy_logits.shape[0] % 2:
        raise ValueError(
            f"{name}: policy_logits must have shape [2P, T, V], chosen rows first, then as many rejected "
            f"rows, got {describe(policy_logits)}"
        )
    loss = StackedLoss.checked(
        name,
        policy_logits.shape[0] // 2,
        policy_logits,
        loss_type,
        beta,
        label_smoothing,
        loss_options,
        impl,
    )
    policy, reference = _policy_and_reference_logps(
        name,
        policy_logits,
        labels,
        reference_logps,
        reference_logits,
        inplace_backward,
        impl=impl,
        average=loss.takes_averages(average),
        shift=shift,
        ignore_index=ignore_index,
        validate=validate,
    )
    lengths = scored_lengths(labels, shift, ignore_index) if loss.takes_lengths(average) else None
    result = loss.of(policy, reference, lengths)
    chosen, rejected = policy.reshape(2, -1)
    return FusedPreferenceLoss(
        mean_of_losses(result.losses),
        chosen.detach(),
        rejected.detach(),
        result.chosen_rewards,
        result.rejected_rewards,
        result.losses.detach(),
    )


def fused_kto_loss(
    policy_logits: Tensor,
    labels: Tensor,
    is_desirable: Tensor,
    *,
    kl: Tensor | float,
    reference_logps: Tensor | None = None,
    reference_logits: Tensor | None = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    shift: bool = False,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    validate: bool | None = None,
    impl: Impl = "auto",
) -> FusedUnpairedLoss:
    """Mean KTO loss (Ethayarajh et al. 2024, eq. 8) of N unpaired responses.

    Args:
        policy_logits: `[N, T, V]`; labels: `[N, T]` int64; is_desirable: `[N]` bool.
        kl: one number, a constant: the estimate of KL(policy || reference), see `kto_kl`.
        reference_logps `[N]`, reference_logits `[N, T, V]`: as in `fused_dpo_loss`.
        desirable_weight, undesirable_weight: >= 0.

    Returns:
        `FusedUnpairedLoss`.
    """
    name = "fused_kto_loss"
    check_tensor(name, "policy_logits", policy_logits)
    if policy_logits.dim() != 3:
        raise ValueError(
            f"{name}: policy_logits must have shape [N, T, V], got {describe(policy_logits)}"
        )
    check_unpaired_options(
        name,
        policy_logits.shape[0],
        policy_logits,
        is_desirable,
        kl,
        beta,
        desirable_weight,
        undesirable_weight,
    )
    policy, reference = _policy_and_reference_logps(
        name,
        policy_logits,
        labels,
        reference_logps,
        reference_logits,
        inplace_backward,
        average=False,
        shift=shift,
        ignore_index=ignore_index,
        validate=validate,
        impl=impl,
    )
    result = kto_loss(
        policy,
        is_desirable,
        reference,
        kl=kl,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        impl=impl,
    )
    return FusedUnpairedLoss(
        mean_of_losses(result.losses), policy.detach(), result.rewards, result.losses.detach()
    )


def _policy_and_reference_logps(
    function: str,
    policy_logits: Tensor,
    labels: Tensor,
    reference_logps: Tensor | None,
    reference_logits: Tensor | None,
    inplace_backward: bool,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs `[rows]` of the policy, and of the reference from whichever of the two forms was given."""
    if reference_logps is not None and reference_logits is not None:
        raise ValueError(f"{function}: pass reference_logps or reference_logits, not both")
    check_per_sequence(
        function, policy_logits.shape[0], policy_logits, reference_logps=reference_logps
    )
    if reference_logits is not None:
        check_tensor(function, "reference_logits", reference_logits)
    check_constants(function, reference_logps=reference_logps, reference_logits=reference_logits)
    reference = reference_logps
    if reference_logits is not None:
        if reference_logits.shape != policy_logits.shape:
            raise ValueError(
                f"{function}: reference_logits must have the shape of policy_logits, "
                f"{list(policy_logits.shape)}, got {describe(reference_logits)}"
            )
        with torch.no_grad():
            reference, _ = checked_logps(
                function,
                reference_logits,
                labels,
                inplace_backward=False,
                logits_name="reference_logits",
                **options,
            )
    policy, _ = checked_logps(
        function,
        policy_logits,
        labels,
        inplace_backward=inplace_backward,
        logits_name="policy_logits",
        **options,
    )
    return policy, reference
