"""Causal language models of transformers: which are refused by name, their lm_head, and what they do to logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from pyfast_dpo.logprobs.head import Head

# The names under which transformers' configurations keep what is done to logits. A name that is missing here costs
# memory, not exactness: models are tried (`ways.py`), and where this does not tell all, make their logits themselves.
FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVISORS = ("logits_scaling",)
MULTIPLY_BY_DIVISORS = ("hyperclovax",)  # model types that mean a factor by that name
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def causal_lm_of(model: Any) -> Any:
    """The causal language model inside a PEFT model, or the model itself."""
    # PEFT sets `peft_config` on the model inside, too.
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def body_of(model: Any) -> Any:
    """What makes the hidden states of a causal language model.

    Raises:
        ValueError: nothing apart from its head does.
    """
    if model.base_model is not model:
        return model.base_model
    # Some name another attribute than the one that holds it.
    inside = [child for child in model.children() if hasattr(child, "get_input_embeddings")]
    if len(inside) != 1:
        raise ValueError(f"{type(model).__name__}: the model shows no body apart from its head")
    return inside[0]


def check_causal_lm(name: str, model: Any) -> None:
    """Refuses, by name, what is no causal language model of transformers.

    Raises:
        ValueError: it has no lm_head, reads what it has not written yet (an encoder, a masked model), or takes
            images or sound.
    """
    kind = type(causal_lm_of(model)).__name__
    config = getattr(model, "config", None)
    embeddings = getattr(model, "get_output_embeddings", None)
    if config is None or embeddings is None or embeddings() is None:
        raise ValueError(
            f"{name}: model must be a causal language model of transformers with an lm_head, got {kind}"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name}: model must be a causal language model, got {kind}, whose encoder reads the whole text; "
            "load a decoder-only model (AutoModelForCausalLM)"
        )
    check_no_other_senses(name, config)


def check_no_other_senses(name: str, config: Any) -> None:
    """The part of `check_causal_lm` that a configuration alone tells."""
    for sense, field in (("images", "vision_config"), ("sound", "audio_config")):
        if getattr(config, field, None) is not None:
            raise ValueError(
                f"{name}: {config.model_type} models take {sense}, which these trainers do not; to train the "
                "language model of one on text, load its text-only class (a configuration without "
                f"{field}) with transformers and give the model itself"
            )


def head_layer(model: Any) -> Any:
    """The linear layer that makes the logits: of a head that PEFT trains as a copy (`modules_to_save`), the
    copy that is in use."""
    layer = model.get_output_embeddings()
    if type(layer).__name__ != "ModulesToSaveWrapper":
        return layer
    active: Sequence[str] = [n for n in layer.active_adapters if n in layer.modules_to_save]
    if layer.disable_adapters or not active:
        return layer.original_module
    return layer.modules_to_save[active[0]]


def head_of(model: Any) -> Head:
    """The lm_head of a causal language model, and what the model does to its logits by its configuration.

    Raises:
        ValueError: no output embeddings, or something else than a plain linear layer.
    """
    layer = head_layer(model)
    if type(layer) is not nn.Linear:
        kind = type(layer).__name__
        if kind == "Linear":
            kind = f"{type(layer).__module__}.{kind}"
        if type(layer).__module__.startswith("peft."):
            kind = f"an adapter's layer ({kind})"
        raise ValueError(
            f"{type(model).__name__}: the lm_head must be a torch.nn.Linear, got {kind}"
        )
    config = model.config.get_text_config()
    factors = [getattr(config, name, None) or 1.0 for name in FACTORS]
    divisors = [getattr(config, name, None) or 1.0 for name in DIVISORS]
    if config.model_type in MULTIPLY_BY_DIVISORS:
        factors, divisors = factors + divisors, []
    scale = math.prod(factors) / math.prod(divisors)
    caps = [getattr(config, name, None) for name in SOFT_CAPS]
    softcap = next((cap for cap in caps if cap), None)
    weight: Any = layer.weight
    bias: Any = layer.bias
    if type(weight).__name__ == "DTensor":  # sharded by itself, outside the root of FSDP
        weight = weight.full_tensor()
        bias = None if bias is None else bias.full_tensor()
    return Head(weight, bias, float(scale), softcap)
