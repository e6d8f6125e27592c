"""Short training runs of a tiny model, for tests."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import make_model, make_pairs

from pyfast_dpo.trainers import DPOConfig, DPOTrainer

LN2 = float(torch.tensor(math.log(2.0), dtype=torch.float32))


def config(kind, tmp_path, **options):
    defaults = {
        "output_dir": str(tmp_path),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "max_length": 32,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
    }
    return kind(**{**defaults, **options})


def lora(dropout=0.0):
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(
        r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=dropout
    )


def train_log(trainer):
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def dpo_trainer(
    tmp_path, tokenizer, model=None, *, ref_model=None, peft_config=None, rows=None, **options
):
    return DPOTrainer(
        model if model is not None else make_model(),
        ref_model,
        config(DPOConfig, tmp_path, **options),
        train_dataset=make_pairs() if rows is None else rows,
        eval_dataset=make_pairs(6),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
