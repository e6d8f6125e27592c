"""Attention over a row of prompts and responses, one call of torch's attention a response: for any device."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyfast_dpo.layout.shared_prompt import SharedPromptLayout


class Scores(NamedTuple):
    """How attention scores are made."""

    scaling: float | None  # None: head dimension ** -0.5
    dropout: float
    window: int | None  # positions that a query sees, itself included
    softcap: float | None


def attend_by_blocks(
    query: Tensor, key: Tensor, value: Tensor, layout: SharedPromptLayout, scores: Scores
) -> Tensor:
    """Query `[1, heads, T, D]`, key and value `[1, key heads, T, D]` -> `[1, T, heads, D]`."""
    # One block a prompt with its first response, one for each other response. Splitting the whole row at
    # once makes the backward pass one concatenation.
    sizes = [size for group in layout.groups for size in group.blocks()]
    blocks = zip(*(tensor.split(sizes, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = []
    for group in layout.groups:
        q, k, v = next(blocks)
        outputs.append(_causal(q, k, v, layout, scores))
        prompt_key, prompt_value = k[:, :, : group.prompt], v[:, :, : group.prompt]
        for _ in group.responses[1:]:
            q, k, v = next(blocks)
            k, v = torch.cat([prompt_key, k], dim=2), torch.cat([prompt_value, v], dim=2)
            outputs.append(_causal(q, k, v, layout, scores))
    if not outputs:  # a row without groups
        return query.new_zeros(query.shape[0], 0, query.shape[1], value.shape[3])
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _causal(
    query: Tensor, key: Tensor, value: Tensor, layout: SharedPromptLayout, scores: Scores
) -> Tensor:
    """Causal attention of queries that are the last positions of the keys."""
    queries, keys = query.shape[2], key.shape[2]
    window, softcap = scores.window, scores.softcap
    mask = None
    if queries != keys or softcap is not None or (window is not None and window < keys):
        mask = layout.mask(queries, keys, window, query.dtype, query.device)
    repeats = query.shape[1] // key.shape[1]
    if softcap is None:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=scores.dropout,
            is_causal=mask is None,
            scale=scores.scaling,
            enable_gqa=repeats > 1,
        )
    # torch's fused attention has no soft-cap; rows of one group are short.
    scale = query.shape[-1] ** -0.5 if scores.scaling is None else scores.scaling
    products = query @ key.repeat_interleave(repeats, 1).transpose(2, 3) * scale
    products = softcap * torch.tanh(products / softcap)
    assert mask is not None
    weights = (products + mask).softmax(-1, dtype=torch.float32)
    weights = F.dropout(weights.to(query.dtype), scores.dropout, scores.dropout > 0)
    return weights @ value.repeat_interleave(repeats, 1)
