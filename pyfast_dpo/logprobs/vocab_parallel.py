"""Log-probs under an lm_head whose weight is divided over the vocabulary among the ranks of a process group.

Every rank holds the hidden states and its part of the vocabulary. Ranks exchange four numbers a row (maximum,
sum, the target's logit and whose it is) in the forward pass and the gradient of the rows in the backward pass;
logits and the weight's gradient stay where they are. Use it with tensor parallelism, or with a DTensor weight
of `Shard(0)` placement through `weight.to_local()`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyfast_dpo.logprobs.chunks import refuse_second
from pyfast_dpo.logprobs.gpu_head import GpuHead, rows_that_wait
from pyfast_dpo.logprobs.head import Head, add_rows
from pyfast_dpo.logprobs.linear_checks import (
    check_labels_or_rows,
    checked_head,
    completion_rows,
    rows_in_budget,
)
from pyfast_dpo.logprobs.plan import Plan
from pyfast_dpo.logprobs.rows import CompletionRows
from pyfast_dpo.logprobs.scores import (
    Gradients,
    Statistics,
    gradient_of_tile,
    score_logits,
    sums_of_sequences,
)
from pyfast_dpo.ops import dispatch
from pyfast_dpo.ops.dispatch import use_kernels_for
from pyfast_dpo.ops.dtypes import statistics_dtype

Wanted = tuple[bool, bool, bool]  # gradients of hidden, weight, bias
NOTHING: Wanted = (False, False, False)


def vocab_parallel_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    rows: CompletionRows | None = None,
    bias: Tensor | None = None,
    shift: bool = False,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    max_chunk_bytes: int | None = None,
) -> Tensor:
    """`linear_token_logps` with the vocabulary divided among ranks; called by all ranks of the group.

    Args:
        hidden: `[..., T, H]`, the same on every rank.
        weight: `[V_r, H]`, this rank's part of the vocabulary; bias: `[V_r]`.
        labels, rows, shift, ...: as in `linear_token_logps`, tokens of the whole vocabulary.
        group: the ranks that share the vocabulary; None: all ranks.
        vocab_start: the token of weight[0]; None: parts are equal and in the order of the ranks.

    Returns:
        `[..., T]`, or `[R]` with rows, the same on every rank; NaN for a label that no rank holds. Each rank
        receives the gradient of its weight, and the whole gradient of hidden: do not sum it over the group.

    Raises:
        TypeError, ValueError: as `linear_token_logps`.
    """
    tokens, found = _tokens(
        "vocab_parallel_token_logps", hidden, weight, labels, group, vocab_start, rows, bias, shift,
        ignore_index, logit_scale, softcap, max_chunk_bytes,
    )  # fmt: skip
    if labels is None:
        return tokens
    return tokens.new_zeros(labels.numel()).index_put((found.index,), tokens).view(labels.shape)


def vocab_parallel_sequence_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None = None,
    *,
    average: bool = False,
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    rows: CompletionRows | None = None,
    bias: Tensor | None = None,
    shift: bool = False,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    max_chunk_bytes: int | None = None,
) -> Tensor:
    """Sum, or with `average` mean, of `vocab_parallel_token_logps` over every sequence: `[B]` or `[S]`."""
    tokens, found = _tokens(
        "vocab_parallel_sequence_logps", hidden, weight, labels, group, vocab_start, rows, bias, shift,
        ignore_index, logit_scale, softcap, max_chunk_bytes,
    )  # fmt: skip
    sums = sums_of_sequences(tokens, found.counts, None, average)
    return sums if labels is None else sums.view(labels.shape[:-1])


def _tokens(
    function: str,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    group: dist.ProcessGroup | None,
    vocab_start: int | None,
    rows: CompletionRows | None,
    bias: Tensor | None,
    shift: bool,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    max_chunk_bytes: int | None,
) -> tuple[Tensor, CompletionRows]:
    head = checked_head(function, hidden, weight, bias, logit_scale, softcap)
    check_labels_or_rows(function, hidden, labels, rows)
    max_rows = rows_in_budget(function, max_chunk_bytes, head)
    use_kernels_for(function, "fused", hidden)
    found = completion_rows(function, hidden, None, labels, rows, shift, ignore_index, False)
    if vocab_start is None:
        vocab_start = dist.get_rank(group) * weight.shape[0]
    tokens = VocabParallelLogps.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        head.weight,
        head.bias,
        (head.logit_scale, head.softcap),
        Plan(found, 1, max_rows),
        vocab_start,
        group,
    )
    return tokens, found


class VocabParallelLogps(torch.autograd.Function):
    """Log-prob of every scored row; one product forward, three backward, one collective in each."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: tuple[float, float | None],
        plan: Plan,
        vocab_start: int,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        head, rows = Head(weight, bias, *activation), plan.rows
        targets = rows.targets - vocab_start
        if dispatch.on_gpu(hidden):
            count = rows.index.shape[0]
            gpu_head = GpuHead(hidden, head, plan.max_rows, NOTHING, weight.dtype, count, count)
            pieces = gpu_head.pieces(rows.index)
        else:
            pieces = _pieces(hidden, head, plan)
        parts = [_of_shard(logits, targets[piece]) for piece, logits in pieces]
        wide = statistics_dtype(hidden.dtype)
        own = torch.cat(parts, 1) if parts else hidden.new_empty((4, 0), dtype=wide)
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, own, group=group)
        statistics = _of_vocabulary(torch.stack(gathered))
        ctx.options = activation, plan, vocab_start, group
        ctx.save_for_backward(hidden, weight, bias, *statistics)
        return statistics.tokens.clone()

    @staticmethod
    def backward(ctx: Any, grad_tokens: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        with torch.no_grad():
            gradients = VocabParallelLogps.gradients(ctx, grad_tokens, *saved)
        return *refuse_second(gradients, saved[:3]), None, None, None, None

    @staticmethod
    def gradients(ctx: Any, grad_tokens: Tensor, *saved: Tensor) -> list[Tensor | None]:
        hidden, weight, bias, *known = saved
        activation, plan, vocab_start, group = ctx.options
        rows, head, wanted = plan.rows, Head(weight, bias, *activation), ctx.needs_input_grad[:3]
        targets, statistics = rows.targets - vocab_start, Statistics(*known)
        compute = _gradients_on_gpu if dispatch.on_gpu(hidden) else _gradients_by_tiles
        of_rows, gradients = compute(hidden, head, wanted, plan, targets, statistics, grad_tokens)
        if wanted[0]:
            # Once, in float32: parts may be cut differently on other ranks.
            dist.all_reduce(of_rows, group=group)
            of_hidden = torch.zeros_like(hidden)
            add_rows(of_hidden, rows.index, of_rows)
            gradients[0] = of_hidden
        return gradients


def _pieces(hidden: Tensor, head: Head, plan: Plan) -> Iterator[tuple[slice, Tensor]]:
    buffer, index = plan.buffer(head.weight.shape[0]), plan.rows.index
    for piece in plan.pieces(index.shape[0]):
        yield piece, head.logits(hidden.index_select(0, index[piece]), buffer)


def _gradients_by_tiles(
    hidden: Tensor,
    head: Head,
    wanted: Wanted,
    plan: Plan,
    targets: Tensor,
    statistics: Statistics,
    coefficients: Tensor,
) -> tuple[Tensor, list[Tensor | None]]:
    """This rank's share of the rows' gradients `[R, H]`; those of weight and bias, after a place for hidden's."""
    index, buffer = plan.rows.index, plan.buffer(head.weight.shape[0])
    gradients = Gradients(hidden, head, wanted, index.shape[0], head.weight.dtype)
    of_rows = coefficients.new_zeros((index.shape[0], hidden.shape[1]))
    for part in plan.parts(index.shape[0], head.weight.shape[0]):
        partial = gradients.add_by_tiles(
            hidden.index_select(0, index[part]),
            targets[part],
            Statistics(*(values[part] for values in statistics)),
            coefficients[part],
            buffer,
        )
        if partial is not None:
            of_rows[part] = partial
    return of_rows, list(gradients.finish())


def _gradients_on_gpu(
    hidden: Tensor,
    head: Head,
    wanted: Wanted,
    plan: Plan,
    targets: Tensor,
    statistics: Statistics,
    coefficients: Tensor,
) -> tuple[Tensor, list[Tensor | None]]:
    """The same in few large products."""
    index, waiting = plan.rows.index, rows_that_wait(head)
    count, dtype = index.shape[0], head.weight.dtype
    gpu_head = GpuHead(hidden, head, plan.max_rows, wanted, dtype, count, waiting)
    of_rows = [coefficients.new_empty((0, hidden.shape[1]))]
    for first in range(0, count, waiting):
        own = index[first : first + waiting]
        for piece, logits in gpu_head.pieces(own):
            part = slice(first + piece.start, first + piece.stop)
            known = Statistics(*(values[part] for values in statistics))
            gpu_head.keep_gradient(
                gradient_of_tile(logits, 0, targets[part], known, coefficients[part], head)
            )
        if wanted[0]:
            of_rows.append(gpu_head.take_rows())
        gpu_head.add_to_head(own)
    return torch.cat(of_rows), list(gpu_head.finish())


def _of_shard(logits: Tensor, targets: Tensor) -> Tensor:
    """`[4, r]`: maximum; sum of exp(z - maximum) without the target; the target's logit; 1 where it is here."""
    vocab = logits.shape[1]
    here = (targets >= 0) & (targets < vocab)
    column = targets.where(here, 0)
    known = score_logits(logits, column).statistics
    # NaN survives amax; a part of the vocabulary may be impossible, which alone would be no distribution.
    top = logits.amax(1)
    # row_sum (1 - p), without cancellation.
    others = known.row_sum * torch.where(here, -torch.expm1(known.tokens), 1.0)
    others = torch.where(top == -torch.inf, 0.0, others)
    target = logits.gather(1, column.unsqueeze(1)).squeeze(1)
    return torch.stack([top, others, torch.where(here, target, 0.0), here.to(top.dtype)])


def _of_vocabulary(parts: Tensor) -> Statistics:
    """Statistics of whole rows from `[ranks, 4, r]`, in the order of the ranks, so the same on all of them."""
    top, others, targets, here = parts.double().unbind(1)
    row_max = top.amax(0)
    base = row_max.masked_fill(row_max == -torch.inf, 0.0)
    rest = (others * (top - base).exp()).sum(0)
    target = targets.sum(0).masked_fill(here.sum(0) != 1, torch.nan)
    row_sum = rest + (target - base).exp()
    tokens = -torch.logaddexp(torch.zeros_like(rest), rest.log() + (base - target))
    # Nothing in the row is possible, or something is +inf: no distribution.
    undefined = ~row_max.isfinite()
    values = (
        tokens.masked_fill(undefined, torch.nan),
        row_max,
        row_sum.masked_fill(undefined, torch.nan),
    )
    return Statistics(*(value.to(parts.dtype) for value in values))
