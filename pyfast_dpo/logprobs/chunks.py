"""Completion rows through the lm_head in pieces: log-probs, and gradients without a logits matrix.

Work runs over the scored rows, and only those, as many at a time as have float32 logits within the budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from pyfast_dpo.logprobs.chunk_losses import empty_statistics
from pyfast_dpo.logprobs.gpu_head import GpuHead, rows_that_wait
from pyfast_dpo.logprobs.head import Head, LogitsBuffer, add_rows
from pyfast_dpo.logprobs.plan import Plan
from pyfast_dpo.logprobs.scores import (
    EntropyGradient,
    Gradients,
    Scored,
    Statistics,
    gradient_of_logits,
    score,
    statistics_of,
)
from pyfast_dpo.ops import dispatch
from pyfast_dpo.ops.dtypes import statistics_dtype


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
        count = rows.index.shape[0]
        gpu_head = None
        if dispatch.on_gpu(hidden):
            wanted = (frozen, False, False)
            gpu_head = GpuHead(hidden, head, plan.max_rows, wanted, weight.dtype, count, count)
            pieces = gpu_head.scored(rows.index, rows.targets)
        else:
            pieces = _scored(hidden, head, plan)
        known: list[Statistics] = []
        of_rows: list[Tensor] = []
        measured = empty_statistics(hidden, rows.targets) if statistics else None
        for piece, scored in pieces:
            known.append(scored.statistics)
            if measured is not None:
                own = statistics_of(scored)
                for values, part in zip(measured, own, strict=True):
                    values[piece] = part
            if frozen:
                ones = torch.ones_like(scored.statistics.tokens)
                if gpu_head is not None:
                    gpu_head.keep(scored, ones)
                else:
                    gradient = gradient_of_logits(scored, ones, head)
                    of_rows.append(head.gradient_of_rows(gradient))
        if frozen and gpu_head is not None:
            of_rows.append(gpu_head.take_rows())
        every = joined(known, hidden)
        ctx.activation, ctx.plan = activation, plan
        entropy = None if measured is None else measured.entropy.clone()
        ctx.save_for_backward(
            hidden, weight, bias, *every, torch.cat(of_rows) if of_rows else None, entropy
        )
        ctx.set_materialize_grads(False)
        tokens = every.tokens.clone()  # what is saved is nobody's to change
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
        hidden, weight, bias, *known, of_rows, entropy = saved
        plan, head = ctx.plan, Head.of(weight, bias, ctx.activation, hidden.dtype)
        rows, count, wanted = plan.rows, plan.rows.index.shape[0], ctx.needs_input_grad[:3]
        if of_rows is not None and grad_entropy is None:
            assert grad_tokens is not None
            total = torch.zeros_like(hidden)
            add_rows(total, rows.index, grad_tokens.unsqueeze(1) * of_rows)
            return [total, None, None]
        of_entropy = None if grad_entropy is None else EntropyGradient(entropy, grad_entropy)
        if dispatch.on_gpu(hidden):
            incoming = grad_tokens, of_entropy
            return _logps_on_gpu(hidden, head, wanted, weight.dtype, plan, known, incoming)
        gradients = Gradients(hidden, head, wanted, count, weight.dtype)
        buffer = plan.buffer(weight.shape[0])
        if of_entropy is not None:
            for piece in plan.pieces(count):
                index = rows.index[piece]
                states = hidden.index_select(0, index)
                scored = score(states, rows.targets[piece], head, buffer)
                of_tokens = None if grad_tokens is None else grad_tokens[piece]
                gradients.add(scored, of_tokens, states, index, of_entropy.of(piece))
            return list(gradients.finish())
        assert grad_tokens is not None
        everything = Waiting(rows.index, rows.targets, Statistics(*known), grad_tokens)
        add_waiting(gradients, hidden, [everything], plan, buffer)
        return list(gradients.finish())


def _scored(hidden: Tensor, head: Head, plan: Plan) -> Iterator[tuple[slice, Scored]]:
    """All rows in pieces."""
    rows, buffer = plan.rows, plan.buffer(head.weight.shape[0])
    for piece in plan.pieces(rows.index.shape[0]):
        states = hidden.index_select(0, rows.index[piece])
        yield piece, score(states, rows.targets[piece], head, buffer)


def _logps_on_gpu(
    hidden: Tensor,
    head: Head,
    wanted: tuple[bool, bool, bool],
    dtype: torch.dtype,
    plan: Plan,
    known: list[Tensor],
    incoming: tuple[Tensor | None, EntropyGradient | None],
) -> list[Tensor | None]:
    """The gradients, from those of log-probs and entropies: logits once more, with their statistics known."""
    rows, (of_tokens, of_entropy) = plan.rows, incoming
    count, waiting = rows.index.shape[0], rows_that_wait(head)
    gpu_head = GpuHead(hidden, head, plan.max_rows, wanted, dtype, count, waiting)
    for first in range(0, count, waiting):
        index = rows.index[first : first + waiting]
        for piece, logits in gpu_head.pieces(index):
            own = slice(first + piece.start, first + piece.stop)
            scored = Scored(logits, rows.targets[own], Statistics(*(v[own] for v in known)))
            gpu_head.keep(
                scored,
                None if of_tokens is None else of_tokens[own],
                None if of_entropy is None else of_entropy.of(own),
            )
        gpu_head.add(index)
    return list(gpu_head.finish())


class Waiting(NamedTuple):
    """Rows whose gradient of the logits is known but for the logits."""

    where: Tensor  # [r] among the hidden states
    targets: Tensor
    statistics: Statistics
    coefficients: Tensor


def add_waiting(
    gradients: Gradients, hidden: Tensor, waiting: list[Waiting], plan: Plan, buffer: LogitsBuffer
) -> None:
    if not waiting:
        return
    index, targets, coefficients = (
        torch.cat(values)
        for values in zip(*((w.where, w.targets, w.coefficients) for w in waiting), strict=True)
    )
    known = joined([w.statistics for w in waiting], coefficients)
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


def joined(parts: list[Statistics], like: Tensor) -> Statistics:
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
