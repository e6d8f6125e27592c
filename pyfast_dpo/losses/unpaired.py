"""Losses of unpaired responses on log-probs: KTO and kin. Formulas and papers: docs/losses."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from pyfast_dpo.losses import oracle
from pyfast_dpo.losses.arguments import one_constant
from pyfast_dpo.losses.mean import mean_of_losses
from pyfast_dpo.losses.table import UNPAIRED_LOSSES, check_unpaired_constants
from pyfast_dpo.ops import operators
from pyfast_dpo.ops.checks import (
    check_constants,
    check_per_sequence,
    check_tensor,
    check_unpaired_options,
    describe,
)
from pyfast_dpo.ops.dispatch import Impl, use_kernels_for
from pyfast_dpo.ops.dtypes import to_statistics_dtype


class UnpairedLoss(NamedTuple):
    """Result of `unpaired_loss` and `kto_loss`; rewards carry no gradient."""

    losses: Tensor  # [N]
    rewards: Tensor  # [N] beta * (policy - reference)


def unpaired_loss(
    policy_logps: Tensor,
    is_desirable: Tensor,
    reference_logps: Tensor | None = None,
    *,
    loss_type: str = "kto",
    kl: Tensor | float | None = None,
    bco_shift: Tensor | float | None = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    impl: Impl = "auto",
) -> UnpairedLoss:
    """Loss of every unpaired response.

    Args:
        policy_logps: `[N]` floating point, sums over the completion.
        is_desirable: `[N]` bool.
        reference_logps: `[N]`, constants.
        loss_type: "kto" (Ethayarajh et al. 2024, eq. 8), "apo_zero_unpaired" (D'Oosterlinck et al. 2024,
            eq. 7, of single responses) or "bco" (Jung et al. 2024).
        kl: for "kto" only, and needed there: one number, a constant, the estimate of
            KL(policy || reference), see `kto_kl`.
        bco_shift: for "bco" only: one number, a constant, see `BcoShift`; 0 by default.
        beta: > 0.
        desirable_weight, undesirable_weight: >= 0, the weights of the two classes.

    Returns:
        `UnpairedLoss(losses, rewards)`, each `[N]`, float32 (float64 when an input is float64).
    """
    return _unpaired_loss(
        "unpaired_loss", policy_logps, is_desirable, reference_logps, loss_type, kl, bco_shift, beta,
        desirable_weight, undesirable_weight, impl,
    )  # fmt: skip


def kto_loss(
    policy_logps: Tensor,
    is_desirable: Tensor,
    reference_logps: Tensor | None = None,
    *,
    kl: Tensor | float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    impl: Impl = "auto",
) -> UnpairedLoss:
    """`unpaired_loss` with `loss_type="kto"` (Ethayarajh et al. 2024, eq. 8)."""
    return _unpaired_loss(
        "kto_loss", policy_logps, is_desirable, reference_logps, "kto", kl, None, beta,
        desirable_weight, undesirable_weight, impl,
    )  # fmt: skip


def _unpaired_loss(
    name: str,
    policy_logps: Tensor,
    is_desirable: Tensor,
    reference_logps: Tensor | None,
    loss_type: str,
    kl: Tensor | float | None,
    bco_shift: Tensor | float | None,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    impl: Impl,
) -> UnpairedLoss:
    check_tensor(name, "policy_logps", policy_logps)
    if policy_logps.dim() != 1:
        raise ValueError(f"{name}: policy_logps must have shape [N], got {describe(policy_logps)}")
    check_per_sequence(
        name,
        policy_logps.shape[0],
        policy_logps,
        policy_logps=policy_logps,
        reference_logps=reference_logps,
    )
    check_unpaired_constants(name, loss_type, kl, bco_shift)
    check_unpaired_options(
        name,
        policy_logps.shape[0],
        policy_logps,
        is_desirable,
        0.0 if kl is None else kl,
        beta,
        desirable_weight,
        undesirable_weight,
    )
    check_constants(name, reference_logps=reference_logps)
    policy, reference_values = to_statistics_dtype(policy_logps, reference_logps)
    assert policy is not None
    formula = UNPAIRED_LOSSES[loss_type].formula
    center = one_constant(name, "kl", kl, policy)
    shift = one_constant(name, "bco_shift", bco_shift, policy)
    if center is None:
        center = policy.new_zeros(1) if shift is None else shift / float(beta)
    weights = (float(beta), float(desirable_weight), float(undesirable_weight))
    if use_kernels_for(name, impl, policy):
        return UnpairedLoss(
            *operators.unpaired_loss(
                policy, reference_values, is_desirable, center, formula, *weights
            )
        )
    logratios = policy if reference_values is None else policy - reference_values
    losses = oracle.UNPAIRED_FORMULAS[formula](logratios, is_desirable, center, *weights)
    return UnpairedLoss(losses, weights[0] * logratios.detach())


def kto_kl(policy_kl_logps: Tensor, reference_kl_logps: Tensor, *, clamp: bool = True) -> Tensor:
    """KTO's estimate of KL(policy || reference) from mismatched prompt-completion pairs.

    Args:
        policy_kl_logps, reference_kl_logps: `[M]` log-probs of completions under prompts that they do not
            belong to (Ethayarajh et al. 2024, section 4.1).
        clamp: not below 0, as in the authors' code.

    Returns:
        A scalar without gradient, float32 (float64 when an input is float64): the mean log-ratio; 0 for
        M = 0.
    """
    check_tensor("kto_kl", "policy_kl_logps", policy_kl_logps)
    check_tensor("kto_kl", "reference_kl_logps", reference_kl_logps)
    check_per_sequence(
        "kto_kl",
        policy_kl_logps.numel(),
        policy_kl_logps,
        policy_kl_logps=policy_kl_logps,
        reference_kl_logps=reference_kl_logps,
    )
    policy, reference_values = to_statistics_dtype(
        policy_kl_logps.detach(), reference_kl_logps.detach()
    )
    assert policy is not None and reference_values is not None
    mean = mean_of_losses(policy - reference_values)
    return mean.clamp(min=0) if clamp else mean
