"""What a trainer reports of the model's distributions, from the pass that scores the tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyfast_dpo.ops import operators


class LinearStatistics(NamedTuple):
    """One number a scored row, float32 (float64 for float64 inputs), without gradient.

    A row with NaN or +inf, or with nothing but -inf, has no distribution: entropy and log_sum_sq_probs are
    NaN and is_top1 is False there.
    """

    entropy: Tensor  # [R] nats: log-sum-exp(z) - sum of p z
    mean_logits: Tensor  # [R] mean of z over the vocabulary; -inf where a token is masked by -inf
    is_top1: Tensor  # [R] bool: no token has a larger logit than the target; a tie is a hit
    log_sum_sq_probs: Tensor  # [R] log of the sum of p^2 (WPO, Zhou et al. 2024, eq. 5)


def row_statistics(
    logits: Tensor, targets: Tensor, row_max: Tensor | None = None
) -> LinearStatistics:
    """Of logits `[R, V]`, float32 or float64, by the kernels. A target outside [0, V) is never a hit. With
    `row_max` `[R]`, the largest logits, a GPU reads the logits once and not twice."""
    return LinearStatistics(*operators.row_statistics(logits, targets, row_max))


def torch_row_statistics(logits: Tensor, targets: Tensor) -> LinearStatistics:
    """The same in plain torch: the oracle of the tests, and impl="torch"."""
    logits = logits.detach()
    logps = logits.log_softmax(-1)
    products = torch.where(logps == -torch.inf, 0.0, logps.exp() * logps)  # 0 log 0 = 0
    valid = (targets >= 0) & (targets < logits.shape[-1])
    target = logits.gather(-1, targets.where(valid, 0).unsqueeze(-1)).squeeze(-1)
    return LinearStatistics(
        -products.sum(-1),
        logits.mean(-1),
        (target == logits.amax(-1)) & logps.isfinite().any(-1) & valid,
        (2 * logps).logsumexp(-1),
    )
