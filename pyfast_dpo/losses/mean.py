"""The mean of losses."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_of_losses(losses: Tensor) -> Tensor:
    """Mean over `[N]`, 0 for N = 0.

    Summed in float64: the mean of equal numbers is that number, so that policy == reference gives ln 2
    bit for bit whatever the number of pairs.
    """
    return (losses.sum(dtype=torch.float64) / max(losses.shape[0], 1)).to(losses.dtype)
