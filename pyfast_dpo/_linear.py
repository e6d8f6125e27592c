"""Chunks of completion rows through the lm_head: log-probs, and gradients without a logits matrix.

Work runs over rows [R, H] that are scored, and only those. A *unit* is what a loss couples: a pair, or one
sequence. Units share a chunk as long as its float32 logits fit the budget; a larger unit is walked in
pieces whose logits are computed twice (4 matrix products instead of 3, for that unit alone).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from pyfast_dpo import _ops
from pyfast_dpo._head import Head, add_weight_gradient
from pyfast_dpo.reference import statistics_dtype

# Loss of the units [first, last): their log-probs, in unit order -> (scalar to add, tensors to keep).
UnitLoss = Callable[[Tensor, int, int], tuple[Tensor, tuple[Tensor, ...]]]


class Units(NamedTuple):
    """How the scored rows are grouped. Rows of a sequence, and sequences of a unit, follow each other."""

    lengths: list[int]  # scored rows of every sequence
    sequences: int  # sequences in a unit: 2 for pairs, else 1
    average: bool
    max_rows: int  # rows whose logits fit the budget

    def chunks(self) -> Iterator[tuple[int, int, int, int]]:
        """(first unit, last unit, first row, last row) of consecutive units that fit the budget together."""
        sizes = [
            sum(self.lengths[i : i + self.sequences])
            for i in range(0, len(self.lengths), self.sequences)
        ]
        unit = row = 0
        while unit < len(sizes):
            last, rows = unit + 1, sizes[unit]
            while last < len(sizes) and rows + sizes[last] <= self.max_rows:
                rows += sizes[last]
                last += 1
            yield unit, last, row, row + rows
            unit, row = last, row + rows


class Scored(NamedTuple):
    """Logits of some rows and what their backward pass needs."""

    logits: Tensor  # [1, r, V]
    targets: Tensor  # [1, r]
    tokens: Tensor  # [1, r] log-probs
    statistics: tuple[Tensor, Tensor, Tensor]  # row_max, row_sum [1, r], sequence_scale [1]


def score(rows: Tensor, targets: Tensor, head: Head) -> Scored:
    logits, labels = head.logits(rows).unsqueeze(0), targets.unsqueeze(0)
    _, tokens, row_max, row_sum, scale = _ops.seq_logp(logits, labels, -100, False, False, False)
    return Scored(logits, labels, tokens, (row_max, row_sum, scale))


def gradient_of_logits(scored: Scored, coefficients: Tensor, head: Head) -> Tensor:
    """`[r, V]`: coefficient of a row times d log-prob / d (x W^T + bias); overwrites the logits if it can."""
    arguments = (None, coefficients.unsqueeze(0), *scored[:3], *scored.statistics, -100, False)
    if head.softcap is None:
        _ops.seq_logp_backward_(*arguments)
        return head.backward_through_activation(scored.logits[0], scored.logits[0])
    gradient = _ops.seq_logp_backward(*arguments)[0]
    return head.backward_through_activation(gradient, scored.logits[0])


class Gradients:
    """Where the three gradients of a pass are gathered, for the inputs that ask for them."""

    def __init__(self, rows: Tensor, head: Head, wanted: tuple[bool, bool, bool]) -> None:
        wide = statistics_dtype(rows.dtype)
        self.rows = torch.empty_like(rows, dtype=wide) if wanted[0] else None
        self.weight = torch.zeros_like(head.weight, dtype=wide) if wanted[1] else None
        self.bias = (
            torch.zeros_like(head.bias, dtype=wide) if wanted[2] and head.bias is not None else None
        )

    def add(self, gradient: Tensor, rows: Tensor, first: int, last: int, head: Head) -> None:
        if self.rows is not None:
            self.rows[first:last] = head.gradient_of_rows(gradient)
        if self.weight is not None:
            add_weight_gradient(self.weight, gradient, rows[first:last])
        if self.bias is not None:
            self.bias += gradient.sum(0)

    def finish(self, head: Head) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        dtype = head.weight.dtype
        rows = None if self.rows is None else self.rows.to(dtype)
        weight = None if self.weight is None else self.weight.to(dtype)
        bias = None if self.bias is None or head.bias is None else self.bias.to(head.bias.dtype)
        return rows, weight, bias


class LinearLoss(torch.autograd.Function):
    """A loss on sequence log-probs, with its gradients computed on the way: 3 products with a trainable
    head, 2 with a frozen one."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: tuple[float, float | None],
        units: Units,
        unit_loss: UnitLoss,
    ) -> tuple[Tensor, ...]:
        head = Head(weight, bias, *options)
        wanted = ctx.needs_input_grad[:3]
        # Without gradients of the head nothing but a factor a row waits for the loss.
        frozen = wanted[0] and not any(wanted[1:])
        gradients = Gradients(rows, head, wanted)
        loss = rows.new_zeros((), dtype=torch.float64)
        kept: list[tuple[Tensor, ...]] = []
        for first_unit, last_unit, first, last in units.chunks():
            pieces = [
                (i, min(i + units.max_rows, last)) for i in range(first, last, units.max_rows)
            ]
            scored: list[Scored] = []  # kept until the loss is known, when it is a single piece
            tokens: list[Tensor] = []
            for i, j in pieces:
                piece = score(rows[i:j], targets[i:j], head)
                tokens.append(piece.tokens[0])
                if frozen:
                    ones = torch.ones_like(piece.tokens[0])
                    gradients.add(gradient_of_logits(piece, ones, head), rows, i, j, head)
                elif len(pieces) == 1:
                    scored.append(piece)
            lengths = units.lengths[first_unit * units.sequences : last_unit * units.sequences]
            logps, scales = _sequence_logps(tokens, lengths, units.average, rows)
            with torch.enable_grad():
                logps.requires_grad_()
                value, outputs = unit_loss(logps, first_unit, last_unit)
                (per_sequence,) = torch.autograd.grad(value, logps)
            loss += value.detach()
            kept.append((logps.detach(), *(output.detach() for output in outputs)))
            if not any(wanted):
                continue
            coefficients = torch.repeat_interleave(
                per_sequence * scales,
                torch.tensor(lengths, device=rows.device),
                output_size=last - first,
            )
            if frozen and gradients.rows is not None:
                gradients.rows[first:last] *= coefficients.unsqueeze(1)
                continue
            for k, (i, j) in enumerate(pieces):
                piece = scored[k] if scored else score(rows[i:j], targets[i:j], head)
                gradient = gradient_of_logits(piece, coefficients[i - first : j - first], head)
                gradients.add(gradient, rows, i, j, head)
        ctx.save_for_backward(rows, weight, bias, *gradients.finish(head))
        columns = tuple(torch.cat(column) for column in zip(*kept, strict=True))
        ctx.mark_non_differentiable(*columns)
        ctx.set_materialize_grads(False)
        return loss.to(statistics_dtype(rows.dtype)), *columns

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 7
        inputs, gradients = ctx.saved_tensors[:3], list(ctx.saved_tensors[3:])
        # loss.backward() brings 1: then the weight's gradient needs no copy. Looking costs a wait on a GPU.
        if grad_loss.is_cuda or grad_loss.item() != 1.0:
            with torch.no_grad():
                gradients = [None if g is None else g * grad_loss.to(g.dtype) for g in gradients]
        return *refuse_second(gradients, inputs), None, None, None, None


class LinearLogps(torch.autograd.Function):
    """Log-prob of every scored row. With a frozen head the gradient of the rows is computed on the way, up
    to the coefficient that the backward pass brings (2 products); else logits are computed again (4)."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: tuple[float, float | None],
        max_rows: int,
    ) -> Tensor:
        head = Head(weight, bias, *options)
        frozen = ctx.needs_input_grad[0] and not any(ctx.needs_input_grad[1:3])
        unit_gradient = (
            torch.empty_like(rows, dtype=statistics_dtype(rows.dtype)) if frozen else None
        )
        tokens = rows.new_empty(rows.shape[0], dtype=statistics_dtype(rows.dtype))
        for first in range(0, rows.shape[0], max_rows):
            piece = slice(first, first + max_rows)
            scored = score(rows[piece], targets[piece], head)
            tokens[piece] = scored.tokens[0]
            if unit_gradient is not None:
                gradient = gradient_of_logits(scored, torch.ones_like(tokens[piece]), head)
                unit_gradient[piece] = head.gradient_of_rows(gradient)
        ctx.options, ctx.max_rows = options, max_rows
        ctx.save_for_backward(rows, weight, bias, targets, unit_gradient)
        return tokens

    @staticmethod
    def backward(ctx: Any, grad_tokens: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = LinearLogps.gradients(ctx, grad_tokens)
        return *refuse_second(gradients, ctx.saved_tensors[:3]), None, None, None

    @staticmethod
    def gradients(ctx: Any, grad_tokens: Tensor) -> list[Tensor | None]:
        rows, weight, bias, targets, unit_gradient = ctx.saved_tensors
        if unit_gradient is not None:
            return [(grad_tokens.unsqueeze(1) * unit_gradient).to(rows.dtype), None, None]
        head = Head(weight, bias, *ctx.options)
        gradients = Gradients(rows, head, ctx.needs_input_grad[:3])
        for first in range(0, rows.shape[0], ctx.max_rows):
            last = min(first + ctx.max_rows, rows.shape[0])
            scored = score(rows[first:last], targets[first:last], head)
            gradient = gradient_of_logits(scored, grad_tokens[first:last], head)
            gradients.add(gradient, rows, first, last, head)
        return list(gradients.finish(head))


def refuse_second(
    gradients: list[Tensor | None], inputs: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """Under create_graph=True, ties the gradients to what they depend on, so that a second backward pass
    raises; untied, they would pass for constants and the second derivative would be silently wrong."""
    if not torch.is_grad_enabled():
        return gradients
    return [None if g is None else _RefuseSecond.apply(g, *inputs) for g in gradients]


class _RefuseSecond(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise NotImplementedError(
            "pyfast_dpo: the linear losses and log-probs have no second derivative; use impl='torch' for "
            "double backward"
        )


def _sequence_logps(
    tokens: list[Tensor], lengths: list[int], average: bool, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums (or means) of consecutive tokens, and the factor from a sequence's to its tokens' gradient."""
    counts = torch.tensor(lengths, device=rows.device)
    values = torch.cat(tokens) if tokens else rows.new_empty(0, dtype=statistics_dtype(rows.dtype))
    sums = torch.segment_reduce(values.double(), "sum", lengths=counts, axis=0)
    divisors = counts.clamp(min=1).double() if average else torch.ones_like(sums)
    return (sums / divisors).to(values.dtype), (1 / divisors).to(values.dtype)
