"""Rows of shared prompts: hidden states and gradients are those of the separate sequences."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
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

from pyfast_dpo.attention import no_mask, pack_row, use_shared_prompt_attention
from pyfast_dpo.attention.shared_prompt import PREFIX

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


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_row_of_shared_prompts_gives_what_the_sequences_give(name, checkpointing):
    model = make(name).train()
    weights = torch.randn(len(pack_row(PROMPTS, RESPONSES).index), 32)

    def gradients(hidden):
        model.zero_grad()
        (hidden * weights).sum().backward()
        return {
            n: p.grad.clone() for n, p in model.base_model.named_parameters() if p.grad is not None
        }

    hidden = separate(model)
    expected = gradients(hidden)
    use_shared_prompt_attention(model)
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    ours = packed(model)
    torch.testing.assert_close(ours, hidden, rtol=1e-5, atol=1e-5)
    result = gradients(ours)
    assert result.keys() == expected.keys()
    for parameter, gradient in expected.items():
        scale = float(gradient.abs().max()) + 1e-6
        difference = float((result[parameter] - gradient).abs().max()) / scale
        assert difference < 1e-4, f"{parameter}: relative difference {difference:.2g}"


@pytest.mark.parametrize(
    "name", ["llama", "llama eager", "gemma2 soft-cap", "mistral sliding window"]
)
def test_a_call_without_a_layout_is_as_before(name):
    model = make(name).eval()
    batch = {
        "input_ids": torch.randint(5, 60, (2, 9)),
        "attention_mask": torch.tensor([[1] * 9, [1] * 6 + [0] * 3]),
    }
    with torch.no_grad():
        before = model(**batch).logits
        generated = model.generate(batch["input_ids"][:1], max_new_tokens=3, do_sample=False)
        use_shared_prompt_attention(model)
        use_shared_prompt_attention(model)  # twice is as once
        assert model.config._attn_implementation.count(PREFIX) == 1
        assert torch.equal(model(**batch).logits, before)
        again = model.generate(batch["input_ids"][:1], max_new_tokens=3, do_sample=False)
    assert torch.equal(again, generated)


def test_saved_configuration_does_not_name_our_attention(tmp_path):
    model = make("llama")
    use_shared_prompt_attention(model)
    model.save_pretrained(tmp_path)
    assert PREFIX not in (tmp_path / "config.json").read_text()
    assert LlamaForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_each_prompt_and_each_response_to_it_stands_once():
    row = pack_row([[1, 2], [3], [1, 2], [1, 2]], [[4], [5, 6], [7, 8], [4]])
    assert row.tokens.tolist() == [1, 2, 4, 7, 8, 3, 5, 6]
    assert row.layout.positions().tolist() == [0, 1, 2, 2, 3, 0, 1, 2]
    assert row.layout.tokens == 8
    # sequences in the order given; the first and the last are the same one
    assert row.lengths == (1, 2, 2, 1)
    assert row.index.tolist() == [1, 5, 6, 1, 3, 1]
    assert row.targets.tolist() == [4, 5, 6, 7, 8, 4]


def test_no_sequences_is_an_empty_row():
    row = pack_row([], [])
    assert row.tokens.numel() == row.index.numel() == row.layout.positions().numel() == 0


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda inputs: {"input_ids": inputs["input_ids"][:, :-1], "position_ids": inputs["position_ids"][:, :-1]},
         "query must be one row of 6 tokens"),
        (lambda inputs: {k: inputs[k].repeat(2, 1) for k in ("input_ids", "position_ids")},
         "query must be one row of 6 tokens"),
    ],
)  # fmt: skip
def test_a_row_that_does_not_fit_its_layout_is_refused(change, message):
    model = make("llama")
    use_shared_prompt_attention(model)
    row = pack_row([[5, 6], [5, 6]], [[7, 8], [9, 10]])
    inputs = {
        "input_ids": row.tokens.unsqueeze(0),
        "position_ids": row.layout.positions().unsqueeze(0),
    }
    with pytest.raises(ValueError, match=message):
        model(
            **change(inputs),
            attention_mask=no_mask(torch.device("cpu")),
            shared_prompt_layout=row.layout,
        )


def test_attention_that_we_do_not_know_is_refused():
    model = GptOssForCausalLM(
        GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    )  # fmt: skip
    use_shared_prompt_attention(model)
    with pytest.raises(ValueError, match="s_aux is not supported"):
        packed(model)
