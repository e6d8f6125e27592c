"""Kernels or plain torch: who runs a function, and in which dtype."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pyfast_dpo import _ops
from pyfast_dpo._checks import check_choice

Impl = Literal["auto", "fused", "torch"]


def use_kernels_for(function: str, impl: Impl, like: Tensor) -> bool:
    check_choice(function, "impl", impl, ("auto", "fused", "torch"))
    if impl == "torch":
        return False
    available = _ops.has_kernels(like.device.type)
    if impl == "fused" and not available:
        raise ValueError(
            f"{function}: impl='fused' has no kernels for device {like.device} in this build; "
            "use impl='auto' or impl='torch'"
        )
    return available


def to_statistics_dtype(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """All in float64 when any of them is, else in float32."""
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    dtype = torch.float64 if double else torch.float32
    return tuple(None if t is None else t.to(dtype) for t in tensors)
