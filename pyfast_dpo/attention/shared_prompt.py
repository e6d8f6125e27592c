"""Attention over a row of prompts and responses, for any model that uses transformers' attention registry."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyfast_dpo.attention.layout import SharedPromptLayout

PREFIX = "shared_prompt_over_"  # then the implementation that serves every call without a layout


def use_shared_prompt_attention(model: Any) -> None:
    """Makes a `transformers` model understand the keyword `shared_prompt_layout` in its call.

    With it, the model's attention keeps the responses of a row apart; pass `position_ids` from
    `SharedPromptLayout.positions()` and `attention_mask=no_mask(...)`. Calls without it run the
    implementation that the model had.

    Raises:
        ValueError: the model does not take its attention from the registry.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    original = model.config._attn_implementation
    if original.startswith(PREFIX):
        return
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(
            f"{type(model).__name__} does not take its attention function from transformers' registry"
        )
    name = PREFIX + original
    AttentionInterface.register(name, shared_prompt_attention)
    masks = AttentionMaskInterface()
    if original in masks:
        AttentionMaskInterface.register(name, masks[original])
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise ValueError(
            f"{type(model).__name__} does not let its attention implementation be changed"
        )


def no_mask(device: torch.device) -> Tensor:
    """An attention mask of four dimensions: models hand it on as it is, and `shared_prompt_attention`
    does not read it. Without a mask they would build one of [T, T] from the positions."""
    return torch.zeros(1, 1, 1, 1, device=device)


def shared_prompt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    shared_prompt_layout: SharedPromptLayout | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention function of the registry: query `[1, heads, T, D]`, key and value `[1, key heads, T, D]`.

    Returns `[1, T, heads, D]`. No score between two responses, or between two groups, is computed.

    Raises:
        ValueError: more than one row, another length than the layout's, or attention that it does not know
            (sinks, a bias of positions).
    """
    if shared_prompt_layout is None:
        arguments = {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window}
        if softcap is not None:
            arguments["softcap"] = softcap
        return _original(module)(
            module, query, key, value, attention_mask, **arguments, **options
        )  # fmt: skip
    for name in ("s_aux", "position_bias"):
        if options.get(name) is not None:
            raise ValueError(f"shared_prompt_attention: {name} is not supported")
    if query.shape[0] != 1 or query.shape[2] != shared_prompt_layout.tokens:
        raise ValueError(
            f"shared_prompt_attention: query must be one row of {shared_prompt_layout.tokens} tokens, "
            f"got {list(query.shape)}"
        )
    # One block a prompt with its first response, one for each other response. Splitting the whole row at
    # once makes the backward pass one concatenation.
    sizes = [
        size
        for group in shared_prompt_layout.groups
        for size in (group.prompt + sum(group.responses[:1]), *group.responses[1:])
    ]
    blocks = zip(*(tensor.split(sizes, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = []
    attend: dict[str, Any] = {
        "layout": shared_prompt_layout,
        "scaling": scaling,
        "dropout": dropout,
        "window": sliding_window,
        "softcap": softcap,
    }
    for group in shared_prompt_layout.groups:
        q, k, v = next(blocks)
        outputs.append(_causal(q, k, v, **attend))
        prompt_key, prompt_value = k[:, :, : group.prompt], v[:, :, : group.prompt]
        for _ in group.responses[1:]:
            q, k, v = next(blocks)
            k, v = torch.cat([prompt_key, k], dim=2), torch.cat([prompt_value, v], dim=2)
            outputs.append(_causal(q, k, v, **attend))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    layout: SharedPromptLayout,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention of queries that are the last positions of the keys."""
    queries, keys = query.shape[2], key.shape[2]
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
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=repeats > 1,
        )
    # torch's fused attention has no soft-cap; rows of one group are short.
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.repeat_interleave(repeats, 1).transpose(2, 3) * scale
    scores = softcap * torch.tanh(scores / softcap)
    assert mask is not None
    weights = (scores + mask).softmax(-1, dtype=torch.float32)
    weights = F.dropout(weights.to(query.dtype), dropout, dropout > 0)
    return weights @ value.repeat_interleave(repeats, 1)


def _original(module: Any) -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = module.config._attn_implementation.removeprefix(PREFIX)
    if name == "eager":  # not in the registry: every model file has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]
