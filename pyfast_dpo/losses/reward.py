"""The loss of a reward model on its scores."""

from __future__ import annotations

from torch import Tensor

from pyfast_dpo.losses.arguments import pair_of
from pyfast_dpo.losses.pairs import PairInputs, loss_of_term
from pyfast_dpo.losses.table import check_pair_options
from pyfast_dpo.ops.checks import check_constants, check_per_sequence, check_weight
from pyfast_dpo.ops.dispatch import Impl, use_kernels_for
from pyfast_dpo.ops.dtypes import to_statistics_dtype


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
    losses, *_ = loss_of_term(term, inputs, use_kernels_for(name, impl, chosen))
    if center_rewards_coefficient == 0:
        return losses
    return losses + float(center_rewards_coefficient) * (chosen + rejected) ** 2
