"""The lm_head's three matrix products, with float32 logits whatever the inputs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyfast_dpo import _ops

TILE = (
    8192  # vocabulary entries of the weight's gradient at a time on CUDA: bounds its extra memory
)


class Head(NamedTuple):
    """logits = softcap * tanh(logit_scale * (x W^T + bias) / softcap); softcap None: no tanh."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    logit_scale: float
    softcap: float | None

    def logits(self, rows: Tensor) -> Tensor:
        """`[r, H]` -> `[r, V]` float32 (float64 for float64): never rounded to the inputs' dtype."""
        if rows.dtype == torch.float64:
            z = rows @ self.weight.T
        elif rows.is_cuda:
            z = torch.mm(rows, self.weight.T, out_dtype=torch.float32)
        else:
            z = _ops.head_logits(rows, self.weight)
        if self.bias is not None:
            z += self.bias
        if self.logit_scale != 1.0:
            z *= self.logit_scale
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z

    def backward_through_activation(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """d loss / d (x W^T + bias) from d loss / d logits, written over the gradient."""
        if self.softcap is not None:
            gradient *= 1 - (logits / self.softcap).square_()
        if self.logit_scale != 1.0:
            gradient *= self.logit_scale
        return gradient

    def gradient_of_rows(self, gradient: Tensor) -> Tensor:
        """`[r, V]` float32 -> `[r, H]` float32: gradient W."""
        if gradient.dtype == torch.float64:
            return gradient @ self.weight
        if gradient.is_cuda:
            return torch.mm(gradient.to(self.weight.dtype), self.weight, out_dtype=gradient.dtype)
        return _ops.head_grad_rows(gradient, self.weight)


def add_weight_gradient(total: Tensor, gradient: Tensor, rows: Tensor) -> None:
    """total `[V, H]` float32 += gradient^T rows, for gradient `[r, V]` float32 and rows `[r, H]`."""
    if gradient.dtype == torch.float64:
        total.addmm_(gradient.T, rows)
    elif gradient.is_cuda:
        narrow = gradient.to(rows.dtype)
        for first in range(0, total.shape[0], TILE):
            tile = slice(first, first + TILE)
            total[tile] += torch.mm(narrow[:, tile].T, rows, out_dtype=gradient.dtype)
    else:
        _ops.head_add_grad_weight_(total, gradient, rows)


def add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """total[index] += rows; an index may occur more than once."""
    rows = rows.to(total.dtype)
    if total.is_cuda:  # sorted, so deterministic; index_add_ would add by atomics
        total.index_put_((index,), rows, accumulate=True)
    else:  # many times faster than index_put_ on the CPU
        total.index_add_(0, index, rows)
