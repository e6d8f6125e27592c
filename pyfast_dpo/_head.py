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

    def logits(self, rows: Tensor, buffer: LogitsBuffer) -> Tensor:
        """`[r, H]` -> `[r, V]` float32 (float64 for float64): never rounded to the inputs' dtype. The next
        call may overwrite them."""
        if rows.dtype == torch.float64:
            z = rows @ self.weight.T
        elif rows.is_cuda:
            z = torch.mm(rows, self.weight.T, out_dtype=torch.float32)
        else:
            z = buffer.rows(rows.shape[0])
            _ops.head_logits_(z, rows, self.weight)
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


class LogitsBuffer:
    """Memory for the logits of one pass on the CPU, touched once for all of its chunks."""

    def __init__(self, head: Head, rows: int) -> None:
        self.shape, self.device = (rows, head.weight.shape[0]), head.weight.device
        self.memory: Tensor | None = None

    def rows(self, count: int) -> Tensor:
        if self.memory is None:
            self.memory = _ops.large_empty(self.shape, torch.float32, self.device)
        return self.memory[:count]


class WeightGradient:
    """Sum of gradient^T rows over the chunks of R rows in all, in float32 until the last one."""

    def __init__(self, weight: Tensor, rows: int) -> None:
        self.weight, self.remaining = weight, rows
        self.total: Tensor | None = None  # float32 (float64), before the last chunk
        self.result: Tensor | None = None

    def add(self, gradient: Tensor, rows: Tensor) -> None:
        """gradient `[r, V]` float32, rows `[r, H]`."""
        self.remaining -= rows.shape[0]
        if gradient.is_cuda or gradient.dtype == torch.float64:
            self._add_by_torch(gradient, rows)
        elif self.remaining == 0 and rows.dtype != torch.float32:
            self.result = self._empty(rows.dtype)
            _ops.head_grad_weight_(self.result, gradient, rows, False, self.total)
            self.total = None
        else:
            accumulate = self.total is not None
            if self.total is None:
                self.total = self._empty(torch.float32)
            _ops.head_grad_weight_(self.total, gradient, rows, accumulate, None)

    def finish(self) -> Tensor:
        if self.result is not None:
            return self.result
        if self.total is None:
            return torch.zeros_like(self.weight)
        return self.total.to(self.weight.dtype)

    def _empty(self, dtype: torch.dtype) -> Tensor:
        return _ops.large_empty(tuple(self.weight.shape), dtype, self.weight.device)

    def _add_by_torch(self, gradient: Tensor, rows: Tensor) -> None:
        if self.total is None:
            self.total = torch.zeros_like(self.weight, dtype=gradient.dtype)
        if gradient.dtype == torch.float64:
            self.total.addmm_(gradient.T, rows)
            return
        narrow = gradient.to(rows.dtype)
        for first in range(0, self.total.shape[0], TILE):
            tile = slice(first, first + TILE)
            self.total[tile] += torch.mm(narrow[:, tile].T, rows, out_dtype=gradient.dtype)


def add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """total[index] += rows; an index may occur more than once."""
    rows = rows.to(total.dtype)
    if total.is_cuda:  # sorted, so deterministic; index_add_ would add by atomics
        total.index_put_((index,), rows, accumulate=True)
    else:  # many times faster than index_put_ on the CPU
        total.index_add_(0, index, rows)
