"""`pyfast-dpo train`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyfast_dpo.cli.console import friendly_errors, quiet_transformers
from pyfast_dpo.cli.models import resolve_model
from pyfast_dpo.data import load_rows
from pyfast_dpo.evaluation.curves import plot_curves
from pyfast_dpo.evaluation.displacement import chosen_falling
from pyfast_dpo.ops.extras import require

if TYPE_CHECKING:
    from pyfast_dpo.trainers.base import PreferenceTrainer
    from pyfast_dpo.trainers.progress import ProgressTable

# Options of one trainer only: (option, whether of KTO)
_LOSS_OPTIONS = (
    ("label_smoothing", False),
    ("desirable_weight", True),
    ("undesirable_weight", True),
)


def run(options: argparse.Namespace) -> int:
    """Trains as the options of `pyfast_dpo.cli.options` say; leaves checkpoint, metrics.json, curves.png."""
    with friendly_errors():
        trainer, table = _build(options)
    trainer.train()
    if options.eval_data:
        trainer.evaluate()
    report = {
        "options": vars(options),
        "data": {name: str(rows) for name, rows in trainer.data_reports.items()},
        "seconds_per_step": table.seconds_per_step,
    }
    finish(trainer, report, title=f"{options.loss.upper()} of {options.model}")
    return 0


def finish(trainer: PreferenceTrainer, report: dict[str, Any], *, title: str) -> None:
    """Saves the checkpoint with its tokenizer, `metrics.json` and `curves.png` to the output folder."""
    if not trainer.is_world_process_zero():
        trainer.save_model()  # sharded weights are gathered by all processes
        return
    folder = Path(trainer.args.output_dir or ".")
    history = trainer.state.log_history
    trainer.save_model()
    (folder / "metrics.json").write_text(json.dumps({**report, "history": history}, indent=1))
    plot_curves(history, folder / "curves.png", title=title)
    losses = [entry["loss"] for entry in history if "loss" in entry]
    print(
        f"loss: first {losses[0]:.7f}, last {losses[-1]:.4f}, over {trainer.state.global_step} steps"
    )
    warning = chosen_falling(history, trainer.args.beta)
    if warning:
        print(f"warning: {warning}")
    print(f"saved to {folder}: checkpoint, metrics.json, curves.png")


def training_options(**options: Any) -> dict[str, Any]:
    """Arguments of a config that the commands share: logs go to the table, one checkpoint at the end."""
    return {
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        **options,
    }


def lora_config(rank: int) -> Any:
    """A LoRA adapter on every linear layer but the head."""
    return require("peft", "--lora").LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def add_table(trainer: PreferenceTrainer) -> ProgressTable:
    """Replaces the Trainer's printing by the table."""
    from transformers.trainer_callback import PrinterCallback

    from pyfast_dpo.trainers.progress import ProgressTable

    table = ProgressTable()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(table)
    return table


def _build(options: argparse.Namespace) -> tuple[PreferenceTrainer, ProgressTable]:
    kto = options.loss == "kto"
    for name, of_kto in _LOSS_OPTIONS:
        if getattr(options, name) is not None and kto != of_kto:
            owner = "--loss kto" if of_kto else "losses on pairs"
            raise ValueError(f"--{name} belongs to {owner}, got --loss {options.loss}")
    rows = load_rows(options.data, split=options.split)
    eval_rows = (
        load_rows(options.eval_data, split=options.eval_split) if options.eval_data else None
    )

    quiet_transformers("pyfast-dpo train")
    from pyfast_dpo.trainers import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
    from pyfast_dpo.trainers.construction import load_model

    lora = options.tuning == "lora"
    given = {
        name: getattr(options, name)
        for name, _ in _LOSS_OPTIONS
        if getattr(options, name) is not None
    }
    if not kto:
        given["loss_type"] = "sigmoid" if options.loss == "dpo" else options.loss
    make_config = KTOConfig if kto else DPOConfig
    make_trainer = KTOTrainer if kto else DPOTrainer
    config = make_config(
        **training_options(
            output_dir=options.output_dir,
            beta=options.beta,
            max_length=options.max_length,
            learning_rate=options.learning_rate or (1e-4 if lora else 1e-6),
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.batch_size,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            num_train_epochs=options.epochs,
            max_steps=options.steps or -1,
            eval_strategy="steps" if eval_rows is not None and options.eval_steps else "no",
            eval_steps=options.eval_steps,
            logging_steps=options.logging_steps,
            seed=options.seed,
            bf16=options.bf16 or None,
            gradient_checkpointing=options.gradient_checkpointing,
            **given,
        )
    )
    trainer = make_trainer(
        model=resolve_model(options.model),
        ref_model=load_model(resolve_model(options.ref_model)) if options.ref_model else None,
        args=config,
        train_dataset=rows,
        eval_dataset=eval_rows,
        peft_config=lora_config(options.lora_r) if lora else None,
    )
    return trainer, add_table(trainer)
