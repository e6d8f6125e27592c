"""What is reported beside a loss, by TRL's names."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyfast_dpo.numpy.arrays import FloatArray


def reward_metrics(chosen: FloatArray, rejected: FloatArray) -> dict[str, float]:
    return {
        "rewards/chosen": mean(chosen),
        "rewards/rejected": mean(rejected),
        "rewards/accuracies": mean(chosen > rejected),
        "rewards/margins": mean(chosen) - mean(rejected),
    }


def metrics_of(
    chosen_rewards: FloatArray,
    rejected_rewards: FloatArray,
    chosen: FloatArray,
    rejected: FloatArray,
) -> dict[str, float]:
    return {
        "rewards/chosen": mean(chosen_rewards),
        "rewards/rejected": mean(rejected_rewards),
        "rewards/margins": mean(chosen_rewards) - mean(rejected_rewards),
        "logps/chosen": mean(chosen),
        "logps/rejected": mean(rejected),
    }


def mean(values: NDArray[Any]) -> float:
    """In float64, from the first value on: the mean of equal values is exactly that value; 0 for nothing."""
    if values.size == 0:
        return 0.0
    wide = values.astype(np.float64)
    if not np.isfinite(wide[0]):  # differences from it would be no numbers
        return float(wide.mean())
    return float(wide[0] + (wide - wide[0]).mean())
