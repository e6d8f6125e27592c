"""The options of `pyfast-dpo train`: flags, and a config file that holds the same flags."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyfast_dpo.losses.table import PAIR_LOSS_NAMES
from pyfast_dpo.ops.extras import require

LOSSES = ("dpo", "kto", *PAIR_LOSS_NAMES)  # dpo is sigmoid


def add_train_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--config",
        metavar="FILE",
        help="a .json, .toml or .yaml file with these options; flags win",
    )

    group = parser.add_argument_group("model and data")
    add = group.add_argument
    add("--model", required=True, help="name or path of a transformers model, or smollm2")
    add("--ref_model", help="reference model; by default the model itself as it is now")
    add(
        "--data",
        nargs="+",
        required=True,
        help="JSONL files or one `datasets` name, with prompt, chosen, rejected or (KTO) prompt, "
        "completion, label; plain strings or chat messages",
    )
    add("--eval_data", nargs="+", help="the same, for evaluation")
    add("--split", default="train", help="split of a `datasets` name (default: %(default)s)")
    add("--eval_split", default="test", help="the same for --eval_data (default: %(default)s)")
    add(
        "--max_length",
        type=positive_int,
        default=1024,
        help="tokens of prompt + response (%(default)s)",
    )
    add("--output_dir", default="runs/train", help="checkpoint, metrics, curves (%(default)s)")

    group = parser.add_argument_group("loss")
    add = group.add_argument
    add(
        "--loss", "--loss_type", choices=LOSSES, metavar="NAME", default="dpo",
        help=f"one of {', '.join(LOSSES)} (default: %(default)s)",
    )  # fmt: skip
    add("--beta", type=float, default=0.1, help="pull to the reference (default: %(default)s)")
    add("--label_smoothing", type=float, help="losses on pairs: assumed share of flipped ones")
    add("--desirable_weight", type=float, help="KTO: weight of the desirable rows")
    add("--undesirable_weight", type=float, help="KTO: weight of the undesirable rows")

    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--lora", dest="tuning", action="store_const", const="lora", help="train a LoRA adapter")
    add("--full", dest="tuning", action="store_const", const="full", help="train all weights")
    parser.set_defaults(tuning="lora")
    add(
        "--lora_r", type=positive_int, default=16, help="rank of the adapter (default: %(default)s)"
    )
    add(
        "--learning_rate",
        type=positive_float,
        help="default: 1e-4 for LoRA, 1e-6 for full training",
    )
    add(
        "--batch_size",
        type=positive_int,
        default=4,
        help="pairs (KTO: rows) a step (default: %(default)s)",
    )
    add("--gradient_accumulation_steps", type=positive_int, default=1, help="default: %(default)s")
    add("--epochs", type=positive_float, default=1.0, help="default: %(default)s")
    add("--steps", type=positive_int, help="number of optimizer steps, instead of --epochs")
    add("--eval_steps", type=positive_int, help="evaluate every so many steps, not only at the end")
    add("--logging_steps", type=positive_int, default=1, help="default: %(default)s")
    add("--seed", type=int, default=42, help="default: %(default)s")
    add("--bf16", action="store_true", help="bfloat16 autocast (default: where CUDA supports it)")
    add(
        "--gradient_checkpointing",
        action="store_true",
        default=None,
        help="recompute every layer (default: those that memory does not hold)",
    )


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
    return value


def with_underscores(arguments: Sequence[str]) -> list[str]:
    """`--max-length` means `--max_length`."""
    spelled = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag.startswith("--"):
            flag = "--" + flag[2:].replace("-", "_")
        spelled.append(flag + equals + value)
    return spelled


def with_config_file(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> list[str]:
    """The arguments with those of `--config` before them, so that flags win and argparse checks both.

    Raises:
        ValueError: a file that cannot be read, or an entry that is no option.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(arguments)[0].config
    if path is None:
        return list(arguments)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    switches = {
        flag for action in parser._actions if action.nargs == 0 for flag in action.option_strings
    }
    config_arguments: list[str] = []
    for key, value in _read_config(Path(path)).items():
        flag = "--" + str(key).replace("-", "_")
        if flag not in flags or flag in ("--config", "--help"):
            known = sorted(f.removeprefix("--") for f in flags - {"--config", "--help", "-h"})
            raise ValueError(
                f"{path}: {key!r} is not an option; the options are {', '.join(known)}"
            )
        if flag in switches:
            if not isinstance(value, bool):
                raise ValueError(f"{path}: {key} must be true or false, got {value!r}")
            config_arguments += [flag] if value else []
        elif isinstance(value, list):
            config_arguments += [flag, *map(str, value)]
        elif isinstance(value, str | int | float) and not isinstance(value, bool):
            config_arguments.append(f"{flag}={value}")
        else:
            raise ValueError(f"{path}: {key} must be a number, a string or a list, got {value!r}")
    return config_arguments + list(arguments)


def _read_config(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".json":
            config = json.loads(text)
        elif path.suffix == ".toml":
            config = _toml().loads(text)
        elif path.suffix in (".yaml", ".yml"):
            config = require("yaml", "a .yaml config file").safe_load(text)
        else:
            raise ValueError("must end in .json, .toml or .yaml")
    except ImportError:
        raise
    except Exception as error:  # each parser has its own
        raise ValueError(f"--config {path}: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"--config {path}: must hold a mapping, got {type(config).__name__}")
    return config


def _toml() -> Any:
    try:
        return importlib.import_module("tomllib")
    except ImportError:  # Python 3.10
        return require("tomli", "a .toml config file on Python 3.10")
