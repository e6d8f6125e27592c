"""The reference: a frozen copy, the base under an adapter, a kept adapter, or log-probs computed once."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyfast_dpo.data.cache import cache_folder
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


# --- computed once ----------------------------------------------------------------------------------


def reference_key(model: nn.Module, examples: Iterable[dict[str, Any]], settings: str) -> str:
    """A name for the log-probs that this model gives to these examples: changes with any of them. Of a PEFT
    model only what stays as it is counts: the base, and an adapter that is kept as the reference."""
    adapted = hasattr(model, "peft_config")
    trained = {name for name, p in model.named_parameters() if adapted and p.requires_grad}
    digest = hashlib.sha256(settings.encode())
    for name, value in model.state_dict().items():
        if name not in trained:
            digest.update(name.encode())
            digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    for example in examples:
        for name, value in example.items():
            if name.endswith("_ids"):
                digest.update(np.asarray(value, dtype=np.int32).tobytes() + b"|")
    return digest.hexdigest()[:32]


def computed_once(
    key: str,
    examples: Sequence[dict[str, Any]],
    columns: tuple[str, ...],
    batch_size: int,
    compute: Callable[[list[dict[str, Any]]], Tensor],
    *,
    name: str,
    rank: int = 0,
    world: int = 1,
) -> np.ndarray:
    """Fills and returns `[N, columns]` float32 from the cache, computing what is not there yet.

    The file is written as it goes, so that a run that was killed goes on where it was. Each process
    computes and keeps its own share, the examples rank, rank + world, ...; those of others stay NaN.

    Args:
        key: from `reference_key`.
        compute: log-probs `[n, columns]` of n examples.
        name: of the dataset, for the progress bar.
    """
    folder = cache_folder() / "reference_logps"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key}-{rank}of{world}.npy"
    table = _open_table(path, (len(examples), len(columns)))
    mine = range(rank, len(examples), world)
    missing = [i for i in mine if np.isnan(table[i]).any()]
    tqdm = require("tqdm", "the progress bar").tqdm
    bar = tqdm(total=len(missing), desc=f"reference log-probs of {name}", disable=rank > 0)
    for start in range(0, len(missing), batch_size):
        part = missing[start : start + batch_size]
        table[part] = compute([examples[i] for i in part]).cpu().numpy()
        table.flush()
        bar.update(len(part))
    bar.close()
    return np.array(table)


def _open_table(path: Path, shape: tuple[int, int]) -> np.memmap:
    if path.exists():
        try:
            table = np.lib.format.open_memmap(path, mode="r+")
            if table.shape == shape and table.dtype == np.float32:
                return table
        except ValueError:
            pass  # cut off while it was created
    table = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    table[:] = np.nan
    return table
