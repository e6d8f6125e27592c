"""A tokenizer of whole words and a Llama of a few thousand weights: trainers in tests need no download."""

from __future__ import annotations

import string

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = ["<unk>", "<eos>", "<user>", "<assistant>", "<end>"]


def make_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Every letter is a word, and so is "cd"; padding is the end-of-sequence token."""
    words = [*SPECIAL, *string.ascii_lowercase, "cd"]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>"
    )
    fast.chat_template = chat_template
    return fast


def make_model(seed: int = 0, attention_dropout: float = 0.0, layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + 27,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_dropout=attention_dropout,
        eos_token_id=1,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


def make_experts(coefficient: float = 0.5) -> Qwen2MoeForCausalLM:
    """Routers that prefer some experts, so that there is something to balance."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=len(SPECIAL) + 27,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        router_aux_loss_coef=coefficient,
        max_position_embeddings=64,
        eos_token_id=1,
        pad_token_id=1,
    )
    return Qwen2MoeForCausalLM(config).eval()


def make_pairs(count: int = 16) -> list[dict[str, str]]:
    """Prompts of different lengths; chosen responses speak of vowels, rejected ones of consonants."""
    letters = string.ascii_lowercase
    return [
        {
            "prompt": " ".join(letters[i % 20 : i % 20 + 2 + i % 4]),
            "chosen": " a e" + " i" * (i % 3),
            "rejected": " x" + " z" * (1 + i % 2),
        }
        for i in range(count)
    ]


class Stream:
    """Rows that can be read again but have no length."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)
