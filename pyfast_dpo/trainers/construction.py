"""What a trainer is made from: its arguments checked, models and tokenizers loaded by name."""

from __future__ import annotations

import copy
from typing import Any, Generic, TypeVar, overload

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from pyfast_dpo.data.templates import tokenizer_of
from pyfast_dpo.model.causal_lm import check_causal_lm, check_no_other_senses
from pyfast_dpo.trainers.options import CHECKPOINTING, PolicyConfig

LOADING = ("revision", "trust_remote_code", "token", "subfolder", "cache_dir", "local_files_only")
Config = TypeVar("Config", bound=PolicyConfig)


def causal_lm(
    name: str,
    model: str | PreTrainedModel | nn.Module,
    init_kwargs: dict[str, Any],
    quantization_config: Any,
) -> PreTrainedModel | nn.Module:
    """The model to train, loaded if it is given by name.

    Args:
        name: of the trainer, for errors.
        model: a model, or a name or path for `from_pretrained`.
        init_kwargs, quantization_config: for a model given by name.

    Raises:
        ValueError: a quantization_config for a model that is there already; a model without an lm_head.
    """
    if quantization_config is not None and not isinstance(model, str):
        raise ValueError(
            f"{name}: quantization_config is for a model given by name, got {type(model).__name__}"
        )
    if isinstance(model, str):
        of_configuration = {key: init_kwargs[key] for key in LOADING if key in init_kwargs}
        check_no_other_senses(name, AutoConfig.from_pretrained(model, **of_configuration))
        init = dict(init_kwargs)
        if quantization_config is not None:
            init["quantization_config"] = quantization_config
        model = load_model(model, init)
    check_causal_lm(name, model)
    return model


def load_model(name: str, init_kwargs: dict[str, Any] | None = None) -> PreTrainedModel:
    """A causal language model by name or path, in float32 unless `init_kwargs` says otherwise."""
    return AutoModelForCausalLM.from_pretrained(
        name, **{"dtype": torch.float32, **(init_kwargs or {})}
    )


def checkpointing_for(model: Any, args: Config) -> Config:
    """The options, without gradient checkpointing where it was left at its default and the model has none."""
    if not args.checkpointing_as_needed or getattr(model, "supports_gradient_checkpointing", True):
        return args
    args = copy.copy(args)
    setattr(args, CHECKPOINTING[0], False)
    return args


def use_pad_token(name: str, processing_class: PreTrainedTokenizerBase, token: str) -> None:
    """Lets the tokenizer pad with a token of its vocabulary, here and where it is saved."""
    tokenizer = tokenizer_of(processing_class)
    if token not in tokenizer.get_vocab():
        raise ValueError(f"{name}: pad_token must be a token of the tokenizer, got {token!r}")
    tokenizer.pad_token = token


def pad_token(processing_class: PreTrainedTokenizerBase, vocabulary: int) -> int:
    """Any token that has an embedding serves as padding, since masks come from lengths."""
    tokenizer = tokenizer_of(processing_class)
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None and token < vocabulary:
            return token
    return 0


Value = TypeVar("Value")


class OptionOf(Generic[Value]):
    """An attribute of a trainer that is an option of its `args`, read and written there."""

    def __init__(self, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, trainer: None, owner: Any) -> OptionOf[Value]: ...
    @overload
    def __get__(self, trainer: Any, owner: Any) -> Value: ...
    def __get__(self, trainer: Any, owner: Any) -> Any:
        return self if trainer is None else getattr(trainer.args, self._name)

    def __set__(self, trainer: Any, value: Value) -> None:
        setattr(trainer.args, self._name, value)
