"""The options of `pyfast-dpo train`: those of the command, and every field of a config, as flags and in a file."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers import HfArgumentParser

from pyfast_dpo.cli.config_file import read_config
from pyfast_dpo.trainers import DPOConfig, KTOConfig
from pyfast_dpo.trainers.config import KTO_LOSSES
from pyfast_dpo.trainers.flags import documented

Config = DPOConfig | KTOConfig
LATEST = "latest"
USAGE = "pyfast-dpo train --model NAME --data FILE [FILE ...] [options]; --help lists them all"


def also(*flags: str, **metadata: Any) -> dict[str, Any]:
    """Metadata of a field with other flags, most of them TRL's."""
    return {"aliases": [f"--{flag}" for flag in flags], **metadata}


@documented
@dataclass
class CommandOptions:
    """What the command takes beside the fields of a config. The second names are TRL's.

    Args:
        config: a .json, .toml or .yaml file with any of these options; flags win.
        model: name or folder of a transformers model, or smollm2.
        model_revision: branch, tag or commit of a model by name.
        dtype: of the model's weights, such as bfloat16 or auto; by default float32.
        attn_implementation: as in `from_pretrained`.
        ref_model: the reference; by default the model itself as it is now.
        data: files, a folder, or one name for `datasets`, whose rows hold prompt, chosen, rejected or (KTO)
            prompt, completion, label: plain strings or chat messages.
        split: of a dataset by name.
        dataset_config: configuration of a dataset by name.
        dataset_streaming: read the rows of a dataset by name as they are needed, with --steps.
        eval_data: the same for evaluation, at the end or as --eval_strategy and --eval_steps say.
        eval_split: of a dataset by name.
        resume: go on from a checkpoint: the latest of --output_dir, or the one whose folder follows.
        lora: train a LoRA adapter on every linear layer but the head; --full trains all weights.
        lora_r: rank of the adapter.
        lora_alpha: scale of the adapter; by default twice the rank.
        lora_dropout: of the adapter, with --no_disable_dropout.
        lora_target_modules: which layers get an adapter.
        lora_target_parameters: which parameters get an adapter, by name.
        lora_modules_to_save: which modules are trained whole, beside the adapter.
        lora_task_type: for the adapter's configuration.
        use_rslora: divide lora_alpha by the root of the rank, not by the rank.
        use_dora: split updates into magnitude and direction (DoRA).
        load_in_8bit: quantize the model under the adapter to 8 bits (bitsandbytes).
        load_in_4bit: quantize the model under the adapter to 4 bits (bitsandbytes).
        bnb_4bit_quant_type: nf4 or fp4.
        use_bnb_nested_quant: quantize the constants of the quantization too.
        bnb_4bit_quant_storage: dtype of the storage of 4-bit weights.
    """

    _argument_group_name: ClassVar[str] = "the command"

    config: str | None = None
    model: str | None = field(default=None, metadata=also("model_name_or_path"))
    model_revision: str | None = None
    dtype: str | None = None
    attn_implementation: str | None = None
    ref_model: str | None = None
    data: list[str] | None = field(default=None, metadata=also("dataset_name"))
    split: str = field(default="train", metadata=also("dataset_train_split"))
    dataset_config: str | None = None
    dataset_streaming: bool = False
    eval_data: list[str] | None = None
    eval_split: str = field(default="test", metadata=also("dataset_test_split"))
    resume: str | None = field(default=None, metadata={"nargs": "?", "const": LATEST})
    lora: bool = field(default=True, metadata=also("use_peft"))
    lora_r: int = 16
    lora_alpha: int | None = None
    lora_dropout: float = 0.0
    lora_target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    lora_target_parameters: list[str] | None = None
    lora_modules_to_save: list[str] | None = None
    lora_task_type: str = "CAUSAL_LM"
    use_rslora: bool = False
    use_dora: bool = False
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"choices": ["fp4", "nf4"]})
    use_bnb_nested_quant: bool = False
    bnb_4bit_quant_storage: str | None = None


@documented
@dataclass
class CommandDefaults:
    """Fields of a config that have another default on the command line, or a short name.

    Args:
        output_dir: where checkpoints, model, metrics and curves go.
        per_device_train_batch_size: pairs (KTO: rows) that each device computes at a time.
        per_device_eval_batch_size: the same in evaluation; by default that of training.
        max_steps: number of optimizer steps, instead of --num_train_epochs.
        num_train_epochs: passes over the data.
        learning_rate: by default 1e-4 for LoRA and 1e-6 for full training.
        logging_steps: a line of the table every so many steps; below 1, a share of all steps.
        save_steps: a checkpoint every so many steps, and at the end; below 1, a share of all steps: by default
            after each tenth of the run. --save_strategy no for none.
        save_total_limit: how many checkpoints are kept, the newest.
        dataloader_pin_memory: by default where there is a GPU.
        disable_tqdm: no progress bar of the Trainer, as the table has one.
    """

    output_dir: str = "runs/train"
    per_device_train_batch_size: int = field(default=4, metadata=also("batch_size"))
    per_device_eval_batch_size: int | None = None
    max_steps: int = field(default=-1, metadata=also("steps"))
    num_train_epochs: float = field(default=1.0, metadata=also("epochs"))
    learning_rate: float | None = None
    logging_steps: float = 1
    save_steps: float = 0.1
    save_total_limit: int | None = 2
    dataloader_pin_memory: bool = torch.cuda.is_available()
    disable_tqdm: bool | None = True


LOSS_HELP = "dpo (sigmoid), kto, or the names that DPOConfig and KTOConfig know; kto and apo_zero_unpaired train KTO"


def flags_of(config: type[Config]) -> type:
    """The fields of a config as the command shows them."""
    several = issubclass(config, DPOConfig)
    loss_type = field(
        default_factory=lambda: ["dpo"] if several else "kto",
        metadata=also("loss", help=LOSS_HELP),
    )
    return dataclasses.make_dataclass(
        config.__name__,
        [("loss_type", list[str] if several else str, loss_type)],
        bases=(CommandDefaults, config),
    )


def parse(arguments: Sequence[str]) -> tuple[CommandOptions, Config]:
    """The options and the config that flags and a config file mean.

    Raises:
        ValueError: an entry or a flag that is no option; an option that is missing or out of its range.
        SystemExit: by argparse, for a flag with a wrong type.
    """
    arguments = with_underscores(arguments)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    first.add_argument("--loss_type", "--loss", dest="loss", nargs="+")
    known, _ = first.parse_known_args(arguments)
    entries = _entries(known.config)
    loss = known.loss or entries.get("loss_type") or entries.get("loss") or ["dpo"]
    losses = [loss] if isinstance(loss, str) else loss
    config = KTOConfig if set(losses) <= set(KTO_LOSSES) else DPOConfig

    kinds: Any = (CommandOptions, flags_of(config))
    parser = HfArgumentParser(
        kinds, prog="pyfast-dpo train", usage=USAGE, allow_abbrev=False, formatter_class=OptionHelp
    )
    names = _names(kinds)
    parser.set_defaults(**dict(_defaults(known.config, entries, names)))
    namespace, rest = parser.parse_known_args(arguments)
    if rest:
        raise ValueError(_unknown(rest, config, losses, names))
    given = vars(namespace)
    command = CommandOptions(**{f.name: given[f.name] for f in dataclasses.fields(CommandOptions)})
    for option in ("model", "data"):
        if not getattr(command, option):
            raise ValueError(f"--{option} is needed (pyfast-dpo train --help)")
    return command, _config(config, command, given)


class OptionHelp(argparse.ArgumentDefaultsHelpFormatter):
    """Each flag in one spelling, its value once, no word on defaults that are none."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        flags = [flag for flag in action.option_strings if "-" not in flag.lstrip("-")]
        value = "" if action.nargs == 0 else self._format_args(action, action.dest.upper())
        return f"{', '.join(flags)} {value}".rstrip()

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.nargs == 0 and action.const is False:
            return f"the opposite of --{action.dest}"
        return action.help if action.default is None else super()._get_help_string(action)


def with_underscores(arguments: Sequence[str]) -> list[str]:
    """`--max-length` means `--max_length`, and `--full` `--no_lora`."""
    spelled = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag.startswith("--"):
            flag = "--" + flag[2:].replace("-", "_")
        spelled.append(("--no_lora" if flag == "--full" else flag) + equals + value)
    return spelled


def _entries(path: str | None) -> dict[str, Any]:
    entries = {} if path is None else read_config(path)
    entries = {str(key).replace("-", "_"): value for key, value in entries.items()}
    full = entries.pop("full", None)
    if full is None:
        return entries
    if not isinstance(full, bool):
        raise ValueError(f"{path}: full must be true or false, got {full!r}")
    return {**entries, "lora": not full}


def _config(config: type[Config], command: CommandOptions, given: dict[str, Any]) -> Config:
    values = {f.name: given[f.name] for f in dataclasses.fields(config) if f.init}
    if isinstance(values["loss_type"], list):
        values["loss_type"] = [{"dpo": "sigmoid"}.get(n, n) for n in values["loss_type"]]
    complete(values, command.lora)
    if values["eval_steps"] is not None and command.eval_data and values["eval_strategy"] == "no":
        values["eval_strategy"] = "steps"
    return config(**values)


def complete(values: dict[str, Any], lora: bool) -> None:
    """Fills in what `CommandDefaults` leaves open, and checks how long the run is."""
    if values["learning_rate"] is None:
        values["learning_rate"] = 1e-4 if lora else 1e-6
    if values["per_device_eval_batch_size"] is None:
        values["per_device_eval_batch_size"] = values["per_device_train_batch_size"]
    if values["max_steps"] != -1 and values["max_steps"] < 1:
        raise ValueError(f"--max_steps must be at least 1, got {values['max_steps']}")
    if not values["num_train_epochs"] > 0:
        raise ValueError(f"--num_train_epochs must be positive, got {values['num_train_epochs']}")


# Names and types -------------------------------------------------------------------------------------------


def _names(kinds: Sequence[type]) -> dict[str, tuple[str, set[Any]]]:
    """Every name that a config file may use: (the field, what it may hold)."""
    names: dict[str, tuple[str, set[Any]]] = {}
    for kind in kinds:
        hints = typing.get_type_hints(kind)
        for each in dataclasses.fields(kind):
            held = {typing.get_origin(t) or t for t in typing.get_args(hints[each.name])}
            if not held or typing.get_origin(hints[each.name]) in (list, dict):
                held = {typing.get_origin(hints[each.name]) or hints[each.name]}
            for name in (each.name, *each.metadata.get("aliases", ())):
                names[name.removeprefix("--")] = (each.name, held)
    return names


def _defaults(
    path: str | None, entries: Mapping[str, Any], names: dict[str, tuple[str, set[Any]]]
) -> Iterator[tuple[str, Any]]:
    """(field, value) of every entry, with numbers as text, which argparse checks as it does a flag's."""
    for key, value in entries.items():
        if key not in names or key == "config":
            raise ValueError(f"{path}: {key!r} is not an option{_hint(key, names)}")
        name, held = names[key]
        given = type(value)
        if given in (int, float):
            value = str(value)
        elif given is str and list in held and str not in held:
            value = [value]
        elif given is not str and given not in held:
            expected = ", ".join(sorted(t.__name__ for t in held if t is not type(None)))
            raise ValueError(f"{path}: {key} must be {expected}, got {value!r}")
        yield name, value


def _unknown(
    rest: Sequence[str],
    config: type[Config],
    losses: Sequence[str],
    names: dict[str, tuple[str, set[Any]]],
) -> str:
    flag = next((word for word in rest if word.startswith("-")), rest[0]).partition("=")[0]
    other = KTOConfig if config is DPOConfig else DPOConfig
    if flag.removeprefix("--") in {f.name for f in dataclasses.fields(other)}:
        return f"{flag} is an option of {other.__name__}, got --loss {' '.join(losses)}"
    return f"{flag} is not an option{_hint(flag.removeprefix('--'), names)}"


def _hint(name: str, names: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    return f"; did you mean {close[0]}?" if close else "; see pyfast-dpo train --help"
