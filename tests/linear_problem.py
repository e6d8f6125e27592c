"""A small head with ragged responses, for tests of what works from hidden states."""

from __future__ import annotations

import torch
from torch import Tensor


def problem(
    *,
    sequences: int = 6,
    length: int = 9,
    hidden: int = 16,
    vocab: int = 211,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hidden, weight, bias, labels): prompts of 3 ignored positions, one short and one empty response."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).mul(scale).to(dtype)

    labels = torch.randint(0, vocab, (sequences, length), generator=generator)
    labels[:, :3] = -100
    if sequences > 2:
        labels[2, 5:], labels[1] = -100, -100
    return draw(sequences, length, hidden), draw(vocab, hidden), draw(vocab), labels
