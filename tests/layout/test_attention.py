"""Rows of shared prompts: hidden states and gradients are those of the separate sequences."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from model_families import MODELS, PROMPTS, RESPONSES, SIZES, make, packed, separate
from transformers import GptOssConfig, GptOssForCausalLM, LlamaForCausalLM

from pyfast_dpo.layout.attention import PREFIX, no_mask, use_shared_prompt_attention
from pyfast_dpo.layout.shared_prompt import pack_row


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
