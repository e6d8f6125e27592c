"""How often a model prefers the chosen response of pairs it was not trained on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyfast_dpo.data import PreparedDataset
from pyfast_dpo.layout.batches import Collator
from pyfast_dpo.model.prepare import prepare
from pyfast_dpo.model.projections import score_responses


@torch.no_grad()
def pair_logps(
    model: nn.Module,
    pairs: PreparedDataset,
    collator: Collator,
    batch_size: int = 8,
) -> Tensor:
    """Summed log-probs `[N, 2]` of the chosen and the rejected response of every pair, on the CPU.

    The model is a causal language model of transformers, or a PEFT model around one; it is left as it was.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    logps = []
    with prepare("pair_logps", {"model": model}):
        for start in range(0, len(pairs), batch_size):
            batch = collator(pairs.examples[start : start + batch_size])
            scores = score_responses(
                model, {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            )
            logps.append(torch.stack(scores.chunk(2), dim=1).cpu())
    model.train(was_training)
    return torch.cat(logps)


def preference_accuracy(logps: Tensor, reference_logps: Tensor | None = None) -> float:
    """Share of pairs whose chosen response has the larger log-prob, or the larger log-ratio to a reference.

    Args:
        logps, reference_logps: `[N, 2]` of `pair_logps`.
    """
    scores = logps if reference_logps is None else logps - reference_logps
    return float((scores[:, 0] > scores[:, 1]).double().mean())
