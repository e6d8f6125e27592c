"""Losses of a policy on the log-probs of sampled tokens: PPO, GRPO and kin. Formulas and papers: docs/losses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfast_dpo.losses import policy_oracle
from pyfast_dpo.losses.policy_table import POLICY_LOSSES, PolicyTerm, check_policy_options
from pyfast_dpo.ops import operators
from pyfast_dpo.ops.checks import (
    check_choice,
    check_constants,
    check_same_device,
    check_tensor,
    describe,
)
from pyfast_dpo.ops.dispatch import Impl, use_kernels_for
from pyfast_dpo.ops.dtypes import to_statistics_dtype


class PolicyLoss(NamedTuple):
    """Result of `policy_loss`; only `loss` carries a gradient. The others have the shape of logps."""

    loss: Tensor  # scalar
    token_losses: Tensor  # the penalty included; 0 where nothing is scored
    ratios: Tensor  # pi / pi_old of the token, or of its sequence; 1 where nothing is scored
    kl: Tensor  # estimates of KL(policy || reference); 0 without a reference
    clipped: (
        Tensor  # int8: -1 below the range with a negative advantage, 1 above it with a positive one
    )


def policy_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    *,
    normalizer: Tensor | float,
    mask: Tensor | None = None,
    counts: Tensor | None = None,
    reference_logps: Tensor | None = None,
    importance_sampling_ratio: Tensor | None = None,
    loss_type: str = "grpo",
    level: str = "token",
    impl: Impl = "auto",
    **options: Any,
) -> PolicyLoss:
    """Sum of the losses of the scored tokens, each with its weight, over an explicit number.

    Args:
        logps: `[S, T]` with `mask`, or `[N]` tokens of sequences that follow one another, with `counts`;
            log-probs of the sampled tokens under the policy, at the temperature of the sampler.
        old_logps: of that shape, log-probs at sampling, constants; None: the policy has not changed since,
            and every ratio is exactly 1.
        advantages: `[S]`, one a sequence, or of the shape of logps (taken as the former where both are the same).
        normalizer: > 0, what the sum is divided by: the number for the whole optimizer step over all
            micro-batches and ranks, see `policy_normalizer`. So any cut of a step gives the same gradient.
        mask: `[S, T]` bool or 0 and 1: which tokens are scored. Others may hold anything, NaN included.
        counts: `[S]` int64, tokens of every sequence; for `[N]`.
        reference_logps: of the shape of logps, constants, for the penalty of weight `beta`.
        importance_sampling_ratio: of the shape of logps, constants: weighs the policy's term of a token
            sampled by another engine, see `sampling_correction`; the penalty is not weighed.
        loss_type: a name of `POLICY_LOSS_NAMES`: "ppo", "grpo", "bnpo", "dapo", "dr_grpo", "luspo", "rloo"
            (clipped ratio), "cispo", "sapo", "vespo", "reinforce".
        level: "token", or "sequence": the ratio is e^(mean log-ratio of the sequence), as GSPO (Zheng et al.
            2025, eq. 5); "luspo" and "rloo" need it, "rloo" with e^(sum of its log-ratios).
        options: epsilon (0.2), epsilon_high (epsilon; for "cispo" the largest ratio, 5), delta (none; the
            largest ratio where the advantage is negative), sapo_temperature_pos, sapo_temperature_neg,
            vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg, beta (0), kl_estimator ("k3"; "k1",
            "k2"), use_bias_correction_kl (False; the penalty times the ratio, with its gradient).

    Returns:
        `PolicyLoss`, float32 (float64 when an input is float64). Log-ratios beyond ±20 count as ±20, without
        a gradient.

    Raises:
        TypeError, ValueError: wrong types, shapes, devices; options that the loss does not take.
    """
    name = "policy_loss"
    term = checked_term(name, loss_type, level, options)
    check_tensor(name, "logps", logps)
    if not logps.is_floating_point():
        raise TypeError(f"{name}: logps must be floating point, got {describe(logps)}")
    counts, flat_mask = token_layout(name, "logps", logps, mask, counts)
    inputs = checked_inputs(
        name, term, logps, counts.shape, old_logps, reference_logps, importance_sampling_ratio, advantages, normalizer
    )  # fmt: skip
    policy, *own = to_statistics_dtype(logps, *inputs.tensors())
    assert policy is not None
    inputs = inputs.with_tensors(None if tensor is None else tensor.flatten() for tensor in own)
    use_kernels = use_kernels_for(name, impl, policy)
    result = losses_of_tokens(policy.flatten(), inputs, counts, flat_mask, use_kernels)
    return PolicyLoss(result.loss, *(values.view(logps.shape) for values in result[1:]))


class PolicyInputs(NamedTuple):
    """What a policy loss knows beside the log-probs, checked."""

    old: Tensor | None  # of the shape of the log-probs, as the next two
    reference: Tensor | None
    correction: Tensor | None
    advantages: Tensor  # of that shape, or one a sequence
    term: PolicyTerm
    normalizer: Tensor  # scalar, float64

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:4]

    def with_tensors(self, tensors: Iterable[Tensor | None]) -> PolicyInputs:
        old, reference, correction, advantages = tensors
        assert advantages is not None
        return PolicyInputs(old, reference, correction, advantages, self.term, self.normalizer)

    def kernel(
        self, logps: Tensor, counts: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """The operator `policy_loss` of log-probs `[N]`: sums of the sequences `[S]`; losses, coefficients, KL
        estimates, ratios, clipped `[N]`."""
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        return operators.policy_loss(
            logps, self.old, self.reference, self.advantages, self.correction, mask, offsets,
            *self.term.formula_options(),
        )  # fmt: skip


def checked_inputs(
    function: str,
    term: PolicyTerm,
    like: Tensor,
    sequences: tuple[int, ...],
    old_logps: Tensor | None,
    reference_logps: Tensor | None,
    importance_sampling_ratio: Tensor | None,
    advantages: Tensor,
    normalizer: Tensor | float,
) -> PolicyInputs:
    """For log-probs of the shape and on the device of `like`; `sequences` is the shape of one number a sequence."""
    tensors = {
        "old_logps": old_logps,
        "reference_logps": reference_logps,
        "importance_sampling_ratio": importance_sampling_ratio,
    }
    for name, value in tensors.items():
        _check_like(function, name, value, like)
    check_tensor(function, "advantages", advantages)
    if advantages.shape not in (like.shape, sequences):
        raise ValueError(
            f"{function}: advantages must have shape {list(sequences)}, one a sequence, or "
            f"{list(like.shape)}, one a token, got {describe(advantages)}"
        )
    check_same_device(function, "the log-probs", like, "advantages", advantages)
    check_constants(function, advantages=advantages, **tensors)
    if reference_logps is None and term.beta > 0:
        raise ValueError(f"{function}: beta {term.beta} needs reference_logps, got None")
    divisor = checked_normalizer(function, normalizer, like)
    return PolicyInputs(
        old_logps, reference_logps, importance_sampling_ratio, advantages, term, divisor
    )


def losses_of_tokens(
    logps: Tensor,
    inputs: PolicyInputs,
    counts: Tensor,
    mask: Tensor | None,
    use_kernels: bool,
) -> PolicyLoss:
    """Of log-probs `[N]` of consecutive sequences, all in one dtype of the statistics."""
    if use_kernels:
        sums, losses, _, kl, ratios, clipped = inputs.kernel(logps, counts, mask)
    else:
        old, reference, correction, advantages = inputs.tensors()
        assert advantages is not None
        sums, losses, kl, ratios, clipped = policy_oracle.policy_loss(
            logps, old, reference, advantages, correction, mask, counts, inputs.term
        )
    total = (sums.sum(dtype=torch.float64) / inputs.normalizer).to(sums.dtype)
    return PolicyLoss(total, losses, ratios, kl, clipped)


def policy_normalizer(
    loss_type: str, lengths: Tensor, *, max_completion_length: int | None = None
) -> Tensor:
    """What the sum of `policy_loss` is divided by, for these sequences; add it up over the micro-batches and ranks
    of an optimizer step.

    Args:
        loss_type: "ppo", "bnpo", "dapo", "cispo", "vespo", "reinforce": the scored tokens; "grpo", "sapo",
            "luspo", "rloo": the sequences with any; "dr_grpo": the sequences times `max_completion_length`.
        lengths: `[S]` scored tokens of every sequence.

    Returns:
        A scalar, float64, at least 0.

    Raises:
        TypeError, ValueError: an unknown name; "dr_grpo" without `max_completion_length`.
    """
    name = "policy_normalizer"
    check_choice(name, "loss_type", loss_type, tuple(POLICY_LOSSES))
    check_tensor(name, "lengths", lengths)
    kind = POLICY_LOSSES[loss_type].normalizer
    if kind == "tokens":
        return lengths.sum(dtype=torch.float64)
    sequences = (lengths > 0).sum(dtype=torch.float64)
    if kind == "sequences":
        return sequences
    if max_completion_length is None or max_completion_length < 1:
        raise ValueError(
            f"{name}: {loss_type!r} needs max_completion_length >= 1, got {max_completion_length}"
        )
    return sequences * max_completion_length


def checked_term(function: str, loss_type: str, level: str, options: dict[str, Any]) -> PolicyTerm:
    """The loss with its options; one that it does not know, or does not use, is refused by name."""
    try:
        term = check_policy_options(function, loss_type, level, **options)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        unknown = str(error).split("'")[1]
        raise TypeError(f"{function}: unexpected keyword argument {unknown!r}") from None
    for option in options.keys() & _SPECIFIC - term.spec.options:
        owners = [name for name, spec in POLICY_LOSSES.items() if option in spec.options]
        raise ValueError(
            f"{function}: {option} is defined for the losses {owners}, got it with {loss_type!r}"
        )
    return term


_SPECIFIC = frozenset().union(*(spec.options for spec in POLICY_LOSSES.values()))


def checked_normalizer(
    function: str, normalizer: Tensor | float, like: Tensor, name: str = "normalizer"
) -> Tensor:
    """A scalar float64 on the device of `like`; a tensor there is not read."""
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(f"{function}: {name} must be one number, got {describe(normalizer)}")
        return normalizer.detach().to(like.device, torch.float64).reshape(())
    if isinstance(normalizer, bool) or not isinstance(normalizer, int | float):
        raise TypeError(f"{function}: {name} must be a number, got {describe(normalizer)}")
    if not 0 < normalizer < float("inf"):
        raise ValueError(
            f"{function}: {name} must be positive and finite, got {normalizer}; see policy_normalizer"
        )
    return torch.tensor(float(normalizer), dtype=torch.float64, device=like.device)


def _check_like(function: str, name: str, value: Tensor | None, like: Tensor) -> None:
    if value is None:
        return
    check_tensor(function, name, value)
    if not value.is_floating_point():
        raise TypeError(f"{function}: {name} must be floating point, got {describe(value)}")
    if value.shape != like.shape or value.device != like.device:
        raise ValueError(
            f"{function}: {name} must have the shape and device of logps, {describe(like)}, got "
            f"{describe(value)}"
        )


def token_layout(
    function: str, name: str, logps: Tensor, mask: Tensor | None, counts: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(tokens of every sequence `[S]`, mask `[N]` or None)"""
    if logps.dim() == 2:
        if counts is not None:
            raise ValueError(f"{function}: counts go with {name} [N], got {name} {describe(logps)}")
        counts = torch.full((logps.shape[0],), logps.shape[1], device=logps.device)
        if mask is None:
            return counts, None
        check_tensor(function, "mask", mask)
        if mask.shape != logps.shape or mask.device != logps.device:
            raise ValueError(
                f"{function}: mask must have the shape and device of {name}, {describe(logps)}, got "
                f"{describe(mask)}"
            )
        return counts, (mask if mask.dtype == torch.bool else mask != 0).flatten()
    if logps.dim() != 1 or counts is None or mask is not None:
        raise ValueError(
            f"{function}: {name} must be [S, T] (with a mask), or [N] with counts, got {describe(logps)}"
            f"{'' if counts is None else ' and counts'}{'' if mask is None else ' and a mask'}"
        )
    check_tensor(function, "counts", counts)
    if counts.dtype != torch.int64 or counts.dim() != 1 or counts.device != logps.device:
        raise TypeError(
            f"{function}: counts must be int64 [S] on {logps.device}, got {describe(counts)}"
        )
    if counts.device.type == "cpu" and (int(counts.sum()) != logps.shape[0] or (counts < 0).any()):
        raise ValueError(
            f"{function}: counts must not be negative and add up to the {logps.shape[0]} tokens of {name}, got "
            f"{counts.tolist()}"
        )
    return counts, None
