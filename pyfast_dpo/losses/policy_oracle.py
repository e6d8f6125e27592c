"""The policy losses in plain differentiable torch, from their definitions: the oracle of the tests and `impl="torch"`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyfast_dpo.losses.policy_table import PolicyTerm

MOST = 20.0  # of a log-ratio
LEAST = math.log(1e-8)  # of VESPO's


def ratio_of(log_ratios: Tensor) -> Tensor:
    return log_ratios.clamp(-MOST, MOST).exp()


def _by_sign(positive: Tensor, pos: float, neg: float, like: Tensor) -> Tensor:
    return torch.where(positive, like.new_tensor(pos), like.new_tensor(neg))


def clip(logps: Tensor, ratios: Tensor, advantages: Tensor, term: PolicyTerm) -> Tensor:
    bounded = ratios.clamp(1 - term.epsilon, 1 + term.epsilon_high)
    freely = ratios.clamp(max=term.delta)
    return -torch.minimum(freely * advantages, bounded * advantages)


def cispo(logps: Tensor, ratios: Tensor, advantages: Tensor, term: PolicyTerm) -> Tensor:
    return -ratios.clamp(max=term.epsilon_high).detach() * advantages * logps


def sapo(logps: Tensor, ratios: Tensor, advantages: Tensor, term: PolicyTerm) -> Tensor:
    pos, neg = term.sapo_temperature_pos, term.sapo_temperature_neg
    temperatures = _by_sign(advantages > 0, pos, neg, logps)
    return -advantages * 4 / temperatures * torch.sigmoid(temperatures * (ratios - 1))


def vespo(logps: Tensor, log_ratios: Tensor, advantages: Tensor, term: PolicyTerm) -> Tensor:
    log_w = log_ratios.detach().clamp(LEAST, MOST)
    positive = advantages >= 0
    k = _by_sign(positive, term.vespo_k_pos, term.vespo_k_neg, logps)
    lam = _by_sign(positive, term.vespo_lambda_pos, term.vespo_lambda_neg, logps)
    return -(lam + k * log_w - lam * log_w.exp()).exp() * advantages * logps


def reinforce(logps: Tensor, ratios: Tensor, advantages: Tensor, term: PolicyTerm) -> Tensor:
    return -advantages * logps


FORMULAS: dict[str, Callable[[Tensor, Tensor, Tensor, PolicyTerm], Tensor]] = {
    "clip": clip,
    "clip_of_sum": clip,
    "cispo": cispo,
    "sapo": sapo,
    "vespo": vespo,
    "reinforce": reinforce,
}


def kl_estimates(logps: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """k1, k2, k3 of Schulman 2020, of every token."""
    u = reference - logps
    if estimator == "k1":
        return -u
    if estimator == "k2":
        return u.square() / 2
    u = u.clamp(max=MOST)
    return torch.expm1(u) - u


def policy_loss(
    logps: Tensor,
    old: Tensor | None,
    reference: Tensor | None,
    advantages: Tensor,
    correction: Tensor | None,
    mask: Tensor | None,
    counts: Tensor,
    term: PolicyTerm,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As the operator, without its coefficients: sums `[S]`, losses, KL estimates, ratios, clipped `[N]`."""
    sequences, tokens = counts.shape[0], logps.shape[0]
    owner = torch.arange(sequences, device=logps.device).repeat_interleave(
        counts, output_size=tokens
    )
    scored = torch.ones_like(owner, dtype=torch.bool) if mask is None else mask

    def per_sequence(values: Tensor) -> Tensor:
        zeros = torch.zeros(sequences, dtype=torch.float64, device=logps.device)
        return zeros.index_add(0, owner, torch.where(scored, values, 0.0).double()).to(values.dtype)

    lengths = per_sequence(torch.ones_like(logps)).clamp(min=1)
    # Replaced before any arithmetic: a NaN that is not scored reaches neither value nor gradient.
    logps = torch.where(scored, logps, 0.0)
    older = logps.detach() if old is None else torch.where(scored, old, 0.0)
    log_ratios = logps - older
    if advantages.shape[0] != tokens or advantages.shape[0] == sequences:
        advantages = advantages[owner]
    level = log_ratios
    if term.sequence_level:
        sums = per_sequence(log_ratios)
        level = (sums if term.spec.formula == "clip_of_sum" else sums / lengths)[owner]
    ratios = ratio_of(level)
    if term.spec.formula == "vespo":
        shares = log_ratios.clamp(-MOST, MOST)
        if correction is not None:
            shares = shares + correction.log().clamp(LEAST, MOST)
        losses = vespo(logps, per_sequence(shares)[owner], advantages, term)
    else:
        losses = FORMULAS[term.spec.formula](logps, ratios, advantages, term)
        if correction is not None:
            losses = losses * correction
    kl = torch.zeros_like(logps)
    if reference is not None:
        kl = kl_estimates(logps, torch.where(scored, reference, 0.0), term.kl_estimator)
        losses = losses + term.beta * (kl * ratios if term.kl_with_ratio else kl)
    losses, kl = torch.where(scored, losses, 0.0), torch.where(scored, kl, 0.0)
    ratios = torch.where(scored, ratios, 1.0)
    clipped = torch.zeros_like(owner, dtype=torch.int8)
    if term.spec.formula in ("clip", "clip_of_sum", "cispo"):
        low, high = 1 - term.epsilon, 1 + term.epsilon_high
        if term.spec.formula == "cispo":
            low, high = -1.0, term.epsilon_high
        clipped = ((ratios > high) & (advantages > 0)).to(torch.int8)
        clipped -= ((ratios < low) & (advantages < 0)).to(torch.int8)
        clipped = torch.where(scored, clipped, torch.zeros_like(clipped))
    weighed = losses / lengths[owner] if term.spec.sequence_means else losses
    return per_sequence(weighed), losses.detach(), kl.detach(), ratios.detach(), clipped
