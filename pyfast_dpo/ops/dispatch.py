"""Kernels or plain torch: who runs a function, and in which dtype."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pyfast_dpo.ops import operators
from pyfast_dpo.ops.checks import check_choice

Impl = Literal["auto", "fused", "torch"]


def is_autocast_enabled(device: torch.device) -> bool:
    """Also of devices that have no autocast, of which torch's own question is an error."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def use_kernels_for(function: str, impl: Impl, like: Tensor) -> bool:
    check_choice(function, "impl", impl, ("auto", "fused", "torch"))
    if impl == "torch":
        return False
    available = operators.has_kernels(like.device.type)
    if impl == "fused" and not available:
        raise ValueError(
            f"{function}: impl='fused' has no kernels for device {like.device} in this build; "
            "use impl='auto' or impl='torch'"
        )
    return available


def on_gpu(tensor: Tensor) -> bool:
    """Whether work on the tensor is cut for a GPU: few large products, and nothing that waits for the device. The
    one place that says so, since what a GPU would do is counted where there is none."""
    return tensor.is_cuda
