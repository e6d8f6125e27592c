"""Attention over a row of prompts and responses on the CPU: one call of our own kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from pyfast_dpo.layout.attention_blocks import Scores
from pyfast_dpo.layout.shared_prompt import SharedPromptLayout
from pyfast_dpo.ops import operators

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def takes(query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> bool:
    """Whether the kernel can serve."""
    return (
        query.device.type == "cpu"
        and scores.softcap is None
        and scores.dropout == 0.0
        and (scores.scaling is None or scores.scaling > 0)
        and key.shape[-1] == value.shape[-1]
        and _dtype(query, key, value) in DTYPES
    )


def attend_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, layout: SharedPromptLayout, scores: Scores
) -> Tensor:
    """Query `[1, heads, T, D]`, key and value `[1, key heads, T, D]` -> `[1, T, heads, D]`."""
    dtype = _dtype(query, key, value)
    query, key, value = (t[0].transpose(0, 1).to(dtype) for t in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scores.scaling is None else scores.scaling
    window = layout.tokens if scores.window is None else scores.window
    output, _ = operators.shared_prompt_attention(
        query, key, value, layout.blocks(), scale, max(window, 1)
    )
    return output.unsqueeze(0)


def _dtype(*tensors: Tensor) -> torch.dtype | None:
    """What torch's own attention would compute in; None where the tensors differ."""
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu")
    dtypes = {tensor.dtype for tensor in tensors}
    return dtypes.pop() if len(dtypes) == 1 else None
