"""The reference: a frozen copy, the base under an adapter, or a kept adapter."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from pyfast_dpo.ops.extras import require

REFERENCE_ADAPTER = "reference"


def with_reference(
    model: nn.Module, ref_model: nn.Module | None, peft_config: Any, *, dropout: bool, copied: bool
) -> tuple[nn.Module, nn.Module | None, str | None]:
    """(policy, reference model or None, adapter that serves as the reference or None).

    A new adapter's reference is the base model under it. An adapter that came with the model may be
    trained, so its present state is kept as a second, frozen adapter. Everything else needs a second model,
    unless `copied` says that nobody will ask for it.
    """
    reference_adapter = None
    has_adapter = hasattr(model, "peft_config")
    if peft_config is not None:
        if has_adapter:
            raise ValueError(
                "peft_config: the model already has an adapter; merge it first (merge_and_unload()) "
                "or leave peft_config out to train that adapter on"
            )
        model = require("peft", "peft_config").get_peft_model(model, peft_config)
    elif has_adapter and ref_model is None:
        reference_adapter = _copy_adapter(model)
    active = getattr(model, "active_peft_config", None)
    if active is not None and active.is_prompt_learning:
        raise ValueError(
            f"peft_config: {type(active).__name__} puts virtual tokens before the prompt, which the batches "
            "do not have; use an adapter in the layers, such as LoraConfig"
        )
    if not dropout:
        disable_dropout(model)
    if ref_model is None and copied and not hasattr(model, "peft_config"):
        ref_model = copy.deepcopy(model)
    if ref_model is not None:
        ref_model.requires_grad_(False).eval()
    return model, ref_model, reference_adapter


def narrow_linear_layers(model: Any, dtype: torch.dtype) -> None:
    """Keeps the weights of a frozen model's linear layers in the dtype to which autocast casts them in every
    pass: the same results, half the memory. Not those of the lm_head, nor any that a module of another kind
    shares."""
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
                stack.enter_context(_adapter_in_use(unwrapped, adapter))
            elif hasattr(unwrapped, "peft_config"):
                stack.enter_context(unwrapped.disable_adapter())
            yield model
    finally:
        model.train(was_training)


@contextlib.contextmanager
def _adapter_in_use(model: Any, name: str) -> Iterator[None]:
    active = model.active_adapter
    model.set_adapter(name, inference_mode=True)
    try:
        yield
    finally:
        model.set_adapter(active)


def _copy_adapter(model: Any) -> str:
    active = model.active_adapter
    model.add_adapter(REFERENCE_ADAPTER, model.peft_config[active])
    state = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in state.items():
            if f".{REFERENCE_ADAPTER}." in name:
                parameter.copy_(state[name.replace(f".{REFERENCE_ADAPTER}.", f".{active}.")])
                parameter.requires_grad_(False)
    model.set_adapter(active)
    return REFERENCE_ADAPTER
