"""Published training scripts, in their shape, with the import swapped: parser, loading, trainer, what follows.

The shapes are those of TRL's `scripts/dpo.py` and `scripts/kto.py` and of the alignment handbook's
`scripts/dpo.py`: dataclasses of TRL beside a config of ours in one parser, the model by name or loaded twice,
data by name, PEFT and quantization from TRL's helpers, resuming, saving.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")
pytest.importorskip("peft")

import datasets
import trl
from tiny_models import CHAT_TEMPLATE, make_model, make_pairs, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.trainer_utils import get_last_checkpoint

from pyfast_dpo import trainers

LORA = ["--use_peft", "--lora_r", "4", "--lora_alpha", "8", "--lora_target_modules", "all-linear"]
EVALUATE = ["--eval_strategy", "steps", "--eval_steps", "2"]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A model, and a dataset with two splits of each kind, by name."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer(CHAT_TEMPLATE).save_pretrained(tmp_path / "model")
    pairs = make_pairs()
    unpaired = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    for name, rows in (("DPO", pairs), ("KTO", unpaired)):
        (tmp_path / name).mkdir()
        for split, part in (("train", rows), ("test", rows[:4])):
            lines = "".join(json.dumps(row) + "\n" for row in part)
            (tmp_path / name / f"{split}.jsonl").write_text(lines)
    return tmp_path


def command_line(files, kind, *flags):
    return [
        "--dataset_name", str(files / kind), "--model_name_or_path", str(files / "model"),
        "--learning_rate", "5.0e-3", "--num_train_epochs", "1", "--per_device_train_batch_size", "2",
        "--max_steps", "3", "--gradient_accumulation_steps", "2", "--output_dir", str(files / "out"),
        "--use_cpu", "--dataloader_pin_memory", "false", "--max_length", "32", "--logging_steps", "1", *flags,
    ]  # fmt: skip


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def of_trl(kind, arguments):
    types = (
        trl.ScriptArguments,
        getattr(trainers, f"{kind}Config"),
        trl.ModelConfig,
        trl.DatasetMixtureConfig,
    )
    parsed = trl.TrlParser(types).parse_args_and_config(arguments, fail_with_unknown_args=False)
    script_args, training_args, model_args, dataset_args = parsed
    assert not dataset_args.datasets
    loading = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    training_args.model_init_kwargs = {**loading, **(training_args.model_init_kwargs or {})}
    dataset = datasets.load_dataset(
        script_args.dataset_name,
        name=script_args.dataset_config,
        streaming=script_args.dataset_streaming,
    )
    evaluates = training_args.eval_strategy != "no"
    trainer = getattr(trainers, f"{kind}Trainer")(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if evaluates else None,
        quantization_config=trl.get_quantization_config(model_args),
        peft_config=trl.get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    if hasattr(trainer, "end"):
        trainer.end()
    return trainer


@pytest.mark.parametrize(
    "kind, flags",
    [
        ("DPO", ["--no_remove_unused_columns", *EVALUATE]),
        ("DPO", ["--no_remove_unused_columns", *EVALUATE, *LORA]),
        ("DPO", ["--loss_type", "sigmoid", "sft", "--gradient_checkpointing", "--bf16"]),
        ("DPO", ["--dataset_streaming", "--dataset_num_proc", "2"]),
        ("DPO", ["--model_init_kwargs", '{"dtype": "bfloat16"}', "--trust_remote_code"]),
        ("KTO", ["--lr_scheduler_type=cosine", "--warmup_steps", "0.1", "--logging_first_step", *EVALUATE]),
        ("KTO", ["--no_gradient_checkpointing", *LORA]),
    ],
)  # fmt: skip
def test_scripts_of_trl_run(files, kind, flags):
    trainer = of_trl(kind, command_line(files, kind, *flags))
    assert len(losses(trainer)) == 3
    assert any("eval_loss" in entry for entry in trainer.state.log_history) == ("steps" in flags)
    AutoModelForCausalLM.from_pretrained(files / "out")
    if "--model_init_kwargs" in flags:
        assert str(trainer.model.dtype) == "torch.bfloat16"


@dataclass
class HandbookConfig(trainers.DPOConfig):
    """As the handbook adds options of its own."""

    chat_template: str | None = field(default=None, metadata={"help": "The chat template."})
    hub_model_revision: str | None = field(default="main", metadata={"help": "The branch."})
    benchmarks: list[str] = field(
        default_factory=list, metadata={"help": "What runs after training."}
    )


def of_the_handbook(arguments):
    parser = trl.TrlParser((trl.ScriptArguments, HandbookConfig, trl.ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config(arguments)
    set_seed(training_args.seed)
    training_args.get_process_log_level()
    assert "beta=" in f"Training parameters {training_args}"
    checkpoint = training_args.resume_from_checkpoint or get_last_checkpoint(
        training_args.output_dir
    )

    def load():
        return AutoModelForCausalLM.from_pretrained(
            model_args.model_name_or_path,
            revision=model_args.model_revision,
            trust_remote_code=training_args.trust_remote_code,
            dtype=model_args.dtype,
            use_cache=not training_args.gradient_checkpointing,
        )

    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    dataset = datasets.load_dataset(script_args.dataset_name)
    for split in dataset:
        assert "messages" not in dataset[split].column_names
    evaluates = training_args.eval_strategy != "no"
    trainer = trainers.DPOTrainer(
        load(),
        load(),
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if evaluates else None,
        processing_class=tokenizer,
        peft_config=trl.get_peft_config(model_args),
    )
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    metrics["train_samples"] = len(dataset[script_args.dataset_train_split])
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    if evaluates:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.save_model(training_args.output_dir)
    return trainer


def test_the_script_of_the_handbook_runs_and_goes_on_where_it_was(files):
    (files / "out").mkdir()
    recipe = files / "recipe.yaml"
    recipe.write_text(
        "beta: 0.01\ndo_eval: true\neval_strategy: steps\neval_steps: 2\ngradient_checkpointing: true\n"
        "gradient_checkpointing_kwargs:\n  use_reentrant: False\nhub_model_id: tiny-dpo\nlog_level: info\n"
        "lr_scheduler_type: cosine\noptim: adamw_torch\nsave_strategy: steps\nsave_steps: 2\n"
        "save_total_limit: 1\nseed: 42\npush_to_hub: false\nbenchmarks: [one, two]\ndataset_num_proc: 2\n"
    )
    flags = ["--config", str(recipe)]
    trainer = of_the_handbook(command_line(files, "DPO", *flags, "--max_steps", "2"))
    assert (trainer.args.beta, trainer.args.benchmarks) == (0.01, ["one", "two"])
    trainer = of_the_handbook(command_line(files, "DPO", *flags, "--max_steps", "4"))
    assert len(losses(trainer)) == 4  # of which the first two come from the checkpoint
    assert {"train_results.json", "eval_results.json", "trainer_state.json"} <= {
        path.name for path in (files / "out").iterdir()
    }
