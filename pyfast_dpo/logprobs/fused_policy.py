"""Policy losses from hidden states and the lm_head's weight, without a logits matrix."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfast_dpo.logprobs.gpu_head import GRAIN
from pyfast_dpo.logprobs.head import Head
from pyfast_dpo.logprobs.linear import torch_logits
from pyfast_dpo.logprobs.linear_checks import (
    check_labels_or_rows,
    checked_head,
    completion_rows,
    outside_graphs,
    rows_in_budget,
    under_autocast,
)
from pyfast_dpo.logprobs.linear_loss import linear_loss
from pyfast_dpo.logprobs.logits import token_logps
from pyfast_dpo.logprobs.plan import Plan
from pyfast_dpo.logprobs.policy_losses import PolicyOptions, counts_for_tokens
from pyfast_dpo.logprobs.rows import CompletionRows
from pyfast_dpo.logprobs.scores import NONE_IGNORED
from pyfast_dpo.logprobs.statistics import LinearStatistics, torch_row_statistics
from pyfast_dpo.losses.policy import (
    PolicyInputs,
    checked_inputs,
    checked_normalizer,
    checked_term,
    losses_of_tokens,
)
from pyfast_dpo.ops import dispatch
from pyfast_dpo.ops.checks import check_finite, check_flags, check_positive
from pyfast_dpo.ops.dispatch import Impl, use_kernels_for
from pyfast_dpo.ops.dtypes import statistics_dtype


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
    """`policy_loss` of the scored tokens from hidden states: three products with the head, with a frozen head two.

    A loss of one token knows its coefficient as soon as the token's log-prob, so that chunks may have any size; one
    of a ratio of the sequence ("sequence", "vespo") knows it when it has seen the sequence. On the CPU tokens whose
    coefficient turns out 0 (bounded, or without an advantage) cost one product.

    Args:
        hidden, weight, labels, rows, bias, shift, ...: as in `linear_token_logps`; a sequence is one of `rows`,
            or a line of the labels.
        advantages: `[S]`, one a sequence, or `[R]`, one a token (taken as the former where both are the same); with
            labels `[...]` or `[..., T]`.
        old_logps, reference_logps, importance_sampling_ratio: one a token, `[R]` or as the labels; see `policy_loss`.
        normalizer, loss_type, level, options: as in `policy_loss`.
        temperature: of the sampler; divides the logits after everything else.
        entropy_coef: the sum of the entropies of the rows' distributions times this, over `entropy_normalizer` (a
            number for the whole optimizer step, as `normalizer` is), is subtracted from the loss.
        statistics: fill `FusedPolicyLoss.statistics`, of the logits over the temperature.
        max_chunk_bytes: as in `linear_token_logps`, and at least the logits of the longest sequence where the loss
            is of a ratio of the sequence; on CUDA then only with an entropy bonus.

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
    inputs = inputs_of_rows(
        name, hidden, found, labels, advantages=advantages, normalizer=normalizer, old_logps=old_logps,
        reference_logps=reference_logps, importance_sampling_ratio=importance_sampling_ratio,
        loss_type=loss_type, level=level, **options,
    )  # fmt: skip
    entropy = entropy_slope(name, entropy_coef, entropy_normalizer, hidden)
    if not use_kernels_for(name, impl, hidden):
        logits = torch_logits(hidden, head, found)
        result = policy_loss_of_logits(logits, found, inputs, entropy, "torch")
    else:
        hidden = under_autocast(hidden)
        plan = _plan(hidden, head, found, max_rows, inputs, entropy is not None)
        loss, *constants = linear_loss(
            hidden, head, PolicyOptions(plan, inputs, entropy, statistics)
        )
        logps, losses, ratios, kl, clipped, *measured = constants
        result = FusedPolicyLoss(
            loss,
            logps,
            losses,
            ratios,
            kl,
            clipped,
            LinearStatistics(*measured) if measured else None,
        )
    if not statistics:
        result = result._replace(statistics=None)
    return result if labels is None else _as_labels(result, found, labels)


def entropy_slope(
    function: str, coefficient: float, normalizer: Tensor | float | None, like: Tensor
) -> Tensor | None:
    """d loss / d entropy of every row: a scalar, float64; None without a bonus."""
    check_finite(function, "entropy_coef", coefficient)
    if normalizer is None:
        if coefficient:
            raise ValueError(
                f"{function}: entropy_coef {coefficient} needs entropy_normalizer, got None"
            )
        return None
    divisor = checked_normalizer(function, normalizer, like, "entropy_normalizer")
    return -coefficient / divisor if coefficient else None


def policy_loss_of_logits(
    logits: Tensor,
    rows: CompletionRows,
    inputs: PolicyInputs,
    entropy: Tensor | None,
    impl: Impl = "auto",
) -> FusedPolicyLoss:
    """From logits `[R, V]` at the sampler's temperature, by autograd."""
    tokens = token_logps(logits, rows.targets, ignore_index=NONE_IGNORED, validate=False, impl=impl)
    use_kernels = use_kernels_for("policy_loss", impl, tokens)
    counts = counts_for_tokens(rows.counts, tokens)
    result = losses_of_tokens(tokens, inputs, counts, None, use_kernels)
    wide = logits.to(tokens.dtype)
    loss, measured = result.loss, torch_row_statistics(wide, rows.targets)
    if entropy is not None:
        logps = wide.log_softmax(-1)
        impossible = logps == -torch.inf  # 0 log 0 = 0
        entropies = -(logps.exp() * logps.masked_fill(impossible, 0.0)).sum(-1)
        loss = (loss + entropy * entropies.sum(dtype=torch.float64)).to(loss.dtype)
    return FusedPolicyLoss(loss, tokens.detach(), *result[1:], measured)


def inputs_of_rows(
    function: str,
    states: Tensor,
    rows: CompletionRows,
    labels: Tensor | None = None,
    *,
    advantages: Tensor,
    normalizer: Tensor | float,
    old_logps: Tensor | None = None,
    reference_logps: Tensor | None = None,
    importance_sampling_ratio: Tensor | None = None,
    loss_type: str = "grpo",
    level: str = "token",
    **options: Any,
) -> PolicyInputs:
    """Checked, `[R]` each in the order of the rows, in the dtype of the log-probs that `states` have."""
    wide, shape, sequences = statistics_dtype(states.dtype), rows.index.shape, rows.counts.shape
    if labels is not None:
        shape, sequences = labels.shape, labels.shape[:-1]
    inputs = checked_inputs(
        function, checked_term(function, loss_type, level, options), states.new_empty(shape, dtype=wide), sequences,
        old_logps, reference_logps, importance_sampling_ratio, advantages, normalizer,
    )  # fmt: skip

    def of_rows(values: Tensor | None) -> Tensor | None:
        if values is not None and labels is not None:
            values = values.flatten().index_select(0, rows.index)
        return None if values is None else values.to(wide)

    *of_tokens, gains = inputs.tensors()
    assert gains is not None
    if gains.shape == sequences:
        count = rows.index.shape[0]
        gains = gains.flatten().repeat_interleave(rows.counts, output_size=count).to(wide)
    else:
        gains = of_rows(gains)
    return inputs.with_tensors([*(of_rows(values) for values in of_tokens), gains])


def _plan(
    hidden: Tensor, head: Head, rows: CompletionRows, max_rows: int, inputs: PolicyInputs, bonus: bool
) -> Plan:  # fmt: skip
    """Where a loss couples the tokens of a sequence, their logits wait for it: on a GPU as gradients, unless a bonus
    makes those two; on the CPU where the head has a gradient."""
    if not inputs.term.couples_sequences():
        return Plan(rows, 0, max_rows)
    on_gpu = dispatch.on_gpu(hidden)
    trainable = any(p is not None and p.requires_grad for p in (head.weight, head.bias))
    if bonus or (trainable and not on_gpu):
        grain = GRAIN if on_gpu else 1
        max_rows = max(max_rows, -(-max(rows.lengths, default=0) // grain) * grain)
    return Plan(rows, 1, max_rows)


def _as_labels(result: FusedPolicyLoss, rows: CompletionRows, labels: Tensor) -> FusedPolicyLoss:
    def spread(values: Tensor, elsewhere: int = 0) -> Tensor:
        every = values.new_full((labels.numel(),), elsewhere)
        return every.index_put((rows.index,), values).view(labels.shape)

    return FusedPolicyLoss(
        result.loss,
        spread(result.logps),
        spread(result.token_losses),
        spread(result.ratios, 1),
        spread(result.kl),
        spread(result.clipped),
        result.statistics,
    )
