"""Labels: the Hugging Face layout, and how many tokens are scored."""

from __future__ import annotations

import torch
from torch import Tensor


def shifted_labels(labels: Tensor, ignore_index: int) -> Tensor:
    """Labels of the Hugging Face layout moved one position to the left; the last position is ignored."""
    if labels.shape[-1] == 0:  # there is no last position
        return labels
    # not F.pad, whose value is a float: it cannot say every int64
    return torch.cat([labels[..., 1:], torch.full_like(labels[..., :1], ignore_index)], -1)


def scored_lengths(labels: Tensor, shift: bool, ignore_index: int) -> Tensor:
    """Numbers of scored tokens `[B]` of labels `[B, T]`."""
    return ((labels[:, 1:] if shift else labels) != ignore_index).sum(1)
