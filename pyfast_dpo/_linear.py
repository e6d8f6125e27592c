"""Chunks of completion rows through the lm_head: log-probs, and gradients without a logits matrix.

Work runs over the scored rows, and only those. A *unit* is what a loss couples: a pair, one sequence, or the
whole batch. Units share a chunk as long as its float32 logits fit the budget; a larger unit is walked in
pieces whose logits are computed twice (4 matrix products instead of 3, for that unit alone).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from pyfast_dpo import _ops
from pyfast_dpo._head import Head, LogitsBuffer, WeightGradient, add_rows
from pyfast_dpo.completion_rows import CompletionRows
from pyfast_dpo.reference import statistics_dtype
from pyfast_dpo.row_statistics import LinearStatistics, row_statistics

# Loss of the units in the slice from their log-probs [group, n]: a scalar, or (scalar, tensors [n] to keep).
LossFunction = Callable[[Tensor, slice], Tensor | tuple[Tensor, tuple[Tensor, ...]]]


class Chunk(NamedTuple):
    """Consecutive units and their rows: one range of rows for each position in a unit."""

    units: slice
    ranges: list[tuple[int, int]]

    def size(self) -> int:
        return sum(last - first for first, last in self.ranges)

    def of(self, values: Tensor) -> Tensor:
        """The chunk's part of values `[R, ...]`, in the order of the chunk."""
        parts = [values[first:last] for first, last in self.ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def write(self, values: Tensor, part: Tensor) -> None:
        for (first, last), own in zip(
            self.ranges, part.split([last - first for first, last in self.ranges]), strict=True
        ):
            values[first:last] = own


class Plan(NamedTuple):
    """How a pass over rows is cut: unit u consists of the sequences u, U + u, 2 U + u, ..."""

    rows: CompletionRows
    group: int  # sequences in a unit
    max_rows: int  # rows whose logits fit the budget

    def units(self) -> int:
        return len(self.rows.lengths) // self.group

    def chunks(self) -> Iterator[Chunk]:
        """Consecutive units that fit the budget together; a single empty chunk when there are no units."""
        units, lengths = self.units(), self.rows.lengths
        starts = [0, *accumulate(lengths)]
        sizes = [sum(lengths[k * units + u] for k in range(self.group)) for u in range(units)]
        first = 0
        while first == 0 or first < units:
            last = min(first + 1, units)
            total = sum(sizes[first:last])
            while last < units and total + sizes[last] <= self.max_rows:
                total += sizes[last]
                last += 1
            yield Chunk(
                slice(first, last),
                [(starts[k * units + first], starts[k * units + last]) for k in range(self.group)],
            )
            first = max(last, 1)

    def largest_piece(self) -> int:
        return min(self.max_rows, self.rows.index.shape[0])

    def pieces(self, chunk: Chunk) -> list[slice]:
        """Parts of a chunk whose logits fit the budget: one, unless it is an oversize unit."""
        size = chunk.size()
        return [slice(i, min(i + self.max_rows, size)) for i in range(0, size, self.max_rows)]


class Scored(NamedTuple):
    """Logits of some rows and what their backward pass needs."""

    logits: Tensor  # [1, r, V]
    targets: Tensor  # [1, r]
    tokens: Tensor  # [1, r] log-probs
    statistics: tuple[Tensor, Tensor, Tensor]  # row_max, row_sum [1, r], sequence_scale [1]


def score(states: Tensor, targets: Tensor, head: Head, buffer: LogitsBuffer) -> Scored:
    """Valid until the next call with this buffer."""
    logits, labels = head.logits(states, buffer).unsqueeze(0), targets.unsqueeze(0)
    # No label is ignored here: the lowest number is none that a label has.
    _, tokens, row_max, row_sum, scale = _ops.seq_logp(logits, labels, _NONE, False, False, False)
    return Scored(logits, labels, tokens, (row_max, row_sum, scale))


_NONE = torch.iinfo(torch.int64).min


def gradient_of_logits(scored: Scored, coefficients: Tensor, head: Head) -> Tensor:
    """`[r, V]`: coefficient of a row times d log-prob / d (x W^T + bias); overwrites the logits if it can."""
    arguments = (None, coefficients.unsqueeze(0), *scored[:3], *scored.statistics, _NONE, False)
    if head.softcap is None:
        _ops.seq_logp_backward_(*arguments)
        return head.backward_through_activation(scored.logits[0], scored.logits[0])
    gradient = _ops.seq_logp_backward(*arguments)[0]
    return head.backward_through_activation(gradient, scored.logits[0])


class Gradients:
    """Where the three gradients of a pass are gathered, for the inputs that ask for them."""

    def __init__(
        self, hidden: Tensor, head: Head, wanted: tuple[bool, bool, bool], rows: int
    ) -> None:
        wide = statistics_dtype(hidden.dtype)
        self.hidden = torch.zeros_like(hidden) if wanted[0] else None
        self.weight = WeightGradient(head.weight, rows) if wanted[1] else None
        self.bias = (
            torch.zeros_like(head.bias, dtype=wide) if wanted[2] and head.bias is not None else None
        )

    def add(self, gradient: Tensor, states: Tensor, index: Tensor, head: Head) -> None:
        """From the gradient of the logits of the rows that `index` took from the hidden states."""
        if self.hidden is not None:
            add_rows(self.hidden, index, head.gradient_of_rows(gradient))
        if self.weight is not None:
            self.weight.add(gradient, states)
        if self.bias is not None:
            self.bias += gradient.sum(0)

    def finish(self, head: Head) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        weight = None if self.weight is None else self.weight.finish()
        bias = None if self.bias is None or head.bias is None else self.bias.to(head.bias.dtype)
        return self.hidden, weight, bias


class LossOptions(NamedTuple):
    plan: Plan
    row_weights: Tensor | None  # [R]
    average: bool
    statistics: bool
    loss_fn: LossFunction


class LinearLoss(torch.autograd.Function):
    """A loss on sequence log-probs, with its gradients computed on the way: 3 products with a trainable
    head, 2 with a frozen one. Returns loss, log-probs, the statistics if wanted, outputs of the loss."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: tuple[float, float | None],
        options: LossOptions,
    ) -> tuple[Tensor, ...]:
        head, plan, wanted = Head(weight, bias, *activation), options.plan, ctx.needs_input_grad[:3]
        rows, wide = plan.rows, statistics_dtype(hidden.dtype)
        # Without gradients of the head nothing but a factor a row waits for the loss.
        frozen = wanted[0] and not any(wanted[1:])
        gradients = Gradients(hidden, head, wanted, rows.index.shape[0])
        buffer = LogitsBuffer(head, plan.largest_piece())
        loss = hidden.new_zeros((), dtype=torch.float64)
        logps = hidden.new_empty((plan.group, plan.units()), dtype=wide)
        kept: list[tuple[Tensor, ...]] = []
        statistics = _empty_statistics(hidden, rows.targets) if options.statistics else None
        for chunk in plan.chunks():
            index, targets, pieces = (
                chunk.of(rows.index),
                chunk.of(rows.targets),
                plan.pieces(chunk),
            )
            tokens = hidden.new_empty(index.shape[0], dtype=wide)
            scored: Scored | None = None  # kept until the loss is known, when it is a single piece
            of_rows: list[Tensor] = []  # gradients of the rows, up to the factors that wait
            measured: list[LinearStatistics] = []
            for piece in pieces:
                scored = score(hidden.index_select(0, index[piece]), targets[piece], head, buffer)
                tokens[piece] = scored.tokens[0]
                if statistics is not None:
                    measured.append(row_statistics(scored.logits[0], targets[piece]))
                if frozen:
                    gradient = gradient_of_logits(scored, torch.ones_like(tokens[piece]), head)
                    of_rows.append(head.gradient_of_rows(gradient))
                if len(pieces) > 1:
                    scored = None
            if statistics is not None and measured:
                for values, parts in zip(statistics, zip(*measured, strict=True), strict=True):
                    chunk.write(values, torch.cat(parts))
            weights = None if options.row_weights is None else chunk.of(options.row_weights)
            counts = rows.counts.reshape(plan.group, -1)[:, chunk.units].flatten()
            own = logps[:, chunk.units]
            own.copy_(sums_of_sequences(tokens, counts, weights, options.average).view_as(own))
            value, outputs, per_sequence = _call(options.loss_fn, own, chunk.units, any(wanted))
            loss += value
            kept.append(outputs)
            if per_sequence is None:
                continue
            coefficients = coefficients_of_rows(
                per_sequence.flatten(), counts, weights, options.average, index.shape[0]
            )
            if frozen and gradients.hidden is not None:
                for piece, part in zip(pieces, of_rows, strict=True):
                    part *= coefficients[piece].unsqueeze(1)
                    add_rows(gradients.hidden, index[piece], part)
                continue
            for piece in pieces:
                states = hidden.index_select(0, index[piece])
                again = score(states, targets[piece], head, buffer) if scored is None else scored
                gradient = gradient_of_logits(again, coefficients[piece], head)
                gradients.add(gradient, states, index[piece], head)
        ctx.save_for_backward(hidden, weight, bias, *gradients.finish(head))
        constants = (
            logps.flatten(),
            *(statistics or ()),
            *(torch.cat(column) for column in zip(*kept, strict=True)),
        )
        ctx.mark_non_differentiable(*constants)
        ctx.set_materialize_grads(False)
        return loss.to(wide), *constants

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 5
        inputs, gradients = ctx.saved_tensors[:3], list(ctx.saved_tensors[3:])
        # loss.backward() brings 1: then the weight's gradient needs no copy. Looking costs a wait on a GPU.
        if grad_loss.is_cuda or grad_loss.item() != 1.0:
            with torch.no_grad():
                gradients = [None if g is None else g * grad_loss.to(g.dtype) for g in gradients]
        return *refuse_second(gradients, inputs), None, None


def _call(
    loss_fn: LossFunction, logps: Tensor, units: slice, differentiate: bool
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """(share of the loss, outputs, its gradient for the log-probs) of the user's function."""
    with torch.enable_grad():
        leaf = logps.detach().clone().requires_grad_(differentiate)
        returned = loss_fn(leaf, units)
        value, outputs = returned if isinstance(returned, tuple) else (returned, ())
        if not isinstance(value, Tensor) or value.dim() != 0:
            raise ValueError(
                f"fused_linear_loss: loss_fn must return a scalar tensor, got {value!r}"
            )
        if not differentiate:
            return value.detach(), tuple(output.detach() for output in outputs), None
        if not value.requires_grad:
            raise ValueError(
                "fused_linear_loss: the value of loss_fn must depend on its log-probs under autograd"
            )
        (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), tuple(output.detach() for output in outputs), gradient


def _empty_statistics(like: Tensor, targets: Tensor) -> LinearStatistics:
    entropy, mean, log_sum_sq = (
        torch.empty_like(targets, dtype=statistics_dtype(like.dtype)) for _ in range(3)
    )
    return LinearStatistics(entropy, mean, torch.empty_like(targets, dtype=torch.bool), log_sum_sq)


class LinearLogps(torch.autograd.Function):
    """Log-prob of every scored row, and their statistics if wanted. With a frozen head the gradient of the
    rows is computed on the way, up to the coefficient that the backward pass brings (2 products); else logits
    are computed again (4)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: tuple[float, float | None],
        plan: Plan,
    ) -> Tensor:
        head, rows = Head(weight, bias, *activation), plan.rows
        frozen = ctx.needs_input_grad[0] and not any(ctx.needs_input_grad[1:3])
        wide = statistics_dtype(hidden.dtype)
        tokens = hidden.new_empty(rows.index.shape[0], dtype=wide)
        unit_gradient = (
            hidden.new_empty((tokens.shape[0], hidden.shape[1]), dtype=wide) if frozen else None
        )
        buffer = LogitsBuffer(head, plan.largest_piece())
        for piece in _pieces(plan):
            scored = score(
                hidden.index_select(0, rows.index[piece]), rows.targets[piece], head, buffer
            )
            tokens[piece] = scored.tokens[0]
            if unit_gradient is not None:
                gradient = gradient_of_logits(scored, torch.ones_like(tokens[piece]), head)
                unit_gradient[piece] = head.gradient_of_rows(gradient)
        ctx.activation, ctx.plan = activation, plan
        ctx.save_for_backward(hidden, weight, bias, unit_gradient)
        return tokens

    @staticmethod
    def backward(ctx: Any, grad_tokens: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = LinearLogps.gradients(ctx, grad_tokens)
        return *refuse_second(gradients, ctx.saved_tensors[:3]), None, None

    @staticmethod
    def gradients(ctx: Any, grad_tokens: Tensor) -> list[Tensor | None]:
        hidden, weight, bias, unit_gradient = ctx.saved_tensors
        rows, head = ctx.plan.rows, Head(weight, bias, *ctx.activation)
        gradients = Gradients(hidden, head, ctx.needs_input_grad[:3], rows.index.shape[0])
        buffer = LogitsBuffer(head, ctx.plan.largest_piece())
        if unit_gradient is not None and gradients.hidden is not None:
            add_rows(gradients.hidden, rows.index, grad_tokens.unsqueeze(1) * unit_gradient)
            return [gradients.hidden, None, None]
        for piece in _pieces(ctx.plan):
            index = rows.index[piece]
            states = hidden.index_select(0, index)
            scored = score(states, rows.targets[piece], head, buffer)
            gradient = gradient_of_logits(scored, grad_tokens[piece], head)
            gradients.add(gradient, states, index, head)
        return list(gradients.finish(head))


def _pieces(plan: Plan) -> list[slice]:
    return plan.pieces(Chunk(slice(0), [(0, plan.rows.index.shape[0])]))


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


class _SegmentSums(torch.autograd.Function):
    """float64 sums of consecutive values, `counts` at a time; torch's own has no second derivative."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(counts)
        ctx.size, ctx.dtype = values.shape[0], values.dtype
        # unsafe: its check of the counts would wait for the device.
        return torch.segment_reduce(values.double(), "sum", lengths=counts, axis=0, unsafe=True)

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor, None]:
        (counts,) = ctx.saved_tensors
        return grad_sums.to(ctx.dtype).repeat_interleave(counts, output_size=ctx.size), None


def sums_of_sequences(
    tokens: Tensor, counts: Tensor, weights: Tensor | None, average: bool
) -> Tensor:
    """`[s]`: sums, or means over the rows, of consecutive tokens times their weights."""
    sums = _SegmentSums.apply(tokens if weights is None else tokens * weights, counts)
    return (sums / counts.clamp(min=1) if average else sums).to(tokens.dtype)


def coefficients_of_rows(
    per_sequence: Tensor, counts: Tensor, weights: Tensor | None, average: bool, size: int
) -> Tensor:
    """`[size]`: the gradient of `sums_of_sequences` for the tokens."""
    if average:
        per_sequence = (per_sequence / counts.clamp(min=1).double()).to(per_sequence.dtype)
    per_row = per_sequence.repeat_interleave(counts, output_size=size)
    return per_row if weights is None else per_row * weights
