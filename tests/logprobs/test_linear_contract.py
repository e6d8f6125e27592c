"""The numerics contract on every path of the linear losses, and how they live with the rest of torch."""

from __future__ import annotations

import math

import pytest
import torch
from _helpers import bits, name_of
from linear_problem import problem
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyfast_dpo import (
    CompletionRows,
    fused_linear_dpo_loss,
    fused_linear_loss,
    linear_sequence_logps,
    linear_token_logps,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
# Bit for bit only where the products are our own: those of float64 are torch's.
own_products = pytest.mark.parametrize("dtype", DTYPES[1:], ids=name_of)
# (trainable head, budget in rows): the passes that a loss can take.
PATHS = [
    (True, 1000, "trainable head"),
    (True, 5, "trainable head, pairs beyond the budget"),
    (True, 8, "trainable head, pairs in pieces"),  # whose gradients a bfloat16 head keeps
    (False, 1000, "frozen head"),
    (False, 5, "frozen head, pairs beyond the budget"),
]
every_path = pytest.mark.parametrize(
    "trainable, budget", [p[:2] for p in PATHS], ids=[p[2] for p in PATHS]
)


def run(
    hidden: Tensor, weight: Tensor, labels: Tensor, trainable: bool, budget: int, **options
) -> list[Tensor]:
    """[loss, losses, log-probs of both sides, gradients] on one path."""
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trainable)
    row = weight.shape[0] * (8 if weight.dtype == torch.float64 else 4)
    options = {"max_chunk_bytes": budget * row, **options}
    result = fused_linear_dpo_loss(*leaves, labels, **options)
    result.loss.backward()
    outputs = [result.loss.detach(), result.losses, result.chosen_logps, result.rejected_logps]
    return outputs + [leaf.grad for leaf in leaves if leaf.requires_grad]


# --- exactness --------------------------------------------------------------------------------------


@every_path
@every_dtype
@pytest.mark.parametrize("margin", [10.0, 17.0, 20.0, 40.0])
def test_certain_models_keep_their_digits(margin, dtype, trainable, budget):
    vocab = 37
    hidden = torch.eye(vocab, dtype=dtype)[None, :14].repeat(2, 1, 1)
    labels = torch.arange(14).repeat(2, 1)
    weight = torch.eye(vocab, dtype=dtype) * margin
    _, _, chosen, _, *gradients = run(hidden, weight, labels, trainable, budget)
    truth = -14 * math.log1p((vocab - 1) * math.exp(-margin))
    assert chosen.item() < 0 and abs(chosen.item() / truth - 1) < 1e-5
    assert all(g.isfinite().all() for g in gradients)
    # Chosen and rejected are the same response: the gradient pulls it up and down alike.
    assert (gradients[0][0] == -gradients[0][1]).all()
    if dtype != torch.float16 or margin < 20:  # it holds nothing below 6e-8
        assert gradients[0][0].abs().max() > 0


@every_path
@every_dtype
def test_an_impossible_first_part_of_the_vocabulary_changes_nothing_else(dtype, trainable, budget):
    hidden, weight, _, labels = problem(vocab=300, dtype=dtype)
    labels = labels.masked_fill((labels >= 0) & (labels < 140), 140)
    bias = torch.zeros(300, dtype=dtype)
    bias[:140] = -math.inf
    masked = run(hidden, weight, labels, trainable, budget, bias=bias)
    kept = run(hidden, weight[140:], labels.where(labels < 0, labels - 140), trainable, budget)
    tolerance = (
        {"rtol": 2e-5, "atol": 2e-5} if dtype in DTYPES[:2] else {"rtol": 0.01, "atol": 0.01}
    )
    for i, (ours, other) in enumerate(zip(masked, kept, strict=True)):
        if i == 5:
            assert (ours[:140] == 0).all(), "tokens that cannot be have no gradient"
            ours = ours[140:]
        torch.testing.assert_close(ours, other, **tolerance)


@every_path
def test_one_pair_a_hundred_times_longer_than_the_rest(trainable, budget):
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(6, 300, 8, generator=generator)
    weight = torch.randn(61, 8, generator=generator)
    labels = torch.full((6, 300), -100)
    labels[:, 1:4] = torch.randint(0, 61, (6, 3), generator=generator)
    labels[1] = torch.randint(0, 61, (300,), generator=generator)
    labels[4] = torch.randint(0, 61, (300,), generator=generator)
    ours = run(hidden, weight, labels, trainable, budget)
    truth = run(hidden.double(), weight.double(), labels, trainable, budget, impl="torch")
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-5)


@every_path
@own_products
def test_policy_equal_to_reference_gives_ln_2_and_opposite_gradients(dtype, trainable, budget):
    hidden, weight, _, labels = problem(sequences=6, dtype=dtype)
    hidden[3:], labels[3:] = hidden[:3].clone(), labels[:3].clone()
    loss, losses, *_, of_hidden = run(
        hidden, weight, labels, trainable, budget, reference_hidden=hidden
    )[:5]
    ln_2 = torch.tensor(2.0, dtype=loss.dtype).log()
    assert loss.item() == ln_2.item() and (losses == ln_2).all()
    assert torch.equal(bits(of_hidden[:3].abs()), bits(of_hidden[3:].abs()))
    assert torch.equal(of_hidden[:3], -of_hidden[3:])


@every_path
@own_products
def test_permuted_batches_are_bitwise_equal_a_sequence(dtype, trainable, budget):
    hidden, weight, _, labels = problem(sequences=8, dtype=dtype)
    order = torch.tensor([2, 0, 3, 1])
    rows = torch.cat([order, order + 4])
    straight = run(hidden, weight, labels, trainable, budget)
    permuted = run(hidden[rows], weight, labels[rows], trainable, budget)
    for i in (1, 2, 3):
        assert torch.equal(bits(permuted[i]), bits(straight[i][order]))
    assert torch.equal(bits(permuted[4]), bits(straight[4][rows])), "gradient of hidden"


@every_path
@own_products
def test_thread_counts_are_bitwise_equal(dtype, trainable, budget):
    hidden, weight, _, labels = problem(sequences=8, vocab=3001, dtype=dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(hidden, weight, labels, trainable, budget))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(results[0], other, strict=True))


@every_path
@every_dtype
def test_nan_in_a_scored_state_is_nan_out_for_its_sequence_alone(dtype, trainable, budget):
    hidden, weight, _, labels = problem(sequences=4, dtype=dtype)
    labels[:] = labels[0]
    hidden[1, 4] = math.nan
    _, losses, chosen, rejected, *_ = run(hidden, weight, labels, trainable, budget)
    assert chosen.isnan().tolist() == losses.isnan().tolist() == [False, True]
    assert rejected.isfinite().all()


# --- the rest of torch ------------------------------------------------------------------------------


def test_checkpointing_gives_the_same_gradients():
    hidden, weight, _, labels = problem()
    rows = CompletionRows.from_labels(labels)
    results = []
    for wrapped in (True, False):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()

        def loss(h: Tensor, w: Tensor) -> Tensor:
            return fused_linear_dpo_loss(h * 2, w, rows=rows).loss

        value = checkpoint(loss, *leaves, use_reentrant=False) if wrapped else loss(*leaves)
        value.backward()
        results.append([leaf.grad for leaf in leaves])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


COMPILED = [
    (lambda h, w, labels, rows: fused_linear_dpo_loss(h * 2, w, labels).loss * 3, "loss"),
    (lambda h, w, labels, rows: fused_linear_dpo_loss(h * 2, w, rows=rows).loss * 3, "loss from rows"),
    (lambda h, w, labels, rows: linear_sequence_logps(h * 2, w, labels).sum(), "log-probs"),
    (
        lambda h, w, labels, rows: fused_linear_loss(
            h * 2, w, None, lambda logps, units: logps.square().sum(), rows=rows
        ).loss,
        "any loss",
    ),
]  # fmt: skip


@pytest.mark.parametrize("function", [c[0] for c in COMPILED], ids=[c[1] for c in COMPILED])
def test_compiled_code_runs_them_between_two_graphs(function):
    hidden, weight, _, labels = problem()
    rows = CompletionRows.from_labels(labels)
    torch._dynamo.reset()
    results = []
    for call in (torch.compile(function, backend="aot_eager"), function):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        call(*leaves, labels, rows).backward()
        results.append([leaf.grad for leaf in leaves])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@own_products
def test_strided_hidden_and_a_weight_that_is_a_view_are_read_right(dtype):
    hidden, weight, _, labels = problem(dtype=dtype)
    plain = linear_token_logps(hidden, weight, labels)
    strided = hidden.transpose(0, 1).contiguous().transpose(0, 1)
    columns = weight.T.contiguous().T
    padded = torch.full((211, 20), math.nan, dtype=dtype)
    padded[:, 2:18] = weight
    for h, w in ((strided, weight), (hidden, columns), (hidden, padded[:, 2:18])):
        assert torch.equal(bits(linear_token_logps(h, w, labels)), bits(plain))
    leaf = strided.clone().requires_grad_()
    (of_view,) = torch.autograd.grad(
        fused_linear_dpo_loss(leaf, columns.requires_grad_(), labels).loss, leaf
    )
    assert of_view.shape == hidden.shape and of_view.isfinite().all()
