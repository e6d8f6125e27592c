"""What the linear functions check of their inputs, and what autocast makes of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from pyfast_dpo.logprobs.head import Head
from pyfast_dpo.logprobs.rows import CompletionRows
from pyfast_dpo.ops import dispatch
from pyfast_dpo.ops.checks import (
    check_constants,
    check_label_options,
    check_labels_in_range,
    check_positive,
    check_same_device,
    check_tensor,
    describe,
)
from pyfast_dpo.ops.dispatch import is_autocast_enabled
from pyfast_dpo.ops.dtypes import LOGITS_DTYPES

Function = TypeVar("Function", bound=Callable[..., Any])


def outside_graphs(function: Function) -> Function:
    """Under torch.compile the function runs as it is, between two graphs: a pass walks chunks whose number
    depends on the batch, and calls the user's loss. Not torch.compiler.disable at once: that imports the
    compiler, which takes as long as importing torch."""

    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*arguments, **options)
        return function(*arguments, **options)

    return cast(Function, run)


def checked_head(
    function: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
) -> Head:
    for name, value in (("hidden", hidden), ("weight", weight)):
        check_tensor(function, name, value)
    if type(weight).__name__ == "DTensor":
        raise TypeError(
            f"{function}: weight is a sharded DTensor; pass weight.full_tensor(), or compute the loss inside "
            "the forward of the module that FSDP wraps, where it has gathered the weight, or shard over the "
            "vocabulary with pyfast_dpo.distributed"
        )
    if hidden.dtype not in LOGITS_DTYPES:
        raise TypeError(
            f"{function}: hidden must be float64, float32, bfloat16 or float16, got {describe(hidden)}"
        )
    if not weight.is_floating_point():
        raise TypeError(
            f"{function}: weight must be floating point; dequantize a quantized lm_head first, "
            f"got {describe(weight)}"
        )
    autocast = is_autocast_enabled(hidden.device)
    parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    for name, value in parameters.items():
        check_tensor(function, name, value)
        if value.dtype != hidden.dtype and not autocast:
            raise TypeError(
                f"{function}: {name} must have the dtype of hidden, {hidden.dtype}, got {describe(value)}"
            )
        check_same_device(function, "hidden", hidden, name, value)
    if (
        hidden.dim() < 2
        or weight.dim() != 2
        or weight.shape[1] != hidden.shape[-1]
        or 0 in weight.shape
    ):
        raise ValueError(
            f"{function}: hidden must have shape [..., T, H] and weight [V, H] with V, H >= 1, "
            f"got {describe(hidden)} and {describe(weight)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{function}: bias must have shape [{weight.shape[0]}], got {describe(bias)}"
        )
    if softcap is not None:
        check_positive(function, "softcap", softcap)
    check_positive(function, "logit_scale", logit_scale)
    return Head(weight, bias, float(logit_scale), None if softcap is None else float(softcap))


def check_labels_or_rows(
    function: str, hidden: Tensor, labels: Tensor | None, rows: CompletionRows | None
) -> None:
    if (labels is None) == (rows is None):
        raise ValueError(
            f"{function}: pass either labels or rows, got {'neither' if rows is None else 'both'}"
        )
    if rows is not None:
        if not isinstance(rows, CompletionRows):
            raise TypeError(f"{function}: rows must be CompletionRows, got {describe(rows)}")
        check_same_device(function, "hidden", hidden, "rows.index", rows.index)
        return
    assert labels is not None
    check_tensor(function, "labels", labels)
    if labels.dtype != torch.int64:
        raise TypeError(f"{function}: labels must be int64, got {describe(labels)}")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{function}: labels must have shape {list(hidden.shape[:-1])}, got {describe(labels)}"
        )
    check_same_device(function, "hidden", hidden, "labels", labels)


def completion_rows(
    function: str,
    hidden: Tensor,
    vocab: int | None,
    labels: Tensor | None,
    rows: CompletionRows | None,
    shift: bool,
    ignore_index: int,
    validate: bool | None,
) -> CompletionRows:
    """The rows that were given, or those of the labels; checked against hidden and the vocabulary.

    Without `validate`, on CUDA, or where no process knows the whole vocabulary (None), a target outside of it
    makes its row NaN.
    """
    check_label_options(function, shift, ignore_index, validate)
    validate = bool(validate) or not dispatch.on_gpu(hidden)  # elsewhere nothing waits for a device
    if rows is None:
        assert labels is not None
        if validate and vocab is not None:
            check_labels_in_range(function, labels, vocab, ignore_index, shift)
        return CompletionRows.from_labels(labels, shift=shift, ignore_index=ignore_index)
    if validate and rows.index.numel():
        states = hidden.shape[:-1].numel()
        for name, values, end in (("index", rows.index, states), ("targets", rows.targets, vocab)):
            if end is None:
                continue
            low, high = (int(t) for t in values.aminmax())
            if low < 0 or high >= end:
                raise ValueError(
                    f"{function}: rows.{name} must be in [0, {end}), got {low} to {high}"
                )
        if tuple(rows.counts.tolist()) != rows.lengths:
            raise ValueError(
                f"{function}: rows.counts must equal rows.lengths, got {rows.counts.tolist()} "
                f"and {list(rows.lengths)}"
            )
    return rows


def check_row_weights(function: str, rows: CompletionRows, row_weights: Tensor | None) -> None:
    if row_weights is None:
        return
    check_tensor(function, "row_weights", row_weights)
    if not row_weights.is_floating_point():
        raise TypeError(
            f"{function}: row_weights must be floating point, got {describe(row_weights)}"
        )
    if row_weights.shape != rows.index.shape:
        raise ValueError(
            f"{function}: row_weights must have shape {list(rows.index.shape)}, one a scored row, "
            f"got {describe(row_weights)}"
        )
    check_same_device(function, "rows.index", rows.index, "row_weights", row_weights)
    check_constants(function, row_weights=row_weights)


def under_autocast(hidden: Tensor) -> Tensor:
    """What autocast would do to a linear layer's input; `Head.of` does it to the parameters."""
    device = hidden.device.type
    if not is_autocast_enabled(hidden.device) or hidden.dtype == torch.float64:
        return hidden
    return hidden.to(torch.get_autocast_dtype(device))


# On a GPU a product of few rows reads the weight for longer than it multiplies, and of more it fills the last round
# of its tiles better: on an H100, 128256 x 4096, 676 TFLOP/s with 512 rows, 737 with 1024, which 512 MiB hold.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}


def rows_in_budget(function: str, max_chunk_bytes: int | None, head: Head) -> int:
    if max_chunk_bytes is None:
        max_chunk_bytes = CHUNK_BYTES.get(head.weight.device.type, CHUNK_BYTES["cpu"])
    elif type(max_chunk_bytes) is not int:
        raise TypeError(
            f"{function}: max_chunk_bytes must be an int or None, got {describe(max_chunk_bytes)}"
        )
    row = head.weight.shape[0] * (8 if head.weight.dtype == torch.float64 else 4)
    if max_chunk_bytes < row:
        raise ValueError(
            f"{function}: max_chunk_bytes must hold one row of logits, {row} bytes, got {max_chunk_bytes}"
        )
    return max_chunk_bytes // row
