"""The lm_head's three matrix products, with float32 logits whatever the inputs."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyfast_dpo.ops import operators


class Head(NamedTuple):
    """logits = softcap * tanh(logit_scale * (x W^T + bias) / softcap); softcap None: no tanh."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    logit_scale: float
    softcap: float | None

    @classmethod
    def of(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        activation: tuple[float, float | None],
        dtype: torch.dtype,
    ) -> Head:
        """In the dtype of the hidden states. Autocast's copy of the weight is made inside the autograd
        functions: their gradient of the weight then is never rounded to the dtype of that copy."""
        return cls(weight.to(dtype), None if bias is None else bias.to(dtype), *activation)

    def at_temperature(self, temperature: float) -> Head:
        """The head whose logits are these over the temperature."""
        softcap = None if self.softcap is None else self.softcap / temperature
        return self._replace(logit_scale=self.logit_scale / temperature, softcap=softcap)

    def tile(self, tile: slice) -> Head:
        """The head of some of the vocabulary."""
        bias = None if self.bias is None else self.bias[tile]
        return self._replace(weight=self.weight[tile], bias=bias)

    def logits(self, rows: Tensor, buffer: LogitsBuffer) -> Tensor:
        """On the CPU: `[r, H]` -> `[r, V]` float32 (float64 for float64), never rounded to the inputs' dtype. The
        next call may overwrite them."""
        if rows.dtype == torch.float64:
            z = rows @ self.weight.T
        else:
            z = buffer.view(rows.shape[0], self.weight.shape[0], rows.device)
            operators.head_logits_(z, rows, self.weight)
        return self.activate(z)

    def activate(self, z: Tensor) -> Tensor:
        """The logits from x W^T, in its memory."""
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
        """On the CPU: `[r, V]` float32 or bfloat16 -> `[r, H]` float32, gradient W."""
        if gradient.dtype == torch.float64:
            return gradient @ self.weight
        return operators.head_grad_rows(gradient, self.weight)


class LogitsBuffer:
    """Memory for the logits of one pass on the CPU: to touch fresh memory takes longer than a product that
    fills it, so the chunks share it."""

    def __init__(self, elements: int, memory: Tensor | None = None) -> None:
        self.elements, self.memory = elements, memory

    def view(self, rows: int, columns: int, device: torch.device) -> Tensor:
        if self.memory is None:
            self.memory = torch.empty(self.elements, dtype=torch.float32, device=device)
        return self.memory[: rows * columns].view(rows, columns)


class WeightGradient:
    """On the CPU: the sum of gradient^T rows over the parts of R rows in all, in float32 until the last part; then in `dtype`,
    that of the parameter, which under autocast is not that of the products."""

    def __init__(self, weight: Tensor, rows: int, dtype: torch.dtype) -> None:
        self.weight, self.remaining, self.dtype = weight, rows, dtype
        self.total: Tensor | None = None  # float32 (float64)
        self.result: Tensor | None = None  # of the parameter's dtype: what the last part writes
        self.accumulate = False
        self.spare: LogitsBuffer | None = None  # while the total's memory is lent to logits

    def lent_rows(self, max_rows: int) -> int:
        """The most rows for `lend`; `max_rows` logits of rows bound what `add` must copy then."""
        if not self.weight.dtype == self.dtype == torch.float32:
            return 0
        width = self.weight.shape[1]
        return min(width, math.isqrt(max_rows * width))

    def lend(self, rows: int, spare: LogitsBuffer) -> LogitsBuffer:
        """Memory for the logits of the first part: the end of what the total will fill, until it is added.
        `spare`, with `copied(rows)` elements and until then not used otherwise, takes a copy of some."""
        self.total, self.spare = self._empty(torch.float32), spare
        size = rows * self.weight.shape[0]
        return LogitsBuffer(size, self.total.view(-1)[self.total.numel() - size :])

    def copied(self, rows: int) -> int:
        """Elements of the gradient of so many rows of logits that lie in their own result's way."""
        vocab, width = self.weight.shape
        return rows * -(-rows * vocab // width)

    def start(self, rows: int) -> None:
        """Before the next part, of that many rows."""
        self.remaining -= rows
        self.accumulate = self.total is not None and self.spare is None
        if self.weight.dtype == torch.float64:
            if self.total is None:
                self.total = torch.zeros_like(self.weight)
        elif self.remaining == 0 and self.dtype == self.weight.dtype != torch.float32:
            self.result = self._empty(self.weight.dtype)
        elif self.total is None:
            self.total = self._empty(torch.float32)

    def skip(self, rows: int) -> None:
        """A part of so many rows that adds nothing; memory that was lent to it is not."""
        self.remaining -= rows
        if self.spare is not None:
            self.total = self.spare = None

    def add(self, gradient: Tensor, rows: Tensor, tile: slice) -> None:
        """For the vocabulary entries of the tile: gradient `[r, v]` as in gradient_of_rows, rows `[r, H]`."""
        total = None if self.total is None else self.total[tile]
        if gradient.dtype == torch.float64 and total is not None:
            total.addmm_(gradient.T, rows)
        elif self.spare is not None and total is not None:
            # Entries before the border lie before the logits; of the others a copy is taken.
            count, vocab = gradient.shape
            others = self.spare.view(count, self.copied(count) // count, gradient.device)
            border = vocab - others.shape[1]
            others.copy_(gradient[:, border:])
            for part, out in ((gradient[:, :border], total[:border]), (others, total[border:])):
                operators.head_grad_weight_(out, part, rows, False, None)
            self.spare = None
        elif self.result is not None:
            operators.head_grad_weight_(self.result[tile], gradient, rows, False, total)
        else:
            operators.head_grad_weight_(total, gradient, rows, self.accumulate, None)

    def finish(self) -> Tensor:
        if self.result is not None:
            return self.result
        if self.total is None:
            return torch.zeros_like(self.weight, dtype=self.dtype)
        return self.total.to(self.dtype)

    def _empty(self, dtype: torch.dtype) -> Tensor:
        return torch.empty_like(self.weight, dtype=dtype, memory_format=torch.contiguous_format)


def add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """total[index] += rows; an index may occur more than once."""
    rows = rows.to(total.dtype)
    if total.is_cuda:
        # Sorted, so deterministic; index_add_ would add by atomics. Unsafe: index_put_ may wait for the device
        # to check the range of the index, which CompletionRows' index_select has used already.
        torch.ops.aten._index_put_impl_(total, [index], rows, accumulate=True, unsafe=True)
    else:  # many times faster than index_put_ on the CPU
        total.index_add_(0, index, rows)
