"""The same functions in plain differentiable torch: the oracle of the tests, `impl="torch"` of every
public function, and the way to higher derivatives and to devices without kernels.

Each formula is written independently of `csrc/common/losses.h`, so that the two check each other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def shifted_labels(labels: Tensor, ignore_index: int) -> Tensor:
    """Labels of the Hugging Face layout moved one position to the left; the last position is ignored."""
    return F.pad(labels[..., 1:], (0, 1), value=ignore_index)


def seq_logp(
    logits: Tensor, labels: Tensor, ignore_index: int, shift: bool, average: bool
) -> tuple[Tensor, Tensor]:
    """Log-probs of labels `[B, T]` under logits `[B, T, V]`: (per sequence `[B]`, per token `[B, T]`).

    log p is -softplus(log-sum-exp of the other entries - target logit), which neither rounds to 0 nor
    exceeds 0 when the model is certain.
    """
    if shift:
        labels = shifted_labels(labels, ignore_index)
    scored = labels != ignore_index
    z = logits.to(statistics_dtype(logits.dtype))
    # Ignored rows are replaced before any arithmetic, so that a NaN in them reaches neither value nor gradient.
    z = z.masked_fill(~scored.unsqueeze(-1), 0.0)
    # A row with NaN or +inf, or with nothing but -inf, has no distribution: NaN, value and gradient.
    defined = z.detach().amax(-1, keepdim=True).isfinite()
    z = z + torch.where(defined, 0.0, float("nan")).to(z.dtype)
    target = labels.masked_fill(~scored, 0).unsqueeze(-1)
    others = z.scatter(-1, target, float("-inf"))
    # The maximum is only a reference point: it carries no gradient. Where all the others are impossible,
    # log(0) has the value -inf and, masked, no gradient instead of 0 * inf.
    peak = others.detach().amax(-1)
    alone = peak == float("-inf")
    peak = peak.masked_fill(alone, 0.0)
    total = (others - peak.unsqueeze(-1)).exp().sum(-1)
    log_total = total.masked_fill(alone, 1.0).log().masked_fill(alone, float("-inf"))
    gap = log_total + (peak - z.gather(-1, target).squeeze(-1))
    tokens = -torch.logaddexp(torch.zeros_like(gap), gap)
    tokens = torch.where(scored, tokens, torch.zeros_like(tokens))
    sums = tokens.sum(-1, dtype=torch.float64)
    if average:
        sums = sums / scored.sum(-1).clamp(min=1)
    return sums.to(tokens.dtype), tokens


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64, every other dtype of logits has float32 results."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sigmoid_loss(
    chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float, label_smoothing: float
) -> Tensor:
    """DPO (Rafailov et al. 2023, eq. 7), with label smoothing cDPO (Mitchell 2023)."""
    h = beta * (chosen_logratios - rejected_logratios)
    if label_smoothing == 0:  # 0 * inf would be NaN where a response is impossible
        return -F.logsigmoid(h)
    return -F.logsigmoid(h) * (1 - label_smoothing) - F.logsigmoid(-h) * label_smoothing


def ipo_loss(
    chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float, label_smoothing: float
) -> Tensor:
    """IPO (Azar et al. 2023, eq. 17)."""
    return (chosen_logratios - rejected_logratios - 1 / (2 * beta)) ** 2


PAIR_LOSSES: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "sigmoid": sigmoid_loss,
    "ipo": ipo_loss,
}


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


UNPAIRED_LOSSES = {"kto": kto_loss}
