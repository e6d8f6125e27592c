"""A model's float32 linear layers, adapters included, on CPUs where our products are faster than torch's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from pyfast_dpo import _C, _allocator, _ops

# MKL, which multiplies for torch, leaves a part of an AMD CPU's units unused: on a Zen 4 it takes 0.9 to 1.2 times our
# time for layers of 576 to 8192, the more the larger they are (bench/bench_layers.py). That needs memory that is there
# already, as trainers keep it: in fresh memory the packed copies of rows and weight made ours slower, by up to a
# fifth. On Intel's own CPUs nothing was measured.
FASTER = (
    _allocator.AVAILABLE
    and _C.cpu_vendor() == "AuthenticAMD"
    and _C.cpu_capability().startswith("avx512")
)
FEWEST = 64  # inputs and outputs of a layer; smaller ones are no work for panels


def use_own_products(model: nn.Module) -> None:
    """Makes the linear layers of a model compute in our products where these serve and are faster: plain float32
    ones on the CPU. A LoRA layer's two terms are then one product, forward and backward."""
    if not FASTER or any(p.device.type != "cpu" for p in model.parameters()):
        return
    for module in model.modules():
        if "forward" in vars(module):  # ours already, or somebody's who moves weights
            continue
        if _is_wide(module):
            module.forward = MethodType(_linear, module)
        elif _is_lora(module):
            module.forward = MethodType(_adapted, module)


def _linear(layer: Any, inputs: Tensor) -> Tensor:
    if not _serve(inputs, layer.weight):
        return nn.Linear.forward(layer, inputs)
    return _shaped(_ops.linear(_matrix(inputs), layer.weight), inputs, layer.bias)


def _is_wide(module: Any) -> bool:
    return type(module) is nn.Linear and min(module.in_features, module.out_features) >= FEWEST


def _is_lora(module: Any) -> bool:
    kind = type(module)
    is_peft = (kind.__module__, kind.__name__) == ("peft.tuners.lora.layer", "Linear")
    return is_peft and _is_wide(module.base_layer)


def _adapted(layer: Any, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """One active, plain adapter; PEFT computes everything else."""
    of_peft: Callable[..., Tensor] = partial(type(layer).forward, layer)
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if args or kwargs or layer.disable_adapters or layer.merged or len(active) != 1:
        return of_peft(inputs, *args, **kwargs)
    (name,) = active
    down, up, base = layer.lora_A[name], layer.lora_B[name], layer.base_layer
    if (
        name in layer.lora_variant
        or type(layer.lora_dropout[name]) is not nn.Identity
        or (down.bias, up.bias) != (None, None)
        or not _serve(inputs, base.weight, down.weight, up.weight)
    ):
        return of_peft(inputs)
    product = _AdaptedLinear.apply(
        _matrix(inputs), base.weight, down.weight, up.weight, layer.scaling[name]
    )
    return _shaped(product, inputs, base.bias)


class _AdaptedLinear(torch.autograd.Function):
    """rows [R, K], weight [N, K], down [r, K], up [N, r] -> rows weight^T + scaling rows down^T up^T, [R, N]."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, down: Tensor, up: Tensor, scaling: float
    ) -> Tensor:
        low = (rows @ down.T).mul_(scaling)
        ctx.save_for_backward(rows, weight, down, up, low)
        ctx.scaling = scaling
        return _ops.linear(rows, weight, low, up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, down, up, low = ctx.saved_tensors
        low_gradient = (gradient @ up).mul_(ctx.scaling)
        needed = ctx.needs_input_grad
        return (
            _ops.linear_grad_rows(gradient, weight, low_gradient, down) if needed[0] else None,
            gradient.T @ rows if needed[1] else None,
            low_gradient.T @ rows if needed[2] else None,
            gradient.T @ low if needed[3] else None,
            None,
        )


def _serve(*tensors: Tensor) -> bool:
    """Whether our products take them; a sharded one, say, they do not."""
    plain = all(
        type(tensor) in (Tensor, nn.Parameter) and tensor.dtype == torch.float32
        for tensor in tensors
    )
    return plain and not (torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())


def _matrix(inputs: Tensor) -> Tensor:
    return inputs.reshape(-1, inputs.shape[-1])


def _shaped(product: Tensor, inputs: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None:
        product = product + bias
    return product.view(*inputs.shape[:-1], -1)
