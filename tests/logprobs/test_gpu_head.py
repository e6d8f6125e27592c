"""The head's passes as a GPU would run them, on the CPU: every result against float64, every product counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from _helpers import bits, name_of
from torch import Tensor

from pyfast_dpo import (
    CompletionRows,
    fused_linear_dpo_loss,
    fused_linear_loss,
    linear_sequence_logps,
    linear_token_logps,
)
from pyfast_dpo.logprobs import gpu_head, linear_loss
from pyfast_dpo.logprobs.chunks import LinearLogps
from pyfast_dpo.logprobs.plan import Plan

VOCAB, WIDTH = 215, 24  # 208 and 7 are multiplied apart
PARTS = (208, 7)
# Scored tokens of chosen responses, then of rejected ones.
LENGTHS = (3, 9, 1, 5, 6, 2)
TOTAL = sum(LENGTHS)
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


class Batch(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    rows: CompletionRows


def rows_of_logits(products: list[tuple[int, int, int]]) -> list[int]:
    return [m for m, depth, n in products if (depth, n) == (WIDTH, PARTS[0])]


def rows_times_weight(products: list[tuple[int, int, int]]) -> list[int]:
    return [m for m, depth, n in products if (depth, n) == (PARTS[0], WIDTH)]


def rows_into_weight(products: list[tuple[int, int, int]]) -> list[int]:
    return [depth for m, depth, n in products if (m, n) == (PARTS[0], WIDTH)]


def make(dtype: torch.dtype, trainable: bool = True, bias: bool = False, seed: int = 0) -> Batch:
    """Two of the rows are of the same hidden state, as the first of both responses to a shared prompt are."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    index = torch.randperm(TOTAL + 5, generator=generator)[:TOTAL]
    index[0] = index[sum(LENGTHS[:3])]
    targets = torch.randint(0, VOCAB, (TOTAL,), generator=generator)
    rows = CompletionRows(index, targets, torch.tensor(LENGTHS), LENGTHS)
    weight = normal(VOCAB, WIDTH).requires_grad_(trainable)
    own_bias = normal(VOCAB).requires_grad_(trainable) if bias else None
    return Batch(normal(TOTAL + 5, WIDTH).requires_grad_(), weight, own_bias, rows)


def in_float64(batch: Batch) -> Batch:
    def wide(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return tensor.detach().double().requires_grad_(tensor.requires_grad)

    return Batch(wide(batch.hidden), wide(batch.weight), wide(batch.bias), batch.rows)


def leaves(batch: Batch) -> list[Tensor]:
    return [t for t in batch[:3] if t is not None and t.requires_grad]


def loss(batch: Batch, **options: Any) -> list[Tensor]:
    def hinge(logps: Tensor, units: slice) -> tuple[Tensor, tuple[Tensor, ...]]:
        margins = logps[0] - logps[1] if logps.shape[0] == 2 else logps.flatten()
        return F.softplus(-0.3 * margins).sum(), (margins.detach(),)

    out = fused_linear_loss(
        batch.hidden, batch.weight, None, hinge, rows=batch.rows, bias=batch.bias, statistics=True, **options
    )  # fmt: skip
    gradients = torch.autograd.grad(out.loss, leaves(batch))
    return [out.loss, out.logps, *out.outputs, *out.statistics, *gradients]


def log_probs(batch: Batch, **options: Any) -> list[Tensor]:
    logps = linear_sequence_logps(
        batch.hidden, batch.weight, rows=batch.rows, bias=batch.bias, **options
    )
    weights = torch.linspace(-1, 1, len(LENGTHS), dtype=logps.dtype)
    return [logps, *torch.autograd.grad((logps * weights).sum(), leaves(batch))]


def budget(rows: int, dtype: torch.dtype) -> int:
    return rows * VOCAB * (8 if dtype == torch.float64 else 4)


@pytest.mark.parametrize(
    "options", [{}, {"logit_scale": 0.7}, {"softcap": 3.0}, {"bias": True}], ids=str
)
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
@pytest.mark.parametrize("rows", [11, 1000], ids="{} rows in the budget".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("step", [loss, log_probs], ids=lambda step: step.__name__)
def test_results_equal_float64(
    products, step: Callable[..., list[Tensor]], dtype, rows, trainable, options
):
    options = dict(options)
    batch = make(dtype, trainable, options.pop("bias", False))
    ours = step(batch, impl="fused", max_chunk_bytes=budget(rows, dtype), **options)
    truth = step(in_float64(batch), impl="torch", **options)
    assert products
    precision = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-5}[dtype]
    for mine, true in zip(ours, truth, strict=True):
        if mine.dtype == torch.bool:
            assert torch.equal(mine, true)
            continue
        is_gradient = mine.dtype == dtype and mine.dim() > 0 and mine.shape[0] in (TOTAL + 5, VOCAB)
        allowed = max(precision, 2 * torch.finfo(dtype).eps) if is_gradient else precision
        error = (mine.detach().double() - true.detach()).norm() / true.detach().norm()
        assert error <= allowed, (mine.shape, float(error))


@pytest.mark.parametrize("group", [2, None, 1], ids="group {}".format)
@pytest.mark.parametrize("rows", [5, 11, 1000], ids="{} rows in the budget".format)
@pytest.mark.parametrize("wait", [4, 1000], ids="{} rows wait".format)
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
def test_a_loss_costs_three_products_or_two_whatever_it_couples(
    products, monkeypatch, trainable, wait, rows, group
):
    """Every row once in each of them, but for rows that fill up the last piece of the first."""
    monkeypatch.setattr(linear_loss, "rows_that_wait", lambda head: wait)
    batch = make(torch.bfloat16, trainable)
    loss(batch, group=group, impl="fused", max_chunk_bytes=budget(rows, torch.bfloat16))
    assert TOTAL <= sum(rows_of_logits(products)) <= 2 * TOTAL + 16
    assert sum(rows_times_weight(products)) == TOTAL
    assert sum(rows_into_weight(products)) == (TOTAL if trainable else 0)
    if wait == 1000:
        assert len(rows_into_weight(products)) == trainable
    assert len(products) == 2 * sum(
        len(rows(products)) for rows in (rows_of_logits, rows_times_weight, rows_into_weight)
    )  # and as many of the few columns that are left


def test_log_probs_cost_four_products_under_a_trainable_head_and_two_under_a_frozen_one(products):
    for trainable, times in ((True, 2), (False, 1)):
        products.clear()
        log_probs(
            make(torch.bfloat16, trainable), impl="fused", max_chunk_bytes=budget(5, torch.bfloat16)
        )
        assert times * TOTAL <= sum(rows_of_logits(products)) < times * (TOTAL + 5)


@pytest.mark.parametrize("rows, size, grain", [(1000, 1000, 8), (15, 8, 8), (5, 5, 5)])
def test_products_of_logits_have_few_numbers_of_rows(products, rows, size, grain):
    """So that a row's bits do not depend on its neighbours: another number may be another kernel."""
    for seed in range(3):
        loss(
            make(torch.bfloat16, seed=seed),
            impl="fused",
            max_chunk_bytes=budget(rows, torch.bfloat16),
        )
    seen = set(rows_of_logits(products))
    assert seen and max(seen) <= size and all(count % grain == 0 for count in seen)


def test_products_of_an_odd_vocabulary_are_of_whole_vectors(products, monkeypatch):
    """But for the few columns that are left; and every row begins where a vector may."""
    strides = set()
    plain = gpu_head.product

    def watched(left: Tensor, right: Tensor, out: Tensor, accumulate: bool = False) -> None:
        for matrix in (left, out):
            if matrix.shape[1] in PARTS:
                strides.add(matrix.stride(0))
        plain(left, right, out, accumulate)

    monkeypatch.setattr(gpu_head, "product", watched)
    loss(make(torch.bfloat16), impl="fused")
    assert strides == {216}
    widths = {size for shape in products for size in shape} & {VOCAB, *PARTS}
    assert widths == set(PARTS)


@pytest.mark.parametrize(
    "wait, expected", [(1000, [torch.bfloat16]), (4, [torch.float32] * 3)], ids=str
)
def test_the_gradient_of_the_weight_is_rounded_once(products, monkeypatch, wait, expected):
    """By its product where all rows wait together, else after the sum of several."""
    dtypes = []
    plain = gpu_head.product

    def watched(left: Tensor, right: Tensor, out: Tensor, accumulate: bool = False) -> None:
        if left.shape[0] == PARTS[0]:
            dtypes.append(out.dtype)
        plain(left, right, out, accumulate)

    monkeypatch.setattr(gpu_head, "product", watched)
    monkeypatch.setattr(linear_loss, "rows_that_wait", lambda head: wait)
    loss(make(torch.bfloat16), impl="fused", max_chunk_bytes=budget(5, torch.bfloat16))
    assert dtypes == expected


def test_a_row_has_the_same_bits_in_any_batch_and_budget(products):
    """As far as the products do, which have fixed numbers of rows."""
    batch = make(torch.float32)
    with torch.no_grad():
        together = linear_token_logps(batch.hidden, batch.weight, rows=batch.rows, impl="fused")
        first = 0
        for length in LENGTHS:
            own = slice(first, first + length)
            alone = CompletionRows(
                batch.rows.index[own], batch.rows.targets[own], torch.tensor([length]), (length,)
            )
            tokens = linear_token_logps(batch.hidden, batch.weight, rows=alone, impl="fused")
            torch.testing.assert_close(tokens, together[own], rtol=1e-6, atol=1e-6)
            first += length


@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
def test_nothing_to_score_is_finite(products, trainable):
    hidden = torch.randn(4, 3, WIDTH).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH).requires_grad_(trainable)
    labels = torch.full((4, 3), -100)
    out = fused_linear_dpo_loss(hidden, weight, labels, impl="fused")
    gradients = torch.autograd.grad(out.loss, [hidden, weight] if trainable else [hidden])
    assert out.loss.isfinite() and all((g == 0).all() for g in gradients)
    assert linear_sequence_logps(hidden, weight, labels, impl="fused").tolist() == [0.0] * 4


def test_policy_equal_to_reference_gives_ln_2_to_the_bit(products):
    batch = make(torch.bfloat16)
    with torch.no_grad():
        reference = linear_sequence_logps(batch.hidden, batch.weight, rows=batch.rows, impl="fused")
    out = fused_linear_dpo_loss(
        batch.hidden, batch.weight, rows=batch.rows, reference_logps=reference, impl="fused"
    )
    expected = torch.full((len(LENGTHS) // 2,), torch.log(torch.tensor(2.0)).item())
    assert torch.equal(bits(out.losses), bits(expected))


def test_the_gradient_of_an_entropy_equals_float64(products):
    batch = make(torch.float32)
    truth = in_float64(batch)

    def gradients(of: Batch) -> list[Tensor]:
        if of.hidden.dtype == torch.float64:
            logps = (of.hidden[of.rows.index] @ of.weight.T).log_softmax(-1)
            tokens = logps.gather(1, of.rows.targets[:, None])[:, 0]
            entropy = -(logps.exp() * logps).sum(-1)
        else:
            plan = Plan(of.rows, 1, 11)
            tokens, entropy, *_ = LinearLogps.apply(
                of.hidden, of.weight, of.bias, (1.0, None), plan, True
            )
        return list(torch.autograd.grad(tokens.sum() + 0.5 * entropy.sum(), leaves(of)))

    for mine, true in zip(gradients(batch), gradients(truth), strict=True):
        assert (mine.double() - true).norm() <= 1e-5 * true.norm()
