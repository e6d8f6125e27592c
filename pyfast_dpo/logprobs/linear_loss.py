"""A loss of chunks of completion rows, with its gradients computed on the way.

Work runs over the scored rows, and only those. A *unit* is what a loss couples: a row (the losses of a policy), a
sequence, a pair, or the whole batch. Units share a chunk as long as its float32 logits fit the budget, or the memory
of the weight's gradient (`WeightGradient.lend`), or their gradients fit it in bfloat16 (`keeps_gradients`). A larger
unit is scored in pieces of its rows and waits; when all such units have their loss, their logits are computed again
(4 matrix products instead of 3, for them alone) in tiles of the vocabulary. On a GPU (`gpu_head`) nothing is computed
twice. On the CPU rows whose coefficient turns out 0 are not multiplied again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyfast_dpo.logprobs.chunk_losses import ChunkLosses
from pyfast_dpo.logprobs.chunks import Waiting, add_waiting, joined, refuse_second
from pyfast_dpo.logprobs.gpu_head import GpuHead, piece_rows, rows_that_wait
from pyfast_dpo.logprobs.head import Head, LogitsBuffer, add_rows
from pyfast_dpo.logprobs.plan import Chunk, Plan
from pyfast_dpo.logprobs.policy_losses import PolicyOptions
from pyfast_dpo.logprobs.scores import (
    Gradients,
    Scored,
    gradient_of_logits,
    keeps_gradients,
    score,
    statistics_of,
    write_gradient,
)
from pyfast_dpo.logprobs.statistics import LinearStatistics
from pyfast_dpo.logprobs.unit_losses import LossOptions
from pyfast_dpo.ops import dispatch, operators


def linear_loss(
    hidden: Tensor, head: Head, options: LossOptions | PolicyOptions
) -> tuple[Tensor, ...]:
    """The loss of hidden states `[..., H]`, with its gradients where somebody may ask for them; then what
    `ChunkLosses.finish` gives beside it."""
    inputs = [hidden.reshape(-1, hidden.shape[-1]), head.weight, head.bias]
    if not torch.is_grad_enabled():  # which the function itself cannot see
        inputs = [None if tensor is None else tensor.detach() for tensor in inputs]
    return LinearLoss.apply(*inputs, (head.logit_scale, head.softcap), options)


class LinearLoss(torch.autograd.Function):
    """3 products with a trainable head, 2 with a frozen one."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: tuple[float, float | None],
        options: LossOptions | PolicyOptions,
    ) -> tuple[Tensor, ...]:
        head, wanted = Head.of(weight, bias, activation, hidden.dtype), ctx.needs_input_grad[:3]
        loss: ChunkLosses = options.losses(hidden, any(wanted))
        compute = _loss_on_gpu if dispatch.on_gpu(hidden) else _loss_in_chunks
        gradients = compute(hidden, head, wanted, weight.dtype, loss)
        ctx.save_for_backward(hidden, weight, bias, *gradients)
        value, constants = loss.finish()
        ctx.mark_non_differentiable(*constants)
        ctx.set_materialize_grads(False)
        return value, *constants

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


def graph_is_kept() -> bool:
    """Whether a second backward pass may follow the one that runs now."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return asked is None or asked()


Gradient3 = tuple[Tensor | None, Tensor | None, Tensor | None]  # of hidden, weight, bias


def _loss_on_gpu(
    hidden: Tensor,
    head: Head,
    wanted: tuple[bool, bool, bool],
    dtype: torch.dtype,
    loss: ChunkLosses,
) -> Gradient3:
    plan, rows, waiting = loss.plan, loss.plan.rows, rows_that_wait(head)
    if loss.waits:
        plan = plan._replace(ready_rows=waiting)
    else:  # a chunk is a piece, whose logits are there when its coefficients are known
        plan = plan._replace(max_rows=piece_rows(plan.max_rows))
    chunks = plan.chunks()
    waiting = max(waiting, *(chunk.size() for chunk in chunks))
    count = rows.index.shape[0]
    gpu_head = GpuHead(hidden, head, plan.max_rows, wanted, dtype, count, waiting)
    ready: list[Tensor] = []  # index of the rows that are kept with their coefficients
    for chunk in chunks:
        index, targets = chunk.of(rows.index), chunk.of(rows.targets)
        tokens = [targets.new_empty(0, dtype=loss.wide)]
        measured: list[LinearStatistics] = []
        scored: Scored | None = None
        for _, scored in gpu_head.scored(index, targets):
            tokens.append(scored.statistics.tokens)
            if loss.statistics is not None:
                measured.append(statistics_of(scored))
            if loss.waits and loss.differentiate:
                gpu_head.keep(scored, torch.ones_like(tokens[-1]))
        loss.measure(chunk, measured)
        coefficients = loss.coefficients(chunk, torch.cat(tokens))
        if coefficients is None or scored is None:
            continue
        if loss.waits:
            gpu_head.add(index, coefficients)
            continue
        if gpu_head.lacks(index.shape[0]):
            gpu_head.add(torch.cat(ready))
            ready.clear()
        gpu_head.keep(scored, coefficients, loss.of_entropy(measured))
        ready.append(index)
    if ready:
        gpu_head.add(torch.cat(ready))
    return gpu_head.finish()


def _loss_in_chunks(
    hidden: Tensor,
    head: Head,
    wanted: tuple[bool, bool, bool],
    dtype: torch.dtype,
    loss: ChunkLosses,
) -> Gradient3:
    plan, rows = (
        loss.plan._replace(kept=loss.waits and keeps_gradients(head, wanted)),
        loss.plan.rows,
    )
    # Without gradients of the head nothing but a factor a row waits for the loss.
    frozen = loss.waits and wanted[0] and not any(wanted[1:])
    gradients = Gradients(hidden, head, wanted, rows.index.shape[0], dtype)
    if not any(wanted[1:]):
        if loss.waits:  # the rows' own gradients do, which the budget bounds too
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
        known = joined([part.statistics for part in scored], hidden)
        coefficients = loss.coefficients(chunk, known.tokens)
        if coefficients is None:
            continue
        if frozen and gradients.hidden is not None:
            for piece, part in zip(pieces, of_rows, strict=True):
                part *= coefficients[piece].unsqueeze(1)
                add_rows(gradients.hidden, index[piece], part)
        elif keep:
            states = hidden.index_select(0, index)
            kept = kept_gradients[: len(states)]
            gradients.add_kept(kept, coefficients, known.tokens, states, index)
        elif len(pieces) == 1:
            gradients.add(scored[0], coefficients, states, index, loss.of_entropy(measured))
        else:
            waiting.append(Waiting(index, targets, known, coefficients))
    add_waiting(gradients, hidden, waiting, plan, buffer)
    return gradients.finish()


def _buffer_for(chunks: list[Chunk], plan: Plan, gradients: Gradients) -> LogitsBuffer:
    """For the logits of every chunk without lent memory, and before them for what lending copies."""
    rows = max((chunk.size() for chunk in chunks if not chunk.lent), default=0)
    elements = [min(rows, plan.piece_rows) * gradients.head.weight.shape[0]]
    if gradients.weight is not None:
        elements += [gradients.weight.copied(chunk.size()) for chunk in chunks if chunk.lent]
    return LogitsBuffer(max(elements))
