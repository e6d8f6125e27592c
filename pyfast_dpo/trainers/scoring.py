"""From a batch to the log-probs of its responses: the one place that knows how a batch is laid out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyfast_dpo import _ops
from pyfast_dpo.data.collators import IGNORE_INDEX
from pyfast_dpo.functional import sequence_logps

ROWS_AT_A_TIME = 128  # of the vocabulary size each: bounds the extra memory of the statistics


class Statistics(NamedTuple):
    """Sums over the scored tokens of each sequence, `[rows]` float32."""

    entropy: Tensor
    mean_logits: Tensor  # of the mean over the vocabulary
    top1_hits: Tensor  # tokens to which the model gives the largest logit


class Scores(NamedTuple):
    logps: Tensor  # [rows] float32, sums over the response tokens, with gradient if enabled
    lengths: Tensor  # [rows] int64, number of response tokens, at least 1
    statistics: Statistics | None


def score_responses(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    statistics: bool = False,
) -> Scores:
    """Log-probs of the responses of a padded batch.

    Args:
        model: a causal language model of `transformers`.
        batch: `input_ids`, `attention_mask`, `labels`, int64 `[rows, L]`; labels are -100 but on the response.
        statistics: also what the metrics need of the logits.
    """
    input_ids, attention_mask, labels = (
        batch[name] for name in ("input_ids", "attention_mask", "labels")
    )
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    lengths = (labels[:, 1:] != IGNORE_INDEX).sum(1).clamp(min=1)
    # Before the log-probs, whose backward pass overwrites the logits.
    measured = _statistics(logits, labels) if statistics else None
    logps = sequence_logps(
        logits,
        labels,
        shift=True,
        ignore_index=IGNORE_INDEX,
        inplace_backward=_ops.has_kernels(logits.device.type),
    )
    return Scores(logps, lengths, measured)


@torch.no_grad()
def _statistics(logits: Tensor, labels: Tensor) -> Statistics:
    targets = labels[:, 1:]
    rows, positions = (targets != IGNORE_INDEX).nonzero(as_tuple=True)
    totals = torch.zeros(3, labels.shape[0], dtype=torch.float32, device=logits.device)
    for row, position in zip(
        rows.split(ROWS_AT_A_TIME), positions.split(ROWS_AT_A_TIME), strict=True
    ):
        z = logits[row, position].float()
        hits = z.argmax(-1) == targets[row, position]
        # entr(0) is 0, also where a logit is -inf
        entropy = torch.special.entr(z.softmax(-1)).sum(-1)
        totals.index_add_(1, row, torch.stack([entropy, z.mean(-1), hits.float()]))
    return Statistics(*totals)
