"""Attention over rows of shared prompts: the operator, the registry's function, and how rows are packed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from _helpers import assert_rule
from fuzz.case import Case, operator, public
from fuzz.draw import HALVES, INT64_MAX, Draw
from torch import Tensor

from pyfast_dpo.layout.attention import shared_prompt_attention as registry_attention
from pyfast_dpo.layout.shared_prompt import Group, SharedPromptLayout, pack_row

ops = torch.ops.pyfast_dpo
# Of the largest element, as in tests/layout/test_attention_cpu.py: roundings of float32, of results in half types.
TOLERANCES = {torch.float32: 4e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def groups(draw: Draw) -> tuple[Group, ...]:
    most = draw.pick([5, 5, 17, 65, 130])
    return tuple(
        Group(draw.size(most), tuple(draw.size(most) for _ in range(draw.integer(0, 4))))
        for _ in range(draw.integer(0, 3))
    )


def drawn(draw: Draw) -> tuple[SharedPromptLayout, list[Tensor], Tensor]:
    """(layout, query, key and value [T, heads, D], a gradient)"""
    layout = SharedPromptLayout(groups(draw))
    key_heads = draw.integer(1, 3)
    heads = key_heads * draw.integer(1, 3)
    width, dtype = draw.size(129, 1), draw.pick([torch.float32, torch.float32, *HALVES])
    scale = draw.pick([0.3, 1.0, 3.0])

    def one(count: int) -> Tensor:
        return draw.layout((scale * draw.normal((layout.tokens, count, width))).to(dtype))

    return layout, [one(heads), one(key_heads), one(key_heads)], one(heads)


def dense(
    tensors: Sequence[Tensor], blocks: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """(outputs, log-sums of the scores [heads, T], of base 2) in float64: one dense score matrix with a mask."""
    query, key, value = tensors
    count = query.shape[0]
    place = torch.full((count,), -1)  # in its sequence
    prompt_end, prompt_first, begins = (torch.zeros(count, dtype=torch.int64) for _ in range(3))
    for first, size, p_first, p_count in blocks.tolist():
        own = slice(first, first + size)
        place[own] = torch.arange(p_count, p_count + size)
        begins[own], prompt_first[own], prompt_end[own] = first, p_first, p_first + p_count
    at = torch.arange(count)
    q, k = at[:, None], at[None, :]
    own = (begins[q] == begins[k]) & (k <= q)
    shared = (k >= prompt_first[q]) & (k < prompt_end[q])
    distance = torch.where(own, q - k, place[q] - (k - prompt_first[q]))
    seen = (own | shared) & (distance < window)
    repeats = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(repeats, 1) for t in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    scores = scores.masked_fill(~seen, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value), scores.logsumexp(-1) / math.log(
        2
    )


def check_attention(
    names: Sequence[str],
    ours: Sequence[Tensor],
    truth: Sequence[Tensor],
    sizes: Sequence[float],
    scores: float,
) -> None:
    """Of the largest element, or of `sizes`; a score of that size has float32 roundings, which exp magnifies."""
    for name, result, true, size in zip(names, ours, truth, sizes, strict=True):
        if true.numel() == 0:
            assert result.shape == true.shape, name
            continue
        tolerance = TOLERANCES[result.dtype] + 4 * scores * 2.0**-23
        largest = max(float(true.abs().max()), size)
        assert_rule(name, result, true, true, tolerance * largest + 1e-30)


def attention(draw: Draw) -> Case:
    layout, tensors, gradient = drawn(draw)
    backward = draw.chance(0.5)
    scale = draw.pick([tensors[0].shape[2] ** -0.5, 0.3])
    window = draw.pick([1, 3, 40, max(layout.tokens, 1), INT64_MAX])
    names = ("query", "key", "value")
    blocks = layout.blocks()
    arguments: dict[str, Any] = dict(zip(names, tensors, strict=True))
    if backward:
        output, log_sums = ops.shared_prompt_attention(*tensors, blocks, scale, window)
        arguments = dict(grad_output=gradient, **arguments, output=output, log_sums=log_sums)
        known = dict(zip(names, [t.clone() for t in tensors], strict=True), output=output.clone(),
                     log_sums=log_sums.clone())  # fmt: skip
    arguments = dict(**arguments, blocks=draw.layout(blocks), scale=scale, window=window)

    def judge(given: dict[str, Any], results: Sequence[Tensor]) -> None:
        inputs = [given[n] for n in names]
        assert all(t.dtype == inputs[0].dtype and t.dim() == 3 for t in inputs), "accepted dtypes"
        assert inputs[1].shape == inputs[2].shape
        wide = [t.detach().double().requires_grad_() for t in inputs]
        truth, log_sums = dense(wide, given["blocks"], float(given["scale"]), given["window"])
        reach = [float(t.abs().max()) if t.numel() else 0.0 for t in inputs]
        scores = reach[0] * reach[1] * float(given["scale"]) * inputs[0].shape[2]
        if not all(t.isfinite().all() for t in inputs) or scores > 1e3 or reach[2] > 1e30:
            return
        if not backward:
            check_attention(["output"], results[:1], [truth.detach()], [0.0], scores)
            assert_rule("log_sums", results[1], log_sums, log_sums, 1e-5 * (1 + scores))
            return
        if (given["scale"], given["window"]) != (scale, window):
            return
        for name, value in known.items():
            assert given[name].shape == value.shape and given[name].dtype == value.dtype
            if not torch.equal(given[name], value):
                return  # of another forward pass
        extra = given["grad_output"]
        assert extra.dtype == inputs[0].dtype and extra.shape == inputs[0].shape
        if not extra.isfinite().all():
            return
        slopes = torch.autograd.grad(truth, wide, extra.double(), materialize_grads=True)
        taken_off = (extra.double() * truth.detach()).sum(-1).abs()
        off = float(taken_off.max()) * float(given["scale"]) if taken_off.numel() else 0.0
        sizes = [off * reach[1], off * reach[0], 0.0]
        check_attention([f"gradient of {n}" for n in names], results, slopes, sizes, scores)

    return operator(
        "shared_prompt_attention_backward" if backward else "shared_prompt_attention",
        arguments,
        judge,
    )


class _Module:
    """What the function asks its caller for."""

    training = False


def registry(draw: Draw) -> Case:
    """The function of transformers' registry, in whichever way it takes, with gradients."""
    layout, tensors, gradient = drawn(draw)
    query, key, value = (t.transpose(0, 1).unsqueeze(0) for t in tensors)
    arguments = {
        "query": query, "key": key, "value": value, "scaling": draw.pick([None, 0.3]),
        "sliding_window": draw.pick([None, None, 1, 3, 40]), "softcap": draw.pick([None, None, None, 20.0]),
    }  # fmt: skip

    def run(**given: Any) -> Sequence[Tensor]:
        names = ("query", "key", "value")
        for n in names:
            if (
                isinstance(given[n], Tensor)
                and given[n].is_floating_point()
                and not given[n].is_meta
            ):
                given[n] = given[n].detach().requires_grad_()
        leaves = [given[n] for n in names]
        output, _ = registry_attention(
            _Module(), attention_mask=None, shared_prompt_layout=layout, **given
        )
        if (
            not output.requires_grad
            or output.is_meta
            or output.shape != gradient.unsqueeze(0).shape
        ):
            return [output.detach()]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        slopes = torch.autograd.grad(output, wanted, gradient.unsqueeze(0), materialize_grads=True)
        return [output.detach(), *slopes]

    def judge(given: dict[str, Any], results: Sequence[Tensor]) -> None:
        inputs = [given[n][0].transpose(0, 1) for n in ("query", "key", "value")]
        width, softcap = inputs[0].shape[2], given["softcap"]
        scale = width**-0.5 if given["scaling"] is None else float(given["scaling"])
        window = INT64_MAX if given["sliding_window"] is None else given["sliding_window"]
        if softcap is not None or len(results) < 4:
            assert results[0].shape == (1, *inputs[0].shape[:2], inputs[2].shape[2])
            return  # torch's own products
        wide = [t.detach().double().requires_grad_() for t in inputs]
        truth, _ = dense(wide, layout.blocks(), scale, window)
        reach = [float(t.abs().max()) if t.numel() else 0.0 for t in inputs]
        scores = reach[0] * reach[1] * scale * width
        if not scores <= 1e3 or reach[2] > 1e30 or not all(t.isfinite().all() for t in inputs):
            return
        slopes = torch.autograd.grad(truth, wide, gradient.double(), materialize_grads=True)
        ours = [results[0][0], *(r[0].transpose(0, 1) for r in results[1:])]
        taken_off = (gradient.double() * truth.detach()).sum(-1).abs()
        off = float(taken_off.max()) * scale if taken_off.numel() else 0.0
        sizes = [0.0, off * reach[1], off * reach[0], 0.0]
        check_attention(
            ["output", "of query", "of key", "of value"],
            ours,
            [truth.detach(), *slopes],
            sizes,
            scores,
        )

    # with a soft-cap the products are torch's, whose sums depend on the number of threads
    return public(registry_attention, arguments, judge, run, same_bits=arguments["softcap"] is None)


def packed(draw: Draw) -> Case:
    """Every sequence is found again in the row, and each scored token is scored by the token before it."""
    prompts = [draw.integers((draw.size(9),), 0, 3).numpy() for _ in range(2)]
    count = draw.size(7)
    arguments = {
        "prompts": [draw.pick(prompts) for _ in range(count)],
        "responses": [draw.integers((draw.size(5),), 0, 3).numpy() for _ in range(count)],
    }

    def judge(given: dict[str, Any], results: Sequence[Any]) -> None:
        (row,) = results
        tokens, start = row.tokens, 0
        assert len(tokens) == row.layout.tokens == len(row.layout.positions())
        for number, (prompt, response) in enumerate(
            zip(given["prompts"], given["responses"], strict=True)
        ):
            first, second = row.sequences[number]
            assert tokens[first].tolist() == list(prompt) and tokens[second].tolist() == list(
                response
            )
            scored = list(response) if len(prompt) else list(response)[1:]
            own = slice(start, start + row.lengths[number])
            assert row.targets[own].tolist() == scored
            places = [*range(first.start, first.stop), *range(second.start, second.stop)]
            before = places[len(places) - len(scored) - 1 : -1] if scored else []
            assert row.index[own].tolist() == before
            start = own.stop

    return Case(
        "pack_row", arguments, lambda **a: [pack_row(**a)], judge, same_bits=False, only_fits=True
    )


SUBJECTS = (attention, registry, packed)
