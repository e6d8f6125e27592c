"""`pyfast-dpo train`: every option as a flag and in a file, TRL's names, checkpoints, what it says to mistakes."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from option_samples import NO_TEXT, plain, sample
from tiny_models import CHAT_TEMPLATE, make_model, make_pairs, make_tokenizer

from pyfast_dpo.cli import main
from pyfast_dpo.cli import train as train_command
from pyfast_dpo.cli.options import CommandOptions, parse, with_underscores
from pyfast_dpo.cli.runs import whole_checkpoints
from pyfast_dpo.trainers import DPOConfig, DPOTrainer, KTOConfig


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model with a chat template, pairs and unpaired rows on disk."""
    folder = tmp_path_factory.mktemp("files")
    make_model().save_pretrained(folder / "model")
    make_tokenizer(CHAT_TEMPLATE).save_pretrained(folder / "model")
    unpaired = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in make_pairs()
        for side in ("chosen", "rejected")
    ]
    for name, rows in (("pairs", make_pairs()), ("unpaired", unpaired)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def train(files, tmp_path, *flags, data="pairs"):
    return main(
        ["train", "--model", str(files / "model"), "--data", str(files / f"{data}.jsonl")]
        + ["--output_dir", str(tmp_path), "--steps", "3", "--learning_rate", "1e-2", *flags]
    )


@pytest.mark.parametrize(
    "flags, data, first_loss",
    [
        (["--loss", "dpo", "--lora"], "pairs", "0.6931472"),
        (["--loss", "dpo", "--full", "--label_smoothing", "0.1"], "pairs", "0.6931472"),
        (["--loss_type", "ipo", "--beta", "0.5"], "pairs", "1.0000000"),
        (["--loss", "kto"], "unpaired", "0.5000000"),
        (["--loss", "kto", "--desirable-weight", "1.2", "--batch-size=3"], "pairs", None),
    ],
)
def test_train_leaves_checkpoint_metrics_and_curves(
    files, tmp_path, capsys, flags, data, first_loss
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    eval_data = ["--eval_data", str(files / f"{data}.jsonl")]
    assert train(files, tmp_path, *flags, *eval_data, data=data) == 0
    printed = capsys.readouterr().out
    for what in (
        "adapter" if "--full" not in flags else "model",
        "metrics",
        "curves",
        "checkpoint",
    ):
        (place,) = [
            line.split()[1] for line in printed.splitlines() if line.startswith(f"  {what} ")
        ][-1:]
        assert Path(place).exists()
    assert "train: kept" in printed and "logp chosen" in printed and "eval after step 3" in printed
    of_pairs = "kto" not in flags  # KTO has no pairs to compare, and its KL is part of the loss
    (header,) = [line for line in printed.splitlines() if line.split()[:1] == ["step"]]
    assert ("accuracy" in header, "kl" in header) == (of_pairs, not of_pairs)
    if first_loss:
        assert f"loss: first {first_loss}" in printed
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert len([entry for entry in report["history"] if "loss" in entry]) == 3
    assert any("eval_rewards/margins" in entry for entry in report["history"])
    assert report["data"]["train"].startswith("train: kept")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    AutoTokenizer.from_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)  # of an adapter, with the base it names


# Options ---------------------------------------------------------------------------------------------------


@pytest.fixture
def unchecked(monkeypatch):
    """Configs that keep what they are given, so that every value can be given alone."""
    for kind in (DPOConfig, KTOConfig):
        monkeypatch.setattr(kind, "__post_init__", lambda self: None)


NEEDED = ["--model", "m", "--data", "d.jsonl"]
LOSS = {DPOConfig: "sigmoid", KTOConfig: "kto"}
FIELDS = [
    (kind, f.name)
    for kind in LOSS
    for f in dataclasses.fields(kind)
    if f.name not in {*NO_TEXT, "loss_type"}
]


@pytest.mark.parametrize("kind, name", FIELDS, ids=lambda value: getattr(value, "__name__", value))
def test_every_field_of_a_config_is_a_flag_and_an_entry(tmp_path, unchecked, kind, name):
    words, value = sample(kind, name)
    loss = ["--loss", LOSS[kind]]
    _, config = parse([*NEEDED, *loss, f"--{name}", *words])
    assert type(config) is kind
    arrived = plain(getattr(config, name))
    assert (arrived, type(arrived)) == (value, type(value))
    path = tmp_path / "config.json"
    path.write_text(json.dumps({name: value, "loss": LOSS[kind]}))
    _, config = parse([*NEEDED, "--config", str(path)])
    arrived = plain(getattr(config, name))
    assert (arrived, type(arrived)) == (value, type(value))


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(CommandOptions)])
def test_every_option_of_the_command_is_a_flag_and_has_a_text(unchecked, name):
    (found,) = [f for f in dataclasses.fields(CommandOptions) if f.name == name]
    assert len(found.metadata["help"].split()) > 2
    if name == "config":
        return  # every test of a file gives it
    words, value = sample(CommandOptions, name)
    command, _ = parse([*NEEDED, f"--{name}", *words])
    assert getattr(command, name) == value


LEFT_OUT = {"ignore_bias_buffers"}  # a workaround for models with bool buffers under DDP


@pytest.mark.parametrize("kind", ["ModelConfig", "ScriptArguments"])
def test_every_flag_of_scripts_of_trl_is_known(unchecked, kind):
    trl = pytest.importorskip("trl")
    theirs = getattr(trl, kind)
    for field in dataclasses.fields(theirs):
        if field.name not in LEFT_OUT:
            parse([*NEEDED, f"--{field.name}", *sample(theirs, field.name)[0]])


@pytest.mark.parametrize(
    "flags, of_command, of_config",
    [
        (["--use_peft", "--lora_r", "32", "--lora_alpha", "16"], {"lora": True, "lora_r": 32, "lora_alpha": 16}, {"learning_rate": 1e-4}),
        (["--use_peft", "false"], {"lora": False}, {"learning_rate": 1e-6}),
        (["--full"], {"lora": False}, {"learning_rate": 1e-6}),
        (["--lora_target_modules", "q_proj", "v_proj"], {"lora_target_modules": ["q_proj", "v_proj"]}, {}),
        (["--dataset_train_split", "train_prefs", "--dataset_test_split", "test_prefs"], {"split": "train_prefs", "eval_split": "test_prefs"}, {}),
        (["--steps", "7", "--batch-size=3", "--epochs", "2"], {}, {"max_steps": 7, "per_device_train_batch_size": 3, "per_device_eval_batch_size": 3, "num_train_epochs": 2.0}),
        (["--per_device_eval_batch_size", "1"], {}, {"per_device_eval_batch_size": 1}),
        (["--resume"], {"resume": "latest"}, {}),
        (["--resume", "runs/a/checkpoint-3"], {"resume": "runs/a/checkpoint-3"}, {}),
        (["--loss", "dpo"], {}, {"loss_type": ["sigmoid"]}),
        (["--loss", "dpo", "sft", "--loss_weights", "1", "0.1"], {}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1]}),
        (["--eval_data", "e.jsonl", "--eval_steps", "5"], {"eval_data": ["e.jsonl"]}, {"eval_strategy": "steps", "eval_steps": 5.0}),
        ([], {}, {"save_strategy": "steps", "save_steps": 0.1, "save_total_limit": 2, "eval_strategy": "no", "report_to": []}),
        (["--no_shared_prompt", "--gradient_checkpointing", "--no_bf16"], {}, {"shared_prompt": False, "gradient_checkpointing": True, "bf16": False}),
    ],
)  # fmt: skip
def test_flags_mean(flags, of_command, of_config):
    command, config = parse([*NEEDED, *flags])
    assert {name: getattr(command, name) for name in of_command} == of_command
    assert {name: getattr(config, name) for name in of_config} == of_config


@pytest.mark.parametrize("names", ["--model_name_or_path m --dataset_name d", "--model=m --data d"])
def test_model_and_data_under_both_names(names):
    command, _ = parse(names.split())
    assert (command.model, command.data) == ("m", ["d"])


def test_help_names_what_a_user_looks_for(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for text in (
        "a checkpoint every so many steps, and at the end; below 1, a share of all steps: by default after each tenth",
        "--steps", "--resume", "--model_name_or_path", "--dataset_name", "--max_tokens_per_batch", "--report_to",
        "by default 1e-4 for LoRA and 1e-6 for full training", "--no_lora the opposite of --lora",
    ):  # fmt: skip
        assert text in shown
    assert "--max-steps" not in shown and "(default: None)" not in shown


# The file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["json", "toml", "yaml"])
def test_config_file_and_flags_that_win(files, tmp_path, suffix):
    if suffix == "toml" and sys.version_info < (3, 11):
        pytest.importorskip("tomli")
    if suffix == "yaml":
        pytest.importorskip("yaml")
    entries = {
        "model": str(files / "model"), "data": [str(files / "pairs.jsonl")], "steps": 5, "loss": "ipo",
        "learning-rate": 1e-3, "full": True, "output_dir": str(tmp_path / "out"), "save_strategy": "no",
    }  # fmt: skip
    separator = ": " if suffix == "yaml" else " = "
    text = "\n".join(f"{key}{separator}{json.dumps(value)}" for key, value in entries.items())
    path = tmp_path / f"config.{suffix}"
    path.write_text(json.dumps(entries) if suffix == "json" else text)
    assert main(["train", "--config", str(path), "--steps=2"]) == 0
    given = json.loads((tmp_path / "out" / "metrics.json").read_text())["options"]
    expected = {"max_steps": 2, "loss_type": ["ipo"], "lora": False, "learning_rate": 1e-3}
    assert {name: given[name] for name in expected} == expected
    assert not whole_checkpoints(tmp_path / "out")


@pytest.mark.parametrize(
    "entries, expected",
    [
        ({"max_length": None}, {"max_length": None}),
        ({"model_init_kwargs": {"dtype": "bfloat16"}}, {"model_init_kwargs": {"dtype": "bfloat16"}}),
        ({"report_to": ["tensorboard", "wandb"]}, {"report_to": ["tensorboard", "wandb"]}),
        ({"report_to": "wandb"}, {"report_to": ["wandb"]}),
        ({"learning_rate": "5e-7"}, {"learning_rate": 5e-7}),  # so YAML reads 5e-7
        ({"beta": 1}, {"beta": 1.0}),
        ({"shared_prompt": False, "gradient_checkpointing": True}, {"shared_prompt": False, "gradient_checkpointing": True}),
        ({"loss_type": ["sigmoid", "sft"]}, {"loss_type": ["sigmoid", "sft"]}),
        ({"per_device_train_batch_size": 2, "num_train_epochs": 3}, {"per_device_train_batch_size": 2, "num_train_epochs": 3.0}),
    ],
)  # fmt: skip
def test_entries_mean(tmp_path, entries, expected):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model": "m", "dataset_name": "d.jsonl", **entries}))
    command, config = parse(["--config", str(path)])
    assert command.data == ["d.jsonl"]
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"learning_rat": 1}', "'learning_rat' is not an option; did you mean learning_rate?"),
        ('{"qqq": 1}', "'qqq' is not an option; see pyfast-dpo train --help"),
        ('{"full": 1}', "full must be true or false, got 1"),
        ('{"beta": {"a": 1}}', "beta must be float, got {'a': 1}"),
        ('{"beta": null}', "beta must be float, got None"),
        ('{"max_steps": [1, 2]}', r"max_steps must be int, got \[1, 2\]"),
        ('{"config": "b.json"}', "'config' is not an option"),
        ("[1]", "must hold a mapping, got list"),
        ("{", "config.json: "),
    ],
)
def test_bad_config_file(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match=f"pyfast-dpo: error: .*{message}"):
        main(["train", "--config", str(path)])


# Mistakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--beta", "0"], "DPOConfig: beta must be positive and finite, got 0.0"),
        (["--beta", "0", "--loss", "kto"], "KTOConfig: beta must be positive"),
        (["--label_smoothing", "0.5"], r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        (["--label_smoothing", "0.1", "--loss", "ipo"], "label_smoothing is defined for the losses .* got 0.1 with 'ipo'"),
        (["--desirable_weight", "2"], "--desirable_weight is an option of KTOConfig, got --loss dpo"),
        (["--loss", "kto", "--label_smoothing=0.1"], "--label_smoothing is an option of DPOConfig, got --loss kto"),
        (["--loss", "hinges"], r"loss_type must be one of \['sigmoid', .*, got 'hinges'"),
        (["--batch_size", "0"], "per_device_train_batch_size must be positive, got 0"),
        (["--learning_rate", "-1"], "learning_rate must be finite and not negative, got -1"),
        (["--steps", "0"], "--max_steps must be at least 1, got 0"),
        (["--epochs", "0"], "--num_train_epochs must be positive, got 0"),
        (["--rpo_alphas", "1"], "--rpo_alphas is not an option; did you mean rpo_alpha?"),
        (["--max_length", "1"], "max_length must be None or at least 2"),
        (["--max_length", "2"], "no usable row; train: kept 0 of 16 rows; dropped: .*max_length 2"),
        (["--data", "none.jsonl"], "none.jsonl"),
        (["--data", "a.csv", "b.txt"], "a.csv"),
        (["--model", "/no/such/model"], "--model /no/such/model: there is no such folder"),
        (["--model", "./none"], "--model ./none: there is no such folder"),
        (["--ref_model", "a/b/c"], "--ref_model a/b/c: there is no such folder"),
        (["--model", "{folder}"], "--model .*: the folder holds no model"),
        (["--resume", "{folder}"], "--resume .*: there is no whole checkpoint"),
        (["--eval_strategy", "steps"], "--eval_strategy needs --eval_data"),
        (["--dataset_streaming"], "config and streaming are for a dataset by name, got None and True with"),
        (["--load_in_4bit", "--load_in_8bit"], "--load_in_8bit and --load_in_4bit: choose one"),
    ],
)  # fmt: skip
def test_mistakes_get_one_line(files, tmp_path, flags, message):
    flags = [flag.format(folder=tmp_path) for flag in flags]
    with pytest.raises(SystemExit, match=f"pyfast-dpo: error: .*{message}") as stop:
        train(files, tmp_path, *flags)
    assert "\n" not in str(stop.value).strip()


def test_a_wrong_type_is_told_without_a_screen_of_usage(files, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(files, tmp_path, "--steps", "x")
    told = capsys.readouterr().err
    assert "argument --max_steps/--max-steps/--steps: invalid int value: 'x'" in told
    assert len(told.splitlines()) == 2


@pytest.mark.parametrize("missing", ["model", "data"])
def test_what_is_needed_is_said(missing):
    given = {"model": ["--model", "m"], "data": ["--data", "d.jsonl"]}
    flags = [word for name, words in given.items() if name != missing for word in words]
    with pytest.raises(SystemExit, match=f"--{missing} is needed"):
        main(["train", *flags])


def test_a_name_that_nobody_has_is_told_as_such(files, tmp_path, monkeypatch):
    def unknown(*args, **kwargs):
        raise OSError("org/none is not a local folder and is not a valid model identifier\nmore")

    for loader in ("AutoConfig", "AutoModelForCausalLM"):
        monkeypatch.setattr(f"transformers.{loader}.from_pretrained", unknown)
    with pytest.raises(
        SystemExit,
        match="--model org/none: there is no such folder, and not as a name of the Hub: org/none is not",
    ) as stop:
        train(files, tmp_path, "--model", "org/none")
    assert "more" not in str(stop.value)


# What is built ---------------------------------------------------------------------------------------------


def test_adapter_and_quantization_are_those_of_the_flags():
    command, _ = parse(
        [*NEEDED, "--lora_r", "8", "--lora_target_modules", "q_proj", "v_proj", "--use_rslora"]
        + [
            "--lora_modules_to_save",
            "lm_head",
            "--load_in_4bit",
            "--use_bnb_nested_quant",
            "--dtype",
            "bfloat16",
        ]
    )
    adapter = train_command._adapter(command)
    assert (adapter.r, adapter.lora_alpha, adapter.use_rslora) == (8, 16, True)
    assert (adapter.target_modules, adapter.modules_to_save) == ({"q_proj", "v_proj"}, ["lm_head"])
    quantized = train_command._quantization(command)
    assert (quantized.load_in_4bit, quantized.bnb_4bit_quant_type) == (True, "nf4")
    assert (
        quantized.bnb_4bit_use_double_quant
        and str(quantized.bnb_4bit_compute_dtype) == "torch.bfloat16"
    )
    plain_command, _ = parse(NEEDED)
    assert train_command._quantization(plain_command) is None
    assert train_command._adapter(plain_command).target_modules == "all-linear"


def test_evaluation_takes_the_test_split_of_the_same_data(files, tmp_path, capsys):
    folder = tmp_path / "pairs"
    folder.mkdir()
    for split, count in (("train", 16), ("test", 4)):
        lines = "".join(json.dumps(row) + "\n" for row in make_pairs(count))
        (folder / f"{split}.jsonl").write_text(lines)
    flags = ["--dataset_name", str(folder), "--eval_strategy", "steps", "--eval_steps", "2"]
    train(files, tmp_path / "out", *flags)
    printed = capsys.readouterr().out
    assert "train: kept 16 of 16" in printed and "eval: kept 4 of 4" in printed
    assert "eval after step 2" in printed


def test_a_stream_by_name_is_read_as_it_is_needed(files, tmp_path, monkeypatch, capsys):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return datasets.Dataset.from_list(make_pairs()).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    flags = ["--dataset_name", "org/pairs", "--dataset_config", "en", "--dataset_streaming"]
    assert train(files, tmp_path, *flags, "--eval_strategy", "steps", "--eval_steps", "3") == 0
    assert asked == [
        (("org/pairs", "en"), {"split": split, "streaming": True}) for split in ("train", "test")
    ]
    assert "eval after step 3" in capsys.readouterr().out


# Checkpoints -----------------------------------------------------------------------------------------------


def history(folder):
    held = json.loads((folder / "metrics.json").read_text())["history"]
    return [entry["loss"] for entry in held if "loss" in entry]


def test_a_checkpoint_after_each_tenth_of_the_run_by_default(files, tmp_path, capsys):
    train(files, tmp_path, "--steps", "20", "--batch_size", "1")
    assert [path.name for path in whole_checkpoints(tmp_path)] == ["checkpoint-18", "checkpoint-20"]
    printed = capsys.readouterr().out
    assert str(tmp_path / "checkpoint-18") in printed and str(tmp_path / "checkpoint-20") in printed


def test_resume_goes_on_to_the_same_bits(files, tmp_path, capsys):
    flags = ["--save_steps", "1", "--lr_scheduler_type", "constant", "--full"]
    train(files, tmp_path / "whole", *flags, "--steps", "4")
    folder = tmp_path / "parts"
    train(files, folder, *flags, "--steps", "2", "--resume")
    assert (
        f"no checkpoint in {folder} yet: this run begins at the first step"
        in capsys.readouterr().out
    )
    train(files, folder, *flags, "--steps", "3", "--resume")
    train(files, folder, *flags, "--steps", "4", "--resume", str(folder / "checkpoint-3"))
    assert history(folder) == history(tmp_path / "whole")
    ours, theirs = (path / "model.safetensors" for path in (folder, tmp_path / "whole"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_new_run_over_an_old_one_says_how_to_go_on(files, tmp_path, capsys):
    train(files, tmp_path, "--steps", "1")
    train(files, tmp_path, "--steps", "1")
    told = f"{tmp_path} holds checkpoint-1 of an earlier run; --resume goes on from there"
    assert capsys.readouterr().out.count(told) == 1


@pytest.mark.parametrize("saved", [True, False])
def test_an_interrupted_run_says_where_it_goes_on(files, tmp_path, capsys, monkeypatch, saved):
    steps = DPOTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return steps(self, *args, **kwargs)

    monkeypatch.setattr(DPOTrainer, "training_step", interrupted)
    flags = ["--save_steps", "1"] if saved else ["--save_strategy", "no"]
    assert train(files, tmp_path, *flags) == train_command.INTERRUPTED
    where = (
        f"--resume goes on from {tmp_path / 'checkpoint-2'}"
        if saved
        else f"no checkpoint in {tmp_path} yet"
    )
    assert f"stopped after step 2; {where}" in capsys.readouterr().out


def test_half_a_checkpoint_is_none_to_go_on_from(tmp_path):
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-11", "checkpoint-x"):
        (tmp_path / name).mkdir()
        if name != "checkpoint-11":
            (tmp_path / name / "trainer_state.json").write_text("{}")
    assert [path.name for path in whole_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-10"]


def test_hyphens_are_underscores_but_values_are_kept():
    assert with_underscores(["--max-length=5", "--data", "a-b.jsonl", "-h", "--x=y-z"]) == [
        "--max_length=5", "--data", "a-b.jsonl", "-h", "--x=y-z",
    ]  # fmt: skip
