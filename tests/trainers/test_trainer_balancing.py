"""Mixtures of experts: the loss that balances them is added, and the same in both layouts."""

from __future__ import annotations

import warnings

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from model_families import SIZES
from tiny_models import make_experts, make_model, make_pairs, make_tokenizer
from trainer_runs import LN2, config

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


def test_a_model_that_does_not_show_how_it_balances_is_refused_if_a_weight_is_given(tmp_path):
    model = make_experts()
    del model.num_experts
    with pytest.raises(ValueError, match=r"does not show how it balances its experts, got 0\.1"):
        train("DPO", tmp_path, make_pairs(8), model, router_aux_loss_coef=0.1)
    with pytest.warns(UserWarning, match="the experts of Qwen2MoeForCausalLM are not balanced"):
        log = train("DPO", tmp_path, make_pairs(8), model)
    assert "aux_loss" not in log[0]


def of(name, **options):
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}ForCausalLM")
    sizes = SIZES | {"vocab_size": 32, "max_position_embeddings": 64}
    return kind(getattr(transformers, f"{name}Config")(**sizes | options)).eval()


WITHOUT = [
    (lambda: of("Glm4Moe", router_aux_loss_coef=0.1, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
                topk_group=1, moe_intermediate_size=16, first_k_dense_replace=0, n_shared_experts=1),
     True, "experts whose router logits are not returned"),
    (lambda: of("GraniteMoeHybrid", router_aux_loss_coef=0.1, num_local_experts=0, num_experts_per_tok=0,
                shared_intermediate_size=48, mamba_n_heads=4, layer_types=["attention", "attention"]),
     False, "fields of a router, no experts"),
    (lambda: of("Qwen2Moe", router_aux_loss_coef=0.1, mlp_only_layers=[0, 1]), False, "no layer with experts"),
]  # fmt: skip


@pytest.mark.parametrize("make, said", [row[:2] for row in WITHOUT], ids=[r[2] for r in WITHOUT])
def test_a_weight_of_the_configuration_that_cannot_be_used_is_left_out(tmp_path, make, said):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        log = train("DPO", tmp_path, make_pairs(8), make())
    assert said == any("are not balanced" in str(warning.message) for warning in caught)
    assert "aux_loss" not in log[0] and log[0]["loss"] == LN2
    with pytest.raises(ValueError, match=r"router_aux_loss_coef must be None or 0 .* got 0\.2"):
        train("DPO", tmp_path, make_pairs(8), make(), router_aux_loss_coef=0.2)
