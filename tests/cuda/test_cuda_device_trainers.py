"""The trainers on a GPU: the losses of the CPU, in both layouts. `make gpu-check` runs these too."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tiny_models import make_model, make_pairs, make_tokenizer
from trainer_runs import LN2, config, train_log

from pyfast_dpo.trainers import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def run(kind, tmp_path, **options):
    make_config, make_trainer = {
        "dpo": (DPOConfig, DPOTrainer),
        "kto": (KTOConfig, KTOTrainer),
    }[kind]
    trainer = make_trainer(
        make_model(), None, config(make_config, tmp_path, learning_rate=1e-2, max_steps=6, **options),
        train_dataset=make_pairs(), processing_class=make_tokenizer(),
    )  # fmt: skip
    return trainer, [entry["loss"] for entry in train_log(trainer)]


@pytest.mark.parametrize("kind", ["dpo", "kto"])
@pytest.mark.parametrize("shared_prompt", [True, False])
def test_float32_losses_are_those_of_the_cpu(tmp_path, kind, shared_prompt):
    options = {"bf16": False, "shared_prompt": shared_prompt, "train_sampling_strategy": "sequential"}  # fmt: skip
    _, cpu = run(kind, tmp_path, use_cpu=True, **options)
    trainer, gpu = run(kind, tmp_path, use_cpu=False, **options)
    assert trainer.model.device.type == "cuda"
    assert gpu == pytest.approx(cpu, rel=1e-3)


def test_bfloat16_autocast_starts_at_ln2_and_learns(tmp_path):
    trainer, losses = run("dpo", tmp_path, use_cpu=False, bf16=True)
    batch = trainer.data_collator(trainer.train_dataset.examples[:2])
    assert "shared_prompt_layout" in batch  # no falling back
    assert losses[0] == LN2
    assert losses[-1] < LN2 - 0.01
