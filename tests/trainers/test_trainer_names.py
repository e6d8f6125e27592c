"""What scripts, subclasses and callbacks written for TRL and transformers use beside `train`."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tiny_models import make_experts, make_model, make_pairs, make_tokenizer
from trainer_runs import LN2, config, dpo_trainer, lora, train_log
from transformers import TrainerCallback

from pyfast_dpo.trainers import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def kto_trainer(tmp_path, tokenizer, **options):
    return KTOTrainer(
        make_model(), args=config(KTOConfig, tmp_path, **options), train_dataset=make_pairs(),
        eval_dataset=make_pairs(6), processing_class=tokenizer,
    )  # fmt: skip


# Attributes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, name, value",
    [
        ({"beta": 0.3}, "beta", 0.3),
        ({"loss_type": "ipo"}, "loss_types", ["ipo"]),
        ({"loss_type": ["sigmoid", "sft"]}, "loss_weights", [1.0, 1.0]),  # as TRL: one for each
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, "loss_weights", [1.0, 0.5]),
        ({"label_smoothing": 0.1}, "label_smoothing", 0.1),
        ({"f_divergence_type": "js_divergence"}, "f_divergence_type", "js_divergence"),
        ({"ld_alpha": 0.5}, "ld_alpha", 0.5),
        ({"use_weighting": True}, "use_weighting", True),
        ({}, "precompute_ref_logps", False),
        ({}, "aux_loss_enabled", False),
    ],
    ids=str,
)
def test_options_are_attributes_of_the_trainer(tmp_path, tokenizer, options, name, value):
    assert getattr(dpo_trainer(tmp_path, tokenizer, **options), name) == value


def test_a_mixture_of_experts_says_that_it_is_balanced(tmp_path, tokenizer):
    assert dpo_trainer(tmp_path, tokenizer, make_experts()).aux_loss_enabled
    off = dpo_trainer(tmp_path, tokenizer, make_experts(), router_aux_loss_coef=0.0)
    assert not off.aux_loss_enabled


def test_what_a_subclass_sets_is_what_the_next_step_uses(tmp_path, tokenizer):
    """A schedule of beta, as scripts have it: IPO's first loss is 1 / (2 beta)^2 whatever the model."""

    class Scheduled(DPOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            self.beta = 0.5 if self.state.global_step == 0 else 0.25
            self.loss_types = ["ipo"]
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    trainer = Scheduled(
        make_model(), args=config(DPOConfig, tmp_path, max_steps=2, learning_rate=0.0),
        train_dataset=make_pairs(), processing_class=tokenizer,
    )  # fmt: skip
    assert [entry["loss"] for entry in train_log(trainer)] == [1.0, 4.0]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_metrics_that_a_subclass_appends_are_logged_as_their_mean(
    tmp_path, tokenizer, accumulation
):
    class Counting(DPOTrainer):
        seen = 0

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
            mode = "train" if self.model.training else "eval"
            self._metrics[mode]["batches"].append(self.seen)
            self.seen += 1
            return (loss, outputs) if return_outputs else loss

    trainer = Counting(
        make_model(),
        args=config(
            DPOConfig, tmp_path, max_steps=2, logging_steps=2, gradient_accumulation_steps=accumulation
        ),
        train_dataset=make_pairs(16), eval_dataset=make_pairs(6), processing_class=tokenizer,
    )  # fmt: skip
    (entry,) = train_log(trainer)
    assert entry["batches"] == (2 * accumulation - 1) / 2
    # A subclass that drops num_items_in_batch has the same loss and gradient.
    plain = dpo_trainer(
        tmp_path, tokenizer, max_steps=2, logging_steps=2, gradient_accumulation_steps=accumulation
    )
    (expected,) = train_log(plain)
    assert (entry["loss"], entry["grad_norm"]) == (expected["loss"], expected["grad_norm"])
    assert trainer.evaluate()["eval_batches"] == 2 * accumulation
    assert not trainer._metrics["train"] and not trainer._metrics["eval"]


# The end of a run ----------------------------------------------------------------------------------------


class StopAt(TrainerCallback):
    def __init__(self, step, event):
        self._step = step
        setattr(self, event, self._stop)

    def _stop(self, args, state, control, **kwargs):
        if state.global_step == self._step:
            control.should_training_stop = True


@pytest.mark.parametrize(
    "options, stop, steps",
    [
        ({"max_steps": 3, "logging_steps": 10}, None, [3]),  # shorter than logging_steps
        ({"max_steps": 5, "logging_steps": 2}, None, [2, 4, 5]),
        ({"max_steps": 4, "logging_steps": 2}, None, [2, 4]),  # nothing twice
        ({"max_steps": 9, "logging_steps": 2}, StopAt(3, "on_step_end"), [2, 3]),
        ({"max_steps": 9, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 1}, StopAt(3, "on_evaluate"), [2, 3]),
        ({"max_steps": 6, "logging_strategy": "epoch"}, None, [4, 6]),
        ({"max_steps": 3, "logging_strategy": "no"}, None, []),
    ],
    ids=str,
)  # fmt: skip
def test_the_last_steps_are_logged_however_a_run_ends(tmp_path, tokenizer, options, stop, steps):
    trainer = dpo_trainer(tmp_path, tokenizer, rows=make_pairs(16), **options)
    if stop is not None:
        trainer.add_callback(stop)
    log = train_log(trainer)
    assert [entry["step"] for entry in log] == steps
    every = train_log(dpo_trainer(tmp_path, tokenizer, rows=make_pairs(16), **{**options, "logging_steps": 1, "logging_strategy": "steps", "eval_strategy": "no"}))  # fmt: skip
    for start, entry in zip([0, *steps], log, strict=False):
        part = every[start : entry["step"]]
        mean = sum(each["loss"] for each in part) / len(part)
        assert entry["loss"] == pytest.approx(mean, rel=1e-6)
        assert entry["rewards/margins"] == pytest.approx(
            sum(each["rewards/margins"] for each in part) / len(part), abs=1e-6
        )


# Without data, without parameters, with names ------------------------------------------------------------


def test_training_without_data_is_refused_by_name(tmp_path, tokenizer):
    trainer = DPOTrainer(make_model(), args=config(DPOConfig, tmp_path), processing_class=tokenizer)
    assert trainer.evaluate(make_pairs(3))["eval_loss"] == LN2  # all that it is for
    with pytest.raises(ValueError, match=r"DPOTrainer: train\(\) needs a train_dataset"):
        trainer.train()


def test_training_with_everything_frozen_is_refused_by_name(tmp_path, tokenizer):
    model = make_model().requires_grad_(False)
    trainer = dpo_trainer(tmp_path, tokenizer, model)
    assert trainer.evaluate()["eval_loss"] == LN2
    with pytest.raises(ValueError, match=r"train\(\) needs a parameter with requires_grad=True"):
        trainer.train()


def test_an_adapter_that_was_loaded_for_inference_is_refused_by_name(tmp_path, tokenizer):
    peft = pytest.importorskip("peft")
    peft.get_peft_model(make_model(), lora()).save_pretrained(tmp_path / "adapter")
    model = peft.PeftModel.from_pretrained(make_model(), tmp_path / "adapter")
    with pytest.raises(ValueError, match="is_trainable=True"):
        dpo_trainer(tmp_path, tokenizer, model).train()


def test_a_reference_by_the_name_of_the_model_is_another_copy_of_it(tmp_path, tokenizer):
    name = str(tmp_path / "model")
    make_model().save_pretrained(name)
    tokenizer.save_pretrained(name)
    trainer = DPOTrainer(
        name, name, config(DPOConfig, tmp_path, learning_rate=1e-2), train_dataset=make_pairs()
    )
    assert trainer.ref_model is not None and trainer.ref_model is not trainer.model
    log = train_log(trainer)
    assert log[0]["loss"] == LN2 and log[-1]["loss"] < LN2


# predict -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [dpo_trainer, kto_trainer])
def test_predict_takes_rows_and_leaves_nothing_to_the_next_evaluation(tmp_path, tokenizer, make):
    trainer = make(tmp_path, tokenizer, learning_rate=1e-2)
    trainer.train()
    before = trainer.evaluate()
    output = trainer.predict(make_pairs(3))
    policy, reference = output.predictions
    assert policy.shape == reference.shape == output.label_ids.shape
    after = trainer.evaluate()
    for name in before.keys() - {
        "eval_runtime",
        "eval_samples_per_second",
        "eval_steps_per_second",
    }:
        assert after[name] == before[name], name
    alone = trainer.evaluate(make_pairs(3), metric_key_prefix="test")
    for name in ("test_loss", "test_rewards/margins", "test_logps/chosen"):
        assert output.metrics[name] == alone[name]


def test_an_evaluation_that_breaks_off_leaves_nothing_to_the_next(tmp_path, tokenizer, monkeypatch):
    trainer = dpo_trainer(tmp_path, tokenizer, per_device_eval_batch_size=2)
    before = trainer.evaluate()

    def breaks(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.callback_handler, "on_prediction_step", breaks)
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate(make_pairs(16))
    monkeypatch.undo()
    assert trainer.evaluate()["eval_logps/chosen"] == before["eval_logps/chosen"]


# Cards and the Hub, without network ----------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch):
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def card_of(folder):
    from huggingface_hub import ModelCard

    return ModelCard.load(folder / "README.md")


@pytest.mark.parametrize("make, tag", [(dpo_trainer, "dpo"), (kto_trainer, "kto")])
def test_models_are_tagged_and_saved_with_a_card(tmp_path, tokenizer, make, tag, no_network):
    trainer = make(tmp_path, tokenizer, save_strategy="steps", save_steps=4)
    assert {"pyfast_dpo", tag} <= set(trainer.model.model_tags)
    trainer.train()
    assert set(card_of(tmp_path).data.tags) == {"pyfast_dpo", tag}  # with the checkpoint
    trainer.save_model(str(tmp_path / "final"))
    card = card_of(tmp_path / "final")
    assert card.data.model_name == "final" and card.data.library_name == "transformers"
    assert "| `beta` | `0.1` |" in card.text and type(trainer).__name__ in card.text


def test_a_card_says_what_it_is_told(tmp_path, tokenizer, no_network):
    model = make_model()
    model.config._name_or_path = "somebody/base"
    trainer = dpo_trainer(tmp_path, tokenizer, model, peft_config=lora())
    assert "dpo" in trainer.model.model_tags
    trainer.create_model_card(model_name="mine", dataset_name="somebody/pairs", tags=["extra"])
    trainer.save_model()  # and keeps it
    data = card_of(tmp_path).data
    assert data.model_name == "mine" and data.datasets == ["somebody/pairs"]
    assert set(data.tags) == {"pyfast_dpo", "dpo", "extra"}
    assert data.base_model == "somebody/base" and data.library_name == "peft"
    trainer.create_model_card(dataset=["a/b", "c/d"], tags="one", license="mit", language=None)
    data = card_of(tmp_path).data
    assert data.datasets == ["a/b", "c/d"] and data.license == "mit" and "one" in data.tags
    assert data.model_name == tmp_path.name


def test_push_to_hub_takes_the_words_of_both_libraries(
    tmp_path, tokenizer, monkeypatch, no_network
):
    import transformers.trainer as module

    class Hub:
        calls = []  # noqa: RUF012

        def create_repo(self, name, **options):
            return type("Url", (), {"repo_id": f"me/{name}"})()

        def upload_folder(self, **options):
            self.calls.append((options["repo_id"], options["commit_message"]))

    monkeypatch.setattr(module, "hf_api", Hub)
    trainer = dpo_trainer(tmp_path / "run", tokenizer)
    trainer.push_to_hub(dataset_name="somebody/pairs", commit_message="done", model_name="mine")
    assert Hub.calls == [("me/run", "done")]
    data = card_of(tmp_path / "run").data
    assert data.datasets == ["somebody/pairs"] and data.model_name == "mine"
    assert (tmp_path / "run" / "model.safetensors").exists()


# Callbacks of TRL ----------------------------------------------------------------------------------------


def test_completions_are_logged_by_trls_callback(tmp_path, tokenizer):
    trl = pytest.importorskip("trl")
    from transformers import GenerationConfig

    trainer = dpo_trainer(tmp_path, tokenizer, max_steps=2)
    callback = trl.LogCompletionsCallback(
        trainer, GenerationConfig(max_new_tokens=3, do_sample=False), num_prompts=2, freq=1
    )
    trainer.add_callback(callback)
    log = train_log(trainer)
    assert [row[:2] for row in callback.table] == [
        [str(step), row["prompt"]]
        if isinstance(callback.table[0], list)
        else (str(step), row["prompt"])
        for step in (1, 2)
        for row in make_pairs(2)
    ]
    plain = train_log(dpo_trainer(tmp_path, tokenizer, max_steps=2))
    assert [entry["loss"] for entry in log] == [entry["loss"] for entry in plain]
    assert torch.isfinite(torch.tensor(log[-1]["grad_norm"]))
