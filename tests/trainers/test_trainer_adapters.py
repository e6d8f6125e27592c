"""Adapters: the reference is the model as it was, before training and after it, whatever the adapter does."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

import peft
from tiny_models import make_model, make_tokenizer
from trainer_runs import LN2, dpo_trainer, train_log

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def lora(**options):
    return peft.LoraConfig(
        **{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    )


def moved(model):
    """Adapters that do something."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def adapted(**options):
    torch.manual_seed(2)
    return moved(peft.get_peft_model(make_model(), lora(**options)))


def two_active(frozen=True):
    model = adapted()
    model.add_adapter("frozen", lora(init_lora_weights=False))
    model.base_model.set_adapter(["default", "frozen"])
    for name, parameter in model.named_parameters():
        if ".frozen." in name:
            parameter.requires_grad_(not frozen)
    return model


def another_name(name):
    torch.manual_seed(2)
    return moved(peft.get_peft_model(make_model(), lora(), adapter_name=name))


def by_transformers():
    model = make_model()
    model.add_adapter(lora())
    return moved(model)


def with_biases():
    """Linear layers that have biases, for adapters that train them."""
    model = make_model()
    model.config.attention_bias = model.config.mlp_bias = True
    torch.manual_seed(0)
    return type(model)(model.config).eval()


@torch.no_grad()
def reference_of(model, examples):
    """Log-probs of the responses, one row at a time."""
    rows = []
    for example in examples:
        for side in ("chosen_ids", "rejected_ids"):
            prompt, response = list(example["prompt_ids"]), list(example[side])
            logits = model(input_ids=torch.tensor([prompt + response])).logits
            logps = logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            rows.append(logps.gather(-1, torch.tensor(response).unsqueeze(-1)).sum())
    return torch.stack(rows).view(-1, 2)


def state_of(model):
    active = model.base_model.active_adapters if hasattr(model, "get_base_model") else None
    return active, {name for name, p in model.named_parameters() if p.requires_grad}


NEW = [
    (make_model, {}, False, "a plain one"),
    (make_model, {"use_dora": True}, False, "DoRA"),
    (make_model, {"modules_to_save": ["lm_head"]}, False, "trains a copy of the lm_head"),
    (make_model, {"init_lora_weights": False}, False, "not zero at the start"),
    (make_model, {"init_lora_weights": "pissa"}, True, "PiSSA: moves weights from the base to the adapter"),
    (with_biases, {"bias": "all"}, True, "trains biases of the base"),
    (with_biases, {"bias": "lora_only"}, True, "trains biases of adapted layers"),
]  # fmt: skip


@pytest.mark.parametrize(
    "make, options, copied", [row[:3] for row in NEW], ids=[row[3] for row in NEW]
)
@pytest.mark.parametrize("precomputed", [False, True], ids=["", "precomputed"])
def test_the_reference_of_a_new_adapter_is_the_model_before(
    tmp_path, tokenizer, monkeypatch, make, options, copied, precomputed
):
    monkeypatch.setenv("PYFAST_DPO_CACHE", str(tmp_path / "cache"))
    before = make()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer = dpo_trainer(
            tmp_path, tokenizer, make(), peft_config=lora(**options), learning_rate=1e-2,
            precompute_ref_log_probs=precomputed, disable_dropout=False,
        )  # fmt: skip
    assert copied == any("a frozen copy of the whole model" in str(w.message) for w in said)
    active, trained = state_of(trainer.model)
    examples = [trainer.train_dataset[i] for i in range(4)]
    truth = reference_of(before, examples)
    log = train_log(trainer)
    if options.get("init_lora_weights") is not False:
        assert log[0]["loss"] == pytest.approx(LN2, abs=1e-6)
    assert log[-1]["loss"] != pytest.approx(log[0]["loss"], abs=1e-3)
    values = trainer._reference_values(trainer.data_collator(examples))
    torch.testing.assert_close(values.double(), truth, rtol=1e-4, atol=1e-3)
    assert state_of(trainer.model) == (active, trained)


CAME = [
    (adapted, False, "one adapter"),
    (lambda: adapted(use_dora=True), False, "DoRA"),
    (lambda: another_name("reference"), False, "its name is the one that we would take"),
    (lambda: adapted(init_lora_weights="pissa"), False, "PiSSA: its initialization must not run again"),
    (two_active, True, "two at once, one of them frozen"),
    (lambda: two_active(frozen=False), True, "two at once"),
    (lambda: adapted(modules_to_save=["lm_head"]), False, "its own lm_head"),
    (by_transformers, False, "put there by transformers itself"),
    (lambda: moved(peft.get_peft_model(with_biases(), lora(bias="all"))), True, "trains biases of the base"),
]  # fmt: skip


@pytest.mark.parametrize("make, copied", [row[:2] for row in CAME], ids=[row[2] for row in CAME])
def test_the_reference_of_an_adapter_that_came_is_its_state(tmp_path, tokenizer, make, copied):
    model = make()
    before, state = copy.deepcopy(model).eval(), state_of(model)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer = dpo_trainer(tmp_path, tokenizer, model, learning_rate=1e-2)
    assert copied == any("a frozen copy of the whole model" in str(w.message) for w in said)
    assert state_of(trainer.model) == state
    examples = [trainer.train_dataset[i] for i in range(4)]
    truth = reference_of(before, examples)
    log = train_log(trainer)
    assert log[0]["loss"] == pytest.approx(LN2, abs=1e-6)
    assert log[-1]["loss"] < LN2 - 1e-3
    values = trainer._reference_values(trainer.data_collator(examples))
    torch.testing.assert_close(values.double(), truth, rtol=1e-4, atol=1e-3)
    assert state_of(trainer.model) == state
    now = dict(trainer.model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())


def test_an_adapter_that_leaves_no_model_as_it_was_is_refused(tmp_path, tokenizer, monkeypatch):
    """It changes the base, and what it adds does not make up for that."""
    wrap = peft.get_peft_model

    def spoiling(model, config):
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(2)
        return wrap(model, config)

    monkeypatch.setattr(peft, "get_peft_model", spoiling)
    with pytest.raises(ValueError, match="peft_config: LoraConfig changes what the model computes"):
        dpo_trainer(tmp_path, tokenizer, peft_config=lora())


@pytest.mark.parametrize("comes", [False, True], ids=["new", "came"])
@pytest.mark.parametrize(
    "kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"]
)
def test_virtual_tokens_are_refused_by_name(tmp_path, tokenizer, kind, comes):
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match=f"{kind} puts virtual tokens before the prompt"):
        if comes:
            dpo_trainer(tmp_path, tokenizer, peft.get_peft_model(make_model(), config))
        else:
            dpo_trainer(tmp_path, tokenizer, peft_config=config)


def test_an_adapter_on_an_adapter_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="the model already has an adapter"):
        dpo_trainer(tmp_path, tokenizer, adapted(), peft_config=lora())


def test_losses_without_a_reference_keep_no_state(tmp_path, tokenizer):
    trainer = dpo_trainer(tmp_path, tokenizer, adapted(), loss_type="simpo")
    assert set(trainer.model.peft_config) == {"default"} and trainer.ref_model is None
