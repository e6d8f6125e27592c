"""Every causal language model of transformers that can be built tiny, by its model type."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# Under the names that one or another configuration has for them. Windows are shorter than the prompts below.
SIZES = {
    "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, "is_decoder": True,
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "dim": 32, "hidden_dim": 32, "embedding_size": 32,
    "attention_hidden_size": 32, "word_embed_proj_dim": 32, "lru_width": 32,
    "intermediate_size": 48, "d_ff": 48, "ffn_dim": 48, "ffn_hidden_size": 48, "decoder_ffn_dim": 48,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2, "encoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "rotary_dim": 4,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "max_position_embeddings": 128, "n_positions": 128, "n_ctx": 128, "max_seq_len": 128,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "expert_ffn_hidden_size": 16, "state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "mamba_n_heads": 8,
    "mamba_d_head": 8, "mamba_d_state": 8, "conv_L_cache": 3,
    "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1, "attention_chunk_size": 8,
    "window_size": 8, "keep_window_size": 8, "attention_window_size": 8,
    "attention_dropout": 0.0, "hidden_dropout": 0.0,
}  # fmt: skip
LATENT_ATTENTION = ("deepseek", "axk", "glm4_moe_lite", "glm_moe", "longcat", "minicpm3", "youtu")
LARGEST = 3_000_000  # parameters


def names() -> list[str]:
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def build(name: str, **options: Any) -> Any:
    """Weights six times as large as drawn, so that attention and logits matter; None where `SIZES` does not make
    it tiny, whatever its configuration raises."""
    sizes = SIZES | options
    if name.startswith(LATENT_ATTENTION):  # their head dimension follows from others
        del sizes["head_dim"]
    kind = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]
    kind = getattr(transformers, kind if isinstance(kind, str) else kind[0])
    try:
        config = _config(CONFIG_MAPPING[name], sizes)
        with torch.device("meta"):
            if sum(p.numel() for p in kind(config).parameters()) > LARGEST:
                return None
        torch.manual_seed(0)
        model = kind(config).eval()
    except Exception:
        return None
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(6)
    return model


def _config(kind: Any, sizes: dict[str, Any]) -> Any:
    try:
        return kind(**sizes)
    except Exception:  # some refuse what they do not know
        known = {
            *inspect.signature(kind.__init__).parameters,
            *vars(kind).get("__annotations__", {}),
        }
        return kind(**{name: value for name, value in sizes.items() if name in known})


def models() -> Iterator[tuple[str, Any]]:
    for name in names():
        model = build(name)
        if model is not None:
            yield name, model
