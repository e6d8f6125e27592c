"""Attention over a row of prompts and responses, for any model that uses transformers' attention registry."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyfast_dpo.layout import attention_cpu, attention_varlen
from pyfast_dpo.layout.attention_blocks import Scores, attend_by_blocks
from pyfast_dpo.layout.shared_prompt import SharedPromptLayout
from pyfast_dpo.ops.checks import check_positive, check_same_device, check_tensor, describe
from pyfast_dpo.ops.dispatch import is_autocast_enabled

PREFIX = "shared_prompt_over_"  # then the implementation that serves every call without a layout


def use_shared_prompt_attention(model: Any) -> Callable[[], None]:
    """Makes a `transformers` model understand the keyword `shared_prompt_layout` in its call.

    With it, the model's attention keeps the responses of a row apart; pass `position_ids` from
    `SharedPromptLayout.positions()` and `attention_mask=no_mask(...)`. Calls without it run the
    implementation that the model had.

    Returns:
        A function that gives the model its implementation back.

    Raises:
        ValueError: the model does not take its attention from the registry.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    original = model.config._attn_implementation
    if original.startswith(PREFIX):
        return lambda: None
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(
            f"{type(model).__name__} does not take its attention function from transformers' registry"
        )
    name = PREFIX + original
    AttentionInterface.register(name, shared_prompt_attention)
    masks = AttentionMaskInterface()
    if original in masks:
        AttentionMaskInterface.register(name, partial(_make_mask, masks[original]))
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise ValueError(
            f"{type(model).__name__} does not let its attention implementation be changed"
        )
    return partial(model.set_attn_implementation, original)


def takes_shared_prompts(model: Any) -> bool:
    """Whether `use_shared_prompt_attention` is in force."""
    return model.config._attn_implementation.startswith(PREFIX)


class Windows:
    """Sees in a model's calls without a layout where attention is told of another window, or chunk, than its mask
    applies: a row of shared prompts has no mask, and goes by what attention is told.

    Attributes:
        mismatches: (positions of the mask's window, of attention's), None for no window.
    """

    def __init__(self) -> None:
        self.mismatches: set[tuple[int | None, int | None]] = set()
        self._masks: dict[int, tuple[Any, int | None]] = {}  # by their memory, which the mask keeps

    def see_mask(self, mask: Any, window: int | None) -> None:
        self._masks[_place(mask)] = mask, window

    def see_attention(self, mask: Any, window: int | None) -> None:
        # A mask of two dimensions says what is padding; then the kernel applies the window, as it is told.
        if _place(mask) in self._masks and getattr(mask, "ndim", None) != 2:
            _, applied = self._masks[_place(mask)]
            if applied != window:
                self.mismatches.add((applied, window))


def _place(mask: Any) -> int:
    """Slices of a mask are at the same place."""
    return mask.untyped_storage().data_ptr() if type(mask) is Tensor else id(mask)


_observed: ContextVar[Windows | None] = ContextVar("observed", default=None)


@contextlib.contextmanager
def observed_windows() -> Iterator[Windows]:
    """Sees the windows of the calls in its block, of a model with `use_shared_prompt_attention`."""
    windows = Windows()
    token = _observed.set(windows)
    try:
        yield windows
    finally:
        _observed.reset(token)


def _make_mask(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    mask = original(*args, **kwargs)
    windows = _observed.get()
    if windows is not None and mask is not None:
        windows.see_mask(mask, kwargs.get("local_size"))
    return mask


def no_mask(device: torch.device) -> Tensor:
    """An attention mask of four dimensions: models hand it on as it is, and `shared_prompt_attention`
    does not read it. Without a mask they would build one of [T, T] from the positions."""
    return torch.zeros(1, 1, 1, 1, device=device)


def shared_prompt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    shared_prompt_layout: SharedPromptLayout | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention function of the registry: query `[1, heads, T, D]`, key and value `[1, key heads, T, D]`.

    Returns `[1, T, heads, D]`. No score between two responses, or between two groups, is computed.

    Raises:
        ValueError: more than one row, another length than the layout's, or attention that it does not know
            (sinks, a bias of positions, a mask that the model made).
    """
    if shared_prompt_layout is None:
        windows = _observed.get()
        if windows is not None:
            windows.see_attention(attention_mask, sliding_window)
        arguments = {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window}
        if softcap is not None:
            arguments["softcap"] = softcap
        return _original(module)(
            module, query, key, value, attention_mask, **arguments, **options
        )  # fmt: skip
    for name in ("s_aux", "position_bias"):
        if options.get(name) is not None:
            raise ValueError(f"shared_prompt_attention: {name} is not supported")
    if attention_mask is not None and attention_mask.numel() != 1:
        raise ValueError(
            "shared_prompt_attention: attention_mask must be that of no_mask, got one of shape "
            f"{list(attention_mask.shape)} that the model has made"
        )
    scores = Scores(scaling, dropout, sliding_window, softcap)
    return _attend(query, key, value, shared_prompt_layout, scores), None


@torch.compiler.disable  # lengths differ in every batch, and the kernels are ours anyway
def _attend(
    query: Tensor, key: Tensor, value: Tensor, layout: SharedPromptLayout, scores: Scores
) -> Tensor:
    _check_heads(query, key, value)
    if query.shape[0] != 1 or query.shape[2] != layout.tokens:
        raise ValueError(
            f"shared_prompt_attention: query must be one row of {layout.tokens} tokens, "
            f"got {list(query.shape)}"
        )
    for name, number in (("scaling", scores.scaling), ("softcap", scores.softcap)):
        if number is not None:
            check_positive("shared_prompt_attention", name, number)
    if scores.window is not None and (
        type(scores.window) is not int or not 1 <= scores.window < 2**63
    ):
        raise ValueError(
            f"shared_prompt_attention: sliding_window must be a positive int or None, got {scores.window!r}"
        )
    if attention_cpu.takes(query, key, value, scores):
        attend = attention_cpu.attend_on_cpu
    elif attention_varlen.takes(query, key, scores):
        attend = attention_varlen.attend_at_once
    else:
        attend = attend_by_blocks
    return attend(query, key, value, layout, scores)


def _check_heads(query: object, key: object, value: object) -> None:
    """Shapes, devices and dtypes that go together; those of the layout are checked beside it."""
    function = "shared_prompt_attention"
    check_tensor(function, "query", query)
    assert isinstance(query, Tensor)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(function, name, tensor)
        assert isinstance(tensor, Tensor)
        if tensor.dim() != 4 or not tensor.is_floating_point() or tensor.is_sparse:
            raise ValueError(
                f"{function}: {name} must be floating point [1, heads, T, D], got {describe(tensor)}"
            )
        check_same_device(function, "query", query, name, tensor)
        if tensor.dtype != query.dtype and not is_autocast_enabled(query.device):
            raise TypeError(
                f"{function}: {name} must have the dtype of query, {query.dtype}, got {describe(tensor)}"
            )
    assert isinstance(key, Tensor) and isinstance(value, Tensor)
    heads, key_heads = query.shape[1], key.shape[1]
    tokens, width = query.shape[2:]
    fits = key_heads > 0 and heads % key_heads == 0 and width == key.shape[3]
    if not fits or key.shape[:3] != (query.shape[0], key_heads, tokens):
        raise ValueError(
            f"{function}: key must have the tokens and the width of query, and heads that divide its heads, got "
            f"{describe(key)} for {describe(query)}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"{function}: value must have the heads and tokens of key, got {describe(value)} for {describe(key)}"
        )


def _original(module: Any) -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = module.config._attn_implementation.removeprefix(PREFIX)
    if name == "eager":  # not in the registry: every model file has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]
