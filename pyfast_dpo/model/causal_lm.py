"""Causal language models of transformers and their lm_head."""

from __future__ import annotations

from typing import Any

from torch import nn

from pyfast_dpo.logprobs.head import Head


def causal_lm_of(model: Any) -> Any:
    """The causal language model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def head_of(model: Any) -> Head:
    """The lm_head of a causal language model, and what the model does to its logits by its configuration.

    Raises:
        ValueError: no output embeddings, or something else than a plain linear layer.
    """
    layer = model.get_output_embeddings()
    if type(layer) is not nn.Linear:
        raise ValueError(
            f"{type(model).__name__}: the lm_head must be a torch.nn.Linear, got {type(layer).__name__}"
        )
    config = model.config
    scale = getattr(config, "logit_scale", None) or 1.0
    scale *= getattr(config, "lm_head_multiplier", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    weight: Any = layer.weight
    bias: Any = layer.bias
    if type(weight).__name__ == "DTensor":  # sharded by itself, outside the root of FSDP
        weight = weight.full_tensor()
        bias = None if bias is None else bias.full_tensor()
    return Head(weight, bias, float(scale), getattr(config, "final_logit_softcapping", None))
