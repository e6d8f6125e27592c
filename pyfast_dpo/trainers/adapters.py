"""The reference of a model with adapters: the model without them, their present state kept, or a frozen copy."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyfast_dpo.model.ways import HALF_TOLERANCE, TOLERANCES
from pyfast_dpo.ops.extras import require

KEPT = "reference"  # the name of a kept adapter, or the beginning of it
PROBE_TOKENS = 4


class AdapterReference(NamedTuple):
    """What stands for the reference; all None: the policy with its adapters off."""

    adapter: str | None = None  # a frozen adapter of the policy
    model: nn.Module | None = None  # a frozen copy


def is_adapted(model: Any) -> bool:
    """Whether it is a PEFT model, which can leave its adapters out."""
    return hasattr(model, "get_base_model")


def wrapped(name: str, model: nn.Module, peft_config: Any) -> tuple[nn.Module, AdapterReference]:
    """(the model under a new adapter, its reference: the model as it was).

    Raises:
        ValueError: the model has an adapter already; a kind of adapter that is not in the layers; one that changes
            what the model computes, with adapter and without.
    """
    if is_adapted(model):
        raise ValueError(
            "peft_config: the model already has an adapter; merge it first (merge_and_unload()) "
            "or leave peft_config out to train that adapter on"
        )
    refuse_prompt_learning(peft_config)
    before = _probe(model)
    model = require("peft", "peft_config").get_peft_model(model, peft_config)
    trained = _trained(model)
    with adapters_off(model):
        off = _probe(model)
        is_before = _equal(off, before)
        if is_before and not _made_by(trained, off):
            return model, AdapterReference()
        twin = copy.deepcopy(model) if is_before else None
    reason = "trains weights that are in use without the adapter, too"
    if twin is None:
        if not _equal(_probe(model), before):
            raise ValueError(
                f"{name}: peft_config: {type(peft_config).__name__} changes what the model computes, with the "
                "adapter and without it, so that the model as it was is gone; give it as ref_model"
            )
        twin = copy.deepcopy(model)
        reason = "changes the weights under the adapter"
    _tell(name, f"{type(peft_config).__name__} {reason}")
    return model, AdapterReference(model=twin)


def as_it_came(name: str, model: Any) -> AdapterReference:
    """The reference of a model that came with adapters, which may be trained: its present state."""
    active = list(model.base_model.active_adapters)
    before = _probe(model)
    kept = _kept_adapter(model, active[0]) if len(active) == 1 else None
    if kept is not None and before is not None:
        with adapter_in_use(model, kept):
            output = _probe(model)
        if not _equal(output, before) or _made_by(_trained(model), output):
            model.delete_adapter(kept)
            model.base_model.set_adapter(active)
            kept = None
    if kept is not None:
        return AdapterReference(adapter=kept)
    many = f"{len(active)} adapters at once" if len(active) > 1 else "this kind of adapter"
    _tell(name, f"{many} cannot be kept beside the trained state")
    return AdapterReference(model=copy.deepcopy(model))


def refuse_prompt_learning(config: Any) -> None:
    """Raises ValueError for what is no adapter in the layers."""
    if config.is_prompt_learning:
        raise ValueError(
            f"peft_config: {type(config).__name__} puts virtual tokens before the prompt, which the batches "
            "do not have; use an adapter in the layers, such as LoraConfig"
        )


@contextlib.contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """PEFT's own context, which leaves another warning and other weights trainable than it found."""
    with _flags_kept(model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Careful, disabling adapter layers")
        with model.disable_adapter():
            yield


@contextlib.contextmanager
def adapter_in_use(model: Any, name: str) -> Iterator[None]:
    """One frozen adapter instead of those that are active."""
    tuner = model.base_model
    active = list(tuner.active_adapters)
    with _flags_kept(model):
        tuner.set_adapter(name, inference_mode=True)
        try:
            yield
        finally:
            tuner.set_adapter(active if len(active) > 1 else active[0])


@contextlib.contextmanager
def _flags_kept(model: nn.Module) -> Iterator[None]:
    """PEFT makes all active adapters trainable when it switches, frozen ones too."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _kept_adapter(model: Any, active: str) -> str | None:
    """Adds a copy of the active adapter; None if PEFT has no place for a second one."""
    names = (KEPT, *(f"{KEPT}_{i}" for i in range(2, 100)))
    kept = next(name for name in names if name not in model.peft_config)
    config = copy.deepcopy(model.peft_config[active])
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # others look at the weights below, and change them
    with _flags_kept(model):
        try:
            model.add_adapter(kept, config)
        except (ValueError, NotImplementedError, TypeError):
            return None
        finally:
            model.base_model.set_adapter(active)
    state = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in state.items():
            if f".{kept}." in f"{name}.":
                parameter.copy_(state[f"{name}.".replace(f".{kept}.", f".{active}.")[:-1]])
                parameter.requires_grad_(False)
    return kept


def _probe(model: Any) -> Tensor | None:
    """Logits of a few tokens, without dropout; None on the meta device."""
    parameter = next(model.parameters())
    if parameter.device.type == "meta":
        return None
    tokens = torch.arange(1, PROBE_TOKENS + 1, device=parameter.device).unsqueeze(0)
    was_training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            return model(input_ids=tokens, use_cache=False).logits
    finally:
        model.train(was_training)


@torch.no_grad()
def _equal(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return True
    tolerance = TOLERANCES.get(second.dtype, HALF_TOLERANCE)
    return bool((first - second).norm() <= tolerance * second.norm())


def _trained(model: nn.Module) -> set[int]:
    return {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def _made_by(parameters: set[int], output: Tensor | None) -> bool:
    """Whether one of these weights, by their identities, has made the output: the leaves of its graph tell."""
    if output is None or output.grad_fn is None:
        return False
    nodes, seen = [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in parameters:
            return True
        nodes += [following for following, _ in node.next_functions if following is not None]
    return False


def _tell(name: str, reason: str) -> None:
    warnings.warn(
        f"{name}: a frozen copy of the whole model is the reference, which costs its memory, since {reason}",
        stacklevel=5,
    )
