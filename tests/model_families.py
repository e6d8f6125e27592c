"""Tiny models of many families, and their hidden states by each sequence alone and by one row of shared prompts."""

from __future__ import annotations

import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pyfast_dpo.layout.attention import no_mask
from pyfast_dpo.layout.shared_prompt import pack_row

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip


MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),  # grouped heads
    "llama eager": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="eager")),
    "qwen2 tied head": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),  # normalized queries and keys
    # windows shorter than the prompt, so that responses must not see its beginning
    "mistral sliding window": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5)),
    "gemma2 soft-cap": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, sliding_window=5)),
    "gemma3 two positions": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SIZES, sliding_window=5, layer_types=["sliding_attention", "full_attention"]
        )
    ),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SIZES)),
    "gpt2 learned positions": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=61, n_positions=64, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=1, eos_token_id=1)
    ),
    "qwen2 experts": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                       shared_expert_intermediate_size=16)
    ),
}  # fmt: skip


PROMPTS = [list(range(5, 14)), list(range(5, 14)), [20], list(range(5, 14)), []]


RESPONSES = [
    [30, 31, 32, 33],
    [40, 41, 42, 43, 44, 45],  # the same prompt: computed once
    [50],  # the shortest prompt and response
    [46, 47],  # a third response to the first prompt
    [51, 52, 53],  # no prompt: nothing scores its first token
]


def make(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    model.config.attention_dropout = 0.0
    return model


def separate(model):
    """Hidden states that score the tokens of each response, from each sequence by itself."""
    rows = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        hidden = model.base_model(torch.tensor([prompt + response]), use_cache=False)[0][0]
        rows.append(hidden[max(len(prompt) - 1, 0) : len(prompt) + len(response) - 1])
    return torch.cat(rows)


def packed(model):
    row = pack_row(PROMPTS, RESPONSES)
    hidden = model.base_model(
        input_ids=row.tokens.unsqueeze(0),
        position_ids=row.layout.positions().unsqueeze(0),
        attention_mask=no_mask(row.tokens.device),
        shared_prompt_layout=row.layout,
        use_cache=False,
    )[0][0]
    return hidden[row.index]
