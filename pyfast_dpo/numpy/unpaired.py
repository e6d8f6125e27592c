"""Losses of unpaired responses, with their gradients."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from pyfast_dpo.losses.table import UNPAIRED_LOSSES, check_unpaired_constants
from pyfast_dpo.numpy.arrays import FloatArray, arrays_of, as_array, describe
from pyfast_dpo.numpy.metrics import mean, metrics_of
from pyfast_dpo.ops import _C
from pyfast_dpo.ops.checks import check_beta, check_finite, check_weight


class UnpairedResult(NamedTuple):
    """Result of `unpaired_loss` and `kto_loss`."""

    loss: float  # mean over the rows, 0 for N = 0
    metrics: dict[str, float]
    grad_policy: FloatArray  # [N] d loss / d policy_logp


def unpaired_loss(
    policy_logp: ArrayLike,
    is_desirable: ArrayLike,
    ref_logp: ArrayLike | None = None,
    beta: float = 0.1,
    *,
    loss_type: str = "kto",
    kl: float | None = None,
    bco_shift: float | None = None,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> UnpairedResult:
    """Any loss of `pyfast_dpo.unpaired_loss`, by the same names: "kto", "apo_zero_unpaired" or "bco".

    Args:
        policy_logp, ref_logp: `[N]` summed log-probs.
        is_desirable: `[N]` bool.
        beta: > 0; weights: >= 0.
        kl: for "kto": the estimate of KL(policy || reference), a constant >= 0.
        bco_shift: for "bco": the reward around which it separates, 0 by default.

    Returns:
        `(loss, metrics, grad_policy)`; metrics are rewards/chosen, rewards/rejected, rewards/margins,
        logps/chosen and logps/rejected, of the desirable and of the undesirable rows, and kl for "kto".
    """
    return _unpaired_loss(
        "unpaired_loss", policy_logp, is_desirable, ref_logp, beta, loss_type, kl, bco_shift,
        desirable_weight, undesirable_weight,
    )  # fmt: skip


def kto_loss(
    policy_logp: ArrayLike,
    is_desirable: ArrayLike,
    ref_logp: ArrayLike,
    beta: float = 0.1,
    *,
    kl: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> UnpairedResult:
    """`unpaired_loss` with `loss_type="kto"` (Ethayarajh et al. 2024, eq. 8)."""
    return _unpaired_loss(
        "kto_loss", policy_logp, is_desirable, ref_logp, beta, "kto", kl, None,
        desirable_weight, undesirable_weight,
    )  # fmt: skip


def _unpaired_loss(
    name: str,
    policy_logp: ArrayLike,
    is_desirable: ArrayLike,
    ref_logp: ArrayLike | None,
    beta: float,
    loss_type: str,
    kl: float | None,
    bco_shift: float | None,
    desirable_weight: float,
    undesirable_weight: float,
) -> UnpairedResult:
    check_unpaired_constants(name, loss_type, kl, bco_shift)
    check_beta(name, beta)
    check_weight(name, "desirable_weight", desirable_weight)
    check_weight(name, "undesirable_weight", undesirable_weight)
    if kl is not None:
        check_weight(name, "kl", kl)
    if bco_shift is not None:
        check_finite(name, "bco_shift", bco_shift)
    policy, reference = arrays_of(name, ("policy_logp", "ref_logp"), (policy_logp, ref_logp), 1)
    assert policy is not None
    desirable = as_array(name, "is_desirable", is_desirable)
    if desirable.dtype != np.bool_:
        raise TypeError(f"{name}: is_desirable must be bool, got {describe(desirable)}")
    if desirable.shape != policy.shape:
        raise ValueError(
            f"{name}: is_desirable must have shape {list(policy.shape)}, got {describe(desirable)}"
        )
    center = float(kl or 0.0) if bco_shift is None else float(bco_shift) / float(beta)
    losses, rewards, gradient = _C.unpaired_loss(
        policy,
        reference,
        np.ascontiguousarray(desirable),
        center,
        UNPAIRED_LOSSES[loss_type].formula,
        float(beta),
        float(desirable_weight),
        float(undesirable_weight),
    )
    metrics = metrics_of(
        rewards[desirable], rewards[~desirable], policy[desirable], policy[~desirable]
    )
    if kl is not None:
        metrics["kl"] = float(kl)
    return UnpairedResult(mean(losses), metrics, gradient / max(len(policy), 1))
