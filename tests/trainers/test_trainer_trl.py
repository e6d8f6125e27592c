"""Change one import line: TRL's own trainers and ours, from the same script, step by step."""

from __future__ import annotations

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

import datasets
import trl
from tiny_models import make_experts, make_model, make_pairs, make_tokenizer

from pyfast_dpo import trainers

# Where the two differ on purpose. num_tokens of KTO: ours counts the mismatched sequences too, which are computed.
APART = {
    "DPO": {"tokens_per_second", "tokens_per_computed_token", "kl", "lengths/chosen", "lengths/rejected"},
    "KTO": {"tokens_per_second", "tokens_per_computed_token", "lengths/chosen", "lengths/rejected", "num_tokens"},
}  # fmt: skip


def quick_start(library, kind, tmp_path, rows, model=make_model, **options):
    """TRL's quick start, but for the tiny model."""
    model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    config = getattr(library, f"{kind}Config")(
        output_dir=str(tmp_path), max_length=32, max_steps=10,
        logging_steps=1, learning_rate=5e-3, report_to=[], save_strategy="no", disable_tqdm=True,
        dataloader_pin_memory=False, use_cpu=True, **{"bf16": False, "per_device_train_batch_size": 4, **options},
    )  # fmt: skip
    trainer = getattr(library, f"{kind}Trainer")(
        model=str(tmp_path / "model"),
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def unpaired(rows):
    """One response a prompt: the mismatched completion is then the next row's for both."""
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 2 else "rejected"], "label": i % 2 == 1}
        for i, row in enumerate(rows)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "kind, options",
    [
        ("DPO", {}),  # shuffled: the same seed draws the same order
        ("DPO", {"loss_type": "ipo"}),
        ("DPO", {"gradient_accumulation_steps": 2}),
        ("DPO", {"precompute_ref_log_probs": True}),
        ("DPO", {"gradient_checkpointing": False, "beta": 0.5}),
        # Both add what balances the experts, over prompts as often as sequences have them.
        ("DPO", {"model": make_experts}),
        ("DPO", {"model": make_experts, "router_aux_loss_coef": 2.0}),
        ("DPO", {"model": make_experts, "router_aux_loss_coef": 0.0}),
    ],
)
def test_the_same_script_gives_the_same_training(tmp_path, monkeypatch, kind, options):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = make_pairs(24)
    theirs = quick_start(trl, kind, tmp_path / "trl", rows, **options)
    ours = quick_start(trainers, kind, tmp_path / "ours", rows, **options)
    # Over accumulated micro-batches TRL averages the averages; ours weighs by tokens.
    accumulated = "gradient_accumulation_steps" in options
    _compare(
        kind,
        ours,
        theirs,
        {"mean_token_accuracy", "logits/chosen", "logits/rejected"} if accumulated else set(),
    )


@pytest.mark.parametrize("model", [make_model, make_experts])
def test_the_same_kto_script_gives_the_same_training(tmp_path, model):
    # TRL takes the mismatched completion from the row before in the same batch, so it cannot shuffle; ours is
    # that of the next row with another prompt, fixed over the whole data. In a batch of two they are one.
    rows = unpaired(make_pairs(2))
    options = {
        "train_sampling_strategy": "sequential", "per_device_train_batch_size": 2, "model": model,
    }  # fmt: skip
    theirs = quick_start(trl, "KTO", tmp_path / "trl", rows, **options)
    ours = quick_start(trainers, "KTO", tmp_path / "ours", rows, **options)
    _compare("KTO", ours, theirs, set())


def _compare(kind, ours, theirs, apart):
    assert len(ours) == len(theirs) == 10
    for step, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        assert our.keys() - APART[kind] == their.keys() - APART[kind]
        for name in their.keys() - APART[kind] - apart:
            assert our[name] == pytest.approx(their[name], rel=1e-4, abs=1e-5), (step, name)
    assert ours[-1]["loss"] != pytest.approx(ours[0]["loss"], rel=1e-2)  # it did move
