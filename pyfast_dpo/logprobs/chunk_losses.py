"""What a pass over chunks of rows asks of its loss: coefficients of rows, from their log-probs."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from pyfast_dpo.logprobs.plan import Chunk, Plan
from pyfast_dpo.logprobs.scores import EntropyGradient
from pyfast_dpo.logprobs.statistics import LinearStatistics
from pyfast_dpo.ops.dtypes import statistics_dtype


class ChunkLosses(ABC):
    """The losses of one chunk after the other, and what comes out beside them."""

    def __init__(self, like: Tensor, plan: Plan, statistics: bool, differentiate: bool) -> None:
        self.plan, self.differentiate = plan, differentiate
        self.wide = statistics_dtype(like.dtype)
        self.statistics = empty_statistics(like, plan.rows.targets) if statistics else None
        # Whether a chunk is more than a piece of logits, so that some are gone before its coefficients are known.
        self.waits = True
        self.entropy: Tensor | None = None  # d loss / d entropy of every row; then nothing waits

    def measure(self, chunk: Chunk, logits: list[LinearStatistics]) -> None:
        """Writes the statistics of the chunk's pieces."""
        if self.statistics is None or not logits:
            return
        for values, parts in zip(self.statistics, zip(*logits, strict=True), strict=True):
            chunk.write(values, torch.cat(parts))

    def of_entropy(self, measured: list[LinearStatistics]) -> EntropyGradient | None:
        """Of a chunk of one piece."""
        if self.entropy is None:
            return None
        entropy = measured[0].entropy
        return EntropyGradient(entropy, self.entropy.to(entropy.dtype).expand(entropy.shape))

    @abstractmethod
    def coefficients(self, chunk: Chunk, tokens: Tensor) -> Tensor | None:
        """d loss / d log-prob of every row of the chunk, from the log-probs of all of them; None where nothing asks
        for gradients."""

    @abstractmethod
    def finish(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss, and what has no gradient: log-probs, statistics, further outputs."""


def empty_statistics(like: Tensor, targets: Tensor) -> LinearStatistics:
    entropy, mean, log_sum_sq = (
        torch.empty_like(targets, dtype=statistics_dtype(like.dtype)) for _ in range(3)
    )
    return LinearStatistics(entropy, mean, torch.empty_like(targets, dtype=torch.bool), log_sum_sq)
