"""Log-probs in plain differentiable torch: the oracle of the tests, and `impl="torch"`."""

from __future__ import annotations

import torch
from torch import Tensor

from pyfast_dpo.ops.dtypes import statistics_dtype
from pyfast_dpo.ops.labels import shifted_labels


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
