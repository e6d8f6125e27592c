"""`pyfast-dpo train`."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import transformers

from pyfast_dpo.cli.console import friendly_errors
from pyfast_dpo.cli.models import loading, resolve_model
from pyfast_dpo.cli.options import LATEST, CommandOptions, Config
from pyfast_dpo.cli.runs import add_table, finish, lora_config, whole_checkpoints
from pyfast_dpo.data import load_rows
from pyfast_dpo.trainers import DPOTrainer, KTOConfig, KTOTrainer
from pyfast_dpo.trainers.base import PreferenceTrainer
from pyfast_dpo.trainers.checkpoints import what_is_lacking
from pyfast_dpo.trainers.construction import load_model

INTERRUPTED = 130  # the exit status of a shell's command that Ctrl-C ended


def run(command: CommandOptions, config: Config) -> int:
    """Trains; leaves model, checkpoints, metrics.json and curves.png in the output folder."""
    with friendly_errors():
        checkpoint = _checkpoint(command.resume or config.resume_from_checkpoint, config)
        trainer = _build(command, config)
    table = add_table(trainer)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        _say_where_to_go_on(trainer)
        return INTERRUPTED
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    report = {
        "options": {**asdict(command), **config.to_dict()},
        "data": {name: str(rows) for name, rows in trainer.data_reports.items()},
        "seconds_per_step": table.seconds_per_step,
    }
    losses = [config.loss_type] if isinstance(config, KTOConfig) else config.loss_type
    finish(trainer, report, title=f"{' + '.join(losses)} of {command.model}")
    if config.push_to_hub:
        trainer.push_to_hub()
    return 0


def _build(command: CommandOptions, config: Config) -> PreferenceTrainer:
    rows, eval_rows = _rows(command, config)
    given = {
        "revision": command.model_revision,
        "dtype": command.dtype,
        "attn_implementation": command.attn_implementation,
        **config.loading_options(),
    }
    config.model_init_kwargs = {name: value for name, value in given.items() if value is not None}
    model, ref_model = str(command.model), None
    if command.ref_model is not None:
        with loading(command.ref_model, "--ref_model"):
            path = resolve_model(command.ref_model, "--ref_model")
            ref_model = load_model(path, config.loading_options())
    make_trainer = KTOTrainer if isinstance(config, KTOConfig) else DPOTrainer
    with loading(model):
        trainer = make_trainer(
            model=resolve_model(model),
            ref_model=ref_model,
            args=config,
            train_dataset=rows,
            eval_dataset=eval_rows,
            quantization_config=_quantization(command),
            peft_config=_adapter(command) if command.lora else None,
        )
    weights = [
        (p.numel(), p.requires_grad)
        for p in trainer.accelerator.unwrap_model(trainer.model).parameters()
    ]
    trained, of_all = sum(n for n, trains in weights if trains), sum(n for n, _ in weights)
    what = "a LoRA adapter (--full trains all weights)" if command.lora else "all weights"
    if trainer.is_world_process_zero():
        print(f"training {what}: {trained:,} of {of_all:,}")
    return trainer


def _rows(command: CommandOptions, config: Config) -> tuple[Any, Any]:
    assert command.data is not None  # checked with the options
    read = partial(
        load_rows,
        command.data,
        config=command.dataset_config,
        streaming=command.dataset_streaming,
    )
    rows = read(split=command.split)
    if command.eval_data is not None:
        return rows, load_rows(command.eval_data, split=command.eval_split)
    if config.eval_strategy == "no":
        return rows, None
    if any(Path(item).is_file() for item in command.data):
        raise ValueError("--eval_strategy needs --eval_data, as files have no split for evaluation")
    return rows, read(split=command.eval_split)


def _adapter(command: CommandOptions) -> Any:
    targets: Any = command.lora_target_modules
    options = {
        "lora_dropout": command.lora_dropout,
        "target_modules": targets[0] if len(targets) == 1 else targets,  # one may be "all-linear"
        "modules_to_save": command.lora_modules_to_save,
        "task_type": command.lora_task_type,
        "use_rslora": command.use_rslora,
        "use_dora": command.use_dora,
    }
    if command.lora_target_parameters:
        options["target_parameters"] = command.lora_target_parameters
    return lora_config(command.lora_r, command.lora_alpha, **options)


def _quantization(command: CommandOptions) -> Any:
    if command.load_in_8bit and command.load_in_4bit:
        raise ValueError("--load_in_8bit and --load_in_4bit: choose one")
    if command.load_in_8bit:
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    if not command.load_in_4bit:
        return None
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=command.dtype,
        bnb_4bit_quant_type=command.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=command.use_bnb_nested_quant,
        bnb_4bit_quant_storage=command.bnb_4bit_quant_storage,
    )


# Going on ------------------------------------------------------------------------------------------------


def _checkpoint(resume: str | None, config: Config) -> str | None:
    """The folder to go on from, None for a new run."""
    folder = config.output_dir
    found = whole_checkpoints(folder)
    tell = print if config.process_index == 0 else lambda text: None
    if resume is None:
        if found:
            tell(f"{folder} holds {found[-1].name} of an earlier run; --resume goes on from there")
        return None
    if resume.lower() in (LATEST, "true"):
        if not found:
            tell(f"no checkpoint in {folder} yet: this run begins at the first step")
        return str(found[-1]) if found else None
    lacking = what_is_lacking(Path(resume))
    if lacking is not None:
        raise ValueError(f"--resume {resume}: there is no whole checkpoint ({lacking})")
    return resume


def _say_where_to_go_on(trainer: PreferenceTrainer) -> None:
    if not trainer.is_world_process_zero():
        return
    step, folder = trainer.state.global_step, trainer.args.output_dir
    found = whole_checkpoints(folder)
    where = f"--resume goes on from {found[-1]}" if found else f"no checkpoint in {folder} yet"
    print(f"stopped after step {step}; {where}")
