"""Mixtures of experts: the loss that balances them is added, and the same in both layouts."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from tiny_models import make_experts, make_model, make_pairs, make_tokenizer
from trainer_runs import config

from pyfast_dpo.trainers import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

KINDS = {"DPO": (DPOTrainer, DPOConfig), "KTO": (KTOTrainer, KTOConfig)}


def train(kind, tmp_path, rows, model, **options):
    """The log of four steps."""
    trainer, options_of = KINDS[kind]
    trainer = trainer(
        model,
        args=config(options_of, tmp_path, **options),
        train_dataset=rows,
        processing_class=make_tokenizer(),
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
def test_the_layouts_balance_alike(tmp_path, kind):
    rows = make_pairs(8)
    rows[1]["prompt"] = rows[0]["prompt"]  # a prompt of four sequences
    logs = [
        train(kind, tmp_path, rows, make_experts(), shared_prompt=shared)
        for shared in (True, False)
    ]
    for ours, padded in zip(*logs, strict=True):
        assert ours["aux_loss"] == pytest.approx(padded["aux_loss"], rel=1e-5)
        assert ours["loss"] == pytest.approx(padded["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(padded["grad_norm"], rel=1e-4)


def test_without_it_the_loss_is_that_of_the_pairs(tmp_path):
    with_it = train("DPO", tmp_path, make_pairs(8), make_experts())
    without = train("DPO", tmp_path, make_pairs(8), make_experts(), router_aux_loss_coef=0.0)
    first, plain = with_it[0], without[0]
    assert "aux_loss" not in plain
    assert first["loss"] == pytest.approx(plain["loss"] + 0.5 * first["aux_loss"], rel=1e-6)


def test_a_weight_for_a_model_without_experts_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"router_aux_loss_coef must be None or 0 for Llama.*got 0.1"
    ):
        train("DPO", tmp_path, make_pairs(8), make_model(), router_aux_loss_coef=0.1)
    with pytest.raises(ValueError, match="router_aux_loss_coef must be finite and not negative"):
        DPOConfig(output_dir=str(tmp_path), router_aux_loss_coef=-1.0)


def test_a_model_that_does_not_show_how_it_balances_is_refused(tmp_path):
    model = make_experts()
    del model.num_experts
    with pytest.raises(ValueError, match="does not show how it balances"):
        train("DPO", tmp_path, make_pairs(8), model)
    train("DPO", tmp_path, make_pairs(8), model, router_aux_loss_coef=0.0)
