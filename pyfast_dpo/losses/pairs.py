"""Losses of pairs on log-probs.

Which names there are, what each sees and which options go with it: `table.py`. Formulas and papers:
docs/losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyfast_dpo.losses import oracle
from pyfast_dpo.losses.arguments import check_lengths, one_constant, pair_of
from pyfast_dpo.losses.table import LossType, PairTerm, check_pair_options
from pyfast_dpo.ops import operators
from pyfast_dpo.ops.checks import check_constants, check_per_sequence, check_tensor
from pyfast_dpo.ops.dispatch import Impl, use_kernels_for
from pyfast_dpo.ops.dtypes import to_statistics_dtype


class PreferenceLoss(NamedTuple):
    """Result of `preference_loss`; rewards carry no gradient."""

    losses: Tensor  # [P]
    chosen_rewards: Tensor  # [P] beta * (policy - reference)
    rejected_rewards: Tensor  # [P]


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
        losses, *term_rewards = loss_of_term(term, inputs, use_kernels)
        if term_rewards and (term.spec.reference or reference_chosen is None):
            rewards = rewards or term_rewards
        weighted = losses if term.weight == 1 else term.weight * losses
        total = weighted if total is None else total + weighted
    assert total is not None
    if rewards is None:
        rewards = [float(beta) * ratio.detach() for ratio in inputs.log_ratios()]
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


def loss_of_term(term: PairTerm, inputs: PairInputs, use_kernels: bool) -> Sequence[Tensor]:
    """(losses, and where it is the kernel that had the log-ratios of the pairs, both rewards)"""
    spec = term.spec
    if spec.sorts is not None:
        ordered, order = _sorted_inputs(spec.sorts, inputs)
        losses, *_ = loss_of_term(
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
        return operators.pair_loss(*inputs, *term.formula_options())
    return (oracle.pair_loss(*inputs, *term.formula_options()),)


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
