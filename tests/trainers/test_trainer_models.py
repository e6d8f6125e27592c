"""Which models can be trained, and what is left of a model that was: everything but its weights is as it was."""

from __future__ import annotations

import copy
import inspect
import io
import re
import warnings

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers
from model_families import SIZES
from tiny_models import make_model, make_pairs, make_tokenizer
from trainer_runs import LN2, config, dpo_trainer, train_log
from transformers import TrainerCallback

from pyfast_dpo.trainers import DPOConfig, DPOTrainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def of(name, config_name=None, **options):
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    sizes = SIZES | {"vocab_size": 32, "max_position_embeddings": 64}
    config_name = config_name or name.removesuffix("ForCausalLM") + "Config"
    return kind(getattr(transformers, config_name)(**sizes | options)).eval()


def gpt2():
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=32, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1,
            eos_token_id=1, pad_token_id=1,
        )
    ).eval()  # fmt: skip


# A trained model is a model ----------------------------------------------------------------------------------


def traces(model):
    return {
        n: (sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks))
        for n, m in model.named_modules()
    }, model.config._attn_implementation


def generated(model):
    """Logits for two prompts, the first padded on the left."""
    ids = torch.tensor([[1, 1, 7, 8], [5, 6, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=3, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    ).logits  # fmt: skip


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise RuntimeError("stopped by a callback")


@pytest.mark.parametrize("ends", ["well", "with an error"])
@pytest.mark.parametrize("make", [gpt2, make_model])
def test_a_trained_model_is_a_model(tmp_path, tokenizer, make, ends):
    model = make()
    twin, before = copy.deepcopy(model), traces(model)
    trainer = dpo_trainer(tmp_path, tokenizer, model, gradient_checkpointing=None)
    if ends == "well":
        trainer.train()
        trainer.evaluate()
    else:
        trainer.add_callback(Stop())
        with pytest.raises(RuntimeError, match="stopped by a callback"):
            trainer.train()
    # What a plain Trainer leaves behind, it may leave.
    theirs = {
        "_gradient_checkpointing_func", "_require_grads_hook", "_require_grads_hooks", "model_tags",
        "_is_accelerate_prepared", "gradient_checkpointing",
    }  # fmt: skip
    for (name, ours), (_, old) in zip(traces(model)[0].items(), before[0].items(), strict=True):
        assert set(ours[0]) - set(old[0]) <= theirs, name
        assert ours[2] == old[2], name
        if (
            model.get_submodule(name) is not model.get_input_embeddings()
        ):  # checkpointing hooks these
            assert ours[1] == old[1], name
    assert traces(model)[1] == before[1]
    for module in model.modules():
        function = vars(module).get("_gradient_checkpointing_func")
        assert "KeptActivations" not in repr(function)

    fresh = type(model)(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    model.eval()
    for ours, plain in zip(generated(model), generated(fresh), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    assert inspect.signature(model.forward) == inspect.signature(twin.forward)
    assert inspect.getsource(model.forward) == inspect.getsource(twin.forward)
    assert model._supports_logits_to_keep()

    ids = torch.tensor([[5, 6, 7]])
    file = io.BytesIO()
    model.disable_input_require_grads()  # transformers' hook for checkpointing does not pickle
    torch.save(model, file)
    file.seek(0)
    model.save_pretrained(tmp_path / "saved")
    for other in (
        copy.deepcopy(model),
        torch.load(file, weights_only=False),
        type(model).from_pretrained(tmp_path / "saved").eval(),
    ):
        assert torch.equal(other(ids).logits, model(ids).logits)


def test_a_plain_trainer_takes_a_trained_model(tmp_path, tokenizer):
    """It reads the signature of `forward` for the columns that it keeps."""
    model = make_model()
    dpo_trainer(tmp_path, tokenizer, model, max_steps=1).train()
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7], "something": 1}] * 4
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer._set_signature_columns_if_needed()
    assert {"input_ids", "labels"} <= set(trainer._signature_columns)
    assert trainer.train().training_loss > 0


def test_a_model_is_used_while_it_is_trained(tmp_path, tokenizer):
    """By a callback that generates, say."""
    seen = []

    class Generate(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            was_training = model.training
            model.eval()
            seen.append(generated(model)[0])
            fresh = type(model)(model.config).eval()
            fresh.load_state_dict(model.state_dict())
            torch.testing.assert_close(seen[-1], generated(fresh)[0], rtol=1e-4, atol=1e-5)
            model.train(was_training)

    trainer = dpo_trainer(tmp_path, tokenizer, gpt2(), max_steps=2)
    trainer.add_callback(Generate())
    trainer.train()
    assert len(seen) == 2 and not torch.equal(*seen)


@pytest.mark.slow
def test_compiled_models_train_to_the_same_losses(tmp_path, tokenizer):
    losses = []
    for compiled in ({"torch_compile": True, "torch_compile_backend": "aot_eager"}, {}):
        trainer = dpo_trainer(tmp_path, tokenizer, make_model(), max_steps=2, **compiled)
        losses.append([entry["loss"] for entry in train_log(trainer)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


# What can be trained -----------------------------------------------------------------------------------------


def bart():
    sizes = {
        "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
    }  # fmt: skip
    return of("BartForConditionalGeneration", "BartConfig", **sizes)


def t5():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return of("T5ForConditionalGeneration", "T5Config", **sizes)


def llava():
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 8, "patch_size": 4}  # fmt: skip
    text = SIZES | {"vocab_size": 32, "model_type": "llama"}
    configuration = transformers.LlavaConfig(
        vision_config=vision | {"model_type": "clip_vision_model"}, text_config=text
    )
    return transformers.LlavaForConditionalGeneration(configuration)


REFUSED = [
    (bart, "BartForConditionalGeneration, whose encoder reads the whole text", "encoder and decoder"),
    (t5, "T5ForConditionalGeneration, whose encoder reads the whole text", "encoder and decoder"),
    (lambda: of("BertForMaskedLM", "BertConfig"), "BertForMaskedLM is no causal language model: its logits", "masked"),
    (lambda: of("BertLMHeadModel", "BertConfig"), "BertLMHeadModel is no causal language model: its logits", "a decoder's class that is told to see everything"),
    (llava, "llava models take images, which these trainers do not; .* its text-only class", "images"),
    (lambda: of("LlamaForSequenceClassification", "LlamaConfig"), "with an lm_head, got LlamaForSequence", "no lm_head"),
    (lambda: torch.nn.Linear(2, 2), "with an lm_head, got Linear", "no model of transformers"),
]  # fmt: skip


@pytest.mark.parametrize("make, message", [row[:2] for row in REFUSED], ids=[r[2] for r in REFUSED])
def test_what_is_no_causal_language_model_is_refused_by_name(tmp_path, tokenizer, make, message):
    with pytest.raises(ValueError, match=message):
        dpo_trainer(tmp_path, tokenizer, make())


def test_a_vision_language_model_is_refused_before_it_is_loaded(tmp_path, tokenizer):
    """transformers loads some by name without their tower, and refuses others as an unknown configuration."""
    llava().config.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="llava models take images, which these trainers do not"):
        DPOTrainer(
            str(tmp_path / "model"), args=config(DPOConfig, tmp_path), train_dataset=make_pairs(),
            processing_class=tokenizer,
        )  # fmt: skip


def test_a_model_without_checkpointing_trains_by_default(tmp_path, tokenizer):
    model = make_model()
    type(model).supports_gradient_checkpointing, before = False, True
    try:
        options = {"gradient_checkpointing": None, "max_steps": 1}
        trainer = dpo_trainer(tmp_path, tokenizer, model, **options)
        assert train_log(trainer)[0]["loss"] == LN2
        with pytest.raises(
            ValueError, match=r"does not support (gradient|activation) checkpointing"
        ):
            dpo_trainer(tmp_path, tokenizer, model, gradient_checkpointing=True).train()
    finally:
        type(model).supports_gradient_checkpointing = before


# The reference is tried as the policy is ---------------------------------------------------------------------


def capped():
    model = of("Gemma2ForCausalLM", final_logit_softcapping=2.0)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


def with_a_trained_head():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(
        make_model(1),
        peft.LoraConfig(target_modules=["lm_head", "q_proj"], init_lora_weights=False),
    )
    return model.eval()


REFERENCES = [
    (capped, "", "a soft-cap that the policy has not"),
    (lambda: of("RecurrentGemmaForCausalLM", lru_width=32, attention_window_size=64, logits_soft_cap=2.0),
     "DPOTrainer, ref_model: falling back to padded batches", "no shared prompts"),
    (lambda: of("Qwen2MoeForCausalLM", use_sliding_window=True, sliding_window=2, max_window_layers=1),
     "DPOTrainer, ref_model: falling back .* a window of 2 positions", "a window of the mask alone"),
    (with_a_trained_head, r"ref_model: .*own logits.*got an adapter's layer \(peft.tuners.lora.layer.Linear\)",
     "an adapter on its lm_head"),
]  # fmt: skip


@pytest.mark.parametrize(
    "make, said", [row[:2] for row in REFERENCES], ids=[r[2] for r in REFERENCES]
)
def test_a_reference_of_another_kind_gives_its_own_log_probs(tmp_path, tokenizer, make, said):
    reference = make()
    plain = copy.deepcopy(reference)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = dpo_trainer(tmp_path, tokenizer, ref_model=reference, max_steps=1)
    texts = [str(w.message) for w in caught if "ref_model" in str(w.message)]
    if said:
        assert any(re.search(said, text) for text in texts), texts
    else:
        assert not texts
    examples = [trainer.train_dataset[i] for i in range(4)]
    values = trainer._reference_values(trainer.data_collator(examples))
    for row, example in zip(values, examples, strict=True):
        for value, side in zip(row, ("chosen_ids", "rejected_ids"), strict=True):
            prompt, response = list(example["prompt_ids"]), list(example[side])
            with torch.no_grad():
                ids = torch.tensor([prompt + response])
                logits = plain(input_ids=ids, use_cache=False).logits
            logps = logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            truth = logps.gather(-1, torch.tensor(response).unsqueeze(-1)).sum()
            assert float(value) == pytest.approx(float(truth), abs=1e-4)
    trainer.train()


def test_a_reference_that_is_no_causal_model_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="DPOTrainer, ref_model: BertLMHeadModel is no causal"):
        dpo_trainer(tmp_path, tokenizer, ref_model=of("BertLMHeadModel", "BertConfig"))


def test_the_head_of_an_adapter_that_trains_a_copy_of_it_is_used_by_itself(tmp_path, tokenizer):
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # not the model's own logits
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")
        trainer = dpo_trainer(tmp_path, tokenizer, peft_config=adapter, learning_rate=1e-2)
    head = trainer.model.get_output_embeddings().modules_to_save["default"].weight
    before = head.detach().clone()
    assert train_log(trainer)[0]["loss"] == LN2
    assert not torch.equal(head, before)
