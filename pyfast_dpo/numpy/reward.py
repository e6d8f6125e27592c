"""The loss of a reward model, with its gradients."""

from __future__ import annotations

from typing import NamedTuple

from numpy.typing import ArrayLike

from pyfast_dpo.losses.table import check_pair_options
from pyfast_dpo.numpy.arrays import FloatArray, arrays_of
from pyfast_dpo.numpy.metrics import mean
from pyfast_dpo.ops import _C
from pyfast_dpo.ops.checks import check_weight


class RewardResult(NamedTuple):
    """Result of `reward_loss`."""

    loss: float  # mean over the pairs, 0 for P = 0
    grad_chosen: FloatArray  # [P] d loss / d chosen
    grad_rejected: FloatArray  # [P]


def reward_loss(
    chosen: ArrayLike,
    rejected: ArrayLike,
    *,
    margins: ArrayLike | None = None,
    center_rewards_coefficient: float = 0.0,
) -> RewardResult:
    """Bradley-Terry loss of a reward model's scores, as `pyfast_dpo.reward_loss` (Ouyang et al. 2022, eq. 1).

    Args:
        chosen, rejected: `[P]` scores of the two responses of every pair.
        margins: `[P]`, taken off chosen - rejected.
        center_rewards_coefficient: >= 0, weight of (chosen + rejected)^2.

    Returns:
        `(loss, grad_chosen, grad_rejected)`; the gradients are those of the mean loss.

    Raises:
        TypeError, ValueError: dtypes, shapes, a negative coefficient.
    """
    name = "reward_loss"
    check_weight(name, "center_rewards_coefficient", center_rewards_coefficient)
    arrays = arrays_of(name, ("chosen", "rejected", "margins"), (chosen, rejected, margins), 2)
    better, worse, margin_values = arrays
    assert better is not None and worse is not None
    (term,) = check_pair_options(name, "sigmoid", 1.0)
    inputs = (better, worse, None, None, None, None, margin_values, None)
    losses, _, _, *slopes = _C.pair_loss(*inputs, *term.formula_options())
    pull, pairs = float(center_rewards_coefficient), max(len(losses), 1)
    if pull:  # 0 times an infinite score would be NaN
        total = better + worse
        losses = losses + pull * total**2
        slopes = [slope + 2 * pull * total for slope in slopes]
    grads = [slope / pairs for slope in slopes]
    return RewardResult(mean(losses), grads[0], grads[1])
