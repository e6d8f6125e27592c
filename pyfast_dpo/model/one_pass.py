"""Gates and norms of a model on the CPU, forward and backward one pass over memory each.

Between its products a training step waits for memory, and torch makes many passes of these.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyfast_dpo.model.forwards import replace_forwards
from pyfast_dpo.model.linear_layers import are_plain
from pyfast_dpo.ops import operators

GATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def use_one_pass(model: nn.Module) -> Callable[[], None]:
    """Replaces the `forward` of the model's feed-forward layers `down(silu(gate(x)) * up(x))` and of its norms
    `weight * x / sqrt(mean(x^2) + epsilon)`. What is not on the CPU, or of a dtype that the kernels do not take,
    is computed as before. Returns what undoes it."""
    if any(p.device.type != "cpu" for p in model.parameters()):
        return lambda: None
    return replace_forwards(model, _one_pass_of)


def _one_pass_of(module: nn.Module) -> Callable[..., Tensor] | None:
    if _has_silu_gate(module):
        return _gated
    return _normalized if _is_rms_norm(module) else None


def _has_silu_gate(module: nn.Module) -> bool:
    if type(getattr(module, "act_fn", None)).__name__ not in ("SiLU", "SiLUActivation"):
        return False
    parts = SimpleNamespace(
        gate_proj=lambda x: x - 1,
        up_proj=lambda x: 3 * x + 1,
        down_proj=lambda x: x + 5,
        act_fn=functional.silu,
    )
    inputs = torch.linspace(-4, 4, 24).view(1, 3, 8)
    return _computes(module, parts, inputs, functional.silu(inputs - 1) * (3 * inputs + 1) + 5)


def _is_rms_norm(module: nn.Module) -> bool:
    if not hasattr(module, "variance_epsilon"):
        return False
    parts = SimpleNamespace(weight=torch.linspace(0.5, 2, 8), variance_epsilon=0.3)
    inputs = torch.linspace(-1, 2, 24).view(1, 3, 8)
    normalized = inputs * (inputs.square().mean(-1, keepdim=True) + 0.3).rsqrt()
    return _computes(module, parts, inputs, parts.weight * normalized)


def _computes(module: Any, parts: SimpleNamespace, inputs: Tensor, expected: Tensor) -> bool:
    """Whether the module's class gives exactly that with stand-ins for its parts: so it is known by its formula,
    whatever its name, and without touching its weights or the state of the generator."""
    try:
        output = type(module).forward(parts, inputs)
    except Exception:  # it needs other parts
        return False
    return isinstance(output, Tensor) and torch.equal(output, expected)


def _gated(module: Any, inputs: Tensor) -> Tensor:
    return module.down_proj(_silu_gate(module, module.gate_proj(inputs), module.up_proj(inputs)))


def _silu_gate(module: Any, gate: Tensor, up: Tensor) -> Tensor:
    if (
        gate.dtype in GATE_DTYPES
        and (gate.dtype, gate.shape) == (up.dtype, up.shape)
        and are_plain(gate, up)
    ):
        return SiluGate.apply(gate, up)
    return module.act_fn(gate) * up


def _normalized(module: Any, inputs: Tensor) -> Tensor:
    weight = module.weight
    if (
        (inputs.dtype, weight.dtype) == (torch.float32, torch.float32)
        and inputs.shape[-1:] == weight.shape
        and are_plain(inputs, weight)
    ):
        return RmsNorm.apply(inputs, weight, module.variance_epsilon)
    return type(module).forward(module, inputs)


class SiluGate(torch.autograd.Function):
    """gate and up, of one shape -> silu(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return operators.silu_gate(gate, up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        return operators.silu_gate_backward(grad_output, *ctx.saved_tensors)


class RmsNorm(torch.autograd.Function):
    """inputs [..., H], weight [H], both float32 -> the same shape."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        output, inverse = operators.rms_norm(inputs, weight, epsilon)
        ctx.save_for_backward(inputs, weight, inverse)
        ctx.epsilon = epsilon
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor | None, None]:
        of_weight = ctx.needs_input_grad[1]
        grad_input, grad_weight = operators.rms_norm_backward(
            grad_output, *ctx.saved_tensors, of_weight
        )
        return grad_input, grad_weight if of_weight else None, None
