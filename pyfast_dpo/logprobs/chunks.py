"""Chunks of completion rows through the lm_head: log-probs, and gradients without a logits matrix.

Work runs over the scored rows, and only those. A *unit* is what a loss couples: a pair, one sequence, or the
whole batch. Units share a chunk as long as its float32 logits fit the budget, or the memory of the weight's
gradient (`WeightGradient.lend`), or their gradients fit it in bfloat16 (`keeps_gradients`). A larger unit is
scored in pieces of its rows and waits; when all such units have their loss, their logits are computed again
(4 matrix products instead of 3, for them alone) in tiles of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from pyfast_dpo.logprobs.head import Head, LogitsBuffer, add_rows
from pyfast_dpo.logprobs.rows import CompletionRows
from pyfast_dpo.logprobs.scores import (
    TILE,
    Gradients,
    Scored,
    Statistics,
    coefficients_of_rows,
    gradient_of_entropy,
    gradient_of_logits,
    keep_gradient_of_logits,
    keeps_gradients,
    score,
    sums_of_sequences,
)
from pyfast_dpo.logprobs.statistics import LinearStatistics, row_statistics
from pyfast_dpo.ops import operators
from pyfast_dpo.ops.dtypes import statistics_dtype

# Loss of the units in the slice from their log-probs [group, n]: a scalar, or (scalar, tensors [n] to keep).
LossFunction = Callable[[Tensor, slice], Tensor | tuple[Tensor, tuple[Tensor, ...]]]


class Chunk(NamedTuple):
    """Consecutive units and their rows: one range of rows for each position in a unit."""

    units: slice
    ranges: list[tuple[int, int]]
    lent: bool  # its logits take the memory of the weight's gradient

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
    # The budget is for kept gradients (`keeps_gradients`), and half as much beside it for logits.
    kept: bool = False
    # Rows whose logits fit the memory of the weight's gradient (`WeightGradient.lend`), for one chunk.
    lent_rows: int = 0
    # Rows of a chunk of which no logits wait for the loss.
    ready_rows: int = 0

    @property
    def chunk_rows(self) -> int:
        return max(self.ready_rows, 2 * self.max_rows if self.kept else self.max_rows)

    @property
    def piece_rows(self) -> int:
        """Rows whose logits exist at a time."""
        if not self.kept:
            return self.max_rows
        panel = operators.HEAD_PANEL_ROWS
        return min(-(-self.max_rows // (2 * panel)) * panel, self.max_rows)

    def units(self) -> int:
        return len(self.rows.lengths) // self.group

    def chunks(self) -> list[Chunk]:
        """Consecutive units that fit the budget together, in the order of their computation; a single empty
        chunk when there are no units."""
        units, lengths = self.units(), self.rows.lengths
        starts = [0, *accumulate(lengths)]
        ends = [0, *accumulate(sum(lengths[u::units]) for u in range(units))]  # rows before a unit

        def rows_of(first: int, last: int) -> int:
            return ends[last] - ends[first]

        spans: list[tuple[int, int]] = []
        first = 0
        while first == 0 or first < units:
            last = min(first + 1, units)
            while last < units and rows_of(first, last + 1) <= self.chunk_rows:
                last += 1
            spans.append((first, last))
            first = max(last, 1)
        lent = max(
            (s for s in spans if 0 < rows_of(*s) <= self.lent_rows),
            key=lambda s: rows_of(*s),
            default=None,
        )
        if lent is not None:  # the longest, which takes its neighbours in
            at = spans.index(lent)
            while at + 1 < len(spans) and rows_of(lent[0], spans[at + 1][1]) <= self.lent_rows:
                lent = lent[0], spans.pop(at + 1)[1]
            while at > 0 and rows_of(spans[at - 1][0], lent[1]) <= self.lent_rows:
                at -= 1
                lent = spans.pop(at)[0], lent[1]
            spans = [lent, *spans[:at], *spans[at + 1 :]]
        return [
            Chunk(
                slice(first, last),
                [(starts[k * units + first], starts[k * units + last]) for k in range(self.group)],
                (first, last) == lent,
            )
            for first, last in spans
        ]

    def pieces(self, rows: int) -> list[slice]:
        """Parts of so many rows whose logits fit the budget."""
        size = self.piece_rows
        return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]

    def parts(self, rows: int, vocab: int) -> list[slice]:
        """Parts of so many rows of which a tile of the vocabulary fits the budget."""
        size = self.piece_rows * vocab // min(TILE, vocab)
        return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]

    def buffer(self, vocab: int) -> LogitsBuffer:
        return LogitsBuffer(min(self.piece_rows, self.rows.index.shape[0]) * vocab)


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
        head, wanted = Head.of(weight, bias, activation, hidden.dtype), ctx.needs_input_grad[:3]
        plan = options.plan._replace(kept=keeps_gradients(head, wanted))
        rows, wide = plan.rows, statistics_dtype(hidden.dtype)
        # Without gradients of the head nothing but a factor a row waits for the loss.
        frozen = wanted[0] and not any(wanted[1:])
        gradients = Gradients(hidden, head, wanted, rows.index.shape[0], weight.dtype)
        if not any(wanted[1:]):
            # What waits are the rows' own gradients, which the budget bounds too.
            vocab, width = weight.shape
            plan = plan._replace(ready_rows=plan.max_rows * vocab // width)
        elif gradients.weight is not None and head.softcap is None:
            plan = plan._replace(lent_rows=gradients.weight.lent_rows(plan.max_rows))
        chunks = plan.chunks()
        buffer = _buffer_for(chunks, plan, gradients)
        kept_rows = min(plan.chunk_rows, rows.index.shape[0]) if plan.kept else 0
        kept_gradients = weight.new_empty((kept_rows, weight.shape[0]), dtype=head.weight.dtype)
        loss = hidden.new_zeros((), dtype=torch.float64)
        logps = hidden.new_empty((plan.group, plan.units()), dtype=wide)
        outputs_from: dict[int, tuple[Tensor, ...]] = {}  # of the loss, by first unit
        statistics = _empty_statistics(hidden, rows.targets) if options.statistics else None
        waiting: list[Waiting] = []
        for chunk in chunks:
            index, targets = chunk.of(rows.index), chunk.of(rows.targets)
            pieces, own_buffer = plan.pieces(index.shape[0]), buffer
            if chunk.lent and gradients.weight is not None:
                pieces = [slice(0, index.shape[0])]
                own_buffer = gradients.weight.lend(index.shape[0], buffer)
            keep = plan.kept and index.shape[0] <= kept_rows
            scored: list[Scored] = []
            of_rows: list[Tensor] = []  # gradients of the rows, up to the factors that wait
            measured: list[LinearStatistics] = []
            for piece in pieces:
                states = hidden.index_select(0, index[piece])
                scored.append(score(states, targets[piece], head, own_buffer))
                if statistics is not None:
                    measured.append(row_statistics(scored[-1].logits, targets[piece]))
                if frozen:
                    ones = torch.ones_like(scored[-1].statistics.tokens)
                    gradient = gradient_of_logits(scored[-1], ones, head)
                    of_rows.append(head.gradient_of_rows(gradient))
                elif keep:
                    keep_gradient_of_logits(scored[-1], kept_gradients[piece])
            if statistics is not None and measured:
                for values, parts in zip(statistics, zip(*measured, strict=True), strict=True):
                    chunk.write(values, torch.cat(parts))
            known = _joined([part.statistics for part in scored], logps)
            weights = None if options.row_weights is None else chunk.of(options.row_weights)
            counts = rows.counts.reshape(plan.group, -1)[:, chunk.units].flatten()
            own = logps[:, chunk.units]
            own.copy_(
                sums_of_sequences(known.tokens, counts, weights, options.average).view_as(own)
            )
            value, outputs, per_sequence = _call(options.loss_fn, own, chunk.units, any(wanted))
            loss += value
            outputs_from[chunk.units.start] = outputs
            if per_sequence is None:
                continue
            coefficients = coefficients_of_rows(
                per_sequence.flatten(), counts, weights, options.average, index.shape[0]
            )
            if frozen and gradients.hidden is not None:
                for piece, part in zip(pieces, of_rows, strict=True):
                    part *= coefficients[piece].unsqueeze(1)
                    add_rows(gradients.hidden, index[piece], part)
            elif keep:
                states = hidden.index_select(0, index)
                gradients.add_kept(kept_gradients[: len(states)], coefficients, states, index)
            elif len(pieces) == 1:
                gradients.add(gradient_of_logits(scored[0], coefficients, head), states, index)
            else:
                waiting.append(Waiting(index, targets, known, coefficients))
        _add_waiting(gradients, hidden, waiting, plan, buffer)
        ctx.save_for_backward(hidden, weight, bias, *gradients.finish())
        constants = (
            logps.flatten(),
            *(statistics or ()),
            *(
                torch.cat(column)
                for column in zip(
                    *(outputs_from[unit] for unit in sorted(outputs_from)), strict=True
                )
            ),
        )
        ctx.mark_non_differentiable(*constants)
        ctx.set_materialize_grads(False)
        return loss.to(wide), *constants

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 5
        saved = ctx.saved_tensors  # once: checkpointing allows no second look
        inputs, gradients = saved[:3], list(saved[3:])
        # loss.backward() brings 1: then the weight's gradient needs no copy. Looking costs a wait on a GPU.
        if grad_loss.is_cuda or grad_loss.item() != 1.0:
            with torch.no_grad():
                gradients = [None if g is None else g * grad_loss.to(g.dtype) for g in gradients]
        return *refuse_second(gradients, inputs), None, None


def _buffer_for(chunks: list[Chunk], plan: Plan, gradients: Gradients) -> LogitsBuffer:
    """For the logits of every chunk without lent memory, and before them for what lending copies."""
    rows = max((chunk.size() for chunk in chunks if not chunk.lent), default=0)
    elements = [min(rows, plan.piece_rows) * gradients.head.weight.shape[0]]
    if gradients.weight is not None:
        elements += [gradients.weight.copied(chunk.size()) for chunk in chunks if chunk.lent]
    return LogitsBuffer(max(elements))


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
    """Log-prob of every scored row, then their statistics if wanted, of which the entropy has a gradient.
    With a frozen head the gradient of the rows is computed on the way, up to the coefficient that the backward
    pass brings (2 products); else, and for the entropy's gradient, logits are computed again (4)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: tuple[float, float | None],
        plan: Plan,
        statistics: bool,
    ) -> tuple[Tensor, ...]:
        head, rows = Head.of(weight, bias, activation, hidden.dtype), plan.rows
        frozen = ctx.needs_input_grad[0] and not any(ctx.needs_input_grad[1:3])
        buffer = plan.buffer(weight.shape[0])
        known: list[Statistics] = []
        of_rows: list[Tensor] = []
        measured = _empty_statistics(hidden, rows.targets) if statistics else None
        for piece in plan.pieces(rows.index.shape[0]):
            states = hidden.index_select(0, rows.index[piece])
            scored = score(states, rows.targets[piece], head, buffer)
            known.append(scored.statistics)
            if measured is not None:
                own = row_statistics(scored.logits, scored.targets)
                for values, part in zip(measured, own, strict=True):
                    values[piece] = part
            if frozen:
                gradient = gradient_of_logits(
                    scored, torch.ones_like(scored.statistics.tokens), head
                )
                of_rows.append(head.gradient_of_rows(gradient))
        joined = _joined(known, hidden)
        ctx.activation, ctx.plan = activation, plan
        ctx.save_for_backward(
            hidden, weight, bias, *joined, torch.cat(of_rows) if of_rows else None
        )
        ctx.set_materialize_grads(False)
        tokens = joined.tokens.clone()  # what is saved is nobody's to change
        if measured is None:
            return (tokens,)
        ctx.mark_non_differentiable(*measured[1:])
        return tokens, *measured

    @staticmethod
    def backward(
        ctx: Any, grad_tokens: Tensor | None, grad_entropy: Tensor | None = None, *_: None
    ) -> tuple[Tensor | None, ...]:
        if grad_tokens is None and grad_entropy is None:
            return (None,) * 6
        saved = ctx.saved_tensors
        with torch.no_grad():
            gradients = LinearLogps.gradients(ctx, grad_tokens, grad_entropy, *saved)
        return *refuse_second(gradients, saved[:3]), None, None, None

    @staticmethod
    def gradients(
        ctx: Any, grad_tokens: Tensor | None, grad_entropy: Tensor | None, *saved: Tensor
    ) -> list[Tensor | None]:
        hidden, weight, bias, *known, of_rows = saved
        plan, head = ctx.plan, Head.of(weight, bias, ctx.activation, hidden.dtype)
        rows, count = plan.rows, plan.rows.index.shape[0]
        gradients = Gradients(hidden, head, ctx.needs_input_grad[:3], count, weight.dtype)
        buffer = plan.buffer(weight.shape[0])
        if grad_entropy is not None:
            for piece in plan.pieces(count):
                index = rows.index[piece]
                states = hidden.index_select(0, index)
                scored = score(states, rows.targets[piece], head, buffer)
                gradient = gradient_of_entropy(scored, grad_entropy[piece], head)
                if grad_tokens is not None:
                    gradient += gradient_of_logits(scored, grad_tokens[piece], head)
                gradients.add(gradient, states, index)
            return list(gradients.finish())
        assert grad_tokens is not None
        if of_rows is not None and gradients.hidden is not None:
            add_rows(gradients.hidden, rows.index, grad_tokens.unsqueeze(1) * of_rows)
            return [gradients.hidden, None, None]
        everything = Waiting(rows.index, rows.targets, Statistics(*known), grad_tokens)
        _add_waiting(gradients, hidden, [everything], plan, buffer)
        return list(gradients.finish())


class Waiting(NamedTuple):
    """Rows whose gradient of the logits is known but for the logits."""

    where: Tensor  # [r] among the hidden states
    targets: Tensor
    statistics: Statistics
    coefficients: Tensor


def _add_waiting(
    gradients: Gradients, hidden: Tensor, waiting: list[Waiting], plan: Plan, buffer: LogitsBuffer
) -> None:
    if not waiting:
        return
    index, targets, coefficients = (
        torch.cat(values)
        for values in zip(*((w.where, w.targets, w.coefficients) for w in waiting), strict=True)
    )
    known = _joined([w.statistics for w in waiting], coefficients)
    for part in plan.parts(index.shape[0], gradients.head.weight.shape[0]):
        of_rows = gradients.add_by_tiles(
            hidden.index_select(0, index[part]),
            targets[part],
            Statistics(*(values[part] for values in known)),
            coefficients[part],
            buffer,
        )
        if gradients.hidden is not None and of_rows is not None:
            add_rows(gradients.hidden, index[part], of_rows)


def _joined(parts: list[Statistics], like: Tensor) -> Statistics:
    if not parts:
        empty = like.new_empty(0, dtype=statistics_dtype(like.dtype))
        return Statistics(empty, empty, empty)
    return Statistics(*(torch.cat(values) for values in zip(*parts, strict=True)))


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
