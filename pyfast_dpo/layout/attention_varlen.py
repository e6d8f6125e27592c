"""Attention over a row of prompts and responses in one call: torch's kernel for sequences of any lengths.

Every prompt with its first response is one sequence. Every other response is one whose keys are those of the
prompt again, then its own; the kernel aligns the causal mask with the end of the keys. It takes half types on
CUDA, and what an SDPA call a response costs there is mostly the launches.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from typing import Any

import torch
from torch import Tensor

from pyfast_dpo.layout.attention_blocks import Scores, attend_by_blocks
from pyfast_dpo.layout.shared_prompt import Group, Sequences, SharedPromptLayout

# Of the check: the norm of a difference over the norm. bfloat16 rounds by 2^-9.
TOLERANCE = 0.02
MAX_HEAD_DIMENSION = 256


def takes(query: Tensor, key: Tensor, scores: Scores) -> bool:
    """Whether one call can serve; checked once for every kind of call against the blocks, with a warning
    where it should and does not."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and scores.softcap is None
        and scores.dropout == 0.0
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= MAX_HEAD_DIMENSION
        and kernel() is not None
        and _agrees(query.device, query.dtype, query.shape[1], key.shape[1], query.shape[-1], scores)
    )  # fmt: skip


@functools.cache
def kernel() -> Any:
    """`torch.nn.attention.varlen.varlen_attn`, or None where torch has none with a window (before 2.11)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size"} <= known.keys() else None


@functools.cache  # every layer asks
def _asks_for_groups(varlen_attn: Any) -> bool:
    """Whether it must be told of grouped heads; before torch 2.12 it saw for itself."""
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def attend_at_once(
    query: Tensor, key: Tensor, value: Tensor, layout: SharedPromptLayout, scores: Scores
) -> Tensor:
    """Query `[1, heads, T, D]`, key and value `[1, key heads, T, D]` -> `[1, T, heads, D]`."""
    sequences = layout.sequences(query.device)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    varlen_attn = kernel()
    options: dict[str, Any] = {}
    if _asks_for_groups(varlen_attn):
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    output = varlen_attn(
        query,
        _RepeatPrompts.apply(key, sequences),
        _RepeatPrompts.apply(value, sequences),
        sequences.query_ends,
        sequences.key_ends,
        sequences.max_queries,
        sequences.max_keys,
        scale=scores.scaling,
        # Positions before the query; -1: all of them. None after it.
        window_size=(-1 if scores.window is None else scores.window - 1, 0),
        **options,
    )
    return output.unsqueeze(0)


class _RepeatPrompts(torch.autograd.Function):
    """`[T, ...]` -> `[K, ...]`: what `Sequences.keys` says. The gradients of a prompt are added in the order of
    its responses, so the sum has the same bits every time; index_select's own would add by atomics."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, sequences: Sequences) -> Tensor:
        ctx.sequences = sequences
        return values.index_select(0, sequences.keys)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        sequences = ctx.sequences
        total = gradient.index_select(0, sequences.first_places)
        for places, positions in sequences.repeats:
            total.index_add_(0, positions, gradient.index_select(0, places))
        return total, None


@functools.cache
def _agrees(
    device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, width: int, scores: Scores
) -> bool:
    """Whether one call gives outputs and gradients of the blocks on a small row."""
    window = None if scores.window is None else 3  # shorter than the prompt
    small = scores._replace(window=window)
    layout = SharedPromptLayout((Group(5, (2, 4, 3)), Group(1, (2,)), Group(0, (3, 1))))

    def inputs(
        heads: int, phase: float
    ) -> Tensor:  # takes nothing from the generator of random numbers
        count = heads * layout.tokens * width
        values = torch.sin(torch.arange(count, device=device, dtype=torch.float32) * 1.7 + phase)
        return values.view(1, heads, layout.tokens, width).to(dtype).requires_grad_()

    def results(attend: Any) -> list[Tensor]:
        leaves = inputs(heads, 0.1), inputs(key_heads, 0.5), inputs(key_heads, 0.9)
        output = attend(*leaves, layout, small)
        weights = torch.sin(torch.arange(output.numel(), device=device) * 0.3).view_as(output)
        return [output, *torch.autograd.grad((output * weights).sum(), leaves)]

    try:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            pairs = zip(results(attend_at_once), results(attend_by_blocks), strict=True)
            differences = [
                (ours.detach().float() - theirs.detach().float()).norm()
                / theirs.detach().float().norm()
                for ours, theirs in pairs
            ]
        difference = float(torch.stack(differences).max())  # NaN if there is one
        reason = f"its result differs by {difference:.2g} of its norm"
    except Exception as error:  # whatever the kernel raises, the blocks remain
        difference, reason = float("inf"), f"{type(error).__name__}: {error}"
    if difference <= TOLERANCE:
        return True
    warnings.warn(
        f"shared_prompt_attention: one attention call a response instead of one a layer, since torch's "
        f"variable-length attention does not serve {dtype} with {heads} heads of {width} here ({reason})",
        stacklevel=2,
    )
    return False
