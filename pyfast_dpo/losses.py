"""Losses on log-probs: of pairs, of unpaired responses, of a reward model.

Which names there are, what each sees and which options go with it: `loss_table.py`. Formulas and papers:
docs/losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyfast_dpo import _ops, reference
from pyfast_dpo._checks import (
    check_constants,
    check_finite,
    check_per_sequence,
    check_same_device,
    check_tensor,
    check_unpaired_options,
    check_weight,
    describe,
)
from pyfast_dpo._dispatch import Impl, to_statistics_dtype, use_kernels_for
from pyfast_dpo.loss_table import (
    UNPAIRED_LOSSES,
    LossType,
    PairTerm,
    check_pair_options,
    check_unpaired_constants,
)


class PreferenceLoss(NamedTuple):
    """Result of `preference_loss`; rewards carry no gradient."""

    losses: Tensor  # [P]
    chosen_rewards: Tensor  # [P] beta * (policy - reference)
    rejected_rewards: Tensor  # [P]


class UnpairedLoss(NamedTuple):
    """Result of `unpaired_loss` and `kto_loss`; rewards carry no gradient."""

    losses: Tensor  # [N]
    rewards: Tensor  # [N] beta * (policy - reference)


def preference_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor | None = None,
    reference_rejected_logps: Tensor | None = None,
    *,
    loss_type: LossType = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    margins: Tensor | None = None,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    discopop_tau: float = 0.05,
    simpo_gamma: float = 0.5,
    alphapo_alpha: float = 0.25,
    cpo_alpha: float = 1.0,
    rpo_alpha: float = 0.0,
    bco_shift: Tensor | float | None = None,
    impl: Impl = "auto",
) -> PreferenceLoss:
    """Loss of every pair from the log-probs of its two responses.

    Args:
        policy_chosen_logps, policy_rejected_logps: `[P]` floating point, sums over the response; without
            lengths they are taken as they are, so that a loss of averages wants averages.
        reference_chosen_logps, reference_rejected_logps: `[P]`, constants; both or neither (a uniform
            reference, log-prob 0). Losses without reference do not see them; rewards do.
        loss_type: a name of `PAIR_LOSS_NAMES`, or a sequence of names: their weighted sum.
        loss_weights: one number for each name, 1 by default.
        beta: > 0, strength of the pull to the reference (for "orpo" the paper's lambda).
        label_smoothing: in [0, 0.5), the assumed share of flipped preferences; for "sigmoid" cDPO (Mitchell
            2023), for "robust" and "exo_pair" (> 0 there) their papers'.
        chosen_lengths, rejected_lengths: `[P]` numbers of tokens, both or neither. With them the losses that
            are defined on averages ("ipo", "sigmoid_norm", "sft", "simpo", "alphapo", "orpo") divide by
            them; an empty response counts as one token.
        margins: `[P]`, constants: taken off beta * (chosen - rejected), in units of the reward (ODPO,
            Amini et al. 2024).
        f_divergence_type: "reverse_kl", "forward_kl", "js_divergence" or "alpha_divergence" (Wang et al.
            2023), f_alpha_divergence_coef its alpha.
        discopop_tau: > 0, temperature of "discopop".
        simpo_gamma: target margin of "simpo" and "alphapo", in units of the reward.
        alphapo_alpha: shape of the reward of "alphapo"; 0 is "simpo".
        cpo_alpha: weight of the chosen response's "sft" loss in "cpo".
        rpo_alpha: weight of an "sft" loss added to the sum (RPO, Pang et al. 2024).
        bco_shift: one number, a constant, for "bco_pair": the reward around which it separates, see
            `BcoShift`; 0 by default.

    Returns:
        `PreferenceLoss(losses, chosen_rewards, rejected_rewards)`, each `[P]`, float32 (float64 when an
        input is float64). Rewards are beta * (policy - reference) of the log-probs as given.

    Raises:
        TypeError, ValueError: wrong types, shapes, devices; options that do not go together.
    """
    name = "preference_loss"
    check_tensor(name, "policy_chosen_logps", policy_chosen_logps)
    check_tensor(name, "policy_rejected_logps", policy_rejected_logps)
    terms = check_pair_options(
        name,
        loss_type,
        beta,
        label_smoothing,
        loss_weights=loss_weights,
        f_divergence_type=f_divergence_type,
        f_alpha_divergence_coef=f_alpha_divergence_coef,
        discopop_tau=discopop_tau,
        simpo_gamma=simpo_gamma,
        alphapo_alpha=alphapo_alpha,
        cpo_alpha=cpo_alpha,
        rpo_alpha=rpo_alpha,
        margins=margins,
        bco_shift=bco_shift,
    )
    pair_of(name, "policy_{}_logps", policy_chosen_logps, policy_rejected_logps)
    pair_of(name, "reference_{}_logps", reference_chosen_logps, reference_rejected_logps)
    pair_of(name, "{}_lengths", chosen_lengths, rejected_lengths)
    check_per_sequence(
        name,
        policy_chosen_logps.shape[0],
        policy_chosen_logps,
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        reference_chosen_logps=reference_chosen_logps,
        reference_rejected_logps=reference_rejected_logps,
        margins=margins,
    )
    lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
    for argument, value in lengths.items():
        check_lengths(name, argument, value, policy_chosen_logps)
    check_constants(
        name,
        reference_chosen_logps=reference_chosen_logps,
        reference_rejected_logps=reference_rejected_logps,
        margins=margins,
    )
    *logps, margins = to_statistics_dtype(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        margins,
    )
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = logps
    assert policy_chosen is not None and policy_rejected is not None
    inputs = PairInputs(
        policy_chosen,
        policy_rejected,
        reference_chosen,
        reference_rejected,
        None if chosen_lengths is None else chosen_lengths.to(policy_chosen),
        None if rejected_lengths is None else rejected_lengths.to(policy_chosen),
        margins,
        one_constant(name, "bco_shift", bco_shift, policy_chosen),
    )
    use_kernels = use_kernels_for(name, impl, policy_chosen)
    total, rewards = None, None
    for term in terms:
        losses, *term_rewards = _loss_of_term(term, inputs, use_kernels)
        if term_rewards and (term.spec.reference or reference_chosen is None):
            rewards = rewards or term_rewards
        weighted = losses if term.weight == 1 else term.weight * losses
        total = weighted if total is None else total + weighted
    assert total is not None
    if rewards is None:
        rewards = [beta * ratio.detach() for ratio in inputs.log_ratios()]
    return PreferenceLoss(total, *rewards)


class PairInputs(NamedTuple):
    """The tensor arguments of the operator `pair_loss`: `[P]` each, the shift `[1]`; None is 0, or length 1."""

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor | None
    reference_rejected: Tensor | None
    chosen_lengths: Tensor | None
    rejected_lengths: Tensor | None
    margins: Tensor | None
    shift: Tensor | None

    def log_ratios(self) -> tuple[Tensor, Tensor]:
        if self.reference_chosen is None or self.reference_rejected is None:
            return self.policy_chosen, self.policy_rejected
        return (
            self.policy_chosen - self.reference_chosen,
            self.policy_rejected - self.reference_rejected,
        )


def _loss_of_term(term: PairTerm, inputs: PairInputs, use_kernels: bool) -> Sequence[Tensor]:
    """(losses, and where it is the kernel that had the log-ratios of the pairs, both rewards)"""
    spec = term.spec
    if spec.sorts is not None:
        ordered, order = _sorted_inputs(spec.sorts, inputs)
        losses, *_ = _loss_of_term(
            term._replace(spec=spec._replace(sorts=None)), ordered, use_kernels
        )
        return (torch.empty_like(losses).scatter(0, order, losses),)
    if not spec.reference:
        inputs = inputs._replace(reference_chosen=None, reference_rejected=None)
    if spec.averages is None:
        inputs = inputs._replace(chosen_lengths=None, rejected_lengths=None)
    if "margins" not in spec.options:
        inputs = inputs._replace(margins=None)
    if "bco_shift" not in spec.options:
        inputs = inputs._replace(shift=None)
    if use_kernels:
        return _ops.pair_loss(*inputs, *term.formula_options())
    return (reference.pair_loss(*inputs, *term.formula_options()),)


def _sorted_inputs(sorts: str, inputs: PairInputs) -> tuple[PairInputs, Tensor]:
    """AOT (Melnyk et al. 2024): the quantiles of one distribution against those of the other, and the pair
    that each quantile of the first came from."""
    if sorts == "pairs":  # the policy's margins against the reference's
        first = inputs.policy_chosen - inputs.policy_rejected
        second = torch.zeros_like(first)
        if inputs.reference_chosen is not None and inputs.reference_rejected is not None:
            second = inputs.reference_chosen - inputs.reference_rejected
    else:  # the chosen log-ratios against the rejected ones
        first, second = inputs.log_ratios()
    ordered, order = torch.sort(first, stable=True)
    return PairInputs(ordered, torch.sort(second).values, *[None] * 6), order


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
        center = policy.new_zeros(1) if shift is None else shift / beta
    weights = (float(beta), float(desirable_weight), float(undesirable_weight))
    if use_kernels_for(name, impl, policy):
        return UnpairedLoss(
            *_ops.unpaired_loss(policy, reference_values, is_desirable, center, formula, *weights)
        )
    logratios = policy if reference_values is None else policy - reference_values
    losses = reference.UNPAIRED_FORMULAS[formula](logratios, is_desirable, center, *weights)
    return UnpairedLoss(losses, beta * logratios.detach())


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


def reward_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    margins: Tensor | None = None,
    center_rewards_coefficient: float = 0.0,
    impl: Impl = "auto",
) -> Tensor:
    """Bradley-Terry loss of a reward model (Ouyang et al. 2022, eq. 1) for every pair:

        -log sigmoid(chosen - rejected - margin) + coefficient * (chosen + rejected)^2

    Args:
        chosen_rewards, rejected_rewards: `[P]` floating point, the model's scores.
        margins: `[P]`, constants (Touvron et al. 2023, eq. 2).
        center_rewards_coefficient: >= 0, weight of the second term, which keeps the scores around 0
            (Eisenstein et al. 2023, eq. 2).

    Returns:
        `[P]` losses, float32 (float64 when an input is float64).
    """
    name = "reward_loss"
    pair_of(name, "{}_rewards", chosen_rewards, rejected_rewards)
    check_per_sequence(
        name,
        chosen_rewards.shape[0],
        chosen_rewards,
        chosen_rewards=chosen_rewards,
        rejected_rewards=rejected_rewards,
        margins=margins,
    )
    check_weight(name, "center_rewards_coefficient", center_rewards_coefficient)
    check_constants(name, margins=margins)
    chosen, rejected, margins = to_statistics_dtype(chosen_rewards, rejected_rewards, margins)
    assert chosen is not None and rejected is not None
    inputs = PairInputs(chosen, rejected, None, None, None, None, margins, None)
    (term,) = check_pair_options(name, "sigmoid", 1.0)
    losses, *_ = _loss_of_term(term, inputs, use_kernels_for(name, impl, chosen))
    if center_rewards_coefficient == 0:
        return losses
    return losses + center_rewards_coefficient * (chosen + rejected) ** 2


def mean_of_losses(losses: Tensor) -> Tensor:
    """Mean over `[N]`, 0 for N = 0.

    Summed in float64: the mean of equal numbers is that number, so that policy == reference gives ln 2
    bit for bit whatever the number of pairs.
    """
    return (losses.sum(dtype=torch.float64) / max(losses.shape[0], 1)).to(losses.dtype)


def pair_of(function: str, names: str, chosen: object, rejected: object) -> None:
    """Two tensors of one dimension, or neither; `names` with the place of "chosen" and "rejected"."""
    first, second = names.format("chosen"), names.format("rejected")
    if (chosen is None) != (rejected is None):
        raise ValueError(f"{function}: pass both {first} and {second}, or neither")
    if chosen is not None:
        check_tensor(function, first, chosen)
        check_tensor(function, second, rejected)
        assert isinstance(chosen, Tensor)
        if chosen.dim() != 1:
            raise ValueError(f"{function}: {first} must have shape [P], got {describe(chosen)}")


def check_lengths(function: str, name: str, lengths: Tensor | None, like: Tensor) -> None:
    if lengths is None:
        return
    if lengths.dtype == torch.bool or lengths.is_complex():
        raise TypeError(f"{function}: {name} must hold numbers of tokens, got {describe(lengths)}")
    if lengths.shape != like.shape:
        raise ValueError(
            f"{function}: {name} must have shape {list(like.shape)}, got {describe(lengths)}"
        )
    check_same_device(function, "the log-probs", like, name, lengths)
    check_constants(function, **{name: lengths})


def one_constant(
    function: str, name: str, value: Tensor | float | None, like: Tensor
) -> Tensor | None:
    """A number, or a tensor of one that stays on its device, as `[1]` beside `like`."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        check_finite(function, name, value)
        return like.new_full((1,), float(value))
    if value.numel() != 1:
        raise ValueError(f"{function}: {name} must be one number, got {describe(value)}")
    check_constants(function, **{name: value})
    return value.detach().to(like).reshape(1)
