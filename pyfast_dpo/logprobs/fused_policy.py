"""Policy losses from hidden states and the lm_head's weight, without a logits matrix."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfast_dpo.logprobs.chunks import LinearLogps
from pyfast_dpo.logprobs.linear import torch_logits
from pyfast_dpo.logprobs.linear_checks import (
    check_labels_or_rows,
    checked_head,
    completion_rows,
    outside_graphs,
    rows_in_budget,
    under_autocast,
)
from pyfast_dpo.logprobs.logits import token_logps
from pyfast_dpo.logprobs.plan import Plan
from pyfast_dpo.logprobs.rows import CompletionRows
from pyfast_dpo.logprobs.scores import NONE_IGNORED
from pyfast_dpo.logprobs.statistics import LinearStatistics, torch_row_statistics
from pyfast_dpo.losses.policy import checked_normalizer, policy_loss
from pyfast_dpo.ops.checks import check_finite, check_flags, check_positive
from pyfast_dpo.ops.dispatch import Impl, use_kernels_for


class FusedPolicyLoss(NamedTuple):
    """Result of `fused_linear_policy_loss`; only `loss` carries a gradient.

    The tokens' numbers are `[R]` in the order of the rows, or `[..., T]` as the labels.
    """

    loss: Tensor  # scalar
    logps: Tensor  # 0 where nothing is scored
    token_losses: Tensor  # the penalty included; 0 where nothing is scored
    ratios: Tensor  # pi / pi_old of the token, or of its sequence; 1 where nothing is scored
    kl: Tensor  # estimates of KL(policy || reference); 0 without a reference
    clipped: Tensor  # int8: -1, 0, 1 as in `PolicyLoss`
    statistics: LinearStatistics | None  # [R] each, with statistics=True


@outside_graphs
def fused_linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None = None,
    *,
    rows: CompletionRows | None = None,
    advantages: Tensor,
    normalizer: Tensor | float,
    old_logps: Tensor | None = None,
    reference_logps: Tensor | None = None,
    importance_sampling_ratio: Tensor | None = None,
    loss_type: str = "grpo",
    level: str = "token",
    temperature: float = 1.0,
    entropy_coef: float = 0.0,
    entropy_normalizer: Tensor | float | None = None,
    statistics: bool = False,
    bias: Tensor | None = None,
    shift: bool = False,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    max_chunk_bytes: int | None = None,
    validate: bool | None = None,
    impl: Impl = "auto",
    **options: Any,
) -> FusedPolicyLoss:
    """`policy_loss` of the scored tokens from hidden states.

    Args:
        hidden, weight, labels, rows, bias, shift, ...: as in `linear_token_logps`; a sequence is one of `rows`,
            or a line of the labels.
        advantages: `[S]`, one a sequence, or one a token: `[R]`, with labels `[..., T]`.
        old_logps, reference_logps, importance_sampling_ratio: one a token, as in `policy_loss`.
        normalizer, loss_type, level, options: as in `policy_loss`.
        temperature: of the sampler; divides the logits after everything else.
        entropy_coef: times the sum of the entropies of the rows' distributions over `entropy_normalizer`, a
            number for the whole optimizer step as `normalizer` is, is subtracted from the loss.
        statistics: fill `FusedPolicyLoss.statistics`, of the logits over the temperature.

    Returns:
        `FusedPolicyLoss`. Double backward raises; use impl="torch" for it.

    Raises:
        TypeError, ValueError: as `linear_token_logps` and `policy_loss`; an entropy_coef without a normalizer.
    """
    name = "fused_linear_policy_loss"
    check_flags(name, statistics=statistics)
    head = checked_head(name, hidden, weight, bias, logit_scale, softcap)
    check_positive(name, "temperature", temperature)
    head = head.at_temperature(temperature)
    check_labels_or_rows(name, hidden, labels, rows)
    max_rows = rows_in_budget(name, max_chunk_bytes, head)
    found = completion_rows(
        name, hidden, head.weight.shape[0], labels, rows, shift, ignore_index, validate
    )

    def of_rows(values: Tensor | None) -> Tensor | None:
        if labels is None or values is None or values.shape != labels.shape:
            return values
        return values.flatten().index_select(0, found.index)

    tensors = {
        "old_logps": old_logps,
        "advantages": advantages,
        "reference_logps": reference_logps,
        "importance_sampling_ratio": importance_sampling_ratio,
    }
    inputs: dict[str, Any] = {key: of_rows(value) for key, value in tensors.items()}
    inputs |= {"normalizer": normalizer, "loss_type": loss_type, "level": level, **options}
    if not use_kernels_for(name, impl, hidden):
        result = policy_loss_of_logits(
            torch_logits(hidden, head, found), found, entropy_coef, entropy_normalizer, impl="torch", **inputs
        )  # fmt: skip
    else:
        hidden = under_autocast(hidden)
        tokens, *known = LinearLogps.apply(
            hidden.reshape(-1, hidden.shape[-1]),
            head.weight,
            head.bias,
            (head.logit_scale, head.softcap),
            Plan(found, 1, max_rows),
            True,
        )
        result = _with_entropy(
            tokens, found, LinearStatistics(*known), entropy_coef, entropy_normalizer, **inputs
        )
    if not statistics:
        result = result._replace(statistics=None)
    if labels is None:
        return result
    shape = labels.shape

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(shape.numel()).index_put((found.index,), values).view(shape)

    ratios = torch.ones(shape.numel(), dtype=result.ratios.dtype, device=hidden.device)
    ratios = ratios.index_put((found.index,), result.ratios).view(shape)
    return result._replace(
        logps=spread(result.logps),
        token_losses=spread(result.token_losses),
        ratios=ratios,
        kl=spread(result.kl),
        clipped=spread(result.clipped),
    )


def policy_loss_of_logits(
    logits: Tensor,
    rows: CompletionRows,
    entropy_coef: float,
    entropy_normalizer: Tensor | float | None,
    impl: Impl = "auto",
    **inputs: Any,
) -> FusedPolicyLoss:
    """From logits `[R, V]` at the sampler's temperature."""
    tokens = token_logps(logits, rows.targets, ignore_index=NONE_IGNORED, validate=False, impl=impl)
    logits = logits.to(tokens.dtype)
    known = torch_row_statistics(logits, rows.targets)
    if entropy_coef:
        logps = logits.log_softmax(-1)
        impossible = logps == -torch.inf  # 0 log 0 = 0
        known = known._replace(entropy=-(logps.exp() * logps.masked_fill(impossible, 0.0)).sum(-1))
    return _with_entropy(tokens, rows, known, entropy_coef, entropy_normalizer, impl=impl, **inputs)


def _with_entropy(
    tokens: Tensor,
    rows: CompletionRows,
    known: LinearStatistics,
    entropy_coef: float,
    entropy_normalizer: Tensor | float | None,
    **inputs: Any,
) -> FusedPolicyLoss:
    name = "fused_linear_policy_loss"
    check_finite(name, "entropy_coef", entropy_coef)
    old_logps = inputs.pop("old_logps", None)
    result = policy_loss(tokens, old_logps, counts=rows.counts, **inputs)
    loss = result.loss
    if entropy_coef:
        if entropy_normalizer is None:
            raise ValueError(
                f"{name}: entropy_coef {entropy_coef} needs entropy_normalizer, got None"
            )
        divisor = checked_normalizer(name, entropy_normalizer, tokens)
        bonus = entropy_coef * known.entropy.sum(dtype=torch.float64) / divisor
        loss = loss - bonus.to(loss.dtype)
    known = known._replace(entropy=known.entropy.detach())
    return FusedPolicyLoss(loss, tokens.detach(), *result[1:], known)
