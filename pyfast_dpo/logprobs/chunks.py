"""Chunks of completion rows through the lm_head: log-probs, and gradients without a logits matrix.

Work runs over the scored rows, and only those. A *unit* is what a loss couples: a pair, one sequence, or the
whole batch. Units share a chunk as long as its float32 logits fit the budget, or the memory of the weight's
gradient (`WeightGradient.lend`), or their gradients fit it in bfloat16 (`keeps_gradients`). A larger unit is
scored in pieces of its rows and waits; when all such units have their loss, their logits are computed again
(4 matrix products instead of 3, for them alone) in tiles of the vocabulary. On a GPU (`gpu_head`) nothing is
computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from pyfast_dpo.logprobs.gpu_head import GpuHead, rows_that_wait
from pyfast_dpo.logprobs.head import Head, LogitsBuffer, add_rows
from pyfast_dpo.logprobs.plan import Chunk, Plan
from pyfast_dpo.logprobs.scores import (
    Gradients,
    Scored,
    Statistics,
    gradient_of_entropy,
    gradient_of_logits,
    keeps_gradients,
    score,
    statistics_of,
    write_gradient,
)
from pyfast_dpo.logprobs.statistics import LinearStatistics
from pyfast_dpo.logprobs.unit_losses import LossOptions, UnitLosses, empty_statistics
from pyfast_dpo.ops import dispatch, operators
from pyfast_dpo.ops.dtypes import statistics_dtype


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
        loss = UnitLosses(hidden, options, any(wanted))
        compute = _loss_on_gpu if dispatch.on_gpu(hidden) else _loss_in_chunks
        gradients = compute(hidden, head, wanted, weight.dtype, options, loss)
        ctx.save_for_backward(hidden, weight, bias, *gradients)
        constants = loss.constants()
        ctx.mark_non_differentiable(*constants)
        ctx.set_materialize_grads(False)
        return loss.value.to(loss.logps.dtype), *constants

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 5
        saved = ctx.saved_tensors  # once: checkpointing allows no second look
        inputs, gradients = saved[:3], list(saved[3:])
        # loss.backward() brings 1: then the weight's gradient needs no copy. On a GPU only a kernel looks, since
        # the host would wait: in the gradient's own memory, where no second pass will ask for it.
        if grad_loss.is_cuda and not graph_is_kept():
            for gradient in gradients:
                if gradient is not None:
                    operators.scale_(gradient, grad_loss)
        elif grad_loss.is_cuda or grad_loss.item() != 1.0:
            with torch.no_grad():
                gradients = [None if g is None else g * grad_loss.to(g.dtype) for g in gradients]
        return *refuse_second(gradients, inputs), None, None


Gradient3 = tuple[Tensor | None, Tensor | None, Tensor | None]  # of hidden, weight, bias


def _loss_on_gpu(
    hidden: Tensor,
    head: Head,
    wanted: tuple[bool, bool, bool],
    dtype: torch.dtype,
    options: LossOptions,
    loss: UnitLosses,
) -> Gradient3:
    rows = options.plan.rows
    waiting = rows_that_wait(head)
    chunks = options.plan._replace(ready_rows=waiting).chunks()
    waiting = max(waiting, *(chunk.size() for chunk in chunks))
    count = rows.index.shape[0]
    gpu_head = GpuHead(hidden, head, options.plan.max_rows, wanted, dtype, count, waiting)
    for chunk in chunks:
        index, targets = chunk.of(rows.index), chunk.of(rows.targets)
        tokens = [targets.new_empty(0, dtype=loss.logps.dtype)]
        measured: list[LinearStatistics] = []
        for _, scored in gpu_head.scored(index, targets):
            tokens.append(scored.statistics.tokens)
            if loss.statistics is not None:
                measured.append(statistics_of(scored))
            if loss.differentiate:
                gpu_head.keep(scored, torch.ones_like(scored.statistics.tokens))
        loss.measure(chunk, measured)
        coefficients = loss.coefficients(chunk, torch.cat(tokens))
        if coefficients is not None:
            gpu_head.add(index, coefficients)
    return gpu_head.finish()


def _loss_in_chunks(
    hidden: Tensor,
    head: Head,
    wanted: tuple[bool, bool, bool],
    dtype: torch.dtype,
    options: LossOptions,
    loss: UnitLosses,
) -> Gradient3:
    plan = options.plan._replace(kept=keeps_gradients(head, wanted))
    rows = plan.rows
    # Without gradients of the head nothing but a factor a row waits for the loss.
    frozen = wanted[0] and not any(wanted[1:])
    gradients = Gradients(hidden, head, wanted, rows.index.shape[0], dtype)
    if not any(wanted[1:]):
        # What waits are the rows' own gradients, which the budget bounds too.
        vocab, width = head.weight.shape
        plan = plan._replace(ready_rows=plan.max_rows * vocab // width)
    elif gradients.weight is not None and head.softcap is None:
        plan = plan._replace(lent_rows=gradients.weight.lent_rows(plan.max_rows))
    chunks = plan.chunks()
    buffer = _buffer_for(chunks, plan, gradients)
    kept_rows = min(plan.chunk_rows, rows.index.shape[0]) if plan.kept else 0
    kept_gradients = head.weight.new_empty((kept_rows, head.weight.shape[0]))
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
            if loss.statistics is not None:
                measured.append(statistics_of(scored[-1]))
            if frozen:
                ones = torch.ones_like(scored[-1].statistics.tokens)
                gradient = gradient_of_logits(scored[-1], ones, head)
                of_rows.append(head.gradient_of_rows(gradient))
            elif keep:
                ones = torch.ones_like(scored[-1].statistics.tokens)
                write_gradient(scored[-1], ones, head, kept_gradients[piece])
        loss.measure(chunk, measured)
        known = _joined([part.statistics for part in scored], loss.logps)
        coefficients = loss.coefficients(chunk, known.tokens)
        if coefficients is None:
            continue
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
    return gradients.finish()


def graph_is_kept() -> bool:
    """Whether a second backward pass may follow the one that runs now."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return asked is None or asked()


def _buffer_for(chunks: list[Chunk], plan: Plan, gradients: Gradients) -> LogitsBuffer:
    """For the logits of every chunk without lent memory, and before them for what lending copies."""
    rows = max((chunk.size() for chunk in chunks if not chunk.lent), default=0)
    elements = [min(rows, plan.piece_rows) * gradients.head.weight.shape[0]]
    if gradients.weight is not None:
        elements += [gradients.weight.copied(chunk.size()) for chunk in chunks if chunk.lent]
    return LogitsBuffer(max(elements))


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
        rows, count, wanted = plan.rows, plan.rows.index.shape[0], ctx.needs_input_grad[:3]
        if of_rows is not None and grad_entropy is None:
            assert grad_tokens is not None
            total = torch.zeros_like(hidden)
            add_rows(total, rows.index, grad_tokens.unsqueeze(1) * of_rows)
            return [total, None, None]
        if dispatch.on_gpu(hidden):
            incoming = grad_tokens, grad_entropy
            return _logps_on_gpu(hidden, head, wanted, weight.dtype, plan, known, incoming)
        gradients = Gradients(hidden, head, wanted, count, weight.dtype)
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
        everything = Waiting(rows.index, rows.targets, Statistics(*known), grad_tokens)
        _add_waiting(gradients, hidden, [everything], plan, buffer)
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
    incoming: tuple[Tensor | None, Tensor | None],
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
            if of_entropy is None:
                assert of_tokens is not None
                gpu_head.keep(scored, of_tokens[own])
                continue
            gradient = gradient_of_entropy(scored, of_entropy[own], head)
            if of_tokens is not None:
                gradient += gradient_of_logits(scored, of_tokens[own], head)
            gpu_head.keep_gradient(gradient)
        gpu_head.add(index)
    return list(gpu_head.finish())


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
