"""`pyfast-dpo grpo`, `rloo`, `ppo`: a model learns from rewards of its own responses."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from transformers import HfArgumentParser

from pyfast_dpo.cli.console import friendly_errors
from pyfast_dpo.cli.models import loading, resolve_model
from pyfast_dpo.cli.options import CommandDefaults, OptionHelp, also, complete, with_underscores
from pyfast_dpo.cli.runs import add_table, finish, lora_config
from pyfast_dpo.data import load_rows
from pyfast_dpo.rewards import READY, reward_by_name
from pyfast_dpo.trainers import (
    GRPOConfig,
    GRPOTrainer,
    PPOConfig,
    PPOTrainer,
    RLOOConfig,
    RLOOTrainer,
)
from pyfast_dpo.trainers.flags import documented
from pyfast_dpo.trainers.online.base import OnlineTrainer
from pyfast_dpo.trainers.online.config import OnlineConfig

METHODS: dict[str, tuple[type[OnlineConfig], type[OnlineTrainer]]] = {
    "grpo": (GRPOConfig, GRPOTrainer),
    "rloo": (RLOOConfig, RLOOTrainer),
    "ppo": (PPOConfig, PPOTrainer),
}
NEEDED = ("model", "data", "reward")


@documented
@dataclass
class OnlineOptions:
    """What the commands take beside the fields of a config.

    Args:
        model: name or folder of a transformers model, or smollm2.
        dtype: of the model's weights, such as bfloat16 or auto; by default float32.
        data: files, a folder, or one name for `datasets`, whose rows hold prompt, a string or chat messages; other
            columns go to the rewards.
        split: of a dataset by name.
        eval_data: prompts for an evaluation at the end, or as --eval_strategy says.
        eval_split: of a dataset by name.
        reward: one or several of the ready rewards, or module:function of your own.
        lora: train a LoRA adapter on every linear layer but the head; --full trains all weights.
        lora_r: rank of the adapter.
        lora_alpha: scale of the adapter; by default twice the rank.
    """

    _argument_group_name: ClassVar[str] = "the command"

    model: str | None = field(default=None, metadata=also("model_name_or_path"))
    dtype: str | None = None
    data: list[str] | None = field(default=None, metadata=also("dataset_name"))
    split: str = field(default="train", metadata=also("dataset_train_split"))
    eval_data: list[str] | None = None
    eval_split: str = field(default="test", metadata=also("dataset_test_split"))
    reward: list[str] | None = field(default=None, metadata=also("reward_funcs"))
    lora: bool = field(default=True, metadata=also("use_peft"))
    lora_r: int = 16
    lora_alpha: int | None = None


@documented
@dataclass
class OnlineDefaults(CommandDefaults):
    """Fields of a config that have another default on the command line.

    Args:
        output_dir: where checkpoints, model, metrics and curves go.
        per_device_train_batch_size: responses that each device trains on at a time; by default 4 groups.
    """

    output_dir: str = "runs/online"
    per_device_train_batch_size: int | None = field(  # type: ignore[assignment]
        default=None, metadata=also("batch_size")
    )


def parse(method: str, arguments: Sequence[str]) -> tuple[OnlineOptions, OnlineConfig]:
    """The options and the config that flags mean.

    Raises:
        ValueError: a flag that is no option; one that is missing or out of its range.
        SystemExit: by argparse, for a flag with a wrong type.
    """
    kind = METHODS[method][0]
    flags = dataclasses.make_dataclass(kind.__name__, [], bases=(OnlineDefaults, kind))
    parser = HfArgumentParser(
        (OnlineOptions, flags),  # type: ignore[arg-type]
        prog=f"pyfast-dpo {method}",
        usage=f"pyfast-dpo {method} --model NAME --data FILE [FILE ...] --reward NAME [options]; --help lists them all",
        allow_abbrev=False,
        formatter_class=OptionHelp,
        epilog=f"ready rewards: {', '.join(READY)}",
    )
    namespace, rest = parser.parse_known_args(with_underscores(arguments))
    if rest:
        flag = next((word for word in rest if word.startswith("-")), rest[0])
        raise ValueError(f"{flag} is not an option; see pyfast-dpo {method} --help")
    given = vars(namespace)
    command = OnlineOptions(**{f.name: given[f.name] for f in dataclasses.fields(OnlineOptions)})
    for option in NEEDED:
        if not getattr(command, option):
            raise ValueError(f"--{option} is needed (pyfast-dpo {method} --help)")
    return command, _config(kind, command, given)


def _config(
    kind: type[OnlineConfig], command: OnlineOptions, given: dict[str, Any]
) -> OnlineConfig:
    values = {f.name: given[f.name] for f in dataclasses.fields(kind) if f.init}
    values["per_device_train_batch_size"] = (
        values["per_device_train_batch_size"] or 4 * values["num_generations"]
    )
    complete(values, command.lora)
    if command.dtype is not None:
        values["model_init_kwargs"] = {
            **(values["model_init_kwargs"] or {}),
            "dtype": command.dtype,
        }
    return kind(**values)


def run(method: str, arguments: Sequence[str]) -> int:
    """Trains; leaves model, checkpoints, metrics.json and curves.png in the output folder."""
    with friendly_errors():
        command, config = parse(method, arguments)
        assert command.data is not None and command.reward is not None
        rewards = [reward_by_name(name) for name in command.reward]
        rows = load_rows(command.data, split=command.split)
        eval_rows = None
        if command.eval_data is not None:
            eval_rows = load_rows(command.eval_data, split=command.eval_split)
        with loading(str(command.model)):
            trainer = METHODS[method][1](
                model=resolve_model(str(command.model)),
                reward_funcs=rewards,
                args=config,
                train_dataset=rows,
                eval_dataset=eval_rows,
                peft_config=lora_config(command.lora_r, command.lora_alpha)
                if command.lora
                else None,
            )
    table = add_table(trainer)
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    if eval_rows is not None:
        trainer.evaluate()
    report = {
        "options": {**asdict(command), **config.to_dict()},
        "seconds_per_step": table.seconds_per_step,
    }
    finish(trainer, report, title=f"{method} of {command.model}: {', '.join(command.reward)}")
    return 0
