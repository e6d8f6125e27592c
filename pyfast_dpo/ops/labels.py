"""Labels: the Hugging Face layout, and how many tokens are scored."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def shifted_labels(labels: Tensor, ignore_index: int) -> Tensor:
    """Labels of the Hugging Face layout moved one position to the left; the last position is ignored."""
    return F.pad(labels[..., 1:], (0, 1), value=ignore_index)


def scored_lengths(labels: Tensor, shift: bool, ignore_index: int) -> Tensor:
    """Numbers of scored tokens `[B]` of labels `[B, T]`."""
    return ((labels[:, 1:] if shift else labels) != ignore_index).sum(1)
