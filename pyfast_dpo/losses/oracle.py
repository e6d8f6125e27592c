"""The losses in plain differentiable torch: the oracle of the tests, `impl="torch"` of every loss, and the way
to higher derivatives and to devices without kernels.

Each formula is written independently of `csrc/common/losses_*.h`, so that the two check each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# --- losses of a pair: as in csrc/common/losses_pair.h ----------------------------------------------


def sigmoid_loss(difference: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """DPO (Rafailov et al. 2023, eq. 7), with label smoothing cDPO (Mitchell 2023)."""
    h = beta * difference
    if label_smoothing == 0:  # 0 * inf would be NaN where a response is impossible
        return -F.logsigmoid(h)
    return -F.logsigmoid(h) * (1 - label_smoothing) - F.logsigmoid(-h) * label_smoothing


def robust_loss(difference: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO (Chowdhury et al. 2024)."""
    h = beta * difference
    if label_smoothing == 0:
        return -F.logsigmoid(h)
    kept, flipped = (1 - label_smoothing) * F.logsigmoid(h), label_smoothing * F.logsigmoid(-h)
    return (flipped - kept) / (1 - 2 * label_smoothing)


def exo_pair_loss(difference: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """EXO for pairs (Ji et al. 2024, eq. 16)."""
    h = (beta * difference).clamp(-1e30, 1e30)  # 0 * inf would be NaN
    win = torch.sigmoid(h) * (F.logsigmoid(h) - math.log1p(-label_smoothing))
    return win + torch.sigmoid(-h) * (F.logsigmoid(-h) - math.log(label_smoothing))


def discopop_loss(difference: Tensor, beta: float, tau: float) -> Tensor:
    """DiscoPOP (Lu et al. 2024, eq. 5)."""
    h = beta * difference
    # The exponential term as one exponential: e^-h alone overflows. Its argument loses all its digits on the
    # other side of 0, where the two halves are told apart.
    above = -h.clamp(min=0) - F.softplus(-h.clamp(min=0) / tau)
    below = h.clamp(max=0) * (1 / tau - 1) - F.softplus(h.clamp(max=0) / tau)
    exponential = torch.where(h > 0, above, below).exp()
    return -F.logsigmoid(h) * torch.sigmoid(-h / tau) + exponential


def nca_pair_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """NCA for pairs (Chen et al. 2024)."""
    c, r = beta * chosen, beta * rejected
    return -F.logsigmoid(c) - 0.5 * F.logsigmoid(-c) - 0.5 * F.logsigmoid(-r)


def bco_pair_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """BCO for pairs (Jung et al. 2024)."""
    return -F.logsigmoid(beta * chosen) - F.logsigmoid(-beta * rejected)


def sppo_hard_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """SPPO with hard labels (Wu et al. 2024, eq. 4.7)."""
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


def apo_zero_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """APO-zero (D'Oosterlinck et al. 2024, eq. 7)."""
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """APO-down (D'Oosterlinck et al. 2024, eq. 8)."""
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))


def orpo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """ORPO (Hong et al. 2024, eq. 6 and 7); a probability of 1 counts as 1 less the smallest normal number."""
    least = torch.finfo(chosen.dtype).tiny

    def log_odds(logp: Tensor) -> Tensor:  # -log(e^-logp - 1)
        certain = (logp - logp.detach()) - least  # -least, with the gradient of logp
        x = -torch.where(logp > -least, certain, logp)
        # the branch that is not taken must not overflow: its gradient would be 0 * inf
        near, far = torch.log(torch.expm1(x.clamp(max=1))), x.clamp(min=1)
        return -torch.where(x < 1, near, far + torch.log1p(-torch.exp(-far)))

    return -chosen - beta * F.logsigmoid(log_odds(chosen) - log_odds(rejected))


# Of the difference of two scores (difference, beta, label_smoothing, discopop_tau), and of both scores.
DIFFERENCE_FORMULAS: dict[str, Callable[[Tensor, float, float, float], Tensor]] = {
    "sigmoid": lambda difference, beta, smoothing, _: sigmoid_loss(difference, beta, smoothing),
    "robust": lambda difference, beta, smoothing, _: robust_loss(difference, beta, smoothing),
    "hinge": lambda difference, beta, *_: torch.relu(
        1 - beta * difference
    ),  # SLiC (Zhao et al. 2023)
    "ipo": lambda difference, beta, *_: (
        (difference - 1 / (2 * beta)) ** 2
    ),  # Azar et al. 2023, eq. 17
    "exo_pair": lambda difference, beta, smoothing, _: exo_pair_loss(difference, beta, smoothing),
    "discopop": lambda difference, beta, _, tau: discopop_loss(difference, beta, tau),
}
PAIR_FORMULAS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "nca_pair": nca_pair_loss,
    "bco_pair": bco_pair_loss,
    "sppo_hard": sppo_hard_loss,
    "apo_zero": apo_zero_loss,
    "apo_down": apo_down_loss,
    "sft": lambda chosen, rejected, beta: -chosen,
    "orpo": orpo_loss,
}


def divergence_score(logratios: Tensor, divergence: str, alpha: float) -> Tensor:
    """f'(e^logratio) of an f-divergence (Wang et al. 2023), up to a constant."""
    if divergence == "reverse_kl":
        return logratios
    if divergence == "js_divergence":
        return math.log(2) + F.logsigmoid(logratios)
    return torch.expm1((alpha - 1) * logratios) / (alpha - 1)


def pair_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor | None,
    reference_rejected: Tensor | None,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    margins: Tensor | None,
    shift: Tensor | None,
    loss: str,
    beta: float,
    label_smoothing: float,
    discopop_tau: float,
    margin: float,
    divergence: str,
    divergence_alpha: float,
    average_first: bool,
) -> Tensor:
    """The operator `pair_loss`: losses `[P]`.

    Where a score of an f-divergence leaves the range of its dtype the value is the kernels', but autograd may
    give NaN for its gradient.
    """
    sides = []
    for policy, constant, lengths in (
        (policy_chosen, reference_chosen, chosen_lengths),
        (policy_rejected, reference_rejected, rejected_lengths),
    ):
        score = policy if constant is None else policy - constant
        divisor = torch.ones_like(score) if lengths is None else lengths.clamp(min=1)
        if average_first:
            score, divisor = score / divisor, torch.ones_like(score)
        sides.append((score, divergence_score(score, divergence, divergence_alpha), divisor))
    (x_chosen, chosen, n_chosen), (x_rejected, rejected, n_rejected) = sides
    chosen, rejected = chosen / n_chosen, rejected / n_rejected
    if loss in PAIR_FORMULAS:
        if shift is not None:
            chosen, rejected = chosen - shift / beta, rejected - shift / beta
        return PAIR_FORMULAS[loss](chosen, rejected, beta)
    difference = chosen - rejected
    if divergence == "alpha_divergence":
        # Two infinite scores: the larger exponential decides.
        lead = (divergence_alpha - 1) * (x_chosen - x_rejected) - (
            n_chosen.log() - n_rejected.log()
        )
        limit = torch.where(lead == 0, 0.0, chosen * lead.sign())
        difference = torch.where(chosen.isinf() & (chosen == rejected), limit, difference)
    difference = difference - (margin if margins is None else margins + margin) / beta
    return DIFFERENCE_FORMULAS[loss](difference, beta, label_smoothing, discopop_tau)


# --- losses of unpaired responses: as in csrc/common/losses_unpaired.h -------------------------------


def kto_loss(
    logratios: Tensor,
    is_desirable: Tensor,
    kl: Tensor,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """KTO (Ethayarajh et al. 2024, eq. 8) with a constant KL estimate."""
    # 1 - sigmoid(x) is sigmoid(-x), which keeps its digits.
    desirable = desirable_weight * torch.sigmoid(beta * (kl - logratios))
    undesirable = undesirable_weight * torch.sigmoid(beta * (logratios - kl))
    return torch.where(is_desirable, desirable, undesirable)


def bco_loss(
    logratios: Tensor,
    is_desirable: Tensor,
    kl: Tensor,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """BCO (Jung et al. 2024), kl the shift / beta."""
    desirable = -desirable_weight * F.logsigmoid(beta * (logratios - kl))
    undesirable = -undesirable_weight * F.logsigmoid(beta * (kl - logratios))
    return torch.where(is_desirable, desirable, undesirable)


UNPAIRED_FORMULAS = {"kto": kto_loss, "bco": bco_loss}
