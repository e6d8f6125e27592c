"""The reference: a frozen copy, the base under an adapter, or a kept adapter."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from pyfast_dpo.trainers.adapters import (
    AdapterReference,
    adapter_in_use,
    adapters_off,
    as_it_came,
    is_adapted,
    refuse_prompt_learning,
    wrapped,
)


def with_reference(
    name: str,
    model: nn.Module,
    ref_model: nn.Module | None,
    peft_config: Any,
    *,
    dropout: bool,
    needed: bool,
    copied: bool,
) -> tuple[nn.Module, nn.Module | None, str | None]:
    """(policy, reference model or None, adapter of the policy that serves as the reference or None).

    A new adapter's reference is the model under it. An adapter that came with the model may be trained, so its
    present state is kept as a second, frozen adapter. Where that would not be the model as it was, and where there
    is no adapter, the reference is a frozen copy.

    Args:
        name: of the trainer, for errors and warnings.
        needed: False if nothing asks for a reference.
        copied: False if a model without adapters needs no copy, since its log-probs are computed before training.

    Raises:
        ValueError: an adapter that cannot be trained here, or whose reference cannot be had.

    Warns:
        UserWarning: an adapter makes a copy necessary.
    """
    found = AdapterReference()
    if peft_config is not None:
        model, found = wrapped(name, model, peft_config)
    elif is_adapted(model):
        for config in model.peft_config.values():  # type: ignore[operator]
            refuse_prompt_learning(config)
        if needed and ref_model is None:
            found = as_it_came(name, model)
    if not dropout:
        disable_dropout(model)
    if needed and ref_model is None:
        ref_model = found.model
        if copied and not is_adapted(model):
            ref_model = copy.deepcopy(model)
    if ref_model is not None:
        ref_model.requires_grad_(False).eval()
    return model, ref_model, found.adapter


def narrow_linear_layers(model: Any, dtype: torch.dtype) -> None:
    """Keeps the weights of a frozen model's linear layers in the dtype to which autocast casts them in every
    pass: the same results, half the memory. Not those of the lm_head, nor any that a module of another kind
    shares, nor a model with adapters."""
    if is_adapted(model):
        return
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if type(m) is nn.Linear and m is not head]
    others = [m for m in model.modules() if type(m) is not nn.Linear or m is head]
    shared = {id(p) for module in others for p in module.parameters(recurse=False)}
    for parameter in (p for module in linear for p in module.parameters()):
        if id(parameter) not in shared and parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(dtype)


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout probability to 0: of `nn.Dropout` modules and of attributes such as
    `attention_dropout`, which attention functions read."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if name.endswith("dropout") and isinstance(value, float):
                setattr(module, name, 0.0)


@contextlib.contextmanager
def as_reference(model: nn.Module, unwrapped: Any, adapter: str | None) -> Iterator[nn.Module]:
    """The policy's own module with its adapter off, or with the kept one in use, without dropout."""
    was_training = model.training
    model.eval()
    try:
        with contextlib.ExitStack() as stack:
            if adapter is not None:
                stack.enter_context(adapter_in_use(unwrapped, adapter))
            elif is_adapted(unwrapped):
                stack.enter_context(adapters_off(unwrapped))
            yield model
    finally:
        model.train(was_training)
