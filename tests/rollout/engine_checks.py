"""What tests of engines share: prompts, and the log-probs of one pass."""

from __future__ import annotations

import torch

from pyfast_dpo import token_logps
from pyfast_dpo.rollout import Completion

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [20], [5, 6, 7]]  # ragged, one of them twice
NEVER = ()  # no stop token: every response has its full length


def scored(
    model, prompt: list[int], completion: Completion, temperature: float = 1.0
) -> torch.Tensor:
    """Log-probs of a response from one pass over the whole unpadded sequence."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion.ids])).logits[0, len(prompt) - 1 : -1]
    return token_logps(logits / temperature, torch.tensor(completion.ids))
