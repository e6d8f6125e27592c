"""The trainers: exact first loss, the trajectory of a plain loop, references, metrics, bad options."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tiny_models import make_model, make_pairs, make_tokenizer
from trainer_runs import LN2, config, dpo_trainer, lora, train_log

from pyfast_dpo.data import DataCollatorForPreference, prepare_pairs
from pyfast_dpo.model.prepare import prepare
from pyfast_dpo.model.projections import score_responses
from pyfast_dpo.trainers import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

STORIES = Path(__file__).parents[3] / "shared" / "data" / "stories260k-hf"

DPO_METRICS = {
    "entropy", "num_tokens", "logits/chosen", "logits/rejected", "mean_token_accuracy", "rewards/chosen",
    "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
    "kl", "lengths/chosen", "lengths/rejected", "tokens_per_computed_token",
}  # fmt: skip
KTO_METRICS = {
    "kl", "entropy", "num_tokens", "logits/chosen", "logits/rejected", "rewards/chosen", "rewards/rejected",
    "rewards/margins", "logps/chosen", "logps/rejected", "lengths/chosen", "lengths/rejected",
    "tokens_per_computed_token",
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


# The first loss ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"per_device_train_batch_size": 3},  # a mean over 3 pairs, which is no power of two
        {"per_device_train_batch_size": 1},
        {"gradient_accumulation_steps": 2},  # two micro-batches, each divided by 2
        {"gradient_checkpointing": True},
        {"pad_to_multiple_of": 16},
        {"bf16": True},  # autocast: the same rounding on both sides
    ],
)
@pytest.mark.parametrize("adapter", [False, True])
def test_first_dpo_loss_is_ln2_exactly(tmp_path, tokenizer, options, adapter):
    trainer = dpo_trainer(
        tmp_path, tokenizer, peft_config=lora() if adapter else None, max_steps=1, **options
    )
    (first,) = train_log(trainer)
    assert first["loss"] == LN2
    assert first["rewards/margins"] == first["rewards/chosen"] == 0


def test_first_loss_is_ln2_with_dropout_in_the_model(tmp_path, tokenizer):
    """Attention dropout is no module, and LoRA dropout is one: both are off."""
    model = make_model(attention_dropout=0.5)
    peft_config = lora()
    peft_config.lora_dropout = 0.5
    assert (
        train_log(dpo_trainer(tmp_path, tokenizer, model, peft_config=peft_config))[0]["loss"]
        == LN2
    )


def test_reference_is_without_dropout_even_if_the_policy_keeps_it(tmp_path, tokenizer):
    model = make_model(attention_dropout=0.5)
    trainer = dpo_trainer(
        tmp_path, tokenizer, model, peft_config=lora(), disable_dropout=False, max_steps=1
    )
    batch = trainer.data_collator(trainer.train_dataset.examples[:4])
    trainer.model.train()
    with trainer._reference() as reference:
        first, second = (score_responses(reference, batch) for _ in range(2))
    assert torch.equal(first, second)
    assert trainer.model.training


def test_first_ipo_loss_is_the_square_of_its_target(tmp_path, tokenizer):
    first, *_ = train_log(dpo_trainer(tmp_path, tokenizer, loss_type="ipo", max_steps=1, beta=0.25))
    assert first["loss"] == 4.0  # (0 - 1 / (2 beta))^2


def test_first_kto_loss_is_a_half(tmp_path, tokenizer):
    trainer = KTOTrainer(
        make_model(), None, config(KTOConfig, tmp_path, max_steps=1), train_dataset=make_pairs(),
        processing_class=tokenizer,
    )  # fmt: skip
    (first,) = train_log(trainer)
    assert first["loss"] == 0.5
    assert first["kl"] == 0


# Against a plain loop ------------------------------------------------------------------------------------


def plain_logps(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    tokens = (
        logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    )
    mask = labels != -100
    return (tokens * mask).sum(1), mask.sum(1)


def plain_dpo(model, reference, batch, beta, epsilon):
    logps, _ = plain_logps(model, batch)
    with torch.no_grad():
        reference_logps, _ = plain_logps(reference, batch)
    chosen, rejected = (logps - reference_logps).chunk(2)
    h = beta * (chosen - rejected)
    return (-(1 - epsilon) * F.logsigmoid(h) - epsilon * F.logsigmoid(-h)).mean()


def plain_ipo(model, reference, batch, beta, epsilon):
    logps, lengths = plain_logps(model, batch)
    with torch.no_grad():
        reference_logps, _ = plain_logps(reference, batch)
    chosen, rejected = ((logps - reference_logps) / lengths).chunk(2)
    return ((chosen - rejected - 1 / (2 * beta)) ** 2).mean()


@pytest.mark.parametrize(
    "loss_type, label_smoothing, plain, accumulation, learning_rate",
    [
        ("sigmoid", 0.0, plain_dpo, 1, 0.1),
        ("sigmoid", 0.2, plain_dpo, 1, 0.1),
        ("ipo", 0.0, plain_ipo, 1, 0.02),  # steeper: at 0.1 steps would magnify float32's rounding
        ("sigmoid", 0.0, plain_dpo, 2, 0.1),  # the mean of the means of the micro-batches
    ],
)
def test_trajectory_of_a_plain_padded_loop(
    tmp_path, tokenizer, loss_type, label_smoothing, plain, accumulation, learning_rate
):
    steps, rows = 10, make_pairs(24)
    trainer = dpo_trainer(
        tmp_path, tokenizer, make_model(), rows=rows, max_steps=steps, loss_type=loss_type,
        label_smoothing=label_smoothing, gradient_accumulation_steps=accumulation, beta=0.3,
        lr_scheduler_type="constant", optim="sgd", max_grad_norm=1e9, learning_rate=learning_rate, seed=3,
        train_sampling_strategy="sequential", per_device_train_batch_size=2,
    )  # fmt: skip
    log = train_log(trainer)
    ours, norms = ([entry[name] for entry in log] for name in ("loss", "grad_norm"))

    model = make_model()
    reference = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    examples = prepare_pairs(rows, tokenizer, max_length=32).examples
    collator = DataCollatorForPreference(tokenizer.pad_token_id)
    expected, expected_norms = [], []
    for step in range(steps):
        losses = []
        for part in range(accumulation):
            start = 2 * (step * accumulation + part)
            batch = collator([examples[i % len(examples)] for i in range(start, start + 2)])
            loss = plain(model, reference, batch, 0.3, label_smoothing) / accumulation
            loss.backward()
            losses.append(float(loss.detach()))
        gradients = [p.grad for p in model.parameters()]
        expected_norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        optimizer.step()
        optimizer.zero_grad()
        expected.append(sum(losses))
    assert ours == pytest.approx(expected, rel=1e-4)
    assert norms == pytest.approx(expected_norms, rel=1e-4)
    assert ours[-1] != pytest.approx(ours[0], rel=1e-3)  # it did move


def test_metrics_against_their_definitions(tmp_path, tokenizer):
    trainer = dpo_trainer(tmp_path, tokenizer, ref_model=make_model(seed=1), max_steps=1, beta=0.2)
    model, reference = copy.deepcopy(trainer.model), copy.deepcopy(trainer.ref_model)
    log = trainer.evaluate()
    assert {f"eval_{name}" for name in DPO_METRICS} <= log.keys()

    batch = DataCollatorForPreference(tokenizer.pad_token_id)(trainer.eval_dataset.examples)
    with torch.no_grad():
        logps = plain_logps(model, batch)[0]
        rewards = 0.2 * (logps - plain_logps(reference, batch)[0])
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    mask = labels != -100
    tokens = logits[:, :-1].log_softmax(-1)
    chosen_mask = mask & (torch.arange(len(mask)) < len(mask) // 2).unsqueeze(1)
    expected = {
        "logps/chosen": logps.chunk(2)[0].mean(),
        "logps/rejected": logps.chunk(2)[1].mean(),
        "rewards/chosen": rewards.chunk(2)[0].mean(),
        "rewards/rejected": rewards.chunk(2)[1].mean(),
        "rewards/margins": (rewards.chunk(2)[0] - rewards.chunk(2)[1]).mean(),
        "rewards/accuracies": (rewards.chunk(2)[0] > rewards.chunk(2)[1]).float().mean(),
        "logits/chosen": logits[:, :-1].mean(-1)[chosen_mask].mean(),
        "logits/rejected": logits[:, :-1].mean(-1)[mask & ~chosen_mask].mean(),
        "entropy": -(tokens.exp() * tokens).sum(-1)[mask].mean(),
        "mean_token_accuracy": (logits[:, :-1].argmax(-1) == labels)[chosen_mask].float().mean(),
    }
    for name, value in expected.items():
        assert log[f"eval_{name}"] == pytest.approx(float(value), rel=1e-4, abs=1e-6), name
    assert log["eval_loss"] == pytest.approx(
        float(plain_dpo(model, reference, batch, 0.2, 0)), rel=1e-5
    )


# Training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_loss_falls_and_metrics_have_their_names(tmp_path, tokenizer, loss_type):
    trainer = dpo_trainer(
        tmp_path, tokenizer, loss_type=loss_type, max_steps=12, learning_rate=1e-2
    )
    log = train_log(trainer)
    assert all(log[0].keys() >= DPO_METRICS for entry in log)
    assert log[-1]["loss"] < 0.9 * log[0]["loss"]
    assert log[-1]["rewards/margins"] > 0
    assert log[-1]["num_tokens"] > log[0]["num_tokens"] > 0
    assert trainer.evaluate()["eval_rewards/accuracies"] > 0.5


@pytest.mark.skipif(not STORIES.exists(), reason="no shared data")
def test_loss_falls_on_a_trained_model(tmp_path):
    trainer = DPOTrainer(
        str(STORIES),
        args=config(DPOConfig, tmp_path, max_steps=10, learning_rate=3e-4, max_length=128),
        train_dataset=[
            {
                "prompt": "Once upon a time",
                "chosen": f" there was a {animal}.",
                "rejected": f" {animal} no.",
            }
            for animal in ("dog", "cat", "bird", "fish", "cow", "frog", "duck", "bear")
        ],
    )
    log = train_log(trainer)
    assert log[0]["loss"] == LN2
    assert log[-1]["loss"] < 0.6


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])  # 1 and odd sizes, with shuffling
@pytest.mark.parametrize("adapter", [False, True])
def test_kto_with_any_batch_size(tmp_path, tokenizer, batch_size, adapter):
    trainer = KTOTrainer(
        make_model(),
        args=config(
            KTOConfig,
            tmp_path,
            per_device_train_batch_size=batch_size,
            max_steps=8,
            learning_rate=5e-3,
        ),
        train_dataset=make_pairs(),
        eval_dataset=make_pairs(5),
        processing_class=tokenizer,
        peft_config=lora() if adapter else None,
    )
    log = train_log(trainer)
    assert log[0]["loss"] == 0.5
    assert all(entry["kl"] >= 0 and math.isfinite(entry["loss"]) for entry in log)
    names = set().union(*log)  # a batch of one has no rejected rows, and so no margin
    assert names >= (KTO_METRICS if batch_size > 1 else KTO_METRICS - {"rewards/margins"})
    metrics = trainer.evaluate()
    assert {f"eval_{name}" for name in KTO_METRICS} <= metrics.keys()
    assert metrics["eval_loss"] < 0.5
    assert metrics["eval_rewards/margins"] > 0


# The reference -------------------------------------------------------------------------------------------


def test_full_training_keeps_a_frozen_copy(tmp_path, tokenizer):
    trainer = dpo_trainer(tmp_path, tokenizer)
    before = copy.deepcopy(trainer.ref_model.state_dict())
    trainer.train()
    assert not any(p.requires_grad for p in trainer.ref_model.parameters())
    assert all(
        torch.equal(before[name], value) for name, value in trainer.ref_model.state_dict().items()
    )
    assert any(
        not torch.equal(before[name], value) for name, value in trainer.model.state_dict().items()
    )


def test_lora_needs_no_second_model(tmp_path, tokenizer):
    model = make_model()
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = dpo_trainer(tmp_path, tokenizer, model, peft_config=lora())
    assert trainer.ref_model is None
    trainer.train()
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    with trainer._reference() as reference:  # the base under the adapter, unchanged
        batch = trainer.data_collator(trainer.train_dataset.examples[:4])
        ours = score_responses(reference, batch)
    fresh = make_model()
    assert all(torch.equal(p, base[name]) for name, p in fresh.named_parameters())
    with prepare("test", {"model": fresh}), torch.no_grad():
        assert torch.equal(ours, score_responses(fresh, batch))


def test_adapter_that_came_trained_is_its_own_reference(tmp_path, tokenizer):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model(), lora())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    trainer = dpo_trainer(tmp_path, tokenizer, model, max_steps=6, learning_rate=1e-2)
    assert trainer.ref_model is None
    log = train_log(trainer)
    assert log[0]["loss"] == LN2
    assert log[-1]["loss"] < LN2
    assert trainer.model.active_adapter == "default"


def test_explicit_reference(tmp_path, tokenizer):
    trainer = dpo_trainer(tmp_path, tokenizer, ref_model=make_model(seed=1), max_steps=1)
    assert train_log(trainer)[0]["loss"] != LN2


# Evaluation, checkpoints ---------------------------------------------------------------------------------


def test_compute_metrics_sees_log_probs(tmp_path, tokenizer):
    seen = {}

    def compute_metrics(prediction):
        policy, reference = prediction.predictions
        seen.update(policy=policy, reference=reference, lengths=prediction.label_ids)
        return {"agreement": float((policy[:, 0] > policy[:, 1]).mean())}

    trainer = DPOTrainer(
        make_model(), None, config(DPOConfig, tmp_path, per_device_eval_batch_size=4),
        train_dataset=make_pairs(), eval_dataset={"a": make_pairs(6), "b": make_pairs(5)},
        processing_class=tokenizer, compute_metrics=compute_metrics,
    )  # fmt: skip
    metrics = trainer.evaluate()
    assert {
        "eval_a_agreement",
        "eval_b_agreement",
        "eval_a_rewards/margins",
        "eval_b_loss",
    } <= metrics.keys()
    assert seen["policy"].shape == seen["reference"].shape == seen["lengths"].shape == (5, 2)
    assert (seen["policy"] == seen["reference"]).all()
    assert trainer.evaluate(make_pairs(3))["eval_loss"] == LN2  # raw rows


def test_evaluation_during_training_keeps_the_metrics_apart(tmp_path, tokenizer):
    trainer = dpo_trainer(tmp_path, tokenizer, eval_strategy="steps", eval_steps=2, logging_steps=2)
    trainer.train()
    evals = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    trains = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(evals) == len(trains) == 2
    assert all("eval_logps/chosen" in entry and "logps/chosen" not in entry for entry in evals)
    assert trains[0]["num_tokens"] == evals[0]["eval_num_tokens"]


def test_checkpoint_reloads(tmp_path, tokenizer):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trainer = dpo_trainer(tmp_path, tokenizer)
    trainer.train()
    trainer.save_model()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], value)
    assert (
        AutoTokenizer.from_pretrained(tmp_path)("a b")["input_ids"] == tokenizer("a b")["input_ids"]
    )


def test_resume_from_a_checkpoint(tmp_path, tokenizer):
    options = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    whole = train_log(dpo_trainer(tmp_path, tokenizer, peft_config=lora(), **options))
    resumed = dpo_trainer(tmp_path, tokenizer, peft_config=lora(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    log = [entry for entry in resumed.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in log] == [entry["loss"] for entry in whole]


def test_two_runs_are_the_same(tmp_path, tokenizer):
    first, second = (
        train_log(dpo_trainer(tmp_path, tokenizer, peft_config=lora(), max_steps=3))
        for _ in range(2)
    )
    assert [entry["loss"] for entry in first] == [entry["loss"] for entry in second]
    assert first[-1]["loss"] != LN2


def test_dropped_rows_are_told(tmp_path, tokenizer, capsys):
    rows = make_pairs(8)
    rows[3]["rejected"] = rows[3]["chosen"]
    trainer = dpo_trainer(tmp_path, tokenizer, rows=rows)
    assert (
        "train: kept 7 of 8 rows; dropped: 1 identical responses (row 4)" in capsys.readouterr().out
    )
    assert trainer.data_reports["train"].dropped == {"identical responses": [4]}


# Bad options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, options, message",
    [
        (DPOConfig, {"beta": 0.0}, "DPOConfig: beta must be positive and finite, got 0.0"),
        (DPOConfig, {"beta": -0.1}, "beta must be positive"),
        (DPOConfig, {"beta": float("nan")}, "beta must be positive"),
        (DPOConfig, {"loss_type": "sigmoidal"}, r"DPOConfig: loss_type must be one of \['sigmoid', .*, got 'sigmoidal'"),
        (DPOConfig, {"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        (DPOConfig, {"label_smoothing": -0.1}, "label_smoothing must be in"),
        (DPOConfig, {"loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing is defined for the losses .* got 0.1 with 'ipo'"),
        (DPOConfig, {"ld_alpha": 1.5}, r"ld_alpha must be in \[0, 1\], got 1.5"),
        (DPOConfig, {"loss_type": "aot", "use_weighting": True}, "use_weighting weighs pairs, which loss_type 'aot' sorts apart"),
        (DPOConfig, {"loss_type": "sigmoid", "simpo_gamma": 1.0}, "simpo_gamma is defined for the losses .* got 1.0 with 'sigmoid'"),
        (DPOConfig, {"max_length": 1}, "max_length must be None or at least 2"),
        (DPOConfig, {"pad_to_multiple_of": 0}, "pad_to_multiple_of must be None or positive, got 0"),
        (KTOConfig, {"loss_type": "sigmoid"}, r"KTOConfig: loss_type must be one of \['kto', 'apo_zero_unpaired'\]"),
        (KTOConfig, {"beta": 0.0}, "KTOConfig: beta must be positive"),
        (KTOConfig, {"desirable_weight": -1.0}, "desirable_weight must be finite and not negative, got -1.0"),
        (KTOConfig, {"undesirable_weight": float("inf")}, "undesirable_weight must be finite"),
    ],
)  # fmt: skip
def test_bad_option_is_refused_at_construction(tmp_path, kind, options, message):
    with pytest.raises(ValueError, match=message):
        config(kind, tmp_path, **options)


def test_unknown_option_is_refused(tmp_path):
    with pytest.raises(TypeError, match="reference_free"):
        config(DPOConfig, tmp_path, reference_free=True)


def test_bad_arguments_of_the_trainer(tmp_path, tokenizer):
    model = make_model()
    with pytest.raises(ValueError, match="ref_model must not be the model itself"):
        dpo_trainer(tmp_path, tokenizer, model, ref_model=model)
    with pytest.raises(TypeError, match="args must be a DPOConfig, got KTOConfig"):
        DPOTrainer(model, args=config(KTOConfig, tmp_path), processing_class=tokenizer)
    with pytest.raises(
        TypeError, match=r"train_dataset must be readable more than once .* got generator"
    ):
        dpo_trainer(tmp_path, tokenizer, model, rows=(row for row in make_pairs()))


def test_odd_number_of_stacked_rows(tmp_path, tokenizer):
    trainer = dpo_trainer(tmp_path, tokenizer, shared_prompt=False)
    batch = trainer.data_collator(trainer.train_dataset.examples[:2])
    with pytest.raises(ValueError, match="as many rejected rows, got 3 rows"):
        trainer.compute_loss(trainer.model, {name: rows[:3] for name, rows in batch.items()})


def test_loss_that_is_not_finite_is_seen(tmp_path, tokenizer):
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[5].fill_(float("nan"))
    log = train_log(dpo_trainer(tmp_path, tokenizer, model, max_steps=1))
    assert math.isnan(log[0]["loss"])
