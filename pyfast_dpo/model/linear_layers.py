"""A model's float32 linear layers, adapters included, on CPUs where our products are faster than torch's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyfast_dpo.model import allocator
from pyfast_dpo.model.forwards import replace_forwards
from pyfast_dpo.ops import _C, operators

# MKL, which multiplies for torch, leaves a part of an AMD CPU's units unused: on a Zen 4 it takes 1.1 to 1.5 times our
# time for layers of 576 to 8192 (bench/bench_layers.py; 0.9 to 1.2 in an earlier run). That needs memory that is there
# already, as trainers keep it: in fresh memory the packed copies of rows and weight made ours slower, by up to a
# fifth. On Intel's own CPUs nothing was measured.
FASTER = (
    allocator.AVAILABLE
    and _C.cpu_vendor() == "AuthenticAMD"
    and _C.cpu_capability().startswith("avx512")
)
FEWEST = 64  # inputs and outputs of a layer; smaller ones are no work for panels


def use_own_products(model: nn.Module) -> Callable[[], None]:
    """Makes the linear layers of a model compute in our products where these serve and are faster: plain float32
    ones on the CPU. A LoRA layer's two terms are then one product, forward and backward. Returns what undoes it."""
    if not FASTER or any(p.device.type != "cpu" for p in model.parameters()):
        return lambda: None
    return replace_forwards(model, _product_of)


def _product_of(module: nn.Module) -> Callable[..., Tensor] | None:
    if _is_wide(module):
        return _linear
    return _adapted if _is_lora(module) else None


def _linear(layer: Any, inputs: Tensor) -> Tensor:
    if not _serve(inputs, layer.weight):
        return nn.Linear.forward(layer, inputs)
    rows = _matrix(inputs)
    product = _filled(_Linear.apply(rows, layer.weight), rows, layer.weight)
    return _shaped(product, inputs, layer.bias)


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
    rows = _matrix(inputs)
    scaling = layer.scaling[name]
    with torch.no_grad():
        low = (rows @ down.weight.T).mul_(scaling)
    output = _AdaptedLinear.apply(rows, base.weight, down.weight, up.weight, low, scaling)
    product = _filled(output, rows, base.weight, low, up.weight)
    return _shaped(product, inputs, base.bias)


@torch.no_grad()
def _filled(output: Tensor, *terms: Tensor) -> Tensor:
    """Writes the product after autograd has saved its inputs: what recomputes a checkpointed layer stops when the
    last one is saved, and spares the layer's last product."""
    operators.linear_(output, *terms)
    return output


class _Linear(torch.autograd.Function):
    """rows [R, K], weight [N, K] -> rows weight^T [R, N], which the caller writes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return rows.new_empty(rows.shape[0], weight.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        of_rows, of_weight = ctx.needs_input_grad
        return (
            operators.linear_grad_rows(gradient, weight) if of_rows else None,
            operators.linear_grad_weight(gradient, rows) if of_weight else None,
        )


class _AdaptedLinear(torch.autograd.Function):
    """rows [R, K], weight [N, K], down [r, K], up [N, r], low = scaling rows down^T [R, r] -> rows weight^T + low
    up^T [R, N], which the caller writes."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        down: Tensor,
        up: Tensor,
        low: Tensor,
        scaling: float,
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, down, up, low)
        ctx.scaling = scaling
        return rows.new_empty(rows.shape[0], weight.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, down, up, low = ctx.saved_tensors
        low_gradient = (gradient @ up).mul_(ctx.scaling)
        of_rows, of_weight, of_down, of_up, *_ = ctx.needs_input_grad
        return (
            operators.linear_grad_rows(gradient, weight, low_gradient, down) if of_rows else None,
            operators.linear_grad_weight(gradient, rows) if of_weight else None,
            low_gradient.T @ rows if of_down else None,
            gradient.T @ low if of_up else None,
            None,
            None,
        )


def _serve(*tensors: Tensor) -> bool:
    """Whether our products take them."""
    return (
        are_plain(*tensors)
        and all(tensor.dtype == torch.float32 for tensor in tensors)
        and not torch.is_autocast_enabled("cpu")
    )


def are_plain(*tensors: Tensor) -> bool:
    """Whether kernels may read them: not if they are sharded, say, or on a device that the model was moved to
    later, nor while a model is compiled."""
    plain = all(type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" for t in tensors)
    return plain and not torch.compiler.is_compiling()


def _matrix(inputs: Tensor) -> Tensor:
    return inputs.reshape(-1, inputs.shape[-1])


def _shaped(product: Tensor, inputs: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None:
        product = product + bias
    return product.view(*inputs.shape[:-1], product.shape[-1])  # also without rows
