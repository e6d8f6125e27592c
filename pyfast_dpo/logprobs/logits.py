"""Log-probs of labels from logits.

Labels follow `torch.nn.functional.cross_entropy`: `labels[b, t]` is the target of position t of the same
tensor, `ignore_index` is not scored. Results are float32 whatever the dtype of the logits (float64 for
float64). `impl="fused"` runs the compiled kernels, `impl="torch"` the same function in plain
differentiable torch (`oracle.py`), `impl="auto"` the kernels wherever they exist.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from pyfast_dpo.logprobs import oracle
from pyfast_dpo.ops import operators
from pyfast_dpo.ops.checks import (
    check_flags,
    check_label_options,
    check_labels_in_range,
    check_logits_and_labels,
    describe,
)
from pyfast_dpo.ops.dispatch import Impl, use_kernels_for


def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    shift: bool = False,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    validate: bool | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Log-probability of every label.

    Args:
        logits: `[..., T, V]`, float64, float32, bfloat16 or float16. Strided rows (such as
            `logits[:, :-1]`) are read in place; only a last dimension that is not contiguous is copied.
        labels: `[..., T]` int64 in [0, V) or `ignore_index`.
        shift: the Hugging Face layout, where position t scores label t + 1; the last position scores nothing.
        inplace_backward: the backward pass writes the gradient over the logits and so needs no memory of
            their size. They must not be used after that; a second backward pass raises. Under
            `torch.compile` the gradient is a new tensor.
        validate: check that the labels are in range and raise ValueError. By default on the CPU only:
            on CUDA the check waits for the device, and without it the row of such a label becomes NaN.
        impl: "auto", "fused" or "torch".

    Returns:
        `[..., T]` float32 (float64 for float64 logits), never above 0; 0 where the label is ignored, -inf for
        a label whose logit is -inf, NaN in a row with NaN or +inf or with nothing but -inf.

    Raises:
        TypeError, ValueError: wrong types, dtypes, shapes, devices; a label out of range.
    """
    return checked_logps(
        "token_logps", logits, labels, shift, ignore_index, False, inplace_backward, validate, impl
    )[1]


def sequence_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    average: bool = False,
    shift: bool = False,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    validate: bool | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Log-probability of every sequence: the sum, or with `average` the mean, over its scored positions.

    Args: as `token_logps`, for logits `[B, T, V]` and labels `[B, T]`.

    Returns:
        `[B]` float32 (float64 for float64 logits); 0 for a sequence without scored positions.
    """
    return checked_logps(
        "sequence_logps",
        logits,
        labels,
        shift,
        ignore_index,
        average,
        inplace_backward,
        validate,
        impl,
    )[0]


def checked_logps(
    function: str,
    logits: Tensor,
    labels: Tensor,
    shift: bool,
    ignore_index: int,
    average: bool,
    inplace_backward: bool,
    validate: bool | None,
    impl: Impl,
    logits_name: str = "logits",
) -> tuple[Tensor, Tensor]:
    """Checks, then (sequence log-probs [B], token log-probs with the shape of labels)."""
    check_logits_and_labels(function, logits, labels, logits_name)
    check_label_options(function, shift, ignore_index, validate)
    check_flags(function, average=average, inplace_backward=inplace_backward)
    if function == "sequence_logps" and logits.dim() != 3:
        raise ValueError(f"{function}: logits must have shape [B, T, V], got {describe(logits)}")
    use_kernels = use_kernels_for(function, impl, logits)
    compiling = torch.compiler.is_compiling()
    if validate is None:
        validate = logits.device.type == "cpu" and not compiling
    # On the CPU the operator checks its labels itself; this check costs a small batch more than the operator. There
    # nothing waits for a device, so that plain torch checks them whatever `validate` says.
    on_cpu = logits.device.type == "cpu" and not compiling
    if (validate and not (use_kernels and on_cpu)) or (on_cpu and not use_kernels):
        check_labels_in_range(function, labels, logits.shape[-1], ignore_index, shift)
    if not use_kernels:
        if inplace_backward:
            raise ValueError(f"{function}: inplace_backward needs the kernels, not impl='torch'")
        return oracle.seq_logp(logits, labels, ignore_index, shift, average)
    if inplace_backward and not compiling:
        _check_inplace(function, logits, logits_name)
    shape = labels.shape
    if logits.dim() == 2:
        logits, labels = logits.unsqueeze(0), labels.unsqueeze(0)
    elif logits.dim() > 3:
        logits, labels = logits.flatten(0, -3), labels.flatten(0, -2)
    arguments = (logits, labels, ignore_index, shift, average, inplace_backward and not compiling)
    if compiling:
        sequences, tokens, *_ = operators.seq_logp(*arguments)
    else:
        try:
            sequences, tokens, *_ = operators.seq_logp(*arguments)
        except RuntimeError:
            check_labels_in_range(
                function, labels.view(shape), logits.shape[-1], ignore_index, shift
            )
            raise
    return sequences, tokens.reshape(shape)


def _check_inplace(function: str, logits: Tensor, name: str) -> None:
    """Each element must own its memory, and the kernels must be able to write through its strides."""
    strides = [s for s, n in zip(logits.stride(), logits.shape, strict=True) if n > 1]
    sizes = [n for n in logits.shape if n > 1]
    spans = sorted(zip(strides, sizes, strict=True))
    overlapping = any(outer[0] < inner[0] * inner[1] for inner, outer in itertools.pairwise(spans))
    if 0 in strides or overlapping or logits.stride(-1) != 1 or logits.dim() > 3:
        raise ValueError(
            f"{function}: inplace_backward needs {name} [B, T, V] or [T, V] whose elements do not share "
            f"memory and whose last dimension is contiguous, got {describe(logits)} with strides "
            f"{list(logits.stride())}"
        )
