"""From hidden states to log-probs and losses: exactness, the work done, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from _helpers import assert_rule, bits, name_of, statistics_dtype
from linear_problem import problem
from torch import Tensor

import pyfast_dpo
from pyfast_dpo import (
    fused_linear_dpo_loss,
    fused_linear_ipo_loss,
    fused_linear_kto_loss,
    linear_sequence_logps,
    linear_token_logps,
)
from pyfast_dpo.ops import operators

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def true_loss_gradients(inputs: list[Tensor], compute) -> tuple[Tensor, list[Tensor]]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    loss = compute(*leaves)
    return loss.detach(), list(torch.autograd.grad(loss, leaves))


# --- the products -----------------------------------------------------------------------------------

SHAPES = [
    (1, 1, 1, "smallest"),
    (3, 5, 7, "smaller than one panel; odd depths end a pair of bfloat16"),
    (14, 16, 32, "one whole panel of every instruction set"),
    (15, 17, 33, "one more than a panel in every dimension"),
    (31, 64, 257, "one more than the vocabulary block of the rows' gradient"),
    (45, 40, 1030, "several tasks, ragged ends"),
    (33, 65, 300, "one more than a panel of AMX in every dimension"),
    (5, 33, 9001, "more blocks of the vocabulary than the rows' gradient has slices"),
]


def head_logits(x: Tensor, w: Tensor) -> Tensor:
    out = torch.full((x.shape[0], w.shape[0]), math.nan)
    operators.head_logits_(out, x, w)
    return out


def head_grad_weight(d: Tensor, x: Tensor) -> Tensor:
    out = torch.full((d.shape[1], x.shape[1]), math.nan)
    operators.head_grad_weight_(out, d, x, False, None)
    return out


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=name_of)
@pytest.mark.parametrize("rows, hidden, vocab", [s[:3] for s in SHAPES], ids=[s[3] for s in SHAPES])
def test_products_have_float32_sums_of_exact_inputs(rows, hidden, vocab, dtype):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, hidden, generator=generator).to(dtype)
    w = torch.randn(vocab, hidden, generator=generator).to(dtype)
    # The gradient of the logits may be rounded to bfloat16 on its way into a bfloat16 product.
    d = torch.randn(rows, vocab, generator=generator).to(dtype).float()
    for name, ours, left, right in (
        ("logits", head_logits(x, w), x, w.T),
        ("gradient of rows", operators.head_grad_rows(d, w), d, w),
        ("gradient of weight", head_grad_weight(d, x), d.T, x),
    ):
        truth = left.double() @ right.double()
        # Sums of n rounded products: n eps of the sum of magnitudes bounds them; far below in practice.
        bound = (left.double().abs() @ right.double().abs()) * left.shape[
            1
        ] ** 0.5 * 2**-23 + 2**-23
        assert_rule(name, ours, left.float() @ right.float(), truth, bound)
    if dtype == torch.bfloat16:
        assert torch.equal(
            operators.head_grad_rows(d.bfloat16(), w), operators.head_grad_rows(d, w)
        )
        assert torch.equal(head_grad_weight(d.bfloat16(), x), head_grad_weight(d, x))


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_every_number_of_last_rows_gives_the_bits_of_the_whole(dtype):
    """A last panel is computed by a kernel for as many rows as it has."""
    generator = torch.Generator().manual_seed(2)
    x, w = (torch.randn(n, 24, generator=generator).to(dtype) for n in (33, 70))
    d = torch.randn(33, 70, generator=generator).to(dtype).float()
    logits, of_rows = head_logits(x, w), operators.head_grad_rows(d, w)
    for rows in range(1, 34):
        assert torch.equal(head_logits(x[:rows], w), logits[:rows]), rows
        assert torch.equal(operators.head_grad_rows(d[:rows], w), of_rows[:rows]), rows
        if dtype == torch.float32:  # here vocabulary entries are the rows of a panel
            part = head_grad_weight(d[:, :rows], x)
            assert torch.equal(part, head_grad_weight(d, x)[:rows]), rows


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize(
    "rows, hidden, vocab, reason",
    [
        (129, 16, 65552, "logits of more than 8 million floats in whole cache lines: past the caches"),
        (129, 16, 65551, "as many, in lines that rows share: not past them"),
        (3, 128, 65540, "the same of the gradient of the weight; its last panel is not whole"),
        (3, 129, 65540, "rows of it share lines"),
        (120, 96, 2100, "enough panels and blocks to fetch the next strip of the weight ahead"),
    ],
)  # fmt: skip
def test_products_larger_than_the_caches_have_the_bits_of_small_ones(
    rows, hidden, vocab, reason, dtype
):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, hidden, generator=generator).to(dtype)
    w = torch.randn(vocab, hidden, generator=generator).to(dtype)
    d = torch.randn(rows, vocab, generator=generator).to(dtype).float()
    logits, of_weight = head_logits(x, w), head_grad_weight(d, x)
    for first in range(0, vocab, 30_000):
        tile = slice(first, first + 30_000)
        assert torch.equal(head_logits(x, w[tile]), logits[:, tile]), reason
        assert torch.equal(head_grad_weight(d[:, tile], x), of_weight[tile]), reason
    # The sums of slices of the vocabulary depend on its size; of the rows, none.
    of_rows = operators.head_grad_rows(d, w)
    assert torch.equal(
        torch.cat([operators.head_grad_rows(d[i : i + 30], w) for i in range(0, rows, 30)]), of_rows
    )


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=name_of)
@pytest.mark.parametrize("rows, hidden, vocab", [s[:3] for s in SHAPES], ids=[s[3] for s in SHAPES])
def test_the_last_sum_is_the_float32_sum_rounded_once(rows, hidden, vocab, dtype):
    x, d = torch.randn(rows, hidden).to(dtype), torch.randn(rows, vocab)
    start = torch.randn(vocab, hidden)
    wide = start.clone()
    operators.head_grad_weight_(wide, d, x, True, None)
    torch.testing.assert_close(wide, start + head_grad_weight(d, x), rtol=1e-5, atol=1e-5)
    if dtype == torch.float32:
        return
    narrow = torch.empty(vocab, hidden, dtype=dtype)
    operators.head_grad_weight_(narrow, d, x, False, start)
    assert torch.equal(narrow, wide.to(dtype))
    operators.head_grad_weight_(narrow, d, x, False, None)
    assert torch.equal(narrow, head_grad_weight(d, x).to(dtype))


@pytest.mark.numerics
def test_rows_do_not_depend_on_their_neighbours_or_on_threads():
    x, w, _, _ = problem(sequences=40, dtype=torch.bfloat16)
    x = x.flatten(0, 1)
    together = head_logits(x, w)
    d = torch.randn_like(together)
    rows = operators.head_grad_rows(d, w)
    for index in (0, 13, 14, 200, x.shape[0] - 1):
        alone = slice(index, index + 1)
        assert torch.equal(head_logits(x[alone], w), together[alone])
        assert torch.equal(operators.head_grad_rows(d[alone], w), rows[alone])
    threads = torch.get_num_threads()
    totals = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(head_logits(x, w), together)
            assert torch.equal(operators.head_grad_rows(d, w), rows)
            totals.append(head_grad_weight(d, x))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(total, totals[0]) for total in totals)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=name_of)
def test_products_are_proper_operators(dtype):
    x, w, d = torch.randn(3, 4).to(dtype), torch.randn(5, 4).to(dtype), torch.randn(3, 5)
    namespace = torch.ops.pyfast_dpo
    for operator, arguments in (
        (namespace.head_logits_, (torch.zeros(3, 5), x, w)),
        (namespace.head_grad_rows, (d, w)),
        (namespace.head_grad_weight_, (torch.zeros(5, 4), d, x, True, None)),
    ):
        torch.library.opcheck(operator, arguments)
    if dtype == torch.bfloat16:
        torch.library.opcheck(namespace.head_grad_rows, (d.bfloat16(), w))
        return
    for wrong in (d.bfloat16(), d.double()):
        with pytest.raises(
            RuntimeError, match="head_grad_rows: gradient must be float32, or bfloat16"
        ):
            namespace.head_grad_rows(wrong, w)
        with pytest.raises(
            RuntimeError, match="head_grad_weight_: gradient must be float32, or bfloat16"
        ):
            namespace.head_grad_weight_(torch.zeros(5, 4), wrong, x, True, None)


# --- log-probs --------------------------------------------------------------------------------------

OPTIONS = [
    ({}, "plain"),
    ({"shift": True}, "the last position scores nothing"),
    ({"logit_scale": 0.3}, "scaled logits"),
    ({"softcap": 5.0}, "soft-capped logits, deep in the cap"),
    ({"softcap": 30.0, "logit_scale": 0.7, "shift": True}, "everything at once"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("options", [o[0] for o in OPTIONS], ids=[o[1] for o in OPTIONS])
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable head", "frozen head"])
def test_log_probs_and_gradients_equal_float64_as_well_as_torch_does(dtype, options, trainable):
    hidden, weight, bias, labels = problem(dtype=dtype)
    upstream = torch.linspace(-2, 3, labels.numel()).view(labels.shape).to(statistics_dtype(dtype))
    inputs = [hidden, weight, bias] if trainable else [hidden]

    def run(impl: str, like: torch.dtype, *leaves: Tensor) -> Tensor:
        h, w, b = (*leaves, *(t.to(like) for t in (hidden, weight, bias)[len(leaves) :]))
        logps = linear_token_logps(h, w, labels, bias=b, impl=impl, **options)
        return (logps * upstream.to(logps.dtype)).sum()

    wide = [t.double() for t in inputs]
    truth, true_gradients = true_loss_gradients(
        wide, lambda *leaves: run("torch", torch.float64, *leaves)
    )
    peer, peer_gradients = true_loss_gradients(inputs, lambda *leaves: run("torch", dtype, *leaves))
    ours, gradients = true_loss_gradients(inputs, lambda *leaves: run("fused", dtype, *leaves))
    eps = torch.finfo(statistics_dtype(dtype)).eps
    assert_rule("sum", ours, peer, truth, 64 * eps * truth.abs())
    for name, g, p, t in zip(
        ["hidden", "weight", "bias"][: len(inputs)],
        gradients,
        peer_gradients,
        true_gradients,
        strict=True,
    ):
        assert g.dtype == dtype
        # One rounding of the result and, for half types, one of the gradient of the logits on its way.
        tolerance = torch.finfo(dtype).eps * (t.abs() + t.abs().max()) + 64 * eps * t.abs().max()
        assert_rule(f"gradient of {name}", g, p, t, tolerance)


@pytest.mark.parametrize("average", [False, True])
def test_sequences_sum_or_average_their_tokens(average):
    hidden, weight, _, labels = problem()
    tokens = linear_token_logps(hidden, weight, labels)
    sequences = linear_sequence_logps(hidden, weight, labels, average=average)
    counts = (labels != -100).sum(1).clamp(min=1) if average else 1
    torch.testing.assert_close(sequences, tokens.sum(1) / counts)
    assert sequences[1] == 0, "an empty response has log-prob 0"


def test_a_bfloat16_sequence_of_512_tokens_is_within_a_thousandth_of_a_nat():
    hidden, weight, _, labels = problem(
        sequences=2, length=515, hidden=64, vocab=2048, dtype=torch.bfloat16, scale=0.7
    )
    ours = linear_sequence_logps(hidden, weight, labels)
    logits = hidden.double() @ weight.double().T
    truth = linear_sequence_logps(hidden.double(), weight.double(), labels, impl="torch")
    rounded = pyfast_dpo.sequence_logps(logits.bfloat16(), labels)
    assert (ours - truth).abs().max() < 1e-3, (ours, truth)
    assert (rounded - truth).abs().max() > 1e-2, "the case shows nothing: rounded logits do as well"


@pytest.mark.parametrize("margin", [10.0, 17.0, 20.0, 40.0])
def test_a_certain_model_keeps_its_digits(margin):
    vocab, hidden = 33, torch.eye(33)[None, 5:6]
    logps = linear_token_logps(hidden, torch.eye(vocab) * margin, torch.tensor([[5]]))
    truth = -math.log1p((vocab - 1) * math.exp(-margin))
    assert logps.item() < 0 and abs(logps.item() / truth - 1) < 1e-6


def test_positions_that_are_not_scored_are_not_read():
    hidden, weight, _, labels = problem()
    clean = linear_token_logps(hidden, weight, labels)
    poisoned = hidden.masked_fill((labels == -100)[..., None], math.nan).requires_grad_()
    logps = linear_token_logps(poisoned, weight, labels)
    assert torch.equal(bits(logps), bits(clean))
    logps.sum().backward()
    assert (poisoned.grad[labels == -100] == 0).all() and poisoned.grad.isfinite().all()


# --- losses -----------------------------------------------------------------------------------------

BUDGETS = [
    (1 << 20, "all pairs in one chunk"),
    (4 * 211 * 12, "a pair or two a chunk"),
    (4 * 211 * 5, "every pair larger than the budget: logits twice"),
    (4 * 211, "one row at a time"),
]


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
@pytest.mark.parametrize("budget", [b[0] for b in BUDGETS], ids=[b[1] for b in BUDGETS])
def test_loss_and_gradients_equal_plain_torch_for_every_budget(loss_type, budget):
    hidden, weight, bias, labels = problem()
    reference = torch.linspace(-30, -20, 6)
    results = {}
    for impl in ("fused", "torch"):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        result = fused_linear_dpo_loss(
            leaves[0], leaves[1], labels, bias=leaves[2], reference_logps=reference, loss_type=loss_type,
            beta=0.05, shift=True, max_chunk_bytes=budget, impl=impl,
        )  # fmt: skip
        (3 * result.loss).backward()
        results[impl] = [*result, *(leaf.grad for leaf in leaves)]
    for ours, torch_result in zip(results["fused"], results["torch"], strict=True):
        torch.testing.assert_close(ours, torch_result, rtol=2e-5, atol=2e-5)


def test_kto_and_ipo_equal_their_losses_on_logits():
    hidden, weight, _, labels = problem()
    desirable = torch.tensor([True, False, True, True, False, False])
    reference = torch.linspace(-30, -20, 6)
    logits = hidden @ weight.T
    kto = fused_linear_kto_loss(
        hidden, weight, labels, desirable, kl=0.3, reference_logps=reference, undesirable_weight=1.2
    )
    other = pyfast_dpo.fused_kto_loss(
        logits, labels, desirable, kl=0.3, reference_logps=reference, undesirable_weight=1.2
    )
    for ours, theirs in zip(kto, other, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    ipo = fused_linear_ipo_loss(hidden, weight, labels, beta=0.2)
    for ours, theirs in zip(ipo, pyfast_dpo.fused_ipo_loss(logits, labels, beta=0.2), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_pairs_in_another_order_give_the_same_bits():
    hidden, weight, _, labels = problem(sequences=8)
    order = torch.tensor([2, 0, 3, 1])
    rows = torch.cat([order, order + 4])
    straight = fused_linear_dpo_loss(hidden, weight, labels)
    permuted = fused_linear_dpo_loss(hidden[rows], weight, labels[rows])
    for name in ("chosen_logps", "rejected_logps", "losses"):
        assert torch.equal(bits(getattr(permuted, name)), bits(getattr(straight, name)[order])), (
            name
        )


@pytest.mark.parametrize("pairs", [1, 3, 7])
def test_policy_equal_to_reference_gives_ln_2_exactly(pairs):
    hidden, weight, _, labels = problem(sequences=2 * pairs)
    loss = fused_linear_dpo_loss(hidden, weight, labels, reference_hidden=hidden).loss
    assert loss.item() == torch.tensor(2.0).log().item()


def test_a_tied_weight_receives_both_gradients():
    tokens, (_, weight, _, labels) = torch.arange(54).view(6, 9), problem()
    results = {}
    for impl in ("fused", "torch"):
        tied = weight.clone().requires_grad_()
        fused_linear_dpo_loss(tied[tokens], tied, labels, impl=impl).loss.backward()
        results[impl] = tied.grad
    torch.testing.assert_close(results["fused"], results["torch"], rtol=2e-5, atol=2e-6)


EMPTY = [
    (torch.full((6, 9), -100), 6, "nothing scored"),
    (torch.zeros(0, 9, dtype=torch.int64), 0, "no pairs"),
]


@pytest.mark.parametrize("labels, sequences", [e[:2] for e in EMPTY], ids=[e[2] for e in EMPTY])
def test_nothing_to_score_is_finite(labels, sequences):
    hidden, weight = torch.randn(sequences, 9, 16, requires_grad=True), torch.randn(5, 16)
    loss = fused_linear_dpo_loss(hidden, weight, labels).loss
    loss.backward()
    assert loss.item() == (torch.tensor(2.0).log().item() if sequences else 0)
    assert (hidden.grad == 0).all()


# --- the work done ----------------------------------------------------------------------------------


@pytest.fixture
def products(monkeypatch) -> list[tuple[str, int]]:
    """Every product of the head that is computed: its name and its number of rows."""
    calls: list[tuple[str, int]] = []

    def count(name: str, rows_of: int) -> None:
        operator = getattr(operators, name)

        def counted(*arguments: Tensor):
            calls.append((name, arguments[rows_of].shape[0]))
            return operator(*arguments)

        monkeypatch.setattr(operators, name, counted)

    count("head_logits_", 1)
    count("head_grad_rows", 0)
    count("head_grad_weight_", 2)
    return calls


WORK = [
    (
        True,
        1 << 20,
        ["head_logits_", "head_grad_rows", "head_grad_weight_"],
        "trainable head: 3",
    ),
    (False, 1 << 20, ["head_logits_", "head_grad_rows"], "frozen head: 2"),
]


@pytest.mark.parametrize(
    "trainable, budget, expected", [w[:3] for w in WORK], ids=[w[3] for w in WORK]
)
def test_a_loss_costs_no_more_products_than_it_must(products, trainable, budget, expected):
    hidden, weight, _, labels = problem()
    hidden.requires_grad_()
    loss = fused_linear_dpo_loss(
        hidden, weight.requires_grad_(trainable), labels, max_chunk_bytes=budget
    ).loss
    loss.backward()
    scored = int((labels != -100).sum())
    assert products == [(name, scored) for name in expected]
    assert (weight.grad is not None) == trainable


def test_a_bfloat16_head_keeps_the_gradients_of_twice_the_rows(products):
    """A pair whose logits exceed the budget, but not the gradients in bfloat16, is not computed twice."""
    hidden, weight, _, labels = problem(sequences=2, dtype=torch.bfloat16)
    scored = int((labels != -100).sum())
    hidden.requires_grad_(), weight.requires_grad_()
    budget = 4 * 211 * -(-scored // 2)
    fused_linear_dpo_loss(hidden, weight, labels, max_chunk_bytes=budget).loss.backward()
    rows = {name: sum(n for called, n in products if called == name) for name, _ in products}
    assert rows == dict.fromkeys(("head_logits_", "head_grad_weight_", "head_grad_rows"), scored)
    assert max(n for name, n in products if name == "head_logits_") <= scored // 2 + 1
    products.clear()
    fused_linear_dpo_loss(hidden, weight, labels, max_chunk_bytes=budget - 4 * 211 * 2)
    assert sum(n for name, n in products if name == "head_logits_") > scored


def test_the_reference_costs_one_product_and_evaluation_too(products):
    hidden, weight, _, labels = problem()
    with torch.no_grad():
        fused_linear_dpo_loss(hidden, weight, labels, reference_hidden=hidden)
    assert [name for name, _ in products] == ["head_logits_", "head_logits_"]


def test_log_probs_under_a_frozen_head_cost_two_products(products):
    hidden, weight, _, labels = problem()
    linear_sequence_logps(hidden.requires_grad_(), weight, labels).sum().backward()
    assert [name for name, _ in products] == ["head_logits_", "head_grad_rows"]


def test_a_frozen_head_needs_no_second_look_at_pairs_beyond_the_budget(products):
    hidden, weight, _, labels = problem()
    fused_linear_dpo_loss(hidden.requires_grad_(), weight, labels, max_chunk_bytes=4 * 211 * 5)
    scored = int((labels != -100).sum())
    for name in ("head_logits_", "head_grad_rows"):
        assert sum(rows for called, rows in products if called == name) == scored


def test_a_frozen_head_needs_no_chunks_of_whole_pairs(products):
    """Nothing but a factor a row waits for the loss: so the parts of rows are as large as the budget."""
    hidden, weight, _, labels = problem(sequences=12)
    scored = int((labels != -100).sum())
    fused_linear_dpo_loss(hidden.requires_grad_(), weight, labels, max_chunk_bytes=4 * 211 * 20)
    sizes = [rows for name, rows in products if name == "head_logits_"]
    assert sizes == [20] * (scored // 20) + [scored % 20]


def test_gradients_of_a_second_backward_pass_are_the_same_and_not_shared():
    hidden, weight, _, labels = problem()
    hidden.requires_grad_(), weight.requires_grad_()
    loss = fused_linear_dpo_loss(hidden, weight, labels).loss
    loss.backward(retain_graph=True)
    first = weight.grad.clone()
    loss.backward()
    assert torch.equal(weight.grad, 2 * first)


def test_logits_stay_within_the_budget(products):
    hidden, weight, _, labels = problem()
    fused_linear_dpo_loss(hidden.requires_grad_(), weight, labels, max_chunk_bytes=4 * 211 * 5)
    assert max(rows for _, rows in products) <= 5


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "compute",
    [lambda *a: fused_linear_dpo_loss(*a).loss, lambda *a: linear_token_logps(*a).sum()],
    ids=["loss", "log-probs"],
)
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable head", "frozen head"])
def test_double_backward_is_refused_by_name(compute, trainable):
    hidden, weight, _, labels = problem()
    value = compute(hidden.requires_grad_(), weight.requires_grad_(trainable), labels)
    (gradient,) = torch.autograd.grad(value, hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="impl='torch'"):
        # The second term requires grad whatever the first one does: a constant gradient would go unnoticed.
        (gradient.square().sum() + hidden.sum()).backward()


H, W, _, L = problem()
BAD = [
    (lambda: fused_linear_dpo_loss(H, W.double(), L), TypeError, ["weight", "dtype of hidden", "float64"]),
    (lambda: fused_linear_dpo_loss(H, W[:, :5], L), ValueError, ["hidden", "weight", "[211, 5]"]),
    (lambda: fused_linear_dpo_loss(H[:5], W, L[:5]), ValueError, ["hidden", "[2P, T, H]", "[5, 9, 16]"]),
    (lambda: fused_linear_dpo_loss(H, W.to(torch.int8), L), TypeError, ["weight", "dequantize", "int8"]),
    (lambda: fused_linear_dpo_loss(H, W.to("meta"), L), ValueError, ["weight", "meta"]),
    (lambda: fused_linear_dpo_loss(H, W, L.int()), TypeError, ["labels", "int64", "int32"]),
    (lambda: fused_linear_dpo_loss(H, W, L[:, 1:]), ValueError, ["labels", "[6, 9]", "[6, 8]"]),
    (lambda: fused_linear_dpo_loss(H, W, L + 100), ValueError, ["labels", "[0, 211)", "such labels"]),
    (lambda: fused_linear_dpo_loss(H, W, L, max_chunk_bytes=843), ValueError, ["max_chunk_bytes", "844", "843"]),
    (lambda: fused_linear_dpo_loss(H, W, L, softcap=0.0), ValueError, ["softcap", "0.0"]),
    (lambda: fused_linear_dpo_loss(H, W, L, logit_scale=-1), ValueError, ["logit_scale", "-1"]),
    (lambda: fused_linear_dpo_loss(H, W, L, bias=torch.zeros(3)), ValueError, ["bias", "[211]", "[3]"]),
    (lambda: fused_linear_dpo_loss(H, W, L, beta=0), ValueError, ["beta", "0"]),
    (
        lambda: fused_linear_dpo_loss(H, W, L, reference_logps=torch.zeros(6), reference_hidden=H),
        ValueError,
        ["reference_logps or reference_hidden"],
    ),
    (
        lambda: fused_linear_dpo_loss(H, W, L, reference_hidden=H.clone().requires_grad_()),
        ValueError,
        ["reference_hidden requires grad", "detach()"],
    ),
    (
        lambda: fused_linear_kto_loss(H, W, L, torch.ones(7, dtype=torch.bool), kl=0.0),
        ValueError,
        ["fused_linear_kto_loss: is_desirable", "[6]", "[7]"],
    ),
    (
        lambda: fused_linear_kto_loss(H, W, L, torch.ones(6, dtype=torch.bool), kl=math.nan),
        ValueError,
        ["fused_linear_kto_loss: kl", "nan"],
    ),
    (lambda: linear_token_logps(H, W, L, impl="cuda"), ValueError, ["impl", "'cuda'"]),
]  # fmt: skip


@pytest.mark.parametrize("call, error, words", BAD, ids=[" ".join(b[2]) for b in BAD])
def test_bad_input_is_refused_by_name(call, error, words):
    with pytest.raises(error) as caught:
        call()
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


def test_a_sharded_weight_is_refused_with_the_remedy():
    class DTensor(Tensor):
        pass

    with pytest.raises(TypeError, match="full_tensor"):
        linear_token_logps(H, W.as_subclass(DTensor), L)


def test_autocast_runs_the_products_in_its_dtype_and_returns_float32():
    hidden, weight, _, labels = problem()
    hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        result = fused_linear_dpo_loss(hidden, weight, labels)
    result.loss.backward()
    narrow = fused_linear_dpo_loss(hidden.bfloat16(), weight.bfloat16(), labels)
    assert result.loss.dtype == torch.float32 and torch.equal(result.losses, narrow.losses)
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
