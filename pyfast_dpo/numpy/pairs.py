"""Losses of pairs, with their gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from pyfast_dpo.losses.table import LossType, PairTerm, check_pair_options
from pyfast_dpo.numpy.arrays import FloatArray, arrays_of
from pyfast_dpo.numpy.metrics import mean, metrics_of, reward_metrics
from pyfast_dpo.ops import _C
from pyfast_dpo.ops.checks import check_finite


class PairResult(NamedTuple):
    """Result of `preference_loss`, `dpo_loss` and `ipo_loss`."""

    loss: float  # mean over the pairs, 0 for P = 0
    metrics: dict[str, float]  # means over the pairs, by TRL's names
    grad_policy_chosen: FloatArray  # [P] d loss / d policy_chosen_logp
    grad_policy_rejected: FloatArray  # [P]


def preference_loss(
    policy_chosen_logp: ArrayLike,
    policy_rejected_logp: ArrayLike,
    ref_chosen_logp: ArrayLike | None = None,
    ref_rejected_logp: ArrayLike | None = None,
    beta: float = 0.1,
    *,
    loss_type: LossType = "sigmoid",
    chosen_lengths: ArrayLike | None = None,
    rejected_lengths: ArrayLike | None = None,
    margins: ArrayLike | None = None,
    bco_shift: float | None = None,
    **options: Any,
) -> PairResult:
    """Any loss of `pyfast_dpo.preference_loss`, or a weighted sum of them, by the same names and options.

    Args:
        policy_chosen_logp, policy_rejected_logp: `[P]` log-probs.
        ref_chosen_logp, ref_rejected_logp: `[P]`, both or neither (a uniform reference).
        beta: > 0.
        loss_type: a name or a sequence of names; options: loss_weights, label_smoothing,
            f_divergence_type, f_alpha_divergence_coef, discopop_tau, simpo_gamma, alphapo_alpha,
            cpo_alpha and rpo_alpha.
        chosen_lengths, rejected_lengths: `[P]` numbers of tokens, for losses of averages.
        margins: `[P]`, in units of the reward.
        bco_shift: for "bco_pair".

    Returns:
        `(loss, metrics, grad_policy_chosen, grad_policy_rejected)`; metrics are rewards/chosen,
        rewards/rejected, rewards/accuracies, rewards/margins, logps/chosen and logps/rejected.
    """
    return _pair_loss(
        "preference_loss",
        (policy_chosen_logp, policy_rejected_logp, ref_chosen_logp, ref_rejected_logp),
        (chosen_lengths, rejected_lengths, margins),
        bco_shift,
        loss_type=loss_type,
        beta=beta,
        **options,
    )


def dpo_loss(
    policy_chosen_logp: ArrayLike,
    policy_rejected_logp: ArrayLike,
    ref_chosen_logp: ArrayLike,
    ref_rejected_logp: ArrayLike,
    beta: float = 0.1,
    *,
    label_smoothing: float = 0.0,
) -> PairResult:
    """DPO (Rafailov et al. 2023, eq. 7); with `label_smoothing` in [0, 0.5) cDPO (Mitchell 2023).

    Args:
        policy_chosen_logp, policy_rejected_logp, ref_chosen_logp, ref_rejected_logp: `[P]` summed log-probs.
        beta: > 0.

    Returns:
        As `preference_loss`.
    """
    logps = (policy_chosen_logp, policy_rejected_logp, ref_chosen_logp, ref_rejected_logp)
    return _pair_loss("dpo_loss", logps, beta=beta, label_smoothing=label_smoothing)


def ipo_loss(
    policy_chosen_logp: ArrayLike,
    policy_rejected_logp: ArrayLike,
    ref_chosen_logp: ArrayLike,
    ref_rejected_logp: ArrayLike,
    beta: float = 0.1,
) -> PairResult:
    """IPO (Azar et al. 2023, eq. 17): length-averaged log-probs by the authors' reading, sums by the paper.

    Args and returns: as `dpo_loss`.
    """
    logps = (policy_chosen_logp, policy_rejected_logp, ref_chosen_logp, ref_rejected_logp)
    return _pair_loss("ipo_loss", logps, loss_type="ipo", beta=beta)


def _pair_loss(
    function: str,
    logps: tuple[ArrayLike | None, ...],
    rest: tuple[ArrayLike | None, ...] = (None, None, None),
    bco_shift: float | None = None,
    *,
    loss_type: LossType = "sigmoid",
    beta: float,
    **options: Any,
) -> PairResult:
    terms = check_pair_options(
        function, loss_type, beta, margins=rest[2], bco_shift=bco_shift, **options
    )
    beta = float(beta)
    names = (
        "policy_chosen_logp", "policy_rejected_logp", "ref_chosen_logp", "ref_rejected_logp",
        "chosen_lengths", "rejected_lengths", "margins",
    )  # fmt: skip
    arrays = arrays_of(function, names, (*logps, *rest), 2)
    for first, second in ((2, 3), (4, 5)):
        if (arrays[first] is None) != (arrays[second] is None):
            raise ValueError(
                f"{function}: pass both {names[first]} and {names[second]}, or neither"
            )
    chosen, rejected, ref_chosen, ref_rejected = arrays[:4]
    assert chosen is not None and rejected is not None
    shift = None
    if bco_shift is not None:
        check_finite(function, "bco_shift", bco_shift)
        shift = np.full(1, bco_shift, chosen.dtype)
    losses, d_chosen, d_rejected = np.zeros((3, len(chosen)), chosen.dtype)
    for term in terms:
        values, slope_chosen, slope_rejected = _loss_of_term(term, [*arrays, shift])
        losses = losses + term.weight * values
        d_chosen = d_chosen + term.weight * slope_chosen
        d_rejected = d_rejected + term.weight * slope_rejected
    chosen_rewards = beta * (chosen if ref_chosen is None else chosen - ref_chosen)
    rejected_rewards = beta * (rejected if ref_rejected is None else rejected - ref_rejected)
    metrics = metrics_of(chosen_rewards, rejected_rewards, chosen, rejected)
    metrics.update(reward_metrics(chosen_rewards, rejected_rewards))
    pairs = max(len(losses), 1)
    return PairResult(mean(losses), metrics, d_chosen / pairs, d_rejected / pairs)


def _loss_of_term(
    term: PairTerm, inputs: list[FloatArray | None]
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """(losses, d losses / d chosen, d losses / d rejected) of one loss; inputs as the kernel's."""
    spec = term.spec
    chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths = inputs[:6]
    margins, shift = inputs[6:]
    assert chosen is not None and rejected is not None
    if spec.sorts is not None:
        # as in losses/pairs.py: quantiles of one distribution against those of the other
        plain = term._replace(spec=spec._replace(sorts=None))
        zero = np.zeros_like(chosen)
        ref_chosen, ref_rejected = (zero if r is None else r for r in (ref_chosen, ref_rejected))
        if spec.sorts == "pairs":
            first, second = chosen - rejected, ref_chosen - ref_rejected
        else:
            first, second = chosen - ref_chosen, rejected - ref_rejected
        orders = [np.argsort(values, kind="stable") for values in (first, second)]
        quantiles = [first[orders[0]], second[orders[1]]]
        losses, *slopes = _loss_of_term(plain, [*quantiles, None, None, None, None, None, None])
        back = [np.argsort(order, kind="stable") for order in orders]
        d_first, d_second = slopes[0][back[0]], slopes[1][back[1]]
        return losses[back[0]], d_first, -d_first if spec.sorts == "pairs" else d_second
    losses, _, _, d_chosen, d_rejected = _C.pair_loss(
        chosen,
        rejected,
        ref_chosen if spec.reference else None,
        ref_rejected if spec.reference else None,
        chosen_lengths if spec.averages else None,
        rejected_lengths if spec.averages else None,
        margins if "margins" in spec.options else None,
        shift if "bco_shift" in spec.options else None,
        *term.formula_options(),
    )
    return losses, d_chosen, d_rejected
