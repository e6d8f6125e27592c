"""How a loss from hidden states is cut into chunks, and where their logits lie."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from _helpers import bits, name_of
from torch import Tensor

from pyfast_dpo import CompletionRows, fused_linear_dpo_loss, fused_linear_loss
from pyfast_dpo.logprobs import chunks
from pyfast_dpo.logprobs.plan import Plan
from pyfast_dpo.ops import operators

# Scored tokens of pairs (chosen and rejected together), rows in the budget, rows in lent memory, the chunks in
# the order of their computation as (first pair, pair behind the last, lent).
CHUNKS = [
    ([4, 6, 2], 12, 0, [(0, 3, False)], "everything fits"),
    ([4, 6, 2], 8, 0, [(0, 1, False), (1, 3, False)], "as many pairs as fit"),
    ([4, 20, 2], 8, 0, [(0, 1, False), (1, 2, False), (2, 3, False)], "a pair beyond the budget is alone"),
    ([4, 6, 2], 12, 16, [(0, 3, True)], "what fits needs no memory of its own"),
    ([4, 20, 2, 8], 8, 22, [(1, 3, True), (0, 1, False), (3, 4, False)], "lent to the longest, and its neighbour"),
    ([4, 20, 2, 8], 8, 34, [(0, 4, True)], "neighbours on both sides"),
    ([4, 20, 2, 8], 8, 10, [(2, 4, True), (0, 1, False), (1, 2, False)], "the longest that fits"),
    ([20, 30], 8, 10, [(0, 1, False), (1, 2, False)], "nothing fits"),
    ([0, 0], 8, 10, [(0, 2, False)], "nothing to score"),
    ([], 8, 10, [(0, 0, False)], "no pairs"),
]  # fmt: skip


@pytest.mark.parametrize(
    "pairs, max_rows, lent_rows, expected", [c[:4] for c in CHUNKS], ids=[c[4] for c in CHUNKS]
)
def test_chunks_hold_whole_pairs_within_their_memory(pairs, max_rows, lent_rows, expected):
    lengths = tuple(n // 2 for n in pairs) * 2
    index = torch.arange(sum(lengths))
    rows = CompletionRows(index, index, torch.tensor(lengths, dtype=torch.int64), lengths)
    chunks = Plan(rows, 2, max_rows, lent_rows=lent_rows).chunks()
    assert [(c.units.start, c.units.stop, c.lent) for c in chunks] == expected
    covered = torch.cat([chunk.of(index) for chunk in chunks])
    assert torch.equal(covered.sort().values, index)


def batch(
    responses: list[tuple[int, int]], hidden: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden states, weight, labels) of pairs with so many scored tokens, V = 97."""
    generator = torch.Generator().manual_seed(3)
    lengths = [chosen for chosen, _ in responses] + [rejected for _, rejected in responses]
    labels = torch.randint(0, 97, (len(lengths), max(lengths) + 1), generator=generator)
    for row, length in enumerate(lengths):
        labels[row, length:] = -100
    states = torch.randn(*labels.shape, hidden, generator=generator).to(dtype)
    return states, torch.randn(97, hidden, generator=generator).to(dtype), labels


# (scored tokens of the pairs, hidden size, rows in the budget, pairs of the chunk in lent memory, reason)
LENT = [
    ([(3, 4), (6, 8), (2, 2)], 24, 9, (1, 2), "a pair beyond the budget"),
    ([(3, 4), (6, 8), (2, 2)], 24, 14, (1, 3), "a pair with its neighbour"),
    ([(5, 4), (1, 1)], 64, 100, (0, 2), "everything; most of the gradient lies before the logits"),
    ([(7, 9)], 16, 50, (0, 1), "as many rows as the hidden size: all columns are copied"),
    ([(7, 8)], 16, 16, (0, 1), "nearly so"),
    ([(1, 1)], 5, 5, (0, 1), "borders in the middle of vectors"),
    ([(20, 25), (3, 2), (1, 0)], 32, 6, (1, 3), "beside a pair that is computed twice"),
]  # fmt: skip


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize(
    "pairs, hidden, rows, lent", [c[:4] for c in LENT], ids=[c[4] for c in LENT]
)
def test_logits_in_the_memory_of_the_gradient_change_no_result(
    pairs, hidden, rows, lent, average, monkeypatch
):
    states, weight, labels = batch(pairs, hidden, torch.float32)
    seen = []
    cut = chunks.Plan.chunks

    def spied(self):
        chunks = cut(self)
        seen.extend((c.units.start, c.units.stop) for c in chunks if c.lent)
        return chunks

    monkeypatch.setattr(chunks.Plan, "chunks", spied)
    results = {}
    for impl in ("fused", "torch"):
        leaves = states.clone().requires_grad_(), weight.clone().requires_grad_()
        result = fused_linear_loss(
            *leaves, labels, lambda logps, units: ((logps[0] - logps[1]).sigmoid().sum(), (logps[0] - logps[1],)),
            average=average, statistics=True, max_chunk_bytes=4 * 97 * rows, impl=impl,
        )  # fmt: skip
        result.loss.backward()
        results[impl] = [
            result.loss, result.logps, *result.outputs, *result.statistics, *(leaf.grad for leaf in leaves),
        ]  # fmt: skip
    assert seen == [lent]
    for ours, plain in zip(results["fused"], results["torch"], strict=True):
        torch.testing.assert_close(ours, plain, rtol=2e-5, atol=2e-5)


def test_a_softcapped_head_lends_nothing(monkeypatch):
    """Its gradient is not written over the logits."""
    states, weight, labels = batch([(3, 4)], 24, torch.float32)
    monkeypatch.setattr(chunks.Gradients, "__init__", _no_lending(chunks.Gradients.__init__))
    fused_linear_dpo_loss(
        states.requires_grad_(), weight.requires_grad_(), labels, softcap=5.0
    ).loss.backward()
    assert weight.grad.isfinite().all()


def _no_lending(construct):
    def constructed(self, *arguments):
        construct(self, *arguments)
        self.weight.lend = None  # raises when it is called

    return constructed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_rows_have_the_same_bits_wherever_their_logits_lie(dtype):
    """A short pair in lent memory, in a chunk of its own, beside others."""
    states, weight, labels = batch([(3, 4), (9, 8), (2, 2)], 24, dtype)

    def run(keep: list[int], rows: int) -> list[Tensor]:
        both = keep + [p + 3 for p in keep]
        leaves = states[both].clone().requires_grad_(), weight.clone().requires_grad_()
        result = fused_linear_loss(
            *leaves, labels[both], lambda logps, _: -F.logsigmoid(logps[0] - logps[1]).sum(),
            max_chunk_bytes=4 * 97 * rows,
        )  # fmt: skip
        result.loss.backward()
        first, count = keep.index(0), len(keep)
        return [result.logps[[first, count + first]], *leaves[0].grad[[first, count + first]]]

    expected = run([0], 1000)
    for keep, rows in (([0], 8), ([0, 1, 2], 1000), ([1, 0, 2], 20), ([0, 1], 9), ([2, 0], 11)):
        for ours, alone in zip(run(keep, rows), expected, strict=True):
            assert torch.equal(bits(ours), bits(alone)), (keep, rows)


def test_without_autograd_nothing_is_computed_for_gradients(monkeypatch):
    """A trainable head asks for its gradient also under no_grad, which autograd's functions do not see."""
    states, weight, labels = batch([(3, 4), (6, 8)], 24, torch.float32)
    weight.requires_grad_()

    def refused(*arguments: Tensor) -> None:
        raise AssertionError("a product for a gradient")

    for name in ("head_grad_rows", "head_grad_weight_"):
        monkeypatch.setattr(operators, name, refused)
    with torch.no_grad():
        out = fused_linear_dpo_loss(states, weight, labels)
    assert out.loss.isfinite() and not out.loss.requires_grad
