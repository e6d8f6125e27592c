"""Feed-forward layers with a SiLU gate, `down(silu(gate(x)) * up(x))`, on the CPU: the gate in one pass over memory."""

from __future__ import annotations

from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyfast_dpo import _ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def use_own_gates(model: nn.Module) -> None:
    """Makes the model's feed-forward layers compute `silu(gate) * up`, and its gradients, in one pass each.

    On the CPU such passes wait for memory, and torch's take two forward and four backward.
    """
    if any(p.device.type != "cpu" for p in model.parameters()):
        return
    for module in model.modules():
        own = "forward" in vars(module)  # ours already, or somebody's
        if not own and _has_silu(module) and _is_gated(type(module)):
            module.forward = MethodType(_gated, module)


def _has_silu(module: nn.Module) -> bool:
    return type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")


def _is_gated(kind: Any) -> bool:
    """Whether a class computes that formula and nothing else: its forward is tried on stand-ins of its parts."""
    parts = SimpleNamespace(
        gate_proj=lambda x: x - 1,
        up_proj=lambda x: 3 * x + 1,
        down_proj=lambda x: x + 5,
        act_fn=functional.silu,
    )
    inputs = torch.linspace(-4, 4, 24).view(1, 3, 8)
    expected = functional.silu(inputs - 1) * (3 * inputs + 1) + 5
    try:
        output = kind.forward(parts, inputs)
    except Exception:  # it needs other parts
        return False
    return isinstance(output, Tensor) and torch.equal(output, expected)


def _gated(module: Any, inputs: Tensor) -> Tensor:
    return module.down_proj(_silu_gate(module, module.gate_proj(inputs), module.up_proj(inputs)))


def _silu_gate(module: Any, gate: Tensor, up: Tensor) -> Tensor:
    if (
        gate.dtype in DTYPES
        and (up.dtype, up.shape) == (gate.dtype, gate.shape)
        and type(gate) is Tensor  # not sharded
        and not torch.compiler.is_compiling()
    ):
        return SiluGate.apply(gate, up)
    return module.act_fn(gate) * up


class SiluGate(torch.autograd.Function):
    """gate and up, of one shape -> silu(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _ops.silu_gate(gate, up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor]:
        return _ops.silu_gate_backward(grad_out, *ctx.saved_tensors)
