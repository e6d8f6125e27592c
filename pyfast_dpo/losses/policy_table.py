"""The policy losses: which names there are, what each bounds, how its tokens are weighed, which options it takes.

The mathematics is in `csrc/common/losses_policy.h` and, independently, in `policy_oracle.py`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from pyfast_dpo.ops.checks import check_choice, check_number, check_weight


class PolicyLossSpec(NamedTuple):
    formula: str  # name in csrc/common/losses_policy.h and in policy_oracle.FORMULAS
    sequence_means: bool  # a token weighs 1 / tokens of its sequence, else 1
    normalizer: str  # what the weighted sum is divided by, see `policy_normalizer`
    options: frozenset[str]
    levels: tuple[str, ...] = ("token", "sequence")


_CLIP = frozenset({"epsilon", "epsilon_high", "delta"})
_NO_LEVEL = ("token",)
# TRL's names. GSPO (Zheng et al. 2025) is "grpo" at the level "sequence".
POLICY_LOSSES: dict[str, PolicyLossSpec] = {
    "ppo": PolicyLossSpec("clip", False, "tokens", _CLIP),
    "grpo": PolicyLossSpec("clip", True, "sequences", _CLIP),
    "bnpo": PolicyLossSpec("clip", False, "tokens", _CLIP),
    "dapo": PolicyLossSpec("clip", False, "tokens", _CLIP),
    "dr_grpo": PolicyLossSpec("clip", False, "longest", _CLIP),
    "luspo": PolicyLossSpec("clip", False, "sequences", _CLIP, ("sequence",)),
    "rloo": PolicyLossSpec("clip_of_sum", True, "sequences", _CLIP, ("sequence",)),
    "cispo": PolicyLossSpec("cispo", False, "tokens", frozenset({"epsilon_high"})),
    "sapo": PolicyLossSpec(
        "sapo", True, "sequences", frozenset({"sapo_temperature_pos", "sapo_temperature_neg"})
    ),
    "vespo": PolicyLossSpec(
        "vespo",
        False,
        "tokens",
        frozenset({"vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"}),
        _NO_LEVEL,  # its ratio is the sequence's anyway
    ),
    "reinforce": PolicyLossSpec("reinforce", False, "tokens", frozenset(), _NO_LEVEL),
}
POLICY_LOSS_NAMES = tuple(POLICY_LOSSES)
KL_ESTIMATORS = ("k1", "k2", "k3")
# The ratio of a token may grow to this much of what it was: the paper's 1 + epsilon (MiniMax-M1 tunes it; 5 is usual).
CISPO_BOUND = 5.0


class PolicyTerm(NamedTuple):
    """A policy loss with its options checked and resolved."""

    spec: PolicyLossSpec
    sequence_level: bool
    epsilon: float
    epsilon_high: float
    delta: float
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    vespo_k_pos: float
    vespo_lambda_pos: float
    vespo_k_neg: float
    vespo_lambda_neg: float
    beta: float
    kl_estimator: str
    kl_with_ratio: bool

    def couples_sequences(self) -> bool:
        """Whether the gradient of a token depends on the others of its sequence."""
        return self.sequence_level or self.spec.formula == "vespo"

    def formula_options(self) -> tuple[str | bool | float, ...]:
        """The last arguments of the operator `policy_loss`."""
        return (self.spec.formula, self.sequence_level, self.spec.sequence_means, *self[2:])


def check_policy_options(
    function: str,
    loss_type: str,
    level: str,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    beta: float = 0.0,
    kl_estimator: str = "k3",
    use_bias_correction_kl: bool = False,
) -> PolicyTerm:
    """Raises ValueError or TypeError that names the function and the option."""
    check_choice(function, "loss_type", loss_type, POLICY_LOSS_NAMES)
    spec = POLICY_LOSSES[loss_type]
    check_choice(function, "level", level, ("token", "sequence"))
    if level not in spec.levels:
        raise ValueError(
            f"{function}: loss_type {loss_type!r} is defined at the level {spec.levels[0]!r}, got level {level!r}"
        )
    check_weight(function, "beta", beta)
    check_choice(function, "kl_estimator", kl_estimator, KL_ESTIMATORS)
    check_weight(function, "epsilon", epsilon)
    if epsilon >= 1 and "epsilon" in spec.options:
        raise ValueError(f"{function}: epsilon must be in [0, 1), got {epsilon}")
    is_cispo = spec.formula == "cispo"
    if epsilon_high is None:
        epsilon_high = CISPO_BOUND if is_cispo else epsilon
    check_weight(function, "epsilon_high", epsilon_high)
    if is_cispo and epsilon_high < 1:
        raise ValueError(
            f"{function}: for 'cispo' epsilon_high is the largest ratio itself and must be at least 1, got "
            f"{epsilon_high}; below 1 it would scale every gradient (the paper's 1 + epsilon is meant)"
        )
    if delta is None:
        delta = math.inf
    else:
        check_number(function, "delta", delta)
        if not delta > 1 + epsilon_high:
            raise ValueError(
                f"{function}: delta must be greater than 1 + epsilon_high = {1 + epsilon_high}, got {delta}"
            )
    for name, value in (
        ("sapo_temperature_pos", sapo_temperature_pos),
        ("sapo_temperature_neg", sapo_temperature_neg),
    ):
        check_weight(function, name, value)
        if value == 0:
            raise ValueError(f"{function}: {name} must be positive, got {value}")
    for name, value in (
        ("vespo_k_pos", vespo_k_pos),
        ("vespo_lambda_pos", vespo_lambda_pos),
        ("vespo_k_neg", vespo_k_neg),
        ("vespo_lambda_neg", vespo_lambda_neg),
    ):
        check_weight(function, name, value)
    return PolicyTerm(
        spec,
        level == "sequence",
        float(epsilon),
        float(epsilon_high),
        float(delta),
        float(sapo_temperature_pos),
        float(sapo_temperature_neg),
        float(vespo_k_pos),
        float(vespo_lambda_pos),
        float(vespo_k_neg),
        float(vespo_lambda_neg),
        float(beta),
        kl_estimator,
        bool(use_bias_correction_kl),
    )
