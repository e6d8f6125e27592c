"""Supervised fine-tuning through our head: the model's own loss and gradients, without its logits."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch

pytest.importorskip("transformers")
import transformers
from torch import nn

from pyfast_dpo.integrations import transformers as drop_in
from pyfast_dpo.integrations.transformers import patch_causal_lm_loss, unpatch_causal_lm_loss

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
MODELS = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "Qwen2, tied head": ("Qwen2ForCausalLM", "Qwen2Config", {"tie_word_embeddings": True}),
    # a soft-cap low enough to bend these logits
    "Gemma 2, soft-cap": (
        "Gemma2ForCausalLM", "Gemma2Config", {"final_logit_softcapping": 0.5, "head_dim": 8},
    ),
    "Cohere, scaled logits": ("CohereForCausalLM", "CohereConfig", {"logit_scale": 3.0}),
    "Granite, divided logits": ("GraniteForCausalLM", "GraniteConfig", {"logits_scaling": 0.2}),
    "Phi, bias in the head": ("PhiForCausalLM", "PhiConfig", {"num_key_value_heads": 4}),
}  # fmt: skip


def make(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    kind, config, options = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**{**SIZES, **options}))
    with torch.no_grad():  # logits that a loss far from log V tells apart
        model.get_output_embeddings().weight.mul_(10)
        if model.get_output_embeddings().bias is not None:
            model.get_output_embeddings().bias.normal_()
    return model.to(dtype).train()


def make_batch(scored: bool = True) -> dict[str, torch.Tensor]:
    """Two sequences, a prompt of three tokens, the second padded."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 61, (2, 11), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, 8:] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    labels[:, : 3 if scored else None] = -100
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def loss_and_gradients(model, batch, **options):
    model.zero_grad()
    loss = model(**batch, **options).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("items", [None, 20, torch.tensor(20)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_the_models_own(name, items):
    model, batch = make(name), make_batch()
    theirs = loss_and_gradients(model, batch, num_items_in_batch=items)
    patch_causal_lm_loss(model)
    output = model(**batch, num_items_in_batch=items)
    assert output.logits is None
    ours = loss_and_gradients(model, batch, num_items_in_batch=items)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=0)
    for key, gradient in theirs[1].items():
        scale = max(float(gradient.abs().max()), 1e-6)
        torch.testing.assert_close(ours[1][key], gradient, rtol=0, atol=1e-5 * scale, msg=key)


def test_bfloat16_is_nearer_to_float64_than_the_models_own_loss():
    model, batch = make("Llama", torch.bfloat16), make_batch()
    hidden = model.model(batch["input_ids"], attention_mask=batch["attention_mask"])[0].double()
    logits = hidden @ model.lm_head.weight.double().T
    truth = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    )
    theirs = model(**batch).loss
    patch_causal_lm_loss(model)
    ours = model(**batch).loss
    errors = [abs(float(value) - float(truth)) for value in (ours, theirs)]
    assert errors[0] < 1e-5 < errors[1], f"ours, the model's own: {errors}"


def test_long_batches_in_chunks_give_the_same(monkeypatch):
    model, batch = make("Gemma 2, soft-cap"), make_batch()
    patch_causal_lm_loss(model)
    whole = loss_and_gradients(model, batch)
    used = drop_in.fused_linear_loss
    monkeypatch.setattr(
        drop_in, "fused_linear_loss", lambda *a, **k: used(*a, **k, max_chunk_bytes=61 * 4 * 3)
    )
    pieces = loss_and_gradients(model, batch)
    torch.testing.assert_close(pieces[0], whole[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(pieces[1], whole[1], rtol=1e-4, atol=1e-6)


def test_a_batch_without_labels_to_score_has_a_loss_of_zero():
    model = make("Llama")
    patch_causal_lm_loss(model)
    loss, gradients = loss_and_gradients(model, make_batch(scored=False))
    assert loss == 0 and all(g.eq(0).all() for g in gradients.values())


@pytest.mark.parametrize(
    ("what", "call", "fused"),
    [
        ("training", {}, True),
        ("a tuple is asked for", {"return_dict": False}, True),
        ("logits are asked for", {"skip_logits": False}, False),
        ("some of the logits are asked for", {"logits_to_keep": 11}, False),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_which_calls_skip_the_logits(what, call, fused):
    model, batch = make("Llama"), make_batch()
    truth = model(**batch).loss
    patch_causal_lm_loss(model)
    output = model(**batch, **call)
    loss, logits = (
        (output[0], output[1:]) if isinstance(output, tuple) else (output.loss, output.logits)
    )
    torch.testing.assert_close(loss, truth, rtol=1e-5, atol=0)
    assert (logits is None or logits == ()) == fused


def test_evaluation_and_generation_are_the_models_own():
    model, batch = make("Llama").eval(), make_batch()
    before = (
        model(**batch),
        model.generate(batch["input_ids"][:1], max_new_tokens=3, do_sample=False),
    )
    patch_causal_lm_loss(model)
    after = (
        model(**batch),
        model.generate(batch["input_ids"][:1], max_new_tokens=3, do_sample=False),
    )
    assert torch.equal(before[0].loss, after[0].loss) and torch.equal(
        before[0].logits, after[0].logits
    )
    assert torch.equal(before[1], after[1])
    assert model(**batch, skip_logits=True).logits is None


def test_shift_labels_are_scored_where_they_stand():
    """Padding-free collators and context parallelism pass labels that are shifted already."""
    model, batch = make("Llama"), make_batch()
    labels = batch.pop("labels")
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    truth = model(**batch, labels=labels, shift_labels=shifted).loss
    patch_causal_lm_loss(model)
    torch.testing.assert_close(model(**batch, shift_labels=shifted).loss, truth, rtol=1e-5, atol=0)


def test_undoing_leaves_the_model_as_it_was():
    model, batch = make("Llama"), make_batch()
    attributes, signature = set(vars(model)), inspect.signature(model.forward)
    patch_causal_lm_loss(model)
    patch_causal_lm_loss(model)  # the second does nothing
    assert inspect.signature(model.forward) == signature, "the Trainer reads columns there"
    unpatch_causal_lm_loss(model)
    unpatch_causal_lm_loss(model)
    assert set(vars(model)) == attributes
    assert model(**batch).logits is not None


def test_a_forward_that_somebody_else_put_there_comes_back():
    model = make("Llama")
    model.forward = own = model.forward  # as accelerate's hooks do
    patch_causal_lm_loss(model)
    unpatch_causal_lm_loss(model)
    assert vars(model)["forward"] is own


def test_a_copy_computes_with_its_own_weights():
    model, batch = make("Llama"), make_batch()
    patch_causal_lm_loss(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    assert float(other(**batch).loss) == pytest.approx(torch.tensor(61.0).log().item())
    assert float(model(**batch).loss) != pytest.approx(torch.tensor(61.0).log().item())


def test_a_head_that_does_more_than_the_configuration_tells_is_refused():
    model = make("Cohere, scaled logits")
    model.config.logit_scale = 1.0  # the model itself keeps multiplying by 3
    with pytest.raises(ValueError, match="CohereForCausalLM does more to its logits"):
        patch_causal_lm_loss(model)
    assert not drop_in._is_patched(model)


def test_a_head_that_is_no_linear_layer_is_refused():
    model = make("Llama")
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match=r"must be a torch\.nn\.Linear, got Sequential"):
        patch_causal_lm_loss(model)


def test_a_peft_model_is_patched_inside():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, batch = make("Llama"), make_batch()
    theirs = model(**batch).loss
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    patch_causal_lm_loss(wrapped)
    output = wrapped(**batch)
    torch.testing.assert_close(output.loss, theirs, rtol=1e-5, atol=0)  # LoRA begins at zero
    assert output.logits is None
    output.loss.backward()
    assert all(p.grad is not None for n, p in wrapped.named_parameters() if "lora_B" in n)


def test_transformers_own_trainer_takes_the_same_steps(tmp_path):
    """Columns, loss keywords and gradient accumulation are what the Trainer reads from the model."""
    pytest.importorskip("accelerate")
    rows = [{k: v[i % 2] for k, v in make_batch().items()} for i in range(8)]

    def history(patched: bool) -> list[float]:
        model = make("Qwen2, tied head")
        if patched:
            patch_causal_lm_loss(model)
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            logging_steps=1, learning_rate=1e-2, report_to=[], save_strategy="no", use_cpu=True,
            disable_tqdm=True, dataloader_pin_memory=False, eval_strategy="steps", eval_steps=1,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:2])
        trainer.train()
        logged = trainer.state.log_history
        return [x[k] for x in logged for k in ("loss", "grad_norm", "eval_loss") if k in x]

    theirs, ours = history(False), history(True)
    assert len(ours) == 6 and ours == pytest.approx(theirs, rel=1e-4)
