"""Tables of ids and positions: as many tokens as they say can be looked up, and not one more."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from tiny_models import make_model

from pyfast_dpo.model.tables import position_table, vocabulary_of

# Models with learned positions: the rows that their tables have, before or after those that no token uses.
LEARNED = {
    "GPT2": {"n_positions": 12, "n_embd": 16, "n_layer": 1, "n_head": 2},
    "GPTBigCode": {"n_positions": 12, "n_embd": 16, "n_layer": 1, "n_head": 2},
    "GPTNeo": {
        "max_position_embeddings": 12, "hidden_size": 16, "num_layers": 1, "num_heads": 2,
        "attention_types": [[["global"], 1]],
    },
    "OpenAIGPT": {"n_positions": 12, "n_embd": 16, "n_layer": 1, "n_head": 2},
    "OPT": {
        "max_position_embeddings": 12, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16,
        "num_hidden_layers": 1, "num_attention_heads": 2,
    },
    "BioGpt": {
        "max_position_embeddings": 12, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "Roberta": {
        "max_position_embeddings": 14, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "is_decoder": True, "pad_token_id": 1,
    },
}  # fmt: skip
HEADS = {"OpenAIGPT": "OpenAIGPTLMHeadModel", "GPT2": "GPT2LMHeadModel"}


@pytest.mark.parametrize("name", LEARNED)
def test_a_table_of_positions_holds_as_many_tokens_as_it_says(name):
    config = getattr(transformers, f"{name}Config")(vocab_size=32, **LEARNED[name])
    model = getattr(transformers, HEADS.get(name, f"{name}ForCausalLM"))(config).eval()
    tokens = position_table(model)
    assert tokens == 12
    with torch.no_grad():
        model(input_ids=torch.full((1, tokens), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, tokens + 1), 5))


def test_rotary_positions_have_no_table():
    assert position_table(make_model()) is None


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3]},
    ],
)
def test_an_adapter_leaves_the_vocabulary_as_it_is(options):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        make_model(), peft.LoraConfig(r=2, task_type="CAUSAL_LM", **options)
    )
    assert vocabulary_of(model) == 32


def test_embeddings_that_are_elsewhere_are_as_many_as_the_configuration_says():
    model = make_model()
    embeddings = torch.nn.Module()
    embeddings.weight = torch.nn.Parameter(torch.zeros(0))  # as a sharded one is on its way
    model.set_input_embeddings(embeddings)
    assert vocabulary_of(model) == 32
