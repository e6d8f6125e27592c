"""A policy loss on the rows of a pass: log-probs of tokens in, a coefficient a row out."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyfast_dpo.logprobs.chunk_losses import ChunkLosses
from pyfast_dpo.logprobs.plan import Chunk, Plan
from pyfast_dpo.losses.policy import PolicyInputs, losses_of_tokens


class PolicyOptions(NamedTuple):
    plan: Plan  # a unit is a row, or a sequence if the loss couples its tokens
    inputs: PolicyInputs  # [R] each, in the dtype of the statistics
    entropy: Tensor | None  # scalar float64: d loss / d entropy of every row
    statistics: bool

    def losses(self, like: Tensor, differentiate: bool) -> PolicyLosses:
        return PolicyLosses(like, self, differentiate)


class PolicyLosses(ChunkLosses):
    """Coefficients chunk by chunk; loss and reports of all tokens at once, when all are known."""

    def __init__(self, like: Tensor, options: PolicyOptions, differentiate: bool) -> None:
        measured = options.statistics or options.entropy is not None
        super().__init__(like, options.plan, measured, differentiate)
        self.inputs, self.entropy = options.inputs, options.entropy
        self.waits = bool(self.plan.group) and self.entropy is None
        rows = self.plan.rows
        self.logps = like.new_empty((rows.index.shape[0],), dtype=self.wide)
        # What a chunk's coefficients lack of the weight of a row.
        weight = 1 / self.inputs.normalizer
        if not self.plan.group and self.inputs.term.spec.sequence_means:
            weight = (weight / rows.counts.clamp(min=1)).repeat_interleave(
                rows.counts, output_size=len(self.logps)
            )
        self.weights = weight.to(self.wide).expand(self.logps.shape)

    def coefficients(self, chunk: Chunk, tokens: Tensor) -> Tensor | None:
        chunk.write(self.logps, tokens)
        if not self.differentiate:
            return None
        inputs, counts = self.inputs, self.plan.rows.counts
        own = inputs.with_tensors(None if t is None else chunk.of(t) for t in inputs.tensors())
        if self.plan.group:
            counts = counts_for_tokens(counts[chunk.units], tokens)
        else:  # every token a sequence: the loss of each is its own
            counts = torch.ones_like(tokens, dtype=torch.int64)
        return own.kernel(tokens, counts)[2] * chunk.of(self.weights)

    def finish(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        counts = counts_for_tokens(self.plan.rows.counts, self.logps)
        result = losses_of_tokens(self.logps, self.inputs, counts, None, True)
        loss = result.loss
        if self.entropy is not None and self.statistics is not None:
            bonus = self.entropy * self.statistics.entropy.sum(dtype=torch.float64)
            loss = (loss + bonus).to(self.wide)
        return loss, (self.logps, *result[1:], *(self.statistics or ()))


def counts_for_tokens(counts: Tensor, tokens: Tensor) -> Tensor:
    """With an empty sequence more where there are as many sequences as tokens, so that as many advantages are those of
    the tokens."""
    return F.pad(counts, (0, 1)) if counts.shape == tokens.shape else counts
